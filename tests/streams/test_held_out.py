"""Files held out by their paths: those inside the folder that was given, wherever it lies."""

import fnmatch
import tarfile

import pytest

from deltaproduct_jax.data.config import PrepareConfig
from deltaproduct_jax.data.documents import list_sources
from deltaproduct_jax.data.preparation import prepare
from deltaproduct_jax.errors import ConfigError
from experiments.language import pack_text, paper
from experiments.lib.legs.leg import TEST_PATHS, VALID_PATHS

FILES = ("fs/xfs/a.c", "fs/xfs/libxfs/b.h", "fs/btrfs/c.c", "mm/d.c", "tools/mm/e.c", "net/f.c")
FILES += ("net/ipv4/g.c", "fs/h.c", "arch/x/mm/i.c", "net/ipv6/j.c", "mm.c", "drivers/k.h")
# What the runs of experiments/results/language were trained, selected and tested on.
PUBLISHED = {
    "valid": {"fs/xfs/a.c", "fs/xfs/libxfs/b.h", "mm/d.c", "tools/mm/e.c", "arch/x/mm/i.c"},
    "test": {"fs/btrfs/c.c", "net/ipv4/g.c"},
}


def made(folder, files=FILES):
    for number, name in enumerate(files):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"int f{number};\n" * 9)
    return folder


def config_for(folder, **fields):
    patterns = {"valid_paths": VALID_PATHS, "test_paths": TEST_PATHS, "pattern": ("*",)}
    return PrepareConfig((str(folder),), **patterns | {"tokenizer": "bytes", "workers": 1} | fields)


def split_by_path(folder):
    config = config_for(folder)
    found = {s.inside: config.split_of_path(s.inside) for s in list_sources([str(folder)], ["*"])}
    return {split: {name for name, of in found.items() if of == split} for split in PUBLISHED}


@pytest.mark.parametrize("of_an_archive", [False, True])
def test_the_published_split_is_that_of_the_archive_wherever_it_is_unpacked(
    of_an_archive, tmp_path
):
    source = made(tmp_path / "linux-6.1")
    (source / "Documentation").mkdir()
    (source / "Documentation/a.rst").write_text("prose")
    if of_an_archive:
        with tarfile.open(tmp_path / "linux.tar.gz", "w:gz") as archive:
            archive.add(source, "linux-6.1")
        source = tmp_path / "linux.tar.gz"
    pack_text.command([f"--workdir={tmp_path / 'packed'}", f"--source={source}", "--level=0"])
    held_out = set().union(*PUBLISHED.values())
    assert {name for name in FILES if pack_text.is_held_out(name)} == held_out
    for place in ("legs", "mm/net/ipv4/legs"):  # the second was all held out
        text = tmp_path / place / "text"
        text.parent.mkdir(parents=True)
        paper.unpack(tmp_path / "packed" / pack_text.ARCHIVE, text)
        assert split_by_path(text / "code") == PUBLISHED
    # As whole paths were matched, at a place that has no such name.
    whole = {f"/data/legs/text/code/{name}": name for name in FILES}
    for split, patterns in (("valid", VALID_PATHS), ("test", TEST_PATHS)):
        matched = {path for p in patterns for path in fnmatch.filter(whole, p)}
        assert {whole[path] for path in matched} == PUBLISHED[split]


def test_a_folder_around_the_text_holds_nothing_out(tmp_path):
    manifest = prepare(config_for(made(tmp_path / "mm" / "linux")), tmp_path / "out")
    counted = {split: said["documents"] for split, said in manifest["splits"].items()}
    assert counted == {"train": 5, "valid": 5, "test": 2}
    assert split_by_path(tmp_path / "mm/linux/mm/d.c") == {"valid": set(), "test": set()}
    assert config_for(tmp_path, valid_paths=("d.c",)).split_of_path("d.c") == "valid"


def test_patterns_that_match_nothing_are_refused_and_leave_nothing(tmp_path):
    folder = made(tmp_path / "linux")
    for name in ("valid_paths", "test_paths"):
        config = config_for(folder, **{name: (f"{folder}/mm/*",)})
        says = f"{name}='{folder}/mm/\\*' matches no file; .*, such as '/arch/x/mm/i.c'"
        with pytest.raises(ConfigError, match=says):
            prepare(config, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    assert config_for(folder, valid_paths=("mm/*",)).split_of_path("mm/d.c") == "valid"
