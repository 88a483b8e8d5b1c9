"""The oracle itself: against finite differences, and against golden data of an independent code."""

import numpy as np
import oracle
import pytest
from helpers import ARGUMENTS, Case, draw_cotangents, relative_error


@pytest.mark.parametrize("l2norm", [False, True])
def test_reverse_pass_matches_finite_differences(l2norm):
    case = Case(T=6, R=3, G=2, K=3, V=4, gate="mild", segments=True, l2norm=l2norm)
    arrays, segment_ids = case.arrays(), case.segment_ids()
    assert len(np.unique(segment_ids)) > 1
    do, dfinal = draw_cotangents(arrays)

    def loss(arrays):
        o, final = oracle.delta_product(
            **arrays, scale=0.7, use_qk_l2norm=l2norm, segment_ids=segment_ids
        )
        return np.sum(o * do) + np.sum(final * dfinal)

    _, _, gradients = oracle.delta_product(
        **arrays,
        scale=0.7,
        use_qk_l2norm=l2norm,
        segment_ids=segment_ids,
        cotangents=(do, dfinal),
    )
    rng = np.random.default_rng(3)
    for name in ARGUMENTS:
        direction = rng.normal(size=arrays[name].shape)
        step = 1e-5
        up = loss({**arrays, name: arrays[name] + step * direction})
        down = loss({**arrays, name: arrays[name] - step * direction})
        expected = np.sum(gradients[name] * direction)
        np.testing.assert_allclose((up - down) / (2 * step), expected, rtol=1e-7, err_msg=name)


def test_one_update_by_hand():
    """Key e_1 and beta 1: the state's first row becomes v; decay acts on the old state only."""
    q = np.array([1.0, 0.0]).reshape(1, 1, 1, 2)
    k = np.array([1.0, 0.0]).reshape(1, 1, 1, 1, 2)
    v = np.array([5.0, 7.0]).reshape(1, 1, 1, 1, 2)
    state = np.array([[1.0, 2.0], [3.0, 4.0]]).reshape(1, 1, 2, 2)
    g = np.log(np.full((1, 1, 1), 0.5))
    o, final = oracle.delta_product(
        q, k, v, np.ones((1, 1, 1, 1)), g, scale=2.0, initial_state=state
    )
    np.testing.assert_allclose(final[0, 0], [[5.0, 7.0], [1.5, 2.0]])
    np.testing.assert_allclose(o[0, 0, 0], [10.0, 14.0])
    assert relative_error(o, o) == 0
