"""Text that travels, legs that go on, and what is kept of them."""

import dataclasses
import gzip
import json
import os
import signal
import sys
import tarfile
import threading

import pytest
from flax import nnx

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.models import SequenceModel, count_parameters
from deltaproduct_jax.training.stopping import Stopped
from deltaproduct_jax.training.text import TextTask
from experiments import language_modeling
from experiments.analysis import effective_rank, length_extrapolation
from experiments.language import pack_text, paper
from experiments.lib import children, flags
from experiments.lib.figures.records import drawn
from experiments.lib.legs.config import LegConfig
from experiments.lib.legs.leg import (
    LEGS,
    RANKS,
    TRAINING,
    Leg,
    curve,
    measurements,
    preparations,
    records_of,
)

FILES = {
    "fs/xfs/a.c": 50,
    "net/ipv4/b.c": 60,
    **{f"drivers/{i}.c": 10 + i for i in range(20)},
    "drivers/Makefile": 5,
    "Documentation/x.rst": 30,
}


@pytest.fixture
def source(tmp_path):
    """A folder of sources."""
    for path, size in FILES.items():
        file = tmp_path / "kernel" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("x" * size)
    return tmp_path / "kernel"


def packed(workdir, source):
    """What an archive of 100 bytes of training code holds."""
    pack_text.command([f"--workdir={workdir}", f"--source={source}", "--code_bytes=100"])
    with tarfile.open(workdir / pack_text.ARCHIVE) as archive:
        return {member.name: member.size for member in archive}


def test_text_is_chosen_alike_from_a_folder_and_an_archive(source, tmp_path, capsys):
    found = packed(tmp_path / "a", source)
    assert {"code/fs/xfs/a.c", "code/net/ipv4/b.c", "prose/Documentation/x.rst"} <= found.keys()
    trained = {path: size for path, size in found.items() if "drivers" in path}
    assert 60 < sum(trained.values()) <= 100
    assert not any(path.endswith("Makefile") for path in found)
    with tarfile.open(tmp_path / "kernel.tar.gz", "w:gz") as archive:
        archive.add(source, "linux-1.2")
    assert packed(tmp_path / "b", tmp_path / "kernel.tar.gz") == found
    record = json.loads((tmp_path / "b" / "text.json").read_text())
    assert record["bytes"] == {"code": sum(trained.values()) + 110, "prose": 30}
    assert record["files"] == len(found)
    capsys.readouterr()


def test_an_archive_holds_what_its_folder_does_however_it_was_made(source, tmp_path, capsys):
    found = packed(tmp_path / "a", source)
    with tarfile.open(tmp_path / "dot.tar", "w") as archive:
        archive.add(source, ".")
    assert packed(tmp_path / "b", tmp_path / "dot.tar") == found
    with tarfile.open(tmp_path / "twice.tar", "w") as archive:
        archive.add(source, "linux")
        archive.add(source / "drivers" / "3.c", "linux/drivers/3.c")
    with pytest.raises(ConfigError, match=r"twice\.tar' has 'linux/drivers/3\.c' twice"):
        packed(tmp_path / "c", tmp_path / "twice.tar")
    capsys.readouterr()


def test_a_name_that_is_no_text_is_refused_if_its_file_is_wanted(source, tmp_path, capsys):
    """Since the archive could be packed, and never prepared."""
    (source / os.fsdecode(b"caf\xe9.o")).write_text("x")
    found = packed(tmp_path / "a", source)
    (source / "drivers" / os.fsdecode(b"caf\xe9.rst")).write_text("x")
    with tarfile.open(tmp_path / "odd.tar", "w") as archive:
        archive.add(source, os.fsdecode(b"linux\xe9"))  # which is not a part of any path
    says = r"has 'drivers/caf\\udce9\.rst', a name that is no UTF-8, .* rename it$"
    for odd in (source, tmp_path / "odd.tar"):
        with pytest.raises(ConfigError, match=says):
            packed(tmp_path / "b", odd)
    assert not (tmp_path / "b").exists()
    (source / "drivers" / os.fsdecode(b"caf\xe9.rst")).unlink()
    assert packed(tmp_path / "c", source) == found
    capsys.readouterr()


def archive_of(folder, kind):
    """An archive of one kind, in the same folder."""
    path = folder.with_name(f"{folder.name}.tar.{kind}")
    with tarfile.open(path, f"w:{kind}") as archive:
        archive.add(folder, "linux-1.2")
    return path


