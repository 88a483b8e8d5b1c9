"""flash-linear-attention's kernels on the inputs of our benchmark; imported only when asked for."""

import concurrent.futures
import functools
import importlib
import importlib.util
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deltaproduct_jax.errors import ConfigError
from experiments.lib.bench.timing import (
    DECODING_ROUNDS,
    FORWARD,
    STEP,
    Compiled,
    Results,
    Shape,
    cotangent,
)

# Runs before the launches of a decoding loop are recorded: what is compiled or allocated once.
WARM_UP_RUNS = 3


def compile_peer(shape: Shape, arrays: Mapping[str, jax.Array], direction: str) -> Compiled:
    """The peer's program, compiled by a first run.

    Raises:
        ConfigError: torch, the package or a GPU is missing, or the peer refuses to run.
    """
    return as_compiled(waited_for(_program(shape, arrays, direction), direction, shape))


def peer_results(shape: Shape, arrays: Mapping[str, jax.Array], direction: str) -> Results:
    """What the peer computes, arranged as our own program's results; raises as `compile_peer`."""
    got = to_numpy(waited_for(_program(shape, arrays, direction), direction, shape)())
    if direction == FORWARD:
        return got
    return {name: x.reshape(arrays[name].shape) for name, x in zip(arrays, got, strict=True)}


def compile_peer_decoding(shape: Shape, arrays: Mapping[str, Any]) -> Compiled:
    """The peer from token to token of what `experiments.lib.bench.timing.by_token` returns.

    Its layers decode by the fused recurrent kernel on a sequence of R updates, of which the last is
    read. All launches are recorded once as a CUDA graph and replayed, so that Python costs nothing.

    Raises:
        ConfigError: as `compile_peer`.
    """
    torch = load_torch()
    from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule

    def as_updates(token: Mapping[str, jax.Array]) -> dict[str, Any]:
        updates = {name: to_torch(token[name]) for name in ("k", "v", "beta")}
        last, first = shape.R - 1, 0
        for name, place in (("q", last), ("g", first)):
            if name in token:
                x = to_torch(token[name]).unsqueeze(1)
                updates[name] = x.new_zeros(x.shape[0], shape.R, *x.shape[2:])
                updates[name][:, place] = x[:, 0]
        return updates

    tokens = [as_updates(token) for token in arrays["tokens"]]
    start = to_torch(arrays["state"])

    @torch.no_grad()
    def decode() -> tuple[Any, ...]:
        state, outputs = start, []
        for token in DECODING_ROUNDS * tokens:
            o, state = fused_recurrent_gated_delta_rule(
                **token, initial_state=state, output_final_state=True
            )
            outputs.append(o[:, -1])
        return torch.stack(outputs, dim=1), state

    def recorded() -> Callable[[], tuple[Any, ...]]:
        aside = torch.cuda.Stream()
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP_RUNS):
                decode()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = decode()

        def replay() -> tuple[Any, ...]:
            graph.replay()
            return results

        return replay

    replay = _refusals_named(recorded, STEP, shape)()
    return as_compiled(waited_for(replay, STEP, shape), calls=DECODING_ROUNDS * len(tokens))


def to_numpy(results: tuple[Any, ...]) -> tuple[np.ndarray, ...]:
    """Tensors as arrays of float32."""
    return tuple(x.detach().float().cpu().numpy() for x in results)


def as_compiled(run: Callable[[], Any], calls: int = 1) -> Compiled:
    """A program that is compiled by its first run."""
    began = time.perf_counter()
    run()
    return Compiled(run, time.perf_counter() - began, None, calls)


def waited_for(call: Callable[[], Any], direction: str, shape: Shape) -> Callable[[], Any]:
    """``call`` until the GPU is done; its refusals are errors of the configuration."""

    def run() -> Any:
        result = call()
        load_torch().cuda.synchronize()
        return result

    return _refusals_named(run, direction, shape)


def _refusals_named(call: Callable[[], Any], direction: str, shape: Shape) -> Callable[[], Any]:
    """The peer refuses some versions of Triton on some GPUs: one line, not a traceback."""

    def run() -> Any:
        try:
            return call()
        except RuntimeError as error:
            raise ConfigError(f"the peer cannot run {direction} at {shape}: {error}") from error

    return run


