"""Texts that fit into their panels, and models that have not failed where they were to."""

import itertools

import pytest

from experiments.lib.figures import margin, style
from experiments.lib.figures.style import Look
from experiments.lib.figures.texts import fit_texts

LONG = "forward + backward, 1 x 32768, ungated, $n_h$ = 2"


@pytest.mark.parametrize("width", style.WIDTHS)
@pytest.mark.parametrize("title", ["forward", LONG, "a title of short words without any comma"])
def test_titles_and_labels_neither_meet_nor_are_cut(title, width):
    figure, panels = style.new_panels(Look(width=width), 2, 2, 1.6)
    for axes in panels.flat:
        axes.set(title=title, xlabel=title, ylabel="what is measured")
    figure.suptitle(f"{title}, {LONG}")
    fit_texts(figure)
    figure.draw_without_rendering()
    whole, across, up = figure.bbox, [], []
    for axes in panels.flat:
        across += [axes.title.get_window_extent(), axes.xaxis.label.get_window_extent()]
        up.append(axes.yaxis.label.get_window_extent())
    (above,) = figure.texts
    boxes = [*across, *up, above.get_window_extent()]
    assert all(whole.x0 - 1 <= box.x0 and box.x1 <= whole.x1 + 1 for box in boxes)
    assert all(whole.y0 - 1 <= box.y0 and box.y1 <= whole.y1 + 1 for box in boxes)
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    words = " ".join(panels[0, 0].get_title().split())
    assert words == title  # nothing is lost
    assert "\n" not in "".join(line for line in panels[0, 0].get_title().split("$")[1::2])


def model(**more):
    entry = {"positions": [1, 100], "failed": None, "predicted": 50.0, "trained": 8}
    return entry | more


@pytest.mark.parametrize(
    ("entry", "point", "held"),
    [
        (model(), (100, 50), True),
        (model(failed=80), (80, 50), False),
        (model(predicted=500.0), None, False),  # may still come
        (model(predicted=None), None, False),
        (model(failed=80, predicted=None), None, False),
    ],
)
def test_a_failure_that_did_not_come_is_shown(entry, point, held):
    _, panels = style.new_panels(Look(), 1, 1, 2.0)
    axes = panels[0, 0]
    assert margin._draw_failures(axes, [(entry, style.points(0))]) is held
    drawn = [tuple(line.get_xydata()[0]) for line in axes.lines if len(line.get_xdata()) == 1]
    assert drawn == ([] if point is None else [point])
    assert len(axes.texts) == held
