"""The command that writes text, from a run directory; and the one that times writing."""

import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deltaproduct_jax import load_run
from deltaproduct_jax.data.tokenizer import ByteTokenizer
from deltaproduct_jax.evaluation import models
from deltaproduct_jax.interop import fla
from deltaproduct_jax.models import ModelConfig, SequenceModel
from deltaproduct_jax.models.generation import Generator, Sampling
from deltaproduct_jax.strict_json import to_json
from deltaproduct_jax.training.checkpoints import Checkpoints
from deltaproduct_jax.training.config import RunConfig, TrainConfig
from deltaproduct_jax.training.optimizer import make_optimizer
from deltaproduct_jax.training.records import CHECKPOINTS, CONFIG
from deltaproduct_jax.training.step import init_state, split_model
from deltaproduct_jax.training.text import TextTask
from experiments import generate
from experiments.lib import flags, language_runs
from experiments.op import generation_speed

ROOT = Path(__file__).parents[2]


def save(run, config, data=None):
    """A run directory with one checkpoint of a model that was not trained."""
    model = SequenceModel(config.model, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    nudge = lambda a: jnp.asarray(a + 0.4 * rng.normal(size=a.shape), a.dtype)
    nnx.update(model, jax.tree.map(nudge, nnx.state(model, nnx.Param)))
    state = init_state(split_model(model)[1], make_optimizer(config.train))
    state = state._replace(step=jnp.asarray(3, state.step.dtype))
    run.mkdir()
    (run / CONFIG).write_bytes(to_json(config.to_dict()))
    with Checkpoints(run / CHECKPOINTS) as checkpoints:
        checkpoints.save(state, 3, (1.0, 1.0), data)
        checkpoints.wait()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    sizes = {"hidden_size": 8, "num_heads": 2, "head_dim": 4, "intermediate_size": 8}
    path = tmp_path_factory.mktemp("generate") / "run"
    # Vocabularies are rounded up: what the tokenizer does not have is never written.
    save(path, RunConfig(TextTask(), ModelConfig(vocab_size=264, **sizes), TrainConfig()))
    return path


def written(capsys, run, *argv):
    assert flags.run(generate.command, [f"--run={run}", *argv]) == 0
    return capsys.readouterr()


def test_the_text_is_the_generators(run, capsys):
    model, _, step = load_run(run)
    assert step == 3
    tokenizer = ByteTokenizer()
    prompt = [tokenizer.bos_id, *b"def f"]
    sampling = Sampling(temperature=0.8, top_p=0.95)
    generator = Generator(model, decode=tokenizer.decode, vocab_size=257)
    options = {"sampling": sampling, "stop_tokens": (256,), "max_tokens": 40, "seed": 4}
    found = generator.generate([prompt], **options)[0]
    want = found.text
    assert len(want) > 10
    argv = ["--prompt=def f", "--max_tokens=40", "--temperature=0.8", "--top_p=0.95", "--seed=4"]
    shown = written(capsys, run, *argv)
    assert shown.out == f"def f{want}\n"
    assert shown.err.startswith(f"{len(found.tokens)} tokens in ")
    assert written(capsys, run, *argv, "--echo=false").out == f"{want}\n"
    stop = want[8:10]
    stopped = written(capsys, run, *argv, f"--stop={stop}").out
    assert stopped == f"def f{want[: want.index(stop)]}\n"
    # The same text again as the first of several, of which each is another.
    more = ["--samples=2", "--prompt=x", "--checkpoint=3", "--rows=1"]
    several = written(capsys, run, *argv, *more).out
    parts = several.split("== ")
    assert [part.partition(" ==")[0] for part in parts[1:]] == [f"{i} of 4" for i in (1, 2, 3, 4)]
    assert parts[1] == f"1 of 4 ==\ndef f{want}\n"
    assert parts[2].startswith("2 of 4 ==\ndef f")
    assert parts[2][11:] != parts[1][11:]
    assert parts[3].startswith("3 of 4 ==\nx")


def test_attention_keeps_as_much_as_is_read(tmp_path, capsys):
    """Its room is for as many tokens as a prompt and what follows have."""
    sizes = {"hidden_size": 8, "num_heads": 2, "head_dim": 4, "intermediate_size": 8}
    model = ModelConfig(257, mixer="transformer", max_length=4, **sizes)
    save(tmp_path / "run", RunConfig(TextTask(), model, TrainConfig()))
    found = written(capsys, tmp_path / "run", "--prompt=abcd", "--max_tokens=5", "--seed=2")
    assert found.err.startswith("5 tokens in ")
    argv = [f"--run={tmp_path / 'run'}", "--prompt=a", "--max_tokens=2000000000"]
    assert flags.run(generate.command, argv) == flags.USAGE_ERROR
    says = "error: a prompt, max_tokens=2000000000 and rows=1 need at least"
    assert capsys.readouterr().err.startswith(says)


def test_text_is_shown_as_it_comes(run, monkeypatch):
    shown = []
    monkeypatch.setattr("builtins.print", lambda *text, **options: shown.append((text, options)))
    flags.run(generate.command, [f"--run={run}", "--prompt=a", "--max_tokens=40"])
    texts = [text for (text,), options in shown if options.get("flush")]
    assert texts[0] == "a"
    assert len(texts) > 4  # 40 tokens are three strides


def test_what_does_not_fit_is_one_line(run, tmp_path, capsys):
    for argv, text in {
        (): "--run is missing; give the directory of a language model's run",
        (
            f"--run={tmp_path}",
        ): f"run={tmp_path} has no config.json; it may be a run directory, or a folder of",
        (f"--run={run}", "--samples=1000000000"): "samples=1000000000 makes 1000000000 texts",
        (f"--run={run}", "--tokenizer=bpe"): "tokenizer='bpe' is not known; it may be bytes, mis",
        (f"--run={run}", "--max_tokens=0"): "max_tokens=0 is too small",
        (f"--run={run}", "--top_p=2"): "top_p=2.0 is too large; it may be up to 1",
        (f"--run={run}", "--checkpoint=7"): "checkpoint=7 is not in",
        (f"--run={run}", "--workdir=x"): "Unknown command line flag 'workdir'",
        (f"--run={run}", "text"): "argument 'text' is no flag",
        (f"--run={run}", "--stop="): "stop holds an empty string",
        (f"--run={run}", "--seed=-1"): "seed=-1 is too small",
    }.items():
        assert flags.run(generate.command, list(argv)) == flags.USAGE_ERROR
        error = capsys.readouterr().err
        assert text in error
        assert error.count("\n") == 1


def test_a_text_that_was_prepared_anew_is_not_read_by_its_new_tokenizer(tmp_path, capsys):
    config = RunConfig(TextTask(), ModelConfig(257, hidden_size=4, num_heads=1), TrainConfig())
    learnt = {"then": "huggingface 0123", "now": models.identity(models.describe(ByteTokenizer()))}
    for name, tokenizer in learnt.items():
        save(tmp_path / name, config, {"tokenizer": tokenizer})
    argv = [f"--run={tmp_path / 'then'}", "--prompt=a", "--max_tokens=1"]
    assert flags.run(generate.command, argv) == flags.USAGE_ERROR
    assert "then learnt: its text was prepared anew since; give" in capsys.readouterr().err
    assert models.open_model(str(tmp_path / "then"), tokenizer="bytes").tokenizer.kind == "bytes"
    assert models.open_model(str(tmp_path / "now")).tokenizer.kind == "bytes"
    found = language_runs.open_language_models([str(tmp_path / name) for name in learnt])
    assert [model.tokenizer for model in found] == list(learnt.values())


def test_a_run_without_text_needs_a_tokenizer(run, monkeypatch, capsys, tmp_path):
    away = TextTask(data=("elsewhere", "tokens"))
    config = RunConfig(away, ModelConfig(257, hidden_size=4, num_heads=1), TrainConfig())
    save(tmp_path / "away", config, {})
    assert flags.run(generate.command, [f"--run={tmp_path / 'away'}"]) == flags.USAGE_ERROR
    assert "names none that is here (data=elsewhere,tokens); it may" in capsys.readouterr().err
    monkeypatch.setattr(models, "_of_text", lambda names: None)
    argv = [f"--run={run}", "--prompt=a", "--max_tokens=2"]
    assert flags.run(generate.command, argv) == flags.USAGE_ERROR
    assert "tokenizer is missing, and" in capsys.readouterr().err
    assert written(capsys, run, *argv[1:], "--tokenizer=bytes").out.startswith("a")


def test_help_lists_every_field(capsys):
    with pytest.raises(SystemExit):
        generate.command(["--help"])
    shown = capsys.readouterr().out
    for config in (generate.GenerateConfig, Sampling):
        for field in dataclasses.fields(config):
            assert f"--{field.name}: {field.metadata['help']}" in shown
    assert "--workdir" not in shown


@pytest.mark.slow
def test_a_reader_that_has_seen_enough_ends_it_quietly(tmp_path):
    """As ``| head -c 5`` does; the model is one of flash-linear-attention's folders."""
    config = ModelConfig(
        vocab_size=257, mixer="gated_delta_product", hidden_size=8, num_heads=2, head_dim=4,
        intermediate_size=8, use_short_conv=True,
    )  # fmt: skip
    fla.save(SequenceModel(config, rngs=nnx.Rngs(0)), tmp_path)
    command = [sys.executable, "-m", "experiments.generate", f"--run={tmp_path}"]
    command += ["--tokenizer=bytes", "--max_tokens=100000", "--prompt=abcdefgh"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        assert process.stdout.read(5) == b"abcde"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 128 + signal.SIGPIPE  # as a shell says it


@pytest.mark.slow
def test_writing_is_timed(tmp_path, capsys):
    argv = [f"--workdir={tmp_path}", "--rows=2", "--max_tokens=4", "--stride=2", "--pieces=4"]
    argv += ["--prompt_tokens=6", "--repeats=2", "--hidden_size=8", "--num_layers=1"]
    argv += ["--num_heads=2", "--head_dim=4", "--intermediate_size=8", "--top_p=0.9"]
    assert flags.run(generation_speed.command, argv) == 0
    record = json.loads((tmp_path / "generation.json").read_text())
    assert [(row["what"], row["name"]) for row in record["rows"]] == [
        *(("write", name) for name in generation_speed.NAMES), ("read", "loop"), ("read", "pieces"),
    ]  # fmt: skip
    for row in record["rows"]:
        assert 0 < row["least"] <= row["tokens_per_s"] <= row["most"]
    assert record["rows"][0]["times_loop"] == 1
    assert record["sampling"]["top_p"] == 0.9
    assert "| write | 2 | scan |" in (tmp_path / "generation.md").read_text()
    assert "| write | 2 | scan |" in capsys.readouterr().out