def cut(data):
    return data[: len(data) // 2]


def flipped(data):
    middle = len(data) // 2
    return (
        data[:middle]
        + bytes(byte ^ 0x5A for byte in data[middle : middle + 40])
        + data[middle + 40 :]
    )


@pytest.mark.parametrize("kind", ["", "gz", "bz2", "xz"])
@pytest.mark.parametrize("damage", [cut, flipped])
def test_an_archive_that_is_damaged_is_one_line(kind, damage, source, tmp_path):
    """Wherever it is read, and nothing of it is kept."""
    path = archive_of(source, kind)
    data = path.read_bytes()
    if kind or damage is cut:  # else text that is another cannot be told from what it was
        path.write_bytes(damage(data))
        with pytest.raises(ConfigError, match=r"^source='.*' cannot be read: [a-zA-Z]"):
            packed(tmp_path / "a", path)
        with pytest.raises(ConfigError, match=r"^archive='.*' cannot be read: [a-zA-Z]"):
            paper.unpack(path, tmp_path / "text")
    assert {entry.name for entry in tmp_path.iterdir()} == {"kernel", path.name}


def test_a_checksum_behind_all_files_is_looked_at(source, tmp_path):
    """Of gzip, whose damaged bytes may be text as well."""
    whole = archive_of(source, "").read_bytes()
    path, data = tmp_path / "x.tar.gz", bytearray(gzip.compress(whole, compresslevel=0))
    text = next(file for file in sorted(source.rglob("*.c"))).read_bytes()
    data[data.find(text) + len(text) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"^source='.*' cannot be read: CRC check failed"):
        packed(tmp_path / "a", path)
    with pytest.raises(ConfigError, match=r"^archive='.*' cannot be read: CRC check failed"):
        paper.unpack(path, tmp_path / "text")
    assert not (tmp_path / "text").exists()


def test_an_archive_cut_between_two_files_is_one_line(tmp_path):
    (tmp_path / "x.c").write_text("x")
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name in ("linux/x.c", "linux/y.c"):
            archive.add(tmp_path / "x.c", name)
    (tmp_path / "x.tar").write_bytes((tmp_path / "x.tar").read_bytes()[:1024])
    with pytest.raises(
        ConfigError, match=r"x\.tar' cannot be read: (it ends too early|empty header)"
    ):
        packed(tmp_path / "a", tmp_path / "x.tar")


HARD = {"name": "code/l.c", "type": tarfile.LNKTYPE, "linkname": "gone"}
SOFT = {"name": "code/l.c", "type": tarfile.SYMTYPE, "linkname": "../../.."}


@pytest.mark.parametrize(
    ("member", "unpacked", "packing"),
    [
        (HARD, "linkname 'gone' not found", "has 'code/l.c' as a hard link, which is not read"),
        (SOFT, "would link to", "has no file of"),
        ({"name": "../x.c"}, "would be extracted to", r"has '\.\./x\.c', which is outside of it"),
    ],
)
def test_a_member_that_cannot_be_taken_is_one_line(member, unpacked, packing, tmp_path):
    path, info = tmp_path / "x.tar", tarfile.TarInfo()
    for name, value in member.items():
        setattr(info, name, value)
    with tarfile.open(path, "w") as archive:
        archive.addfile(info)
    with pytest.raises(ConfigError, match=rf"^archive='.*' cannot be read: .*{unpacked}"):
        paper.unpack(path, tmp_path / "text")
    with pytest.raises(ConfigError, match=rf"^source='.*' {packing}"):
        packed(tmp_path / "a", path)
    assert {entry.name for entry in tmp_path.iterdir()} <= {"x.tar", "a"}


def test_text_is_of_the_archive_that_is_named(source, tmp_path, capsys):
    workdir, text = tmp_path / "legs", tmp_path / "legs" / "text"
    with pytest.raises(ConfigError, match=r"\.gz' has no folder code or prose; it may be one of"):
        paper.unpack(archive_of(source, "gz"), text)
    assert not list(workdir.glob("*"))
    packed(tmp_path / "a", source)
    good = tmp_path / "a" / pack_text.ARCHIVE
    for _ in range(2):
        paper.unpack(good, text)
        assert (text / "prose/Documentation/x.rst").read_text() == "x" * 30
    with pytest.raises(ConfigError, match=r"is not what .*/text is of; give a new workdir"):
        paper.unpack(archive_of(source, "xz"), text)
    good.unlink()
    paper.unpack(good, text)  # which is not needed any more
    capsys.readouterr()


def test_what_cannot_be_packed_is_said_in_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"^--source is missing"):
        pack_text.PackConfig()
    with pytest.raises(ConfigError, match=r"^source=.*nowhere' cannot be read: "):
        packed(tmp_path / "a", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.py").write_text("more than a byte")
    with pytest.raises(ConfigError, match=r"^source=.*empty' has no file of"):
        packed(tmp_path / "a", tmp_path / "empty")
    argv = [f"--workdir={tmp_path / 'a'}", f"--source={tmp_path / 'empty'}"]
    with pytest.raises(ConfigError, match=r"^code_bytes=1 and prose_bytes=1 leave no file of sou"):
        pack_text.command([*argv, "--code=*.py", "--code_bytes=1", "--prose_bytes=1"])
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match=r"^source=.*pipe' cannot be read: it is no file"):
        packed(tmp_path / "a", tmp_path / "pipe")


