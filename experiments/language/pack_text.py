"""Which text do the language models here read? Packs it, so that it can travel to where they train.

    apt-get download linux-source-6.1 && dpkg -x linux-source-6.1_*.deb kernel
    python -m experiments.language.pack_text --workdir=runs/text \\
        --source=kernel/usr/src/linux-source-6.1.tar.xz

takes C files from an archive of sources, or from a folder, and its documentation as a second domain
of prose, and writes ``text.tar.xz`` with both and ``text.json`` with what was taken. The files held
out for validation and test, whole directories of them, are all taken, of the others as many as
``--code_bytes`` allows, in an order of hashes: the same files on every machine. The text is its
owners' (of the kernel GPL-2.0) and stays out of the repository.

Source: this project; https://arxiv.org/abs/2502.10297 reads code and prose too, of other sources.
Expect: some 60 MiB from 420 MB of C, which the paper's tokenizer makes 200 million tokens.
Takes: 10 minutes of a CPU core, nearly all for compressing.
"""

import dataclasses
import fnmatch
import hashlib
import io
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from deltaproduct_jax.errors import ConfigError, require_at_least
from deltaproduct_jax.files import user_path
from deltaproduct_jax.settings import check_fields, setting
from experiments.lib import flags
from experiments.lib.bench.report import command_line, write_json
from experiments.lib.language_legs import TEST_PATHS, VALID_PATHS

ARCHIVE = "text.tar.xz"


@dataclasses.dataclass(frozen=True)
class PackConfig:
    """What is taken; raises ConfigError where the fields make no sense."""

    source: str = setting("", "folder of sources, or an archive of one that tar reads")
    code: tuple[str, ...] = setting(("*.c", "*.h"), "names of files of code")
    prose: tuple[str, ...] = setting(("*.rst",), "names of files of prose")
    code_bytes: int = setting(420_000_000, "of code that is trained on, at most")
    prose_bytes: int = setting(20_000_000, "of prose, at most")
    level: int = setting(9, "of compression, from 0 to 9")

    def __post_init__(self) -> None:
        """Checks every field."""
        check_fields(self)
        if not self.source:
            raise ConfigError("--source is missing; give a folder of sources or an archive of one")
        for name in ("code_bytes", "prose_bytes"):
            require_at_least(name, getattr(self, name), 1)
        if not 0 <= self.level <= 9:
            raise ConfigError(f"level={self.level} must be from 0 to 9")

    def place_of(self, path: str) -> str | None:
        """The folder of the archive for a file of this path; None for one that is not taken."""
        name = PurePosixPath(path).name
        for folder, patterns in (("code", self.code), ("prose", self.prose)):
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
                return folder
        return None


def files_of(source: Path) -> Iterator[tuple[str, int, io.BufferedIOBase | Path]]:
    """Path, size and content of every regular file, in the source's order.

    Raises:
        ConfigError: it is neither a folder nor an archive.
    """
    if source.is_dir():
        for path in sorted(p for p in source.rglob("*") if p.is_file() and not p.is_symlink()):
            yield path.relative_to(source).as_posix(), path.stat().st_size, path
        return
    try:
        with tarfile.open(source, "r|*") as archive:
            for member in archive:
                if member.isreg():
                    inside = PurePosixPath(member.name).parts[1:]
                    yield "/".join(inside), member.size, archive.extractfile(member)
    except (OSError, tarfile.TarError) as error:
        raise ConfigError(f"source={str(source)!r} cannot be read: {error}") from error


def chosen(config: PackConfig, sizes: dict[str, int]) -> set[str]:
    """Paths that are taken: all that is held out of the code, and the rest in order of hashes."""
    taken = {path for path in sizes if config.place_of(path) == "code" and is_held_out(path)}
    for folder, most in (("code", config.code_bytes), ("prose", config.prose_bytes)):
        rest = [p for p in sizes if config.place_of(p) == folder and p not in taken]
        for path in sorted(rest, key=lambda p: hashlib.sha256(p.encode()).digest()):
            most -= sizes[path]
            if most < 0:
                break
            taken.add(path)
    return taken


def is_held_out(path: str) -> bool:
    """Whether a file of code is not for training."""
    return any(fnmatch.fnmatchcase(f"/{path}", p) for p in (*VALID_PATHS, *TEST_PATHS))


def command(argv: Sequence[str]) -> None:
    """Reads the source twice: for what is in it, and for what is taken."""
    parsed = flags.parse(argv, {"pack": PackConfig}, {"default": {}})
    config = PackConfig(**parsed.sections["pack"])
    source = user_path(config.source)
    sizes = {path: size for path, size, _ in files_of(source) if config.place_of(path)}
    taken = chosen(config, sizes)
    if not taken:
        raise ConfigError(f"source={config.source!r} has no file of {config.code}, {config.prose}")
    target = parsed.workdir / ARCHIVE
    partial = target.with_suffix(".partial")
    parsed.workdir.mkdir(parents=True, exist_ok=True)
    with tarfile.open(partial, "w:xz", preset=config.level) as archive:
        for path, size, content in files_of(source):
            if path in taken:
                data = content.read_bytes() if isinstance(content, Path) else content.read()
                entry = tarfile.TarInfo(f"{config.place_of(path)}/{path}")
                entry.size = size
                archive.addfile(entry, io.BytesIO(data))
    partial.replace(target)
    summed = {
        folder: sum(sizes[p] for p in taken if config.place_of(p) == folder)
        for folder in ("code", "prose")
    }
    record = {"command": command_line("language.pack_text", argv), "files": len(taken)}
    record |= {"bytes": summed, "archive_bytes": target.stat().st_size}
    record["sha256"] = hashlib.sha256(target.read_bytes()).hexdigest()
    write_json(parsed.workdir / "text.json", record)
    print(f"{target}: {record['archive_bytes'] / 2**20:.1f} MiB of {len(taken)} files, {summed}")


if __name__ == "__main__":
    sys.exit(flags.run(command, sys.argv[1:]))
