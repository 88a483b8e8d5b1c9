"""Does a language model's training step fit devices that are not there, and what does it send?

    python -m experiments.plan_pod --workdir=runs/plan --topology=v5e:16x16 --preset=805m_3 \\
        --mesh=data:-1,fsdp:16
    python -m experiments.plan_pod --workdir=runs/plan --topology=h100:8 --preset=340m_2

compiles the step that ``experiments.language_modeling`` jits for a topology of TPUs or GPUs, of
which no device is needed; nothing is run, and no parameter is drawn. Memory is the compiler's own
account for one device. Collectives are read from the compiled program, those of a loop as often as
it runs; a size is that of the array on one device. Operations are those of all products of the
trace, what is computed anew backwards among them.

Times are no measurements. "compiler" is the sum of what the cost model of the compiler for TPUs
expects of each operation, one after another: it knows neither kernels of Pallas nor links between
chips. "products" and "memory" are what operations and traffic would take at the published peaks.

``--search`` looks for the most sequences that a device can have at once, by up to three programs
and the line through them. ``--scan_layers`` is on here, since 24 blocks one by one compile for far
longer; the scan holds a copy of the parameters of the blocks, which counts as temporary memory.

Source: this project; the models are those of https://arxiv.org/abs/2502.10297.
Expect: experiments/results/language/plans/ has plans of four models for v4, v5e, v5p and v6e.
Takes: 2 to 10 minutes a program on a CPU core and some 3 GiB; extra "tpu" or "cuda", no device.
"""

import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from deltaproduct_jax.compilers import tpu
from deltaproduct_jax.compilers.topologies import CHIPS, GIB, kind_of, platform_of
from deltaproduct_jax.errors import require_at_least
from deltaproduct_jax.models import ModelConfig
from deltaproduct_jax.parallel.config import DeviceConfig
from deltaproduct_jax.settings import check_fields, setting
from deltaproduct_jax.training.config import RunConfig, TrainConfig
from deltaproduct_jax.training.text import TextTask
from experiments.lib import flags, language_presets
from experiments.lib.bench.report import begun, markdown, shown, write_report
from experiments.lib.compilers import versions
from experiments.lib.pod.batches import fits, largest_rows, memory_of_step
from experiments.lib.pod.compiler import compile_apart

DEFAULT = "340m_2"
_NAMED = language_presets.PRESETS | {"default": language_presets.PRESETS[DEFAULT]}
_SET_HERE = {"scan_layers": True, "accumulation_steps": 1}
PRESETS = {name: values | _SET_HERE for name, values in _NAMED.items()}
# What the program of a step depends on; what else a run has is no flag here.
USED = {"train_length", "packing", "mesh", "accumulation_steps", "optimizer", "decayed"}
USED |= {"clip_norm", "loss_chunk_size", "z_loss", "spike_deviations"}
NOT_OF_MODEL = {"initializer", "initializer_range"}


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """For what is compiled."""

    topology: str = setting("v5e:16x16", "chips and how they are joined, as v5e:16x16 or h100:8")
    rows: int = setting(1, "sequences that each device of data and fsdp has at once", least=1)
    search: bool = setting(True, "look for the most of them that fit, by three programs at most")
    timeout_s: float = setting(3600.0, "seconds after which a compilation is given up", above=0)

    def __post_init__(self) -> None:
        """Checks every field."""
        check_fields(self)
        kind_of(self.topology)


SECTIONS = {"plan": PlanConfig, "task": TextTask, "model": ModelConfig, "train": TrainConfig}
SECTIONS |= {"devices": DeviceConfig}


def _excluded() -> set[str]:
    of_run = {f.name for kind in (TextTask, TrainConfig, DeviceConfig) for f in fields(kind)}
    return of_run - USED | NOT_OF_MODEL


def run_of(sections: Mapping[str, Mapping[str, Any]]) -> RunConfig:
    """The run whose step is compiled, but for its batch."""
    task, train, model = (sections[name] for name in ("task", "train", "model"))
    require_at_least("accumulation_steps", train["accumulation_steps"], 1)
    batches = {"batch_size": train["accumulation_steps"], "eval_batch_size": 1}
    return RunConfig(
        TextTask(**task, eval_lengths=(task["train_length"],)),
        ModelConfig.variant(model)(**model),
        TrainConfig(**train, **batches),
    )


def memory_table(found: Mapping[str, Any], memory_bytes: int) -> str:
    """Bytes of a device by kind, beside the chip's."""
    total = memory_of_step(found)
    kinds = {
        "parameters, float32": found["parameters_bytes"],
        "moments of the optimiser": found["moments_bytes"],
        "tokens of a batch": found["batch_bytes"],
    }
    if "temp_bytes" in found:
        said = found["argument_bytes"] - sum(kinds.values())
        kinds["counts, and tiles filled up"] = said
        kinds["temporary: activations, gradients, copies"] = found["temp_bytes"]
        kinds["results beside what was given"] = found["output_bytes"] - found["alias_bytes"]
        kinds["program"] = found["generated_code_bytes"]
    elif total is not None:
        kinds["all else"] = total - sum(kinds.values())
    kinds["together"] = total
    kinds["of the chip"] = memory_bytes
    kinds["of it for programs"] = found.get("limit_bytes")
    lines = [
        [kind, shown(None if size is None else size / GIB, ".2f"), _share(size, memory_bytes)]
        for kind, size in kinds.items()
    ]
    return markdown(("on a device", "GiB", "of the chip's, %"), lines)


def _share(size: int | None, memory_bytes: int) -> str:
    return shown(None if size is None else 100 * size / memory_bytes, ".1f")