@pytest.mark.parametrize("change", ["gone", "grown"])
def test_a_source_that_changes_while_it_is_packed_is_refused(change, source, tmp_path, monkeypatch):
    real, file = pack_text.chosen, source / "drivers" / "3.c"

    def late(*given):
        file.unlink() if change == "gone" else file.write_text("y" * 14)
        return real(*given)

    monkeypatch.setattr(pack_text, "chosen", late)
    says = r"kernel' has changed while it was read: 'drivers/3\.c' is gone or of another size$"
    argv = [f"--workdir={tmp_path / 'a'}", f"--source={source}"]
    with pytest.raises(ConfigError, match=says):
        pack_text.command(argv)
    assert not list((tmp_path / "a").iterdir())


@pytest.mark.parametrize("name", LEGS)
def test_every_leg_is_a_run(name, tmp_path, monkeypatch):
    monkeypatch.setattr(TextTask, "vocab_size", property(lambda self: 32_000))
    given = Leg(name, 3, tmp_path).training(64, 8, 2, 40, 1e-3)
    assert given[1:3] == ["-m", "experiments.language_modeling"]
    experiment = language_modeling.EXPERIMENT
    parsed = flags.parse(
        given[3:], experiment.sections, experiment.presets, exclude=("vocab_size",)
    )
    run = experiment.configure(parsed.sections)
    assert (run.train.seed, run.train.steps, run.train.accumulation_steps) == (3, 40, 2)
    assert run.task.data == (str(tmp_path / "tokens" / "code"),)
    assert run.model.registered.name == dict(
        [("36m_transformer", "transformer"), ("36m_mamba2", "mamba2")]
    ).get(name, "gated_delta_product" if "gated" in name or name == "tiny" else "delta_product")
    if name == "36m_mamba2":  # as published, and of no more parameters than the others
        assert not run.model.allow_neg_eigval
        assert (run.model.num_heads, run.model.num_v_heads) == (1, 12)
        shapes = nnx.eval_shape(lambda: SequenceModel(run.model, rngs=nnx.Rngs(0)))
        assert count_parameters(shapes)["total"] == 35_709_744


def test_commands_of_a_leg_know_each_other(tmp_path):
    leg = Leg("tiny", 0, tmp_path)
    written = {part for command in preparations(tmp_path, "bytes").values() for part in command}
    read = {flag for part in measurements(leg, 512, 256, 2) for flag in part.command}
    assert f"--workdir={leg.tokens('prose')}" in written
    assert f"--data={leg.tokens('prose')}" in read
    assert f"--run={leg.run}" in read


@pytest.mark.parametrize(("length", "rank_length"), [(300, 100), (7, 1), (32_768, 16_384)])
def test_a_trained_leg_is_measured_by_rows_of_any_length(length, rank_length, tmp_path):
    _, losses, ranks = measurements(Leg("tiny", 0, tmp_path), length, rank_length, 2)
    read = (losses, length_extrapolation, length_extrapolation.ExtrapolationConfig)
    for part, script, kind in (read, (ranks, effective_rank, effective_rank.RankConfig)):
        asked = flags.parse(part.command[3:], {"asked": kind}, script.PRESETS)
        kind(**asked.sections["asked"])
    assert length < 512 or {"--window=256", "--every=16"} <= {*losses.command, *ranks.command}


