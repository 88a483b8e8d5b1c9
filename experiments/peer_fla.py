"""flash-linear-attention's kernels on the inputs of our benchmark; imported only when asked for."""

import os
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deltaproduct_jax.errors import ConfigError
from experiments.timing import FORWARD, Compiled, Shape, program


def compile_peer(
    shape: Shape, arrays: Mapping[str, jax.Array], direction: str
) -> tuple[Compiled, float]:
    """The peer's program, compiled by a first run, and its worst error against float32 JAX.

    Raises:
        ConfigError: torch, the package or a GPU is missing, or the peer refuses to run.
    """
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
    names = list(inputs)

    def forward() -> tuple[Any, Any]:
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

    def run() -> Any:
        result = call()
        torch.cuda.synchronize()
        return result

    torch.cuda.synchronize()
    began = time.perf_counter()
    try:
        got = run()
    except RuntimeError as error:  # it refuses some versions of Triton on some GPUs
        raise ConfigError(f"peer=fla cannot run {direction} at {shape}: {error}") from error
    compiled = Compiled(run, time.perf_counter() - began, None)

    wide = {name: x.astype(jnp.float32) for name, x in arrays.items()}
    want = jax.jit(program("chunked", direction))(wide)
    want = list(want) if direction == FORWARD else [want[name] for name in names]
    errors = []
    for ours, theirs in zip(want, got, strict=True):
        ours = np.asarray(ours, np.float64)
        theirs = theirs.detach().float().cpu().numpy().reshape(ours.shape)
        errors.append(float(np.linalg.norm(theirs - ours) / np.linalg.norm(ours)))
    return compiled, max(errors)
