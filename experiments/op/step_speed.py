"""How fast does a 340M-parameter language model train: tokens per second of whole training steps.

    python -m experiments.op.step_speed --workdir=runs/step                  # a GPU of 80 GB
    python -m experiments.op.step_speed --workdir=runs/step --peer=fla       # beside the peer
    python -m experiments.op.step_speed --workdir=runs/step --preset=narrow  # a GPU of 24 GB
    python -m experiments.op.step_speed --workdir=runs/step --preset=small   # a CPU, to see it run
    python -m experiments.op.step_speed --workdir=runs/step --preset=gpu     # results/gpu/step
    python -m experiments.op.step_speed --workdir=runs/step --preset=meshes  # results/gpu/meshes

The shapes are the published ones of the paper's language models, with tied embeddings and
convolutions: 8 heads of 128 with one factor per token (341,594,112 parameters), 4 with two
(316,379,136). A step is the project's own: cross entropy of the next token, gradient, clipping,
AdamW, in bfloat16 with float32 parameters. ``--peer=fla`` trains the same model as
flash-linear-attention has it, in PyTorch. Tokens are drawn at random and stay the same.

Models come in turn, one for each ``num_householder``; of the other shapes there is one for all or
one for each. ``--preset=gpu`` has n_h = 1, 2 and 3, without gates and with them, and 1.3 billion
parameters. Each runs in a process of its own, because neither library gives back the memory of a
GPU that it has once taken. What a peer refuses becomes a line of the table.

``--at_once=2`` traces one model while another is compiled and timed, and ``--gpus=2`` shares models
of one device out to two GPUs. The peers, whose host is a part of their time, come when ours are
done.

``--preset=narrow`` is the model of ``--preset=paper`` of `experiments.state_tracking`: one layer of
128 channels, 8 heads of 32, n_h = 4, rows of 129 tokens, 4096 at a time. Of that run it leaves out
how a step makes its data.

``--meshes`` trains our model over several devices, as ``--mesh`` of the training scripts does,
mesh by mesh. Along data and fsdp each device has ``batch_size`` sequences of its own, so that
"of the first" is tokens per second of a device beside those with the first mesh (weak scaling).
``--preset=meshes`` adds one sequence of 131,072 tokens, on one GPU and along sequence.

On a GPU "on the GPU" is the time of our kernels alone, by JAX's profiler, without the host, and a
second table has the ten kinds of kernels that take longest; step.json has them all. MFU is the part
of the chip's peak as training reports it: 6 operations a parameter and token, whatever the model
computes anew. "GiB moved" is what all operations read and write, as XLA counts it.

Source: https://arxiv.org/abs/2502.10297, language models (340M, and n_h = 2 with half the heads).
Expect: experiments/results/gpu/step/ has an H200's, results/gpu/meshes/ those of two.
Takes: on a GPU of 80 GB 3 minutes with n_h = 1 and 5 with 2; with ``--preset=small`` seconds
    on a CPU.
"""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from deltaproduct_jax.errors import ConfigError
from experiments.lib import flags
from experiments.lib.bench import training_steps
from experiments.lib.bench.peers.fla_model import check_peer, peer_rows
from experiments.lib.bench.report import (
    TIMES,
    begun,
    known_columns,
    shown,
    times,
    write_report,
)
from experiments.lib.bench.step_models import FOR_EACH, PRESETS, StepConfig
from experiments.lib.bench.training_steps import ALONE, OURS, Case, Row, measured, our_rows

SHOWN_KERNELS = 10


def cases(config: StepConfig, ours: bool) -> list[Case]:
    """Ours of each model over each mesh, or the peers."""
    timing = (config.steps, config.repeats, config.budget_s)
    found = []
    for index, model in enumerate(config.models):
        known = {name: getattr(model, name) for name in ("num_householder", "num_heads", *FOR_EACH)}
        about = (model.training, config.model(model))
        for place, mesh in enumerate(model.meshes if ours else ()):
            tokens = model.rows(mesh) * model.length
            told = known | {"place": [index, place], "mesh": mesh, "tokens": tokens}
            arguments = (*about, config.tokens(model, mesh), *timing, mesh)
            found.append(Case(our_rows, OURS, arguments, told))
        if config.peer and not ours:
            tokens = model.rows(ALONE) * model.length
            told = known | {"place": [index, 1], "mesh": ALONE, "tokens": tokens}
            arguments = (*about, config.peer_precisions.split(","), config.tokens(model), *timing)
            found.append(Case(peer_rows, config.peer, arguments, told))
    return found


def compared(rows: Sequence[Row]) -> list[Row]:
    """The rows in order of models, with tokens per second, and these beside the first row's."""
    rows = sorted(rows, key=lambda row: row["place"])
    firsts: dict[int, Row] = {}
    for row in rows:
        first = firsts.setdefault(row["place"][0], row)
        if "error" in row:
            continue
        row["tokens_per_s"] = 1e3 * row["tokens"] / row["median_ms"]
        devices = row.setdefault("devices", 1)
        row["ours_times_faster"] = row["of_the_first"] = None
        if "error" not in first:
            per_device = row["tokens_per_s"] / devices
            of_the_first = per_device * first["devices"] / first["tokens_per_s"]
            ours = row["implementation"] == OURS
            row["of_the_first" if ours else "ours_times_faster"] = (
                of_the_first if ours else 1 / of_the_first
            )
    return rows