def sent_table(found: Mapping[str, Any]) -> str:
    """What is sent in a step: kinds and axes, how often, and the arrays."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for sent in found["sent"]:
        groups.setdefault((sent["kind"], ", ".join(sent["axes"])), []).append(sent)
    lines = [
        [
            *(kind, axes or "-", sum(sent["count"] for sent in of_kind)),
            f"{sum(sent['count'] * sent['size'] for sent in of_kind) / 2**20:,.1f}",
            f"{max(sent['size'] for sent in of_kind) / 2**20:,.2f}",
        ]
        for (kind, axes), of_kind in groups.items()
    ]
    return markdown(("collective", "along", "times a step", "MiB, all", "MiB, largest"), lines)


def time_table(found: Mapping[str, Any], kind: str) -> str:
    """Operations and traffic of a device, and the times that follow; none is measured."""
    lines = [["operations of products", f"{found['operations'] / 1e12:,.2f} T"]]
    if found["peak"] is not None:
        lines.append(["products, at the peak, ms", _ms(found["operations"] / found["peak"])])
    if "hbm_bytes" in found:
        lines.append(["traffic with memory", f"{found['hbm_bytes'] / GIB:,.1f} GiB"])
        lines.append(["memory, at the peak, ms", _ms(found["hbm_bytes"] / CHIPS[kind].bandwidth)])
    if found.get("model_cycles"):
        seconds = found["model_cycles"] / tpu.GENERATIONS[kind].hertz
        lines.append(["compiler, an estimate, ms", _ms(seconds)])
    return markdown(("of a device, a step", ""), lines)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f}"


def batch_table(compiled: Mapping[int, Mapping[str, Any]], limit: int) -> str:
    """What was compiled for the search."""
    lines = []
    for rows, found in sorted(compiled.items()):
        memory = memory_of_step(found)
        said = {True: "yes", False: "no", None: found.get("error", "-")}[fits(found, limit)]
        gib = shown(None if memory is None else memory / GIB, ".2f")
        lines.append([rows, f"{found['tokens']:,}", gib, said])
    return markdown(("sequences a device", "tokens a step", "GiB", "fits"), lines)


def verdict(compiled: Mapping[int, Mapping[str, Any]], line: int | None, limit: int) -> str:
    """The largest batch in words."""
    fitting = [rows for rows, found in compiled.items() if fits(found, limit)]
    text = "None of these fits"
    if fitting:
        text = f"Largest batch that was compiled and fits: {max(fitting)} sequences a device"
    return f"{text}. By the line through what was compiled: {shown(line)}."


def plan(config: PlanConfig, run: RunConfig, mesh: str) -> dict[str, Any]:
    """Compiles; all that is said of it."""
    kind = kind_of(config.topology)

    def compiled_with(rows: int) -> dict[str, Any]:
        found = compile_apart(run, config.topology, mesh, rows, config.timeout_s)
        print(batch_table({rows: found}, CHIPS[kind].memory_bytes), file=sys.stderr, flush=True)
        return found

    limit = CHIPS[kind].memory_bytes
    if config.search:
        compiled, line = largest_rows(compiled_with, config.rows, limit)
    else:
        compiled, line = {config.rows: compiled_with(config.rows)}, None
    return {"compiled": compiled, "line": line, "memory_bytes": limit, "chip": kind}


def page(record: Mapping[str, Any]) -> list[str]:
    """Paragraphs and tables of a plan."""
    kind, limit = record["chip"], record["memory_bytes"]
    compiled = {int(rows): found for rows, found in record["compiled"].items()}
    first = compiled[record["rows"]]
    cut = [first["mesh"].get(axis, 1) for axis in ("sequence", "tensor")]
    on = "a device" if math.prod(cut) == 1 else f"{math.prod(cut)} devices together"
    fit = {True: "It fits", False: "It does not fit", None: "Whether it fits is not known"}
    parts = [
        f"{record['preset']} on {record['topology']}, mesh {record['mesh']}: "
        f"{first['parameters']:,} parameters, {first['tokens']:,} tokens a step, "
        f"{record['rows']} x {record['length']:,} tokens on {on} at once. "
        f"{fit[fits(first, limit)]}. Nothing was run; {record['versions']}.",
        memory_table(first, limit),
    ]
    for name in ("error", "unread"):
        if name in first:
            parts.append(f"What is sent is not known; the compiler says: {first[name]}")
    parts.append(time_table(first, kind))
    if "sent" in first:
        parts.append(sent_table(first) if first["sent"] else "Nothing is sent.")
        calls = ", ".join(f"{n} {name}" for name, n in first["custom_calls"].items())
        parts.append(f"Custom calls: {calls or 'none'}.")
    if record["search"]:
        parts += [batch_table(compiled, limit), verdict(compiled, record["line"], limit)]
    return parts


def command(argv: Sequence[str]) -> None:
    """Compiles, prints the plan, writes it by the names of preset and topology."""
    parsed = flags.parse(argv, SECTIONS, PRESETS, exclude=_excluded())
    config, run = PlanConfig(**parsed.sections["plan"]), run_of(parsed.sections)
    mesh = DeviceConfig(**parsed.sections["devices"]).mesh
    named = DEFAULT if parsed.preset in (None, "default") else parsed.preset
    preset = "config" if parsed.saved else named
    record = begun("plan_pod", argv, preset=preset, mesh=mesh)
    record |= {"topology": config.topology, "rows": config.rows, "search": config.search}
    record |= {"length": run.task.train_length, "versions": versions(platform_of(config.topology))}
    record |= plan(config, run, mesh)
    name = f"{preset}_{config.topology.replace(':', '_')}"
    print(write_report(parsed.workdir, name, record, page))


if __name__ == "__main__":
    sys.exit(flags.run(command, sys.argv[1:]))
