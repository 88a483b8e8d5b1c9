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
from collections.abc import Container, Iterator, Sequence
from pathlib import Path, PurePosixPath

from deltaproduct_jax.data.splits import matches, names_inside
from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.files import errors_as_one_line, user_path
from deltaproduct_jax.settings import check_fields, setting
from experiments.lib import archives, flags
from experiments.lib.bench.report import command_line, write_json
from experiments.lib.legs.leg import DOMAINS, TEST_PATHS, VALID_PATHS

ARCHIVE = "text.tar.xz"


@dataclasses.dataclass(frozen=True)
class PackConfig:
    """What is taken; raises ConfigError where the fields make no sense."""

    source: str = setting("", "folder of sources, or an archive of one that tar reads")
    code: tuple[str, ...] = setting(("*.c", "*.h"), "names of files of code")
    prose: tuple[str, ...] = setting(("*.rst",), "names of files of prose")
    code_bytes: int = setting(420_000_000, "of code that is trained on, at most", least=1)
    prose_bytes: int = setting(20_000_000, "of prose, at most", least=1)
    level: int = setting(9, "of compression, from 0 to 9", least=0, most=9)

    def __post_init__(self) -> None:
        """Checks every field."""
        check_fields(self)
        if not self.source:
            raise ConfigError("--source is missing; give a folder of sources or an archive of one")

    def place_of(self, path: str) -> str | None:
        """The folder of the archive for a file of this path; None for one that is not taken."""
        name = PurePosixPath(path).name
        for folder, patterns in (("code", self.code), ("prose", self.prose)):
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
                return folder
        return None


def files_of(source: Path, wanted: Container[str] = ()) -> Iterator[tuple[str, int, bytes | None]]:
    """Path, size and, of those that are wanted, content of every regular file.

    Raises:
        ConfigError: the source is neither a folder nor an archive, or cannot be read.
    """
    if not source.is_dir():
        with archives.opened(source, "source") as archive:
            for member in archive:
                if member.islnk():
                    raise ConfigError(
                        f"source={str(source)!r} has {member.name!a} as a hard link, which is not "
                        "read from an archive; unpack it, and give the folder"
                    )
                if member.isreg():
                    path = PurePosixPath(member.name.lstrip("/")).as_posix()
                    data = archive.extractfile(member).read() if path in wanted else None
                    yield path, member.size, data
        return
    try:
        for file in sorted(p for p in source.rglob("*") if p.is_file() and not p.is_symlink()):
            path = file.relative_to(source).as_posix()
            data = file.read_bytes() if path in wanted else None
            yield path, file.stat().st_size if data is None else len(data), data
    except OSError as error:
        raise ConfigError(f"source={str(source)!r} cannot be read: {error}") from error


def listed(config: PackConfig, source: Path) -> tuple[str, dict[str, int]]:
    """The folder that all files are in, and the sizes of those of code and prose by path in it.

    A folder that an archive has around everything is not a part of a path, or files of an archive
    would be others than those of the folder that it was made from.

    Raises:
        ConfigError: the source cannot be read, or has a path twice, one that leads out of it, or
            one of these that is no UTF-8.
    """
    sizes: dict[str, int] = {}
    for path, size, _ in files_of(source):
        if ".." in PurePosixPath(path).parts:
            raise ConfigError(f"source={str(source)!r} has {path!a}, which is outside of it")
        if path in sizes:
            raise ConfigError(f"source={str(source)!r} has {path!a} twice")
        sizes[path] = size
    tops = {path.partition("/")[0] for path in sizes}
    around = "" if source.is_dir() or len(tops) > 1 else f"{''.join(tops)}/"
    inside = {path.removeprefix(around): size for path, size in sizes.items()}
    fitting = {path: size for path, size in inside.items() if config.place_of(path)}
    for path in fitting:
        if path.encode(errors="ignore").decode() != path:
            raise ConfigError(
                f"source={str(source)!r} has {path!a}, a name that is no UTF-8, which nothing that "
                "reads the archive takes; rename it"
            )
    return around, fitting


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
    return matches(names_inside(path), (*VALID_PATHS, *TEST_PATHS))


def command(argv: Sequence[str]) -> None:
    """Reads the source twice: for what is in it, and for what is taken."""
    parsed = flags.parse(argv, {"pack": PackConfig}, {"default": {}})
    config = PackConfig(**parsed.sections["pack"])
    source = user_path(config.source, "source")
    around, sizes = listed(config, source)
    if not sizes:
        names = ",".join((*config.code, *config.prose))
        raise ConfigError(
            f"source={config.source!r} has no file of {names}, those of code or prose"
        )
    taken = chosen(config, sizes)
    if not taken:
        raise ConfigError(
            f"code_bytes={config.code_bytes} and prose_bytes={config.prose_bytes} leave no file of "
            f"source={config.source!r}"
        )
    target = parsed.workdir / ARCHIVE
    partial = target.with_suffix(".partial")
    wanted = {f"{around}{path}" for path in taken}
    with errors_as_one_line(target, "written"):
        parsed.workdir.mkdir(parents=True, exist_ok=True)
    try:
        with (
            errors_as_one_line(target, "written"),
            tarfile.open(partial, "w:xz", preset=config.level) as archive,
        ):
            for found, _, data in files_of(source, wanted):
                if data is not None:
                    path = found.removeprefix(around)
                    if len(data) != sizes[path]:
                        break
                    wanted.remove(found)
                    entry = tarfile.TarInfo(f"{config.place_of(path)}/{path}")
                    entry.size = len(data)
                    archive.addfile(entry, io.BytesIO(data))
        if wanted:
            raise ConfigError(
                f"source={config.source!r} has changed while it was read: {min(wanted)!a} is gone "
                "or of another size"
            )
        with errors_as_one_line(target, "written"):
            partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    summed = {
        folder: sum(sizes[p] for p in taken if config.place_of(p) == folder) for folder in DOMAINS
    }
    record = {"command": command_line("language.pack_text", argv), "files": len(taken)}
    record |= {"bytes": summed, "archive_bytes": target.stat().st_size}
    record["sha256"] = hashlib.sha256(target.read_bytes()).hexdigest()
    write_json(parsed.workdir / "text.json", record)
    print(f"{target}: {record['archive_bytes'] / 2**20:.1f} MiB of {len(taken)} files, {summed}")


if __name__ == "__main__":
    sys.exit(flags.run(command, sys.argv[1:]))
