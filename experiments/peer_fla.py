"""flash-linear-attention's kernels on the inputs of our benchmark; imported only when asked for."""

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deltaproduct_jax.errors import ConfigError
from experiments.timing import FORWARD, Compiled, Results, Shape


def compile_peer(shape: Shape, arrays: Mapping[str, jax.Array], direction: str) -> Compiled:
    """The peer's program, compiled by a first run.

    Raises:
        ConfigError: torch, the package or a GPU is missing, or the peer refuses to run.
    """
    run = _program(shape, arrays, direction)
    began = time.perf_counter()
    run()
    return Compiled(run, time.perf_counter() - began, None)


def peer_results(shape: Shape, arrays: Mapping[str, jax.Array], direction: str) -> Results:
    """What the peer computes, arranged as our own program's results; raises as `compile_peer`."""
    got = [x.detach().float().cpu().numpy() for x in _program(shape, arrays, direction)()]
    if direction == FORWARD:
        return tuple(got)
    return {name: x.reshape(arrays[name].shape) for name, x in zip(arrays, got, strict=True)}


def _program(
    shape: Shape, arrays: Mapping[str, jax.Array], direction: str
) -> Callable[[], tuple[Any, ...]]:
    """One call of the peer, waited for: o and final state, or a gradient for each input."""
    try:
        import torch
        from fla.ops.gated_delta_product import chunk_gated_delta_product
    except ImportError as error:
        raise ConfigError(
            f"peer=fla needs torch and flash-linear-attention: {error}; install both, or leave it"
        ) from error
    if os.environ.get("TRITON_CACHE_DIR") == "":  # jax-triton leaves it so, and the peer needs one
        del os.environ["TRITON_CACHE_DIR"]
    if not torch.cuda.is_available():
        raise ConfigError("peer=fla needs a CUDA GPU that torch can use, and there is none")

    def to_torch(name: str, x: jax.Array) -> Any:
        tensor = torch.from_numpy(np.array(x, np.float32)).cuda()
        if name in ("k", "v", "beta"):  # the peer folds the factors into time
            tensor = tensor.flatten(1, 2)
        return tensor.to(torch.bfloat16) if x.dtype == jnp.bfloat16 else tensor

    inputs = {name: to_torch(name, x) for name, x in arrays.items()}

    def forward() -> tuple[Any, ...]:
        return chunk_gated_delta_product(
            **{"g": None, **inputs}, num_householder=shape.R, output_final_state=True
        )

    def backward() -> tuple[Any, ...]:
        for tensor in inputs.values():
            tensor.requires_grad_(True)
        outputs = forward()
        loss = sum((x.float() * w).sum() for x, w in zip(outputs, weights, strict=True))
        return torch.autograd.grad(loss, list(inputs.values()))

    weights = [torch.cos(torch.arange(x.numel(), device="cuda")).view(x.shape) for x in forward()]
    call = forward if direction == FORWARD else backward

    def run() -> tuple[Any, ...]:
        try:
            result = call()
        except RuntimeError as error:  # it refuses some versions of Triton on some GPUs
            raise ConfigError(f"peer=fla cannot run {direction} at {shape}: {error}") from error
        torch.cuda.synchronize()
        return result

    return run
