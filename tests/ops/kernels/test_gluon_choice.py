"""Which calls the Gluon kernels take, and into how many pieces they cut them; needs no Triton."""

import importlib.metadata
import itertools
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltaproduct_jax.ops import kernels
from deltaproduct_jax.ops.kernels import Options
from deltaproduct_jax.ops.kernels.gluon import cut, gates, launch, passes
from deltaproduct_jax.ops.layout import Tokens

OPTIONS = Options(1.0, None, 0, interpret=False)


def tokens(B=2, T=5, R=2, H=2, Hv=4, K=128, V=64, dtype="bfloat16", **other):
    shapes = {
        "q": (B, T, H, K),
        "k": (B, T, R, H, K),
        "v": (B, T, R, Hv, V),
        "beta": (B, T, R, Hv),
    }
    dtypes = {"q": dtype, "k": dtype, "v": dtype, "beta": "float32"} | other
    arrays = [jax.ShapeDtypeStruct(shape, dtypes[name]) for name, shape in shapes.items()]
    return Tokens(*arrays, None, None)


@pytest.fixture
def new_versions(monkeypatch):
    monkeypatch.setattr(passes, "has_versions", lambda: True)


@pytest.mark.parametrize(
    "sizes",
    [{}, {"T": 1}, {"R": 8}, {"K": 64, "V": 128}, {"B": 65536, "H": 1, "Hv": 1}],
    ids=str,
)
def test_what_they_take(sizes, new_versions):
    assert passes.takes(tokens(**sizes), OPTIONS, 90)
    default = OPTIONS._replace(precision="default")
    assert passes.takes(tokens(**sizes), default, 90)


@pytest.mark.parametrize(
    "sizes",
    [
        {"T": 0},
        {"B": 0},
        {"R": 9},
        {"K": 32},
        {"V": 256},
        {"dtype": "float32"},
        {"k": "float32"},
        {"v": "float16"},
    ],
    ids=str,
)
def test_sizes_and_dtypes_that_they_do_not_take(sizes, new_versions):
    assert not passes.takes(tokens(**sizes), OPTIONS, 90)


def test_chips_precisions_and_versions_that_they_do_not_take(new_versions, monkeypatch):
    for capability in (80, 89, 100, 120):
        assert not passes.takes(tokens(), OPTIONS, capability)
    for precision in ("high", "highest"):
        assert not passes.takes(tokens(), OPTIONS._replace(precision=precision), 90)
    monkeypatch.setattr(passes, "has_versions", lambda: False)
    assert not passes.takes(tokens(), OPTIONS, 90)


def test_gradients_run_where_there_is_room_for_what_they_keep(new_versions, monkeypatch):
    two_slots = OPTIONS._replace(spans=2, more=True)  # of four blocks, which 200 updates have
    call = tokens(T=100, R=2)
    triton = kernels.load("triton")
    monkeypatch.setattr(triton, "compute_capability", lambda: 90)
    of_gluon = (jax.ShapeDtypeStruct((3,), jnp.bfloat16),)
    monkeypatch.setattr(passes, "kept_more", lambda *_: of_gluon)  # which needs Triton 3.7
    assert passes.takes_gradients(call, two_slots, 90)
    assert triton.kept_more(call, two_slots) == of_gluon
    assert triton._by_gluon(call, two_slots)
    assert not triton._by_gluon(call, two_slots._replace(more=False))  # no room for X and errors
    assert not passes.takes_gradients(call, two_slots._replace(slots=1), 90)
    assert not passes.takes_gradients(call, two_slots, 100)
    assert not passes.takes_gradients(tokens(R=9), two_slots, 90)
    monkeypatch.setattr(triton, "compute_capability", lambda: 80)
    assert not triton._by_gluon(call, two_slots)
    assert triton.kept_more(call, two_slots) != of_gluon


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, True),
        ({"triton": "3.10.1"}, True),  # numbers, not text
        ({"jax": "0.12.0"}, True),
        ({"python": (3, 11, 9)}, False),
        ({"jax": "0.10.2"}, False),
        ({"triton": "3.6.0"}, False),
        ({"triton": None}, False),
        ({"supported": False}, False),
    ],
    ids=str,
)
def test_versions(changed, expected, monkeypatch):
    having = {"python": (3, 12, 0), "jax": "0.11.0", "triton": "3.7.0", "supported": True} | changed

    def version(name):
        if having[name] is None:
            raise importlib.metadata.PackageNotFoundError
        return having[name]

    with monkeypatch.context() as patch:
        patch.setattr(passes.importlib.metadata, "version", version)
        patch.setattr(passes, "jax", types.SimpleNamespace(__version__=having["jax"]))
        patch.setattr(passes, "sys", types.SimpleNamespace(version_info=having["python"]))
        patch.setattr(launch, "is_supported", lambda: having["supported"])
        assert passes.has_versions.__wrapped__() is expected
    if sys.version_info < (3, 12):
        assert not passes.has_versions.__wrapped__()


