"""FlashQLA's kernels on the inputs of our benchmark; imported only when asked for.

They have one factor a token. More are interleaved, as their users have to: R updates in turn, of
which the first alone has a gate and the last alone a query. That is done before the clock starts.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from experiments.lib.bench.peers.fla import as_compiled, load_torch, to_numpy, to_torch, waited_for
from experiments.lib.bench.timing import FORWARD, Compiled, Results, Shape, cotangent

NAMES = ("flashqla", "flashqla_interleaved")
PEER = ("flashqla", "flash_qla", "flash-qla")


def compile_peer(shape: Shape, arrays: Mapping[str, jax.Array], direction: str) -> Compiled:
    """The peer's program, compiled by a first run.

    Raises:
        ConfigError: torch, the package or a GPU is missing, or the peer refuses to run.
    """
    return as_compiled(waited_for(_program(shape, arrays, direction)[0], direction, shape))


def peer_results(shape: Shape, arrays: Mapping[str, jax.Array], direction: str) -> Results:
    """What the peer computes, arranged as our own program's results; raises as `compile_peer`."""
    run, names = _program(shape, arrays, direction)
    got = to_numpy(waited_for(run, direction, shape)())
    of_factors = [x.reshape(shape.B, shape.T, shape.R, *x.shape[2:]) for x in got[: len(names)]]
    if direction == FORWARD:
        return of_factors[0][:, :, -1], got[1]
    picked = {"q": lambda x: x[:, :, -1], "g": lambda x: x[:, :, 0]}
    by_name = dict(zip(names, of_factors, strict=True))
    return {name: picked.get(name, lambda x: x)(by_name[name]) for name in arrays}


def _program(
    shape: Shape, arrays: Mapping[str, jax.Array], direction: str
) -> tuple[Callable[[], tuple[Any, ...]], tuple[str, ...]]:
    """One call: o of all updates and the final state, or gradients; the names of the first ones."""
    torch = load_torch(PEER)
    from flash_qla import chunk_gated_delta_rule

    inputs = {name: to_torch(x) for name, x in arrays.items()}
    if "g" not in inputs:  # it has no form without
        inputs["g"] = torch.zeros(shape.B, shape.T, shape.H, device="cuda")
    for name, place in (("q", -1), ("g", 0)):
        x = inputs[name]
        inputs[name] = x.new_zeros(shape.B, shape.T, shape.R, *x.shape[2:])
        inputs[name][:, :, place] = x
    inputs = {name: x.flatten(1, 2).contiguous() for name, x in inputs.items()}

    def forward() -> tuple[Any, ...]:
        return chunk_gated_delta_rule(**inputs, output_final_state=True)

    def backward() -> tuple[Any, ...]:
        return torch.autograd.grad(forward(), list(inputs.values()), cotangents)

    if direction == FORWARD:
        return forward, ("o",)
    for tensor in inputs.values():
        tensor.requires_grad_(True)
    o = to_torch(cotangent((shape.B, shape.T, shape.H, shape.V))).to(torch.bfloat16)
    of_updates = o.new_zeros(shape.B, shape.T, shape.R, *o.shape[2:])
    of_updates[:, :, -1] = o
    of_state = to_torch(cotangent((shape.B, shape.H, shape.K, shape.V)))
    cotangents = [of_updates.flatten(1, 2), of_state]
    return backward, tuple(inputs)
