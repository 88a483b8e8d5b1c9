"""Plans for devices that are not there: the search, the tables, and a whole small plan."""

import json

import jax
import pytest

from deltaproduct_jax.compilers.topologies import GIB
from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.models import ModelConfig
from deltaproduct_jax.parallel.config import DeviceConfig
from deltaproduct_jax.training.config import RunConfig, TrainConfig
from deltaproduct_jax.training.text import TextTask
from experiments import plan_pod
from experiments.lib import compilers
from experiments.lib.pod import compiler
from experiments.lib.pod.batches import MOST_COMPILES, fits, largest_rows, memory_of_step
from experiments.lib.pod.step_program import bytes_on_a_device, step_program

TINY = {"hidden_size": 32, "num_heads": 2, "head_dim": 16, "intermediate_size": 64}


def compiled(rows, *, state=10, fixed=3, each=2.0, limit=None):
    """What the compiler would say of a program whose memory is a line; refused above ``limit``."""
    temporary = int(fixed + each * rows)
    found = {"parameters_bytes": 4, "moments_bytes": state - 4, "batch_bytes": 0, "tokens": rows}
    if limit is not None and state + temporary > limit:
        return found | {"needed_bytes": state + temporary, "limit_bytes": limit}
    sizes = {"argument": state, "temp": temporary, "output": state, "alias": state}
    return found | {f"{n}_bytes": size for n, size in sizes.items()} | {"generated_code_bytes": 0}


@pytest.mark.parametrize("first", [1, 4, 40])
@pytest.mark.parametrize("said", [True, False])
@pytest.mark.parametrize("limit", [100, 17, 15])
def test_the_largest_batch_is_found_by_three_programs(first, said, limit):
    wanted = (limit - 13) // 2
    found, line = largest_rows(lambda n: compiled(n, limit=limit if said else None), first, limit)
    assert len(found) <= MOST_COMPILES
    assert line == wanted
    assert max(rows for rows, entry in found.items() if fits(entry, limit)) == wanted


def test_nothing_fits_and_nothing_is_known():
    found, line = largest_rows(lambda n: compiled(n, limit=12), 2, 12)
    assert (line, any(fits(entry, 12) for entry in found.values())) == (0, False)
    assert plan_pod.verdict(found, line, 12).startswith("None of these fits. By the line")
    silent = {"parameters_bytes": 4, "moments_bytes": 8, "error": "the compiler aborted"}
    assert largest_rows(lambda n: silent, 2, 12) == ({2: silent}, None)
    assert (memory_of_step(silent), fits(silent, 12)) == (None, None)


def test_what_a_failure_says():
    found = compiler._of_failure(
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
        "hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G."
    )
    assert found == {"needed_bytes": int(20.5 * GIB), "limit_bytes": int(15.75 * GIB)}
    found = compiler._of_failure(
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
        "required for HLO temporaries (19.50G) exceeds available HBM (15.75G). HLO module: jit_f."
    )
    assert found == {"needed_bytes": int(19.5 * GIB), "limit_bytes": int(15.75 * GIB)}
    assert compiler._of_failure("INTERNAL: no\nmore") == {"error": "INTERNAL: no"}


def test_what_jax_cannot_read_is_read_as_the_compiler_wrote_it(tmp_path):
    class Newer:
        def as_text(self):
            raise jax.errors.JaxRuntimeError("INTERNAL: async-update should have 1 operands")

    with pytest.raises(jax.errors.JaxRuntimeError, match="async-update"):
        compiler._text_of(Newer(), tmp_path)
    for name, text in (
        ("0.init.after_optimizations", "short"),
        ("1.step", "of another pass, long"),
    ):
        (tmp_path / f"{name}.txt").write_text(text)
    (tmp_path / "2.step.after_optimizations.txt").write_text("the program")
    assert compiler._text_of(Newer(), tmp_path) == "the program"


@pytest.mark.usefixtures("all_devices")
def test_a_step_is_traced_over_a_mesh_without_arrays():
    model = ModelConfig(vocab_size=64, num_layers=1, **TINY)
    task = TextTask(train_length=32, eval_lengths=(32,))
    run = RunConfig(task, model, TrainConfig(batch_size=8, eval_batch_size=4, eval_sequences=4))
    program = step_program(run, DeviceConfig(mesh="data:2,fsdp:2"), jax.devices()[:4])
    whole = sum(x.size for x in jax.tree.leaves(program.state.params))
    assert program.layout.sizes == {"data": 2, "fsdp": 2, "sequence": 1, "tensor": 1}
    assert 2 * whole <= bytes_on_a_device(program.state.params) < 2.2 * whole  # norms are whole
    assert bytes_on_a_device(program.batch) == 2 * 32 * (4 + 4 + 1)
    assert not any(isinstance(x, jax.Array) for x in jax.tree.leaves(program[1:3]))