def test_pieces_have_all_groups_and_fit_side_by_side():
    for heads in (1, 2, 5, 16, 33, 34, 45, 66, 67, 200):
        for groups, gated in itertools.product(
            (1, 15, 16, 17, 31, 33, 64, 97, 1024), (True, False)
        ):
            pieces = cut.pieces_for(heads, groups, R=2, gated=gated, keeps=True)
            steps = -(-groups // pieces)
            assert (pieces - 1) * steps < groups <= pieces * steps  # none of them is empty
            assert pieces <= cut.MOST_PIECES
            if pieces > 1:
                assert steps >= cut.GROUPS_IN_A_PIECE
                assert heads * pieces <= cut.PROGRAMS_AT_ONCE


@pytest.mark.parametrize(
    ("heads", "groups", "gated", "pieces"),
    [
        (1, 1024, True, 24),
        (2, 64, True, 16),
        (16, 1024, False, 8),
        (33, 1024, False, 4),
        (34, 1024, True, 3),
        (34, 1024, False, 2),  # of three a map would take as long as it saves
        (66, 1024, False, 2),
        (67, 1024, True, 1),
        (1, 7, True, 1),
        (1, 16, True, 4),
        (1, 33, True, 7),  # eight would be 5 groups each, and the last empty
    ],
)
def test_pieces(heads, groups, gated, pieces):
    assert cut.pieces_for(heads, groups, R=2, gated=gated, keeps=True) == pieces


@pytest.mark.parametrize(
    ("heads", "groups", "R", "gated", "pieces"),
    [
        (48, 32, 2, True, 2),
        (48, 31, 2, True, 1),
        (48, 64, 2, False, 2),
        (48, 64, 1, False, 1),
        (40, 64, 1, True, 3),
        (33, 16, 1, False, 4),
    ],
)
def test_a_short_sequence_is_not_cut_in_two_for_outputs_alone(heads, groups, R, gated, pieces):
    assert cut.pieces_for(heads, groups, R=R, gated=gated, keeps=False) == pieces
    assert cut.pieces_for(heads, groups, R=R, gated=gated, keeps=True) > 1


def test_how_many_groups_of_a_piece_matter():
    """Of two pieces of four groups: ones that forget in none, in two, and in one that is last."""
    least = -np.inf
    growth = [[0, 1, -2, 0, 1, -21, -20, 1], [0, -41, 0, 0, 0, 0, least], [-30, 5, -20, -30]]
    growth = [np.pad(np.array(x, np.float32), (0, 8 - len(x))) for x in growth]
    needs = gates.needed(jnp.asarray(growth)[None], 2)
    assert needs.shape == (1, 3, 2, 3)
    assert needs[0, 0].tolist() == [[4, 4, 4], [3, 0, 3]]
    assert needs[0, 1].tolist() == [[3, 0, 2], [2, 0, 3]]
    assert needs[0, 2].tolist() == [[2, 0, 3], [4, 4, 4]]


def test_what_is_not_finite_is_not_forgotten():
    growth = jnp.asarray([[[-50.0, jnp.nan, -50.0, 0.0], [-50.0, jnp.inf, -jnp.inf, 0.0]]])
    assert gates.needed(growth, 1).tolist() == [[[[2, 0, 1]], [[2, 0, 1]]]]
    growth = jnp.asarray([[[jnp.nan, -50.0, -50.0, jnp.nan]]])
    assert gates.needed(growth, 1).tolist() == [[[[4, 4, 4]]]]


def test_ptx_says_how_many_registers_a_thread_has():
    ptx = ".visible .entry walk()\n.reqntid 512\n{\n}"
    assert launch.limited(ptx, None) == ptx
    assert launch.limited(ptx, 96) == ".visible .entry walk()\n.reqntid 512\n.maxnreg 96\n{\n}"


def test_shapes_are_known_without_a_compiler():
    outs = [jax.ShapeDtypeStruct((3, 2), jnp.bfloat16), jax.ShapeDtypeStruct((4,), jnp.float32)]
    run = lambda x: launch.launch(None, [x], outs, (2,), warps=4, tiles={}, T=7)
    found = jax.eval_shape(run, jnp.ones(3))
    assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in outs]
    (call,) = jax.make_jaxpr(run)(jnp.ones(3)).eqns
    assert call.params["grid"] == (2, 1, 1)
    assert call.params["constants"] == (("T", 7),)
