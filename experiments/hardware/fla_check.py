"""Are our models the same in flash-linear-attention, and its models the same here?

    python -m experiments.hardware.fla_check --workdir=DIR

draws models with one to four Householder factors, with and without a forget gate, writes them by
``fla.save``, and compares the logits of both worlds on the same tokens; then the other way, models
drawn and written there and read by ``fla.load``. In float32 the peer's recurrent kernel runs, which
takes up to 64 tokens; in bfloat16 its chunked one, by the faster of the first two launches of each
kernel. Needs a GPU, torch and the package.

Source: https://github.com/fla-org/flash-linear-attention, its class GatedDeltaProductForCausalLM.
Expect: errors of about 1e-6 in float32 and 1e-2 in bfloat16, relative to the norm of the logits.
Takes: minutes on an H100, most of which are Triton's compilations.
"""

import dataclasses
import itertools
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deltaproduct_jax.interop import fla
from deltaproduct_jax.models import ModelConfig, SequenceModel
from deltaproduct_jax.settings import check_fields, seed_setting, setting
from experiments.lib import flags
from experiments.lib.bench.peers.fla import load_torch, take_first_launches
from experiments.lib.bench.peers.fla_model import DEVICE, check_peer
from experiments.lib.bench.report import markdown, write_report
from experiments.lib.bench.timing import started

PRESETS: dict[str, dict[str, Any]] = {"default": {}}
TOKENS = {"float32": 48, "bfloat16": 256}
ROWS = 2
ERRORS = ("ours_there", "theirs_here")


@dataclasses.dataclass(frozen=True)
class CheckConfig:
    """Which models; raises ConfigError where the fields make no sense."""

    num_householder: tuple[int, ...] = setting(
        (1, 2, 3, 4), "factors per token of the models", filled=True, least=1
    )
    seed: int = seed_setting("of parameters and tokens")

    def __post_init__(self):
        check_fields(self)


def command(argv: Sequence[str]) -> None:
    """Compares, writes fla_check.json and .md, prints the table."""
    parsed = flags.parse(argv, {"check": CheckConfig}, PRESETS)
    options = CheckConfig(**parsed.sections["check"])
    check_peer()
    take_first_launches()
    record = started("hardware.fla_check", argv)
    for R, gated, dtype in itertools.product(options.num_householder, (False, True), TOKENS):
        row = {"num_householder": R, "gated": gated, "dtype": dtype}
        record["rows"].append(row | _errors(R, gated, dtype, options))
        print(record["rows"][-1], file=sys.stderr, flush=True)
        # What is found stays, whatever comes next.
        text = write_report(parsed.workdir, "fla_check", record, page)
    print(text)


def page(record: Mapping[str, Any]) -> list[str]:
    """What fla_check.md holds."""
    named = ("num_householder", "gated", "dtype")
    cells = [
        (*(row[name] for name in named), *(f"{row[name]:.1e}" for name in ERRORS))
        for row in record["rows"]
    ]
    about = f"Relative errors of logits; {record['machine']}."
    head = ("n_h", "gated", "dtype", "ours there", "theirs here")
    return [about, markdown(head, cells)]


def _errors(R: int, gated: bool, dtype: str, options: CheckConfig) -> dict[str, float]:
    """Relative errors of the logits, both ways."""
    config = ModelConfig(
        vocab_size=1000,
        mixer="gated_delta_product" if gated else "delta_product",
        hidden_size=256,
        num_layers=2,
        num_heads=4,
        head_dim=64,
        num_householder=R,
        use_output_gate=gated,
        use_short_conv=True,
        dtype=dtype,
        param_dtype=dtype,
    )
    rng = np.random.default_rng(options.seed)
    tokens = rng.integers(0, config.vocab_size, size=(ROWS, TOKENS[dtype]))
    model = SequenceModel(config, rngs=nnx.Rngs(options.seed))
    with tempfile.TemporaryDirectory() as parent:
        ours, theirs = Path(parent) / "ours", Path(parent) / "theirs"
        fla.save(model, ours)
        peer = _peer(ours, dtype)
        there = _difference(_here(model, tokens), _there(peer, tokens))
        _redraw(peer, options.seed)
        peer.save_pretrained(theirs)
        here = _difference(_here(fla.load(theirs), tokens), _there(peer, tokens))
    return dict(zip(ERRORS, (there, here), strict=True))


def _peer(folder: Path, dtype: str) -> Any:
    torch = load_torch()
    import fla.models  # noqa: F401, registers the model types
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    return model.to(DEVICE).eval()


def _redraw(peer: Any, seed: int) -> None:
    """Other parameters than ours were: every one moves by a tenth of its own size."""
    torch = load_torch()
    torch.manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.mul_(1 + 0.1 * torch.randn_like(parameter))


def _there(peer: Any, tokens: np.ndarray) -> np.ndarray:
    torch = load_torch()
    with torch.no_grad():
        logits = peer(input_ids=torch.from_numpy(tokens).to(DEVICE), use_cache=False).logits
    return logits.float().cpu().numpy()


def _here(model: SequenceModel, tokens: np.ndarray) -> np.ndarray:
    # Else products of float32 are rounded to TF32 on a GPU, which torch does not do.
    with jax.default_matmul_precision("highest"):
        logits = nnx.jit(lambda model, tokens: model(tokens))(model, jnp.asarray(tokens, jnp.int32))
    return np.asarray(jax.device_get(logits), np.float32)


def _difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


if __name__ == "__main__":
    sys.exit(flags.run(command, sys.argv[1:]))
