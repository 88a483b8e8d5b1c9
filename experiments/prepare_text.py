"""Text, JSON lines or Parquet files to tokens on disk, which language models are trained on.

    python -m experiments.prepare_text --sources=FOLDER --pattern=*.c,*.h --workdir=runs/tokens

works with all cores, shows its progress, and after a kill goes on by the same command, to the same
bytes. ``manifest.json`` is written last: counts, hashes, the tokenizer and the sources. The files
are described in ``deltaproduct_jax/data/README.md``.

Source: https://arxiv.org/abs/2502.10297 trains on FineWeb by the 32,000 pieces of
    ``--tokenizer=mistral``, documents packed with BOS between them and nothing else.
Expect: a table of documents, tokens and bytes by split, and what was left out; 2 to 4 bytes to
    every token.
Takes: about a second a megabyte of text and core.
"""

import sys
from collections.abc import Sequence

from deltaproduct_jax.data.config import PrepareConfig
from deltaproduct_jax.data.preparation import prepare, summary
from deltaproduct_jax.data.splits import SPLITS
from experiments.lib import flags

PRESETS = {"default": {}}


def command(argv: Sequence[str]) -> None:
    """Prepares as the flags say, and prints the counts."""
    parsed = flags.parse(argv, {"data": PrepareConfig}, PRESETS)
    manifest = prepare(PrepareConfig(**parsed.sections["data"]), parsed.workdir)
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
