"""Text, JSON lines or Parquet files to tokens on disk, which language models are trained on.

    python -m experiments.prepare_text --sources=FOLDER --pattern=*.c,*.h --workdir=runs/tokens

works with all cores, shows its progress, and after a kill goes on by the same command, to the same
bytes. ``manifest.json`` is written last: counts, hashes, the tokenizer and the sources. The files
are described in ``deltaproduct_jax/data/README.md``. ``--verify --workdir=runs/tokens`` reads them
again, there or in a copy, and names the first that is not what was written.

Source: https://arxiv.org/abs/2502.10297 trains on FineWeb by the 32,000 pieces of
    ``--tokenizer=mistral``, documents packed with BOS between them and nothing else.
Expect: a table of documents, tokens and bytes by split, and what was left out; 2 to 4 bytes to
    every token.
Takes: about a second a megabyte of text and core.
"""

import dataclasses
import sys
from collections.abc import Sequence

from deltaproduct_jax.data.config import PrepareConfig
from deltaproduct_jax.data.preparation import prepare, summary, verify
from deltaproduct_jax.data.splits import SPLITS
from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.files import require_writable
from deltaproduct_jax.settings import setting
from experiments.lib import flags
from experiments.lib.folders import TEXT, refuse_other

PRESETS = {"default": {}}


@dataclasses.dataclass(frozen=True)
class VerifyConfig:
    """Whether tokens are only looked at."""

    verify: bool = setting(
        False, "prepare nothing: compare the files of a finished folder with their hashes"
    )

    def refuse_others(self, config: PrepareConfig) -> None:
        """Raises ConfigError for a setting that means nothing where nothing is prepared."""
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            if field.name != "workers" and value != field.default:
                raise ConfigError(
                    f"{field.name}={value!r} is for preparing, and --verify prepares nothing; it "
                    "goes with --workdir and --workers alone"
                )


def command(argv: Sequence[str]) -> None:
    """Prepares as the flags say, or verifies what is there, and prints the counts."""
    sections = {"data": PrepareConfig, "verify": VerifyConfig}
    parsed = flags.parse(argv, sections, PRESETS, writes=False)  # to a copy that is verified
    config = PrepareConfig(**parsed.sections["data"])
    wanted = VerifyConfig(**parsed.sections["verify"])
    if wanted.verify:
        wanted.refuse_others(config)
        print(summary(verify(parsed.workdir, config.processes)))
        print(f"every file in {parsed.workdir} has the hash that its manifest says")
        return
    require_writable(parsed.workdir, "workdir")
    refuse_other(parsed.workdir, TEXT)
    manifest = prepare(config, parsed.workdir)
    print(summary(manifest))
    missing = [split for split in SPLITS if split not in manifest["splits"]]
    if missing:
        print(
            f"note: no document is in {' or '.join(missing)}, and training needs all of "
            f"{', '.join(SPLITS)}; --valid_fraction and --test_fraction hold out documents",
            file=sys.stderr,
        )


if __name__ == "__main__":
    sys.exit(flags.run(command, sys.argv[1:], goes_on=True))