def test_flags_are_those_that_a_plan_depends_on():
    assert not {"data", "steps", "learning_rate", "batch_size", "seed"} & plan_pod.USED
    assert {"mesh", "train_length"} & plan_pod._excluded() == set()
    with pytest.raises(ConfigError, match=r"^topology='v5e' is not known"):
        plan_pod.PlanConfig(topology="v5e")
    with pytest.raises(ConfigError, match=r"^rows=0 is too small"):
        plan_pod.PlanConfig(rows=0)
    argv = ["--workdir=unused", "--accumulation_steps=0"]
    with pytest.raises(ConfigError, match=r"^accumulation_steps=0 is too small"):
        plan_pod.command(argv)


def test_a_plan_is_called_as_what_it_is_of(tmp_path, monkeypatch):
    """However the preset is written; a name that is not its own would stand over other numbers."""
    nothing = {"parameters_bytes": 1, "moments_bytes": 1, "batch_bytes": 1, "error": "none"}
    nothing |= {"tokens": 1, "mesh": {}, "parameters": 1, "operations": 1.0, "peak": None}
    compiled = []
    monkeypatch.setattr(plan_pod, "versions", lambda platform: "none")
    monkeypatch.setattr(
        plan_pod, "compile_apart", lambda run, *given: compiled.append(run.model) or nothing
    )
    model = {"num_layers": 3, "num_heads": 2, "head_dim": 8}
    (tmp_path / "own.json").write_text(json.dumps({"model": model, "task": {"train_length": 64}}))
    for written, name, layers in (
        ([], "340m_2", 24),
        (["--preset=default"], "340m_2", 24),
        (["--preset", "tiny"], "tiny", 2),
        (["-preset=tiny"], "tiny", 2),
        ([f"--config={tmp_path / 'own.json'}", "--accumulation_steps=1"], "config", 3),
    ):
        out = tmp_path / str(len(compiled))
        plan_pod.command([f"--workdir={out}", "--topology=v4:2x2x1", "--search=false", *written])
        assert sorted(path.stem for path in out.iterdir()) == [f"{name}_v4_2x2x1"] * 2
        assert json.loads((out / f"{name}_v4_2x2x1.json").read_text())["preset"] == name
        assert compiled[-1].num_layers == layers


def test_a_missing_compiler_is_said_in_one_line(monkeypatch):
    monkeypatch.setattr(compilers, "compiler_version", lambda platform: None)
    for platform, package in (("tpu", "libtpu"), ("cuda", "jax-cuda13-pjrt")):
        with pytest.raises(ConfigError, match=rf"^package {package}, .*--extra={platform}$"):
            compilers.require_compiler(platform)


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x2", "h100:2"])
def test_a_whole_plan(topology, tmp_path, capsys):
    platform = "cuda" if topology.startswith("h") else "tpu"
    try:
        compilers.require_compiler(platform)
    except ConfigError as error:
        pytest.skip(str(error))
    flags = [f"--{name}={value}" for name, value in (TINY | {"num_layers": 3}).items()]
    flags += ["--vocab_size=256", "--train_length=256", "--loss_chunk_size=128", "--search=false"]
    plan_pod.command(
        [f"--workdir={tmp_path}", f"--topology={topology}", "--mesh=fsdp:2", "--rows=2", *flags]
    )
    name = f"340m_2_{topology.replace(':', '_')}"
    record = json.loads((tmp_path / f"{name}.json").read_text())
    found = record["compiled"]["2"]
    assert fits(found, record["memory_bytes"])
    assert found["argument_bytes"] >= found["parameters_bytes"] + found["moments_bytes"]
    gathered = [s for s in found["sent"] if s["kind"] == "all-gather" and "fsdp" in s["axes"]]
    # Five matrices of a layer are as large, gathered on the way there and back; a GPU's compiler
    # sends several at once.
    most = max(s["count"] for s in gathered)
    assert most in ({3 * 5 * 2} if platform == "tpu" else {3, 6})
    assert found["operations"] > 6 * found["tokens"] * 3 * 3 * 32 * 64 / 2  # the MLPs alone
    text = capsys.readouterr().out
    assert "It fits. Nothing was run" in text
    assert ("compiler, an estimate, ms" in text) == (platform == "tpu")
