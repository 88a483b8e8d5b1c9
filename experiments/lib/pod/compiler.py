"""Compiles a run's training step for a topology that is not there, in a process of its own."""

import collections
import dataclasses
import os
import re
import resource
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from deltaproduct_jax.compilers import child, hlo_cost, kernel_traffic, topologies, tpu
from deltaproduct_jax.compilers.collectives import collectives_in_a_run
from deltaproduct_jax.compilers.memory import memory_of
from deltaproduct_jax.compilers.products import product_operations
from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.parallel.config import DeviceConfig
from deltaproduct_jax.training.config import RunConfig
from deltaproduct_jax.training.measuring.throughput import peak_of
from deltaproduct_jax.training.progress import compiling
from experiments.lib import environment
from experiments.lib.compilers import require_compiler
from experiments.lib.pod.step_program import StepProgram, bytes_on_a_device, step_program

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# As the compiler for TPUs says it where all, or temporaries alone, are too much.
_USED = (
    re.compile(r"Used (?P<used>[\d.]+)(?P<unit>[KMGT]) of (?P<limit>[\d.]+)(?P<of>[KMGT]) hbm"),
    re.compile(
        r"\((?P<used>[\d.]+)(?P<unit>[KMGT])\) exceeds available HBM "
        r"\((?P<limit>[\d.]+)(?P<of>[KMGT])\)"
    ),
)


def compile_apart(
    config: RunConfig, topology: str, mesh: str, rows: int, timeout_s: float
) -> dict[str, Any]:
    """Compiles the step of a run in a child process, which a compiler may abort.

    Args:
        config: the run, whatever its batch is.
        topology: as `topologies.devices_of` takes it.
        mesh: as ``--mesh`` has it.
        rows: sequences that each device of the batch's axes has at once.
        timeout_s: after which it is given up.

    Returns:
        What `compile_here` gives, or "error" where the compiler gave nothing.

    Raises:
        ConfigError: the compiler is not installed, or the run does not fit the mesh.
    """
    platform = topologies.platform_of(topology)
    require_compiler(platform)
    variables = tpu.child_environment(environment.extra_folder(platform))
    if platform == "cuda":
        path = [variables["PYTHONPATH"], str(environment.extra_folder("gpu"))]
        variables |= {"PYTHONPATH": os.pathsep.join(path), "DELTAPRODUCT_COMPUTE_CAPABILITY": "90"}
    entry = {"config": config.to_dict(), "topology": topology, "mesh": mesh}
    entry["rows"] = rows
    with compiling(f"the training step for {topology}, {rows} sequences a device"):
        found, ending = child.call_apart(
            f"{__name__}:{compile_here.__name__}",
            [entry],
            folder=environment.ROOT,
            environment=variables,
            timeout_s=timeout_s,
        )
    if not found:
        return {"error": f"the compiler {ending}"}
    if "refused" in found[0]:
        raise ConfigError(found[0]["refused"])
    return found[0]


def compile_here(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Compiles one step in this process, which must have been started for it.

    Args:
        entry: "config" as `RunConfig.to_dict` gives it, and the other arguments of `compile_apart`.

    Returns:
        What `_of_program` says of the trace; then, of the compiled program, memory, what is sent
        and the compiler's estimate, or "needed_bytes" and "limit_bytes" where it does not fit, or
        "error"; or only "refused", where the run does not fit the mesh.
    """
    began = time.perf_counter()
    try:
        chips = topologies.devices_of(entry["topology"])
        devices = DeviceConfig(mesh=entry["mesh"])
        config = _with_rows(entry, devices.sizes_of(len(chips)))
        program = step_program(config, devices, chips)
    except ConfigError as error:
        return {"refused": str(error)}
    platform = topologies.platform_of(entry["topology"])
    found = _of_program(program, platform)
    lowered = program.lower()
    found["lower_s"] = time.perf_counter() - began
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        written = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        try:
            compiled = lowered.compile(compiler_options=written if platform == "tpu" else None)
        except jax.errors.JaxRuntimeError as error:
            return found | _of_failure(str(error))
        found["compile_s"] = time.perf_counter() - began
        found["host_memory_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return found | _of_compiled(compiled, program, platform, Path(folder))


def _with_rows(entry: Mapping[str, Any], sizes: Mapping[str, int]) -> RunConfig:
    """The run with the batch that gives each device its sequences at once."""
    config = RunConfig.from_dict(entry["config"])
    over = sizes["data"] * sizes["fsdp"]
    whole = over * entry["rows"] * config.train.accumulation_steps
    sizes = {"batch_size": whole, "eval_batch_size": over, "eval_sequences": over}
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **sizes))


def _of_program(program: StepProgram, platform: str) -> dict[str, Any]:
    """What the trace alone says: devices, bytes of a device by kind, operations of a device."""
    mesh, state = program.layout.mesh, program.state
    kind = mesh.devices.flat[0].device_kind
    return {
        "device_kind": kind,
        "peak": peak_of(kind),
        "devices": mesh.size,
        "mesh": {name: size for name, size in program.layout.sizes.items() if size > 1},
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
        "tokens": program.batch.inputs.size,
        "parameters_bytes": bytes_on_a_device(state.params),
        "moments_bytes": bytes_on_a_device(state.opt_state),
        "batch_bytes": bytes_on_a_device(program.batch),
        "operations": product_operations(program.traced.jaxpr.jaxpr, platform) // mesh.size,
    }


def _of_failure(message: str) -> dict[str, Any]:
    """Of a program that was refused: how much memory it would take at least, if that was why."""
    match = next(filter(None, (form.search(message) for form in _USED)), None)
    if match is None:
        return {"error": message.splitlines()[0][:300]}
    size = lambda number, unit: int(float(match[number]) * _UNITS[match[unit]])
    return {"needed_bytes": size("used", "unit"), "limit_bytes": size("limit", "of")}


def _text_of(compiled: Any, written: Path) -> str:
    """The program's text: as JAX reads it, or as the compiler wrote it into a folder.

    A compiler newer than JAX may make what JAX cannot read.
    """
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError:
        texts = list(written.glob("*.after_optimizations.txt"))
        if not texts:
            raise
        return max(texts, key=lambda path: path.stat().st_size).read_text()


def _of_compiled(
    compiled: Any, program: StepProgram, platform: str, written: Path
) -> dict[str, Any]:
    """Memory; and what is sent and the estimate, or "unread" where the program's text says less."""
    found = memory_of(compiled)
    try:
        text = _text_of(compiled, written)
        times = hlo_cost.passes(text)
        sent = collectives_in_a_run(text, program.layout.sizes, times)
        if platform == "tpu":
            kernels = kernel_traffic.kernel_bytes(program.traced.jaxpr.jaxpr)
            cost = dataclasses.asdict(hlo_cost.cost(text, kernels))
            found |= {name: cost[name] for name in ("model_cycles", "hbm_bytes", "custom_calls")}
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        return found | {"unread": str(error).splitlines()[0][:300]}
    if platform == "cuda":
        targets = re.findall(r'custom_call_target="([^"]+)"', text)
        found["custom_calls"] = dict(collections.Counter(targets))
    found["sent"] = [
        {**each._asdict(), "axes": list(each.axes), "count": count}
        for each, count in sorted(sent.items())
    ]
    return found
