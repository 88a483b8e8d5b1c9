"""The baselines' ops: against float64 loops, chunked against recurrent, cuts, packing, extremes."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import oracle_baselines as oracle
import pytest
from helpers import relative_error
from quick import quick

from deltaproduct_jax.ops import baselines

B, T, H, K, V = 2, 41, 2, 5, 3
SEGMENTS = np.cumsum(np.random.default_rng(7).uniform(size=(B, T)) < 0.12, axis=1) % 2

# One row per recurrence: how its inputs are drawn; "chunked" and "recurrent" take them all.
LINEAR = ("scalar", "diagonal", "scalar_signed", "diagonal_signed", "low_rank")
DELTA = ("delta", "delta_erasing_signed")
OPS = (*LINEAR, *DELTA, "mlstm", "slstm")


def draw(op: str, seed: int = 0, T: int = T) -> dict:
    """Arrays of the op along T, by argument, in float64."""
    rng = np.random.default_rng(seed)
    normal = lambda *width: rng.normal(size=(B, T, H, *width))
    if op == "slstm":
        return {"x": 1.5 * rng.normal(size=(B, T, 4, H, V))}
    x = {"q": normal(K), "k": normal(K), "v": normal(V)}
    if op == "mlstm":
        return x | {"i": 2 * normal(), "log_f": -np.abs(normal())}
    gate = (K,) if op.startswith(("diagonal", "low", "delta")) else ()
    x["g"] = rng.choice([0.0, -0.1, -1.0, -30.0], p=[0.1, 0.5, 0.3, 0.1], size=(B, T, H, *gate))
    if op.endswith("signed"):
        x["negative"] = rng.uniform(size=(B, T, H, *gate)) < 0.4
    if op == "low_rank":
        x["a"] = normal(K) / K
        x["b"] = normal(K)
    if op in DELTA:
        unit = lambda a: a / np.linalg.norm(a, axis=-1, keepdims=True)
        x |= {"k": unit(x["k"]), "beta": rng.uniform(0, 2, size=(B, T, H))}
    if op == "delta_erasing_signed":
        x |= {"e": unit(normal(K)), "gamma": rng.uniform(0, 2, size=(B, T, H))}
    return x


def extra(op: str) -> dict:
    """Arguments of the op that do not run along T."""
    if op == "slstm":
        return {"recurrent": np.random.default_rng(5).normal(size=(4, H, V, V)) / V}
    return {}


def names(op: str) -> str:
    known = {"low_rank": "diagonal_plus_low_rank", "mlstm": "mlstm", "slstm": "slstm"}
    known |= dict.fromkeys(DELTA, "channel_delta")
    return known.get(op, "gated_linear_attention")


@functools.partial(jax.jit, static_argnames=("op", "implementation", "chunk_size"))
def run(op, x, *, initial_state=None, segment_ids=None, implementation=None, chunk_size=None):
    """``(o, final_state)``; a scan that has one form only is not asked for another."""
    options = {"implementation": implementation, "chunk_size": chunk_size}
    return getattr(baselines, names(op))(
        **x,
        **jax.tree.map(lambda a: jnp.asarray(a, x["x"].dtype), extra(op)),
        initial_state=initial_state,
        segment_ids=segment_ids,
        **({} if op == "slstm" else options),
    )


@functools.partial(jax.jit, static_argnames="op")
def step(op, state, x):
    return getattr(baselines, f"{names(op)}_step")(
        state, **x, **jax.tree.map(lambda a: jnp.asarray(a, x["x"].dtype), extra(op))
    )


def reference(op: str, x: dict, segment_ids=None) -> np.ndarray:
    if op == "mlstm":
        return oracle.mlstm(**x, segment_ids=segment_ids)
    if op == "slstm":
        return oracle.slstm(**x, **extra(op), segment_ids=segment_ids)
    x = dict(x)
    gate = np.exp(x.pop("g")) * np.where(x.pop("negative", False), -1, 1)
    recurrence = oracle.channel_delta if op in DELTA else oracle.linear
    return recurrence(**x, gate=gate, segment_ids=segment_ids)[0]


def agree(got, want, bar: float) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative_error(a, b) <= bar


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_recurrent_form_is_the_definition(op, packed, x64):
    x, ids = draw(op), SEGMENTS if packed else None
    o, _ = run(op, x, segment_ids=ids, implementation="recurrent")
    assert relative_error(o, reference(op, x, ids)) <= 1e-12


@functools.partial(jax.jit, static_argnames=("op", "options"))
def outcome(op, x, flags, start, segment_ids, options=()):
    """Outputs, final state and the gradients of a function of them all."""

    def forward(x, start):
        x = x | flags
        return run(op, x, initial_state=start, segment_ids=segment_ids, **dict(options))

    outputs, pullback = jax.vjp(forward, x, start)
    return outputs, pullback(jax.tree.map(lambda a: jnp.cos(3 * a), outputs))


# One chunk of three sub-chunks, and three chunks of five.
@pytest.mark.parametrize(
    ("packed", "chunk_size"), quick([(False, None), (True, 20)], [(True, 20)], unpack=True)
)
@pytest.mark.parametrize("op", quick([op for op in OPS if op != "slstm"], ["low_rank"]))
def test_chunked_form_agrees_with_the_recurrent(op, packed, chunk_size, x64):
    x, ids = draw(op), SEGMENTS if packed else None
    start = run(op, draw(op, seed=1))[1]
    flags = {name: x.pop(name) for name in ("negative",) if name in x}
    want = outcome(op, x, flags, start, ids, (("implementation", "recurrent"),))
    got = outcome(op, x, flags, start, ids, (("chunk_size", chunk_size),))
    agree(got, want, 1e-10)


@pytest.mark.parametrize("op", quick(OPS, ["diagonal", "slstm"]))
def test_pieces_and_steps_agree_with_the_whole(op, x64):
    x = draw(op)
    whole = run(op, x)
    first, state = run(op, {n: a[:, :17] for n, a in x.items()})
    second, state = run(op, {n: a[:, 17:] for n, a in x.items()}, initial_state=state)
    agree((np.concatenate([first, second], axis=1), state), whole, 1e-12)
    state, outputs = run(op, {n: a[:, :17] for n, a in x.items()})[1], []
    for t in range(17, T):
        o, state = step(op, state, {n: a[:, t] for n, a in x.items()})
        outputs.append(o)
    agree((np.stack(outputs, axis=1), state), (whole[0][:, 17:], whole[1]), 1e-12)


@pytest.mark.parametrize("op", quick(OPS, ["low_rank", "slstm"]))
def test_no_tokens_leave_the_state(op):
    x = {n: a if a.dtype == bool else a.astype(np.float32) for n, a in draw(op).items()}
    state = run(op, x)[1]
    o, after = run(op, {n: a[:, :0] for n, a in x.items()}, initial_state=state)
    assert o.shape == (B, 0, H, V)
    agree(after, state, 0)


FORMS = [(op, form) for op in OPS for form in ("recurrent", "chunked")][:-1]
QUICK = {("diagonal_signed", "recurrent"), ("slstm", "recurrent")}  # compiled in a second each


@pytest.mark.parametrize(
    ("op", "implementation"),
    [pytest.param(*form, marks=[] if form in QUICK else [pytest.mark.slow]) for form in FORMS],
)
def test_mapped_over_one_argument_gradients_equal_a_loop(op, implementation):
    """Those of all arguments, which every call but the mapped one shares."""
    mapped = {"slstm": "x", "mlstm": "log_f", "low_rank": "b", "delta": "beta"}.get(op, "v")
    first, *others = (draw(op, seed, T=6) for seed in range(3))
    first = {n: jnp.asarray(a, a.dtype if a.dtype == bool else "float32") for n, a in first.items()}
    flags = {n: first.pop(n) for n in ("negative",) if n in first}
    options = (("implementation", implementation),)

    def results(x, a):
        return outcome(op, x | {mapped: a}, flags, None, None, options)

    copies = [jnp.asarray(other[mapped], "float32") for other in others]
    got = jax.vmap(results, in_axes=(None, 0))(first, jnp.stack(copies))
    loop = [results(first, copy) for copy in copies]
    agree(got, jax.tree.map(lambda *a: np.stack(a), *loop), 1e-5)


# Where gates vanish and inputs are large: values that some arguments take, and a factor for others.
EXTREMES = {
    "closed": ((*LINEAR, *DELTA), {"g": -1e4}, 1.0),
    "open": ((*LINEAR, *DELTA), {"g": 0.0}, 1.0),
    "infinite": ((*LINEAR, *DELTA), {"g": -np.inf}, 1.0),
    "wide input gate": (("mlstm",), {"i": 1e4, "log_f": -1e-6}, 1.0),
    "no input": (("mlstm",), {"i": -1e4, "log_f": -1e4}, 1.0),
    "large": (OPS, {}, 1e4),
}


@pytest.mark.parametrize(
    ("op", "extreme"),
    [
        pytest.param(op, name, marks=[pytest.mark.slow] if op == "delta" else [])
        for name, (ops, *_) in EXTREMES.items()
        for op in ops
    ],
)
def test_outputs_and_gradients_are_finite_at_extremes(op, extreme):
    x = draw(op)
    _, values, factor = EXTREMES[extreme]
    for name, value in values.items():  # at every third token, and at all of row 1
        x[name][:, ::3] = value
        x[name][1] = value
    large = ("x", "q", "v", "i", *(() if op in DELTA else ("k",)))  # whose keys are unit vectors
    x = {n: factor * a if n in large else a for n, a in x.items()}
    x = {n: a if a.dtype == bool else a.astype(np.float32) for n, a in x.items()}
    flags = {n: x.pop(n) for n in ("negative",) if n in x}
    for leaf in jax.tree.leaves(outcome(op, x, flags, None, None)):
        assert np.all(np.isfinite(leaf))


@pytest.mark.slow
def test_a_small_gate_after_a_segment_of_large_ones():
    """What a stabiliser had risen to is forgotten with its segment, not exponentiated."""
    x = {n: a.astype(np.float32) for n, a in draw("mlstm").items()}
    ids = np.arange(T)[None] // np.array([[9], [30]])
    x["i"] = np.where(ids[..., None] % 2, [-300, -301], 300).astype(np.float32)
    o, _ = run("mlstm", x, segment_ids=ids, implementation="recurrent")
    outputs, gradients = outcome("mlstm", x, {}, None, ids)
    assert relative_error(outputs[0], o) <= 1e-5
    assert all(np.all(np.isfinite(a)) for a in jax.tree.leaves(gradients))


def test_strong_decay_costs_no_digits():
    """A difference of two cumulative sums would lose the small gates beside the large ones."""
    x = draw("diagonal")
    rng = np.random.default_rng(3)
    x["g"] = np.where(rng.uniform(size=x["g"].shape) < 0.2, -3e3, -rng.uniform(size=x["g"].shape))

    start, options = np.ones((B, H, K, V)), (("implementation", "recurrent"),)
    with jax.enable_x64(True):
        want = jax.tree.map(np.asarray, outcome("diagonal", x, {}, start, None, options))
    single = jax.tree.map(lambda a: a.astype(np.float32), (x, {}, start))
    agree(outcome("diagonal", *single, None), want, 1e-5)


@pytest.mark.parametrize("op", ["scalar", "diagonal"])
def test_the_sign_of_a_gate_is_exact(op):
    """Gates of -1 on whole numbers give whole numbers, whatever the length."""
    x = {n: np.round(a).astype(np.float32) for n, a in draw(op, T=300).items()}
    x["g"], negative = np.zeros_like(x["g"]), np.ones_like(x["g"], bool)
    want = oracle.linear(**{n: x[n] for n in "qkv"}, gate=-np.ones_like(x["g"]), scale=1.0)
    x = jax.tree.map(jnp.asarray, x | {"negative": negative})
    got = baselines.gated_linear_attention(**x, scale=1.0)
    agree(got, want, 0)


@pytest.mark.slow
def test_extended_gate_keeps_both_ends_and_the_gradient_at_zero(x64):
    log_alpha = np.array([0.0, -1e-9, -1e-3, -0.5, np.log(0.5), -1.0, -30.0, -1e4])
    g, negative = baselines.extended_gate(jnp.asarray(log_alpha, jnp.float32))
    gate = np.exp(np.asarray(g, np.float64)) * np.where(negative, -1, 1)
    want = 1 + 2 * np.expm1(log_alpha.astype(np.float32).astype(np.float64))
    np.testing.assert_allclose(gate, want, rtol=2e-7, atol=2e-7)
    np.testing.assert_allclose(g[1:3], np.log(want[1:3]), rtol=2e-7)  # no digits lost near 1
    # Where the gate is 0, the write of the last token is all there is, but not for the gradient.
    one = {name: jnp.ones((1, 2, 1, 1)) for name in ("q", "k", "v")}

    def last(log_alpha):
        g, negative = baselines.extended_gate(jnp.full((1, 2, 1), log_alpha))
        return baselines.gated_linear_attention(**one, g=g, negative=negative)[0][0, 1, 0, 0]

    a = jnp.asarray(np.log(0.5))
    assert 2 * np.exp(a) - 1 == 0
    np.testing.assert_allclose(jax.value_and_grad(last)(a), (1.0, 2 * 0.5))


@pytest.mark.parametrize("op", quick(OPS, ["scalar", "mlstm"]))
def test_bfloat16_stays_near(op):
    x = draw(op)
    narrow = {
        n: a if a.dtype == bool else jnp.asarray(a, jnp.bfloat16 if n in "qkvaebx" else jnp.float32)
        for n, a in x.items()
    }
    o, state = run(op, narrow)
    assert o.dtype == jnp.bfloat16
    assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(state))
    rounded = {n: np.asarray(a, bool if a.dtype == bool else np.float64) for n, a in narrow.items()}
    assert relative_error(o, reference(op, rounded)) <= 2e-2


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"k": np.zeros((B, T, H, K + 1))}, r"k must have shape \[B, T, H, K\] with B=2, T=41, H="),
        ({"g": np.zeros((B, T, H + 1))}, r"g must have shape \[B, T, H\] with B=2, T=41, H=2, got"),
        ({"segment_ids": np.zeros((B, 3), int)}, r"segment_ids must have shape \[B, T\] with B=2"),
        ({"initial_state": np.zeros((B, H, V, K))}, "initial_state must have shape"),
        ({"implementation": "triton"}, "implementation='triton' is not available; it may be one"),
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ({"implementation": "recurrent", "chunk_size": 8}, "chunk_size=8 has no meaning"),
        ({"q": np.ones((B, T, H, K), int)}, "q must have a dtype among bfloat16, .*, got int32"),
        ({"v": np.ones((B, T, H, V), np.float16)}, "v must be float32 when q is float32, got flo"),
        ({"k": [0.0]}, "k must be a JAX or NumPy array, got list"),
        ({"negative": np.ones((B, T, H))}, "negative must have dtype bool, got float32"),
        ({"segment_ids": np.zeros((B, T))}, "segment_ids must have an integer dtype, got float32"),
        (
            {"initial_state": np.zeros((B, H, K, V), np.float16)},
            "initial_state must be float32 when q is float32, got float16",
        ),
    ],
)
def test_errors_name_the_argument(change, text, unchecked):
    with pytest.raises(ValueError, match=text) as caught:
        baselines.gated_linear_attention(**draw("scalar") | change)
    assert "\n" not in str(caught.value)


def test_other_ops_check_their_inputs(unchecked):
    with pytest.raises(ValueError, match=r"b must have 4 dimensions \[B, T, H, K\]"):
        baselines.diagonal_plus_low_rank(**draw("low_rank") | {"b": np.zeros((B, T, H))})
    erasing = draw("delta_erasing_signed")
    with pytest.raises(ValueError, match=r"beta must have 3 dimensions \[B, T, H\] with B=2, T"):
        baselines.channel_delta(**erasing | {"beta": np.zeros((B, T, H, K))})
    for given, other in (("e", "gamma"), ("gamma", "e")):
        with pytest.raises(ValueError, match=f"{given} means nothing without {other}, got"):
            baselines.channel_delta(**erasing | {other: None})
    with pytest.raises(ValueError, match=r"log_f must have 3 dimensions \[B, T, H\]"):
        baselines.mlstm(**draw("mlstm") | {"log_f": np.zeros((B, T))})
    with pytest.raises(ValueError, match="recurrent must have 4 gates z, i, f, o, got 3"):
        baselines.slstm(x=np.zeros((B, T, 3, H, V)), recurrent=np.zeros((3, H, V, V)))
    with pytest.raises(ValueError, match="recurrent must be float32 when x is float32, got int8"):
        baselines.slstm(**draw("slstm"), recurrent=np.zeros((4, H, V, V), np.int8))


KEYS, GATE = (B, T, H, K), (B, T, H)
SHAPES = dict.fromkeys("qkabg", KEYS) | dict.fromkeys(("beta", "i", "log_f"), GATE)
SHAPES |= {"v": (B, T, H, V), "x": (B, T, 4, H, V)}
OF_NO_TOKEN = {"recurrent": (4, H, V, V), "state": (B, H, K, V)}
FUNCTIONS = [name for name in dir(baselines) if inspect.isfunction(getattr(baselines, name))]


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "extended_gate"])
@pytest.mark.usefixtures("unchecked")
def test_what_is_no_array_or_not_there_is_named(name):
    op = getattr(baselines, name)
    parameters = inspect.signature(op).parameters.values()
    needed = [p.name for p in parameters if p.default is p.empty]
    of_token = lambda shape: (shape[0], *shape[2:]) if name.endswith("_step") else shape
    shapes = {n: of_token(shape) for n, shape in SHAPES.items()} | OF_NO_TOKEN
    given = {n: np.zeros(shapes[n], np.float32) for n in needed}
    if name == "mlstm_step":
        given["state"] = baselines.MLSTMState(*(given["state"][..., 0],) * 3)
    if name == "slstm_step":
        given["state"] = baselines.SLSTMState(*(given["state"][:, :, 0],) * 4)
    for argument in needed:
        for wrong in (None, [0.0]):
            with pytest.raises(ValueError, match=rf"^{argument} must be a "):
                op(**given | {argument: wrong})


@pytest.mark.usefixtures("unchecked")
def test_no_width_and_no_axis_are_named():
    empty = {name: x[..., :0] for name, x in draw("scalar").items() if name in ("q", "k")}
    with pytest.raises(ValueError, match=r"q must have K of at least 1, got shape \(2, 41, 2, 0\)"):
        baselines.gated_linear_attention(**draw("scalar") | empty)
    with pytest.raises(ValueError, match=r"q must have 4 dimensions \[B, T, H, K\], got 1"):
        baselines.mlstm(**draw("mlstm") | {"q": np.zeros(2)})
    with pytest.raises(ValueError, match="initial_state must be a MLSTMState, got ndarray"):
        baselines.mlstm(**draw("mlstm"), initial_state=np.zeros((B, H, K, V)))
