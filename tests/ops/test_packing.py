"""Segment ids and their other forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaproduct_jax.ops import (
    carry_state,
    cu_seqlens_from_segment_ids,
    segment_ids_from_cu_seqlens,
)
from deltaproduct_jax.ops.packing import starts_of_segments


@settings(max_examples=8, derandomize=True, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_round_trip(lengths):
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    ids = segment_ids_from_cu_seqlens(bounds, int(bounds[-1]))
    np.testing.assert_array_equal(ids[0], np.repeat(np.arange(len(lengths)), lengths))
    np.testing.assert_array_equal(cu_seqlens_from_segment_ids(ids), bounds)


def test_padding_behind_the_last_bound_is_a_segment_of_its_own():
    ids = jax.jit(segment_ids_from_cu_seqlens, static_argnums=1)(jnp.array([0, 2, 3]), 5)
    np.testing.assert_array_equal(ids, [[0, 0, 1, 2, 2]])


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint32"])
def test_bounds_of_any_integers(dtype):
    """A row may be longer than the bounds' dtype could count."""
    ids = segment_ids_from_cu_seqlens(jnp.array([0, 2, 3], dtype), 300)
    np.testing.assert_array_equal(ids[0], [0, 0, 1] + 297 * [2])


def test_an_empty_sequence_takes_no_token():
    ids = segment_ids_from_cu_seqlens(np.array([0, 2, 2, 4]), 4)
    np.testing.assert_array_equal(ids, [[0, 0, 2, 2]])


def test_a_returning_id_is_a_new_segment():
    ids = jnp.array([[7, 7, 0, 7, 7]])
    np.testing.assert_array_equal(starts_of_segments(ids), [[False, False, True, True, False]])
    np.testing.assert_array_equal(cu_seqlens_from_segment_ids(ids), [0, 2, 3, 5])


def test_no_token():
    assert starts_of_segments(jnp.zeros((3, 0), int)).shape == (3, 0)
    np.testing.assert_array_equal(cu_seqlens_from_segment_ids(np.zeros((1, 0), int)), [0])


def test_carried_state_is_zero_where_the_segment_ended():
    state = jnp.ones((3, 2, 4, 5))
    carried = carry_state(state, jnp.array([1, 1, 2]), jnp.array([1, 2, 2]))
    np.testing.assert_array_equal(carried[:, 0, 0, 0], [1, 0, 1])
