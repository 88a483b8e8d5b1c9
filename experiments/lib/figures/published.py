"""Points of published curves, to stand beside ours.

Read off figure 1 of https://arxiv.org/abs/2502.10297, to about .02: one layer trained on S5 at 128
tokens, the fraction of sequences right at every position so far, by the number of factors.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.lib.run_records import label

Points = list[tuple[int, float]]

CUMULATIVE: dict[tuple[str, int], Points] = {
    ("S5", 1): [(8, 0.0)],
    ("S5", 2): [(8, 0.0)],
    ("S5", 3): [(17, 0.5), (55, 0.0)],
    ("S5", 4): [(165, 1.0), (200, 0.98), (330, 0.5), (400, 0.155), (512, 0.01)],
}


def published_points(panels: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Points]]:
    """The points of each curve that has some, by panel and name as `curves.panels_of` has them."""
    names = {
        (label(["group"], (group,)), label(["num_householder"], (factors,))): points
        for (group, factors), points in CUMULATIVE.items()
    }
    return {
        title: {name: names[title, name] for name in curves if (title, name) in names}
        for title, curves in panels.items()
    }


def keys_fit(x: str, by: Sequence[str]) -> bool:
    """Whether a figure of these settings has panels and curves that points are known of."""
    return x == "group" and list(by) == ["num_householder"]
