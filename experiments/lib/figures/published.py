"""Points of published curves, and numbers of a published table, to stand beside ours.

Curves are read off figure 1 of https://arxiv.org/abs/2502.10297, to about .02: one layer trained on
S5 at 128 tokens, the fraction of sequences right at every position so far, by the number of
factors. The table is table 3 of https://arxiv.org/abs/2411.12537, whose protocol that paper
repeats: formal languages, scaled accuracy over 40 to 256 tokens, the best of three seeds. Its Mamba
has no mixer here.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from deltaproduct_jax.layers.registry import MIXERS
from experiments.lib.run_records import Record, label

Points = list[tuple[int, float]]

CUMULATIVE: dict[tuple[str, int], Points] = {
    ("S5", 1): [(8, 0.0)],
    ("S5", 2): [(8, 0.0)],
    ("S5", 3): [(17, 0.5), (55, 0.0)],
    ("S5", 4): [(165, 1.0), (200, 0.98), (330, 0.5), (400, 0.155), (512, 0.01)],
}
# Settings of the published runs; beside ours of other settings, which say other things, is nothing.
OF_CURVES = {
    "train_length": 128,
    "num_layers": 1,
    "max_displaced": None,
    "merge_elements": 1,
    "repeat_elements": 1,
}


def _are_alike(members: Sequence[Record], settings: Mapping[str, Any]) -> bool:
    """Whether all runs have these settings, as far as they have them at all."""
    return all(
        r.settings.get(key, value) == value for r in members for key, value in settings.items()
    )


def published_points(
    panels: Mapping[str, Mapping[str, Any]], records: Sequence[Record]
) -> dict[str, dict[str, Points]]:
    """The points of each curve that has some, by panel and name as `curves.panels_of` has them.

    Args:
        panels: the curves.
        records: runs that they are of.
    """
    names = {}
    for (group, factors), points in CUMULATIVE.items():
        wanted = {"group": group, "num_householder": factors}
        members = [r for r in records if wanted.items() <= r.settings.items()]
        if _are_alike(members, OF_CURVES):
            title = label(["group"], (group,))
            names[title, label(["num_householder"], (str(factors),))] = points
    return {
        title: {name: names[title, name] for name in curves if (title, name) in names}
        for title, curves in panels.items()
    }


LANGUAGES = ("parity", "modular_arithmetic", "modular_arithmetic_brackets")
# By the mixer and whether eigenvalues reach below 0; none: it has no such choice.
SCALED_ACCURACY = "strict.scaled_accuracy"
LONGEST = 256
OF_LANGUAGES = {
    "train_length": 40,
    "min_train_length": 3,
    "min_eval_length": 40,
    "bracket_multiplication": False,
}
SCORES: dict[tuple[str, str], tuple[float, float, float]] = {
    ("transformer", "none"): (0.022, 0.031, 0.067),
    ("mlstm", "none"): (0.087, 0.040, 0.114),
    ("slstm", "none"): (1.000, 0.787, 0.178),
    ("delta_net", "false"): (0.017, 0.314, 0.194),
    ("delta_net", "true"): (1.000, 0.971, 0.260),
}


def published_scores(members: Sequence[Record], length: int | None) -> dict[str, float]:
    """The published score of each language, of runs of one mixer with one range of eigenvalues.

    Args:
        members: the runs.
        length: at which they are looked at; None for the longest of each.
    """
    kinds = set()
    for record in members:
        mixer, reach = record.value("mixer"), record.value("allow_neg_eigval")
        if reach == "none" and mixer in MIXERS and MIXERS[mixer].takes("allow_neg_eigval"):
            reach = str(MIXERS[mixer].default("allow_neg_eigval")).lower()
        kinds.add((mixer, reach))
    scores = SCORES.get(kinds.pop()) if len(kinds) == 1 else None
    if scores is None:
        return {}
    found = {}
    for language, score in zip(LANGUAGES, scores, strict=True):
        own = [r for r in members if r.settings.get("language") == language]
        if _are_alike(own, OF_LANGUAGES) and all(r.entry(length)["length"] == LONGEST for r in own):
            found[language] = score
    return found


def keys_fit(kind: str, x: str, by: Sequence[str], metric: str | None, length: int | None) -> bool:
    """Whether a figure of these settings shows what points or scores are known of."""
    if kind == "cumulative":
        return x == "group" and list(by) == ["num_householder"]
    usual = metric in (None, SCALED_ACCURACY) and length in (None, LONGEST)
    return kind == "table" and x == "language" and "mixer" in by and usual
