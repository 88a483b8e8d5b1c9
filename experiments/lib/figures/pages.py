"""The Markdown beside a record, made again by the script that the record names.

A record of a measurement says under "page" which script of experiments wrote it; the ``page`` of
that script turns what the record holds into tables. As in a sweep, the script is found by its
name: nothing here knows what any of them measures.
"""

from typing import Any

from deltaproduct_jax.errors import ConfigError, found_module
from experiments.lib.bench.report import PAGE, Page, report_of


def page_of(script: str) -> Page:
    """The ``page`` of a script, by its name in experiments; ConfigError if there is none."""
    module = found_module(f"experiments.{script}")
    if not hasattr(module, "page"):
        raise ConfigError(
            f"{PAGE}={script!r} is not known; it may be a script of experiments with a page, "
            "as op.speed"
        )
    return module.page


def text_of(record: Any) -> str | None:
    """What the Markdown of a record holds, without a newline; None where it names no script.

    Several records, as a list, are shown one after another.
    """
    several = record if isinstance(record, list) else [record]
    if not several or not all(isinstance(each, dict) and PAGE in each for each in several):
        return None
    return "\n\n".join(report_of(each, page_of(each[PAGE])) for each in several)