CHILD = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
print("ready", flush=True)
time.sleep(60)
"""


def test_a_part_ends_when_its_time_is_over_and_a_failure_is_one(capsys):
    children.run([sys.executable, "-c", CHILD], limit_s=1)
    children.run([sys.executable, "-c", "import time; time.sleep(60)"], limit_s=0.5)  # starting
    with pytest.raises(ConfigError, match=r"^a part failed with 7, see above: -c import sys"):
        children.run([sys.executable, "-c", "import sys; sys.exit(7)"])
    for code in (1, 2):  # which has said why
        with pytest.raises(SystemExit, match=f"^{code}$"):
            children.run([sys.executable, "-c", f"raise SystemExit({code})"])
    with pytest.raises(ConfigError, match="failed with 143"):  # by someone else
        children.run([sys.executable, "-c", "import sys; sys.exit(143)"], limit_s=60)
    capsys.readouterr()


def test_a_signal_ends_a_part_before_this_process(capsys):
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(Stopped, match="stopped by Ctrl-C; the same command goes on") as stopped:
        children.run([sys.executable, "-c", CHILD])
    assert stopped.value.exit_code == 130
    assert "import signal" in capsys.readouterr().err


def test_records_of_legs_are_drawn_together(tmp_path, capsys):
    for number, leg in enumerate(("213m_1", "213m_2")):
        rows = [{"step": i, "tokens": 100 * i, "loss": 3.0 - i, "time": 1.0} for i in (1, 2)]
        rows[1]["valid_loss"] = 1.5 + number
        record = {"leg": leg, "seed": 0, "curve": curve(rows), "results": None}
        assert "time" not in record["curve"][0]
        folder = tmp_path / "records" / f"{leg}_seed0"
        folder.mkdir(parents=True)
        (folder / TRAINING).write_text(json.dumps(record))
    heads = [{"trained": None, "end": end, "kept_at_starts": kept} for end, kept in KEPT]
    ranks = {"trained": None, "starts": [], "heads": {"0": heads[:1], "3": heads[1:]}}
    ranks["along"] = {name: [1, 2] for name in ("position", "mean", "low", "high")}
    (folder / RANKS).write_text(json.dumps(ranks))
    paper.command([f"--workdir={tmp_path}", "--stages=draw"])
    text = capsys.readouterr().out
    assert "| 213m_1 | 0 | 200 | - | - | 1.5000 | - | - | - | - | - |" in text
    assert "| 213m_2 | 0 | 200 | - | - | 2.5000 | - | - | - | 3.00 | 0.25 |" in text
    (tmp_path / "losses.png").unlink()
    assert [path.name for path in drawn(tmp_path, paper.Look(), pytest.fail)] == [
        "legs.md",
        "losses.png",
        "ranks.png",
    ]


KEPT = [(2.0, 0.5), (4.0, 0.25), (3.0, None)]


def test_settings_of_a_leg():
    config = LegConfig(tokens=10 * 32 * 4096 + 5)
    assert config.steps == 10
    for wrong, said in (
        ({"leg": "213m_4"}, "leg='213m_4'"),
        ({"stages": ("train", "sing")}, "stages='sing'"),
        ({"tokens": 100}, "tokens=100 must be one batch"),
        ({"stages": ()}, "stages is empty"),
        ({"accumulation_steps": 0}, "accumulation_steps=0 is too small"),
        ({"accumulation_steps": 3}, "batch_size=32 must be a multiple of accumulation_steps=3"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be greater than 0"),
        ({"train_s": -1.0}, "train_s=-1.0 must be greater than 0"),
    ):
        with pytest.raises(ConfigError, match=said):
            dataclasses.replace(config, **wrong)
    with pytest.raises(ConfigError, match="no records"):
        records_of(paper.Path("nowhere"))


@pytest.mark.slow
def test_a_leg_is_prepared_and_trained_and_goes_on(source, tmp_path, capfd):
    for folder in ("kernel/fs/xfs", "kernel/fs/btrfs", "kernel/drivers"):
        for number in range(8):
            file = tmp_path / folder / f"more{number}.c"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"int f{number}(void) {{ return {number}; }}\n" * 200)
    text = tmp_path / "text"
    pack_text.command([f"--workdir={text}", f"--source={source}"])
    command = [f"--workdir={tmp_path}/legs", f"--archive={text}/text.tar.xz", "--preset=tiny"]
    command += ["--stages=prepare,train", "--tokens=9000"]
    paper.command([*command, "--train_s=1"])
    assert "is not finished; the same command goes on" in capfd.readouterr().err
    paper.command(command)
    record = json.loads((tmp_path / "legs/records/tiny_seed0" / TRAINING).read_text())
    assert record["results"]["steps"] == record["curve"][-1]["step"] == 8