COLUMNS = {"batch_size": "B", "length": "T", "hidden_size": "D", "gated": "gated"}
COLUMNS |= {"remat": "remat"}
HEAD = ("n_h", "heads", *COLUMNS.values(), "model", "mesh", "parameters", *TIMES)
HEAD += ("on the GPU, ms", "tokens/s", "MFU", "of the first", "ours x faster", "compile s")
HEAD += ("GiB moved", "temp GiB", "peak GiB", "first loss", "last loss")


def sizes_of(rows: Sequence[Row]) -> list[list[Any]]:
    """Of each row n_h, heads, and those of `COLUMNS` in which rows differ."""
    differ = {name: len({row.get(name) for row in rows}) > 1 for name in COLUMNS}
    found = []
    for row in rows:
        more = {name: row.get(name) if differ[name] else None for name in COLUMNS}
        if more["gated"] is not None:
            more["gated"] = ("no", "yes")[more["gated"]]
        found.append([row["num_householder"], row["num_heads"], *more.values()])
    return found


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown, and below it what did not run."""
    lines, failed = [], []
    for row, sizes in zip(rows, sizes_of(rows), strict=True):
        names = [*sizes, row["implementation"], row.get("mesh")]
        if "error" in row:
            lines.append([*names, *[None] * (len(HEAD) - len(names))])
            failed.append(
                f"n_h = {sizes[0]}, {row['implementation']} over {row.get('mesh')} did not run: "
                f"{row['error']}"
            )
            continue
        # A peer has no more than its times.
        in_gib = ("moved_mib", "temp_mib", "peak_mib")
        memory = [row.get(name) and row[name] / 1024 for name in in_gib]
        lines.append(
            [
                *(*names, f"{row['parameters']:,}", *times(row)),
                shown(row.get("device_ms"), ".4g"),
                *(f"{row['tokens_per_s']:,.0f}", shown(row.get("mfu"), ".1%")),
                *(shown(row.get(name), ".2f") for name in ("of_the_first", "ours_times_faster")),
                f"{row['compile_s']:.1f}",
                *(shown(gib, ".2f") for gib in memory),
                *(f"{row[name]:.3f}" for name in ("first_loss", "last_loss")),
            ]
        )
    return "\n\n".join([known_columns(HEAD, lines), *failed, *table_of_kernels(rows)])


def table_of_kernels(rows: Sequence[Row]) -> list[str]:
    """The kinds of kernels that take longest, if any were seen."""
    lines = [
        [sizes[0], *sizes[2:], f"`{kind}`", f"{milliseconds:.3g}"]
        for row, sizes in zip(rows, sizes_of(rows), strict=True)
        for kind, milliseconds in list(row.get("kernels_ms", {}).items())[:SHOWN_KERNELS]
    ]
    return [known_columns(("n_h", *COLUMNS.values(), "kernels", "ms"), lines)] if lines else []


def command(argv: Sequence[str]) -> None:
    """Measures, prints the table, writes step.json and step.md."""
    parsed = flags.parse(argv, {"step": StepConfig}, PRESETS)
    config = StepConfig(**parsed.sections["step"])
    if config.peer:
        training_steps.apart(check_peer)  # before minutes are spent
    record = begun("op.step_speed", argv, config=dataclasses.asdict(config), rows=[])
    text = ""
    for ours, at_once in ((True, config.at_once), (False, 1)):
        for rows in measured(cases(config, ours), config.gpus, at_once):
            # What is measured stays, whatever comes next.
            record["rows"] = compared([*record["rows"], *rows])
            print(table(rows), file=sys.stderr)
            text = write_report(parsed.workdir, "step", record, page)
    print(text)
    failed = [r for r in record["rows"] if "error" in r and r["implementation"] == OURS]
    if failed:
        raise ConfigError(f"our own model did not run: {failed[0]['error']}")


def page(record: Mapping[str, Any]) -> list[str]:
    """What step.md holds."""
    config = {name: _joined(value) for name, value in record["config"].items()}
    machines = dict.fromkeys(row["machine"] for row in record["rows"] if "machine" in row)
    gated = {"0": "ungated", "1": "gated", "False": "ungated", "True": "gated"}
    head = (
        f"B={config['batch_size']} T={config['length']} D={config['hidden_size']}, "
        f"{config['num_layers']} blocks, K=V={config['head_dim']}, vocabulary "
        f"{config['vocab_size']}, {gated.get(config['gated'], 'ungated and gated')}; ours in "
        f"{config['dtype']}, remat={config['remat']}; {'; '.join(machines)}"
    )
    return [head, table(record["rows"])]


def _joined(value: Any) -> str:
    """Of a list what differs, in order."""
    values = dict.fromkeys(value if isinstance(value, list | tuple) else [value])
    return " or ".join(map(str, values))


if __name__ == "__main__":
    sys.exit(flags.run(command, sys.argv[1:]))