# What a peer is called, the module that must import, and the package that has it.
FLA = ("fla", "fla.ops.gated_delta_product", "flash-linear-attention")


def require_packages(peer: tuple[str, str, str] = FLA) -> None:
    """Raises ConfigError where torch or the peer's package is not installed; imports neither."""
    name, module, package = peer
    for needed in ("torch", module.partition(".")[0]):
        if importlib.util.find_spec(needed) is None:
            raise ConfigError(
                f"peer={name} needs torch and {package}: there is no {needed}; install both, or "
                "leave it"
            )


def load_torch(peer: tuple[str, str, str] = FLA) -> Any:
    """PyTorch, where the peer can run.

    Raises:
        ConfigError: torch, the peer's package or a GPU is missing.
    """
    name, module, package = peer
    # With FlashQLA installed it would run that: a peer of its own.
    os.environ.setdefault("FLA_FLASH_QLA", "0")
    try:
        import torch

        importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"peer={name} needs torch and {package}: {error}; install both, or leave it"
        ) from error
    if os.environ.get("TRITON_CACHE_DIR") == "":  # jax-triton leaves it so, and the peer needs one
        del os.environ["TRITON_CACHE_DIR"]
    if not torch.cuda.is_available():
        raise ConfigError(f"peer={name} needs a CUDA GPU that torch can use, and there is none")
    _compile_side_by_side()
    return torch


@functools.cache
def _compile_side_by_side() -> None:
    """Has Triton compile all launches that it will try for a kernel on all cores.

    The peer tries dozens for every kernel, a model has dozens of kernels, and one after another
    they take many minutes. What is tried and what is chosen stay the same.
    """
    import triton
    from triton.runtime.autotuner import Autotuner

    pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
    prune = Autotuner.prune_configs

    def compiled(self: Any, kwargs: dict[str, Any]) -> Any:
        configs = prune(self, kwargs)
        options = {name: x for name, x in kwargs.items() if name != "warmup"}
        with triton.AsyncCompileMode(pool, ignore_errors=True):  # the tuner meets them again
            for config in configs:
                self.fn.warmup(*self.nargs.values(), **options, **config.all_kwargs())
        return configs

    Autotuner.prune_configs = compiled


def take_first_launches() -> None:
    """Has Triton try the first two launches of a kernel only: for results, not for times.

    Trying them all takes minutes a model.
    """
    load_torch()
    from triton.runtime.autotuner import Autotuner

    Autotuner.prune_configs = lambda self, kwargs: self.configs[:2]


def to_torch(x: jax.Array) -> Any:
    """An array as a tensor on the GPU, bfloat16 or float32."""
    torch = load_torch()
    tensor = torch.from_numpy(np.array(x, np.float32)).cuda()
    return tensor.to(torch.bfloat16) if x.dtype == jnp.bfloat16 else tensor


def _program(
    shape: Shape, arrays: Mapping[str, jax.Array], direction: str
) -> Callable[[], tuple[Any, ...]]:
    """One call of the peer: o and final state, or a gradient for each input."""
    torch = load_torch()
    from fla.ops.gated_delta_product import chunk_gated_delta_product

    inputs = {name: to_torch(x) for name, x in arrays.items()}
    for name in ("k", "v", "beta"):  # the peer folds the factors into time
        inputs[name] = inputs[name].flatten(1, 2)

    def forward() -> tuple[Any, ...]:
        return chunk_gated_delta_product(
            **{"g": None, **inputs}, num_householder=shape.R, output_final_state=True
        )

    def backward() -> tuple[Any, ...]:
        return torch.autograd.grad(forward(), list(inputs.values()), cotangents)

    if direction == FORWARD:
        return forward
    for tensor in inputs.values():
        tensor.requires_grad_(True)
    sizes = ((shape.B, shape.T, shape.H, shape.V), (shape.B, shape.H, shape.K, shape.V))
    o, final_state = (to_torch(cotangent(size)) for size in sizes)
    cotangents = [o.to(torch.bfloat16), final_state]
    return backward
