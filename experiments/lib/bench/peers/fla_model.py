"""flash-linear-attention's language model, trained on our tokens; imported only when asked for."""

import contextlib
import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.models import ModelConfig
from deltaproduct_jax.training.config import TrainConfig
from experiments.lib.bench.peers.fla import load_torch
from experiments.lib.bench.timing import Compiled, time_in_turn

# How the peer holds its numbers. The paper trained with "masters"; the peer's own benchmark is
# "bfloat16", which moves the fewest bytes and rounds small updates away.
PRECISIONS = ("masters", "bfloat16", "autocast")
DEVICE = "cuda"


def check_peer() -> None:
    """ConfigError, unless torch, the package and a GPU are there."""
    _load()


def peer_rows(
    train: TrainConfig,
    model: ModelConfig,
    precisions: Sequence[str],
    tokens: np.ndarray,
    steps: int,
    repeats: int,
    budget_s: float,
) -> list[dict[str, Any]]:
    """One row a precision: the peer's model at the shape of ours, trained for the timed rounds.

    Args:
        train: optimiser and clipping.
        model: our configuration; the peer's fields are read off it.
        precisions: among `PRECISIONS`.
        tokens: ``[B, T + 1]``; the last is for models that take targets apart.
        steps: a timed round.
        repeats: timed rounds, after one that warms up.
        budget_s: no further round begins after so many seconds.

    Raises:
        ConfigError: torch, the package or a GPU is missing.
    """
    torch, _, _ = _load()
    rows = []
    for precision in precisions:
        name = f"fla, {precision}"
        try:
            row = _row(train, model, precision, tokens, steps, repeats, budget_s)
        except Exception as error:  # whatever torch, Triton or the peer may raise
            row = {"error": one_line(error)}
        rows.append({"implementation": name, **row})
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def one_line(error: BaseException) -> str:
    """What an error says, short enough for a line below a table."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def peer_config(model: ModelConfig) -> dict[str, Any]:
    """Our configuration in the peer's names."""
    return {
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_heads": model.num_heads,
        "head_dim": model.head_dim,
        "expand_v": model.value_of("expand_v"),
        "num_householder": model.value_of("num_householder"),
        "intermediate_size": model.mlp_width,
        "use_forget_gate": model.mixer.startswith("gated_"),
        "use_output_gate": model.value_of("use_output_gate"),
        "use_short_conv": model.value_of("use_short_conv"),
        "conv_size": model.value_of("conv_size"),
        "allow_neg_eigval": model.value_of("allow_neg_eigval"),
        "norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": model.initializer_range,
        "vocab_size": model.vocab_size,
    }


def _load() -> tuple[Any, Any, Any]:
    """torch, and the peer's classes of configuration and model."""
    torch = load_torch()
    try:
        from fla.models import GatedDeltaProductConfig, GatedDeltaProductForCausalLM
    except (ImportError, RuntimeError) as error:  # transformers wraps what it cannot import
        raise ConfigError(f"peer=fla cannot import its models: {error}") from error
    return torch, GatedDeltaProductConfig, GatedDeltaProductForCausalLM


def _row(
    train: TrainConfig,
    model: ModelConfig,
    precision: str,
    tokens: np.ndarray,
    steps: int,
    repeats: int,
    budget_s: float,
) -> dict[str, Any]:
    torch, _, _ = _load()
    torch.cuda.reset_peak_memory_stats()
    step, parameters = _train_step(train, model, precision, tokens)
    losses = []

    def run() -> None:
        losses.extend(step() for _ in range(steps))
        torch.cuda.synchronize()

    began = time.perf_counter()
    losses.append(step())
    torch.cuda.synchronize()
    entry = Compiled(run, time.perf_counter() - began, None, steps)
    time_in_turn({precision: entry}, repeats, budget_s)
    return {
        "parameters": parameters,
        **entry.summary(),
        "peak_mib": torch.cuda.max_memory_allocated() / 2**20,
        "first_loss": float(losses[0]),
        "last_loss": float(losses[-1]),
        "steps": len(losses),
        "machine": f"torch {torch.__version__}",
    }


def _train_step(
    train: TrainConfig, config: ModelConfig, precision: str, tokens: np.ndarray
) -> tuple[Callable[[], Any], int]:
    """One step, which returns its loss, of a new model, and the number of its parameters."""
    torch, make_config, make_model = _load()
    torch.manual_seed(0)
    model = make_model(make_config(**peer_config(config))).to(DEVICE).train()
    inputs = torch.from_numpy(tokens[:, :-1].astype(np.int64)).to(DEVICE)
    trained = list(model.parameters())  # what AdamW updates
    if precision == "masters":
        trained = [torch.nn.Parameter(p.detach().clone()) for p in trained]
    if precision != "autocast":
        model.to(torch.bfloat16)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        trained if precision == "masters" else parameters,
        lr=train.learning_rate,
        betas=(train.adam_b1, train.adam_b2),
        eps=train.adam_eps,
        weight_decay=train.weight_decay,
        fused=True,
    )
    computing = (
        torch.autocast(DEVICE, torch.bfloat16)
        if precision == "autocast"
        else contextlib.nullcontext()
    )

    def step() -> Any:
        with computing:
            # The labels are shifted by the model, whose last position counts for nothing.
            loss = model(input_ids=inputs, labels=inputs, use_cache=False).loss
        loss.backward()
        if precision == "masters":
            for master, parameter in zip(trained, parameters, strict=True):
                master.grad, parameter.grad = parameter.grad.float(), None
        torch.nn.utils.clip_grad_norm_(trained, train.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if precision == "masters":
            with torch.no_grad():
                torch._foreach_copy_(parameters, trained)
        return loss.detach()

    return step, sum(p.numel() for p in parameters)
