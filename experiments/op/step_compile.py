"""How long does a language model's training step compile, and how much memory does it take?

    python -m experiments.op.step_compile --workdir=runs/compile --model=340m_1

compiles the step of a preset on this machine, without running it: blocks one by one and as a scan
(``--scan_layers``), logits of all tokens and of some thousand at once (``--loss_chunk_size``). Each
row is a step; memory is the compiler's own count of what the program needs beside its arguments.

Source: this project.
Expect: on a CPU little between a scan and blocks one by one: experiments/results/language/LOG.md.
Takes: minutes; of 24 blocks one by one the longest.
"""

import dataclasses
import itertools
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from deltaproduct_jax.compilers.memory import memory_of
from deltaproduct_jax.models import ModelConfig
from deltaproduct_jax.parallel.config import DeviceConfig
from deltaproduct_jax.settings import check_fields, setting
from deltaproduct_jax.training.config import RunConfig, TrainConfig
from deltaproduct_jax.training.text import TextTask
from experiments.lib import flags
from experiments.lib.bench.report import markdown, shown, write_report
from experiments.lib.bench.timing import started
from experiments.lib.language_presets import PRESETS
from experiments.lib.pod.step_program import step_program

Row = dict[str, Any]
HEAD = ("blocks", "tokens with logits at once", "compile s", "process s", "temporary MiB")


@dataclasses.dataclass(frozen=True)
class CompileConfig:
    """What is compiled; the model's sizes are the preset's."""

    model: str = setting("340m_1", "a preset of experiments.language_modeling", one_of=PRESETS)
    num_layers: int = setting(24, "number of blocks", least=1)
    rows: int = setting(8, "sequences B", least=1)
    length: int = setting(4096, "tokens T", least=1)
    vocab_size: int = setting(32000, "number of token ids", least=1)
    chunks: tuple[int, ...] = setting(
        (0, 4096), "values of loss_chunk_size in turn; 0: none", filled=True, least=0
    )
    scans: tuple[int, ...] = setting(
        (1, 0), "blocks as a scan: 1 yes, 0 no, in turn", one_of=(0, 1)
    )
    remat: str = setting("products", "what a block computes anew")

    def __post_init__(self) -> None:
        """Checks every field; the model's are the model's to check."""
        check_fields(self)

    def run(self, scanned: bool, chunk: int | None) -> RunConfig:
        """A run of the preset's model."""
        names = ModelConfig.__dataclass_fields__.keys() & PRESETS[self.model].keys()
        own = {"vocab_size": self.vocab_size, "num_layers": self.num_layers, "remat": self.remat}
        return RunConfig(
            TextTask(train_length=self.length, eval_lengths=(self.length,)),
            ModelConfig(
                **{name: PRESETS[self.model][name] for name in names} | own, scan_layers=scanned
            ),
            TrainConfig(batch_size=self.rows, loss_chunk_size=chunk),
        )


def compiled_row(config: CompileConfig, scanned: bool, chunk: int) -> Row:
    """Compiles one step; nothing is allocated."""
    run = config.run(scanned, chunk or None)
    began, spent = time.perf_counter(), time.process_time()
    compiled = step_program(run, DeviceConfig(mesh="data:1")).lower().compile()
    return {
        "scan_layers": scanned,
        "loss_chunk_size": chunk or None,
        "compile_s": time.perf_counter() - began,
        "process_s": time.process_time() - spent,
        "temporary_mib": memory_of(compiled)["temp_bytes"] / 2**20,
    }


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    lines = [
        [
            "a scan" if row["scan_layers"] else "one by one",
            row["loss_chunk_size"] or "all",
            *(shown(row[name], ".0f") for name in ("compile_s", "process_s", "temporary_mib")),
        ]
        for row in rows
    ]
    return markdown(HEAD, lines)


def command(argv: Sequence[str]) -> None:
    """Compiles, prints the table, writes compile.json and compile.md."""
    parsed = flags.parse(argv, {"compile": CompileConfig}, {"default": {}})
    config = CompileConfig(**parsed.sections["compile"])
    record = started("op.step_compile", argv, config=dataclasses.asdict(config))
    for scanned, chunk in itertools.product(config.scans, config.chunks):
        record["rows"].append(compiled_row(config, bool(scanned), chunk))
        print(table(record["rows"][-1:]), file=sys.stderr)
        text = write_report(parsed.workdir, "compile", record, page)
    print(text)


def page(record: Mapping[str, Any]) -> list[str]:
    """What compile.md holds."""
    config = record["config"]
    head = (
        f"{config['model']}, {config['num_layers']} blocks, B={config['rows']} "
        f"T={config['length']}, vocabulary {config['vocab_size']}, remat={config['remat']}; "
        f"{record['machine']}"
    )
    return [head, table(record["rows"])]


if __name__ == "__main__":
    sys.exit(flags.run(command, sys.argv[1:]))
