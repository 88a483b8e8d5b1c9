"""How full is each head's state along a text, and does it empty where a document begins?

    python -m experiments.analysis.effective_rank --workdir=OUT --run=runs/a --data=tokens/code

reads one row by one model and takes the effective rank of every head's state before every
Householder update: the exponential of the entropy of its singular values over their sum. A panel a
block; dotted lines stand where documents begin. ``ranks.npz`` has them all, ``effective_rank.md``
what each head comes to.

Source: https://arxiv.org/abs/2502.10297, effective rank (16,384 tokens, trained on 4,096).
Expect: in the paper DeltaNet's rank keeps growing behind the length trained; some heads of n_h = 3
    let it fall at BOS.
Takes: seconds on a CPU for the preset tiny's model; minutes on a GPU for the paper's, whose
    singular values of all updates need --every=16 or so.
"""

import dataclasses
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deltaproduct_jax.analysis.effective_rank import over_heads, ranks_of_model, summary
from deltaproduct_jax.data import standard_library
from deltaproduct_jax.data.splits import SPLITS
from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.files import write_file
from deltaproduct_jax.settings import check_fields, seed_setting, setting
from experiments.lib import flags
from experiments.lib.bench.report import begun, markdown, shown, write_report
from experiments.lib.bench.timing import machine
from experiments.lib.figures.language import draw_ranks
from experiments.lib.figures.style import SECTION, Look
from experiments.lib.language_runs import names_of_texts, open_language_models, rows_of

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "tiny": {"length": 2048, "every": 8},
}


@dataclasses.dataclass(frozen=True)
class RankConfig:
    """Who reads what; raises ConfigError where the fields make no sense."""

    run: str = setting("", "run directory, or folder of flash-linear-attention")
    checkpoint: str = setting("best", "of a run directory: best, newest, or a step")
    data: str = setting(standard_library.NAME, "folder of experiments.prepare_text")
    split: str = setting("test", f"one of {', '.join(SPLITS)}", one_of=SPLITS)
    length: int = setting(16384, "tokens of the row", least=1)
    every: int = setting(16, "ranks are taken at the updates of one of so many tokens", least=1)
    dtype: str | None = setting(None, "dtype of the computation; none: the model's own")
    seed: int = seed_setting("orders the documents")

    def __post_init__(self) -> None:
        """Checks every field."""
        check_fields(self)
        if not self.run:
            raise ConfigError("--run is missing; give the directory of a language model")
        if self.length % self.every:
            raise ConfigError(f"every={self.every} must divide length={self.length}")


def table(heads_by_block: Mapping[int, Sequence[Mapping[str, Any]]]) -> str:
    """A line for every head."""
    lines = [
        [
            *(block, head),
            *(shown(said[name], ".2f") for name in ("trained", "end", "kept_at_starts")),
        ]
        for block, heads in heads_by_block.items()
        for head, said in enumerate(heads)
    ]
    head = ("block", "head", "rank within the length trained", "in the last quarter")
    return markdown((*head, "kept at starts of documents"), lines)


def write_arrays(path: Path, ranks: Mapping[int, np.ndarray], starts: np.ndarray) -> None:
    """Ranks by block, and where documents begin, as NumPy reads them."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, starts=starts, **{f"block{i}": x for i, x in ranks.items()})
    write_file(path, buffer.getvalue())


def command(argv: Sequence[str]) -> None:
    """Reads, writes ranks.npz, effective_rank.json and .md, draws effective_rank."""
    parsed = flags.parse(argv, {"ranks": RankConfig, **SECTION}, PRESETS)
    look = Look(**parsed.sections["figures"])
    config = RankConfig(**parsed.sections["ranks"])
    models = open_language_models((config.run,), config.checkpoint, config.dtype, name="run")
    ((label, model, trained, _),) = models
    wanted = {"count": 1, "length": config.length, "seed": config.seed}
    text = rows_of(config.data, config.split, **wanted, models=models)
    tokens = text.rows[0, : config.length]
    starts = np.flatnonzero(tokens == text.bos_id)
    ranks = ranks_of_model(model, tokens, config.every)
    heads = {
        block: summary(of_block, config.every, starts.tolist(), trained)
        for block, of_block in ranks.items()
    }
    record = begun(
        "analysis.effective_rank",
        argv,
        config=dataclasses.asdict(config),
        machine=machine(),
        label=label,
        trained=trained,
        starts=starts.tolist(),
        num_householder=next(iter(ranks.values())).shape[1],
        heads=heads,
        along=over_heads(ranks, config.every),
    )
    (name,) = names_of_texts([config.data])
    print(write_report(parsed.workdir, "effective_rank", record, page))
    write_arrays(parsed.workdir / "ranks.npz", ranks, starts)
    path = parsed.workdir / "effective_rank"
    draw_ranks(ranks, config.every, starts.tolist(), trained, f"{label}, {name}", path, look)


def page(record: Mapping[str, Any]) -> list[str]:
    """What effective_rank.md holds."""
    config, starts = record["config"], record["starts"]
    (name,) = names_of_texts([config["data"]])
    text = f"{config['length']} tokens of {name} with {len(starts)} starts"
    return [f"{record['label']}, {text}; {record['machine']}", table(record["heads"])]


if __name__ == "__main__":
    sys.exit(flags.run(command, sys.argv[1:]))
