"""Pictures of legs: panels, models and seeds, and what stands above what."""

import numpy as np
import pytest

from experiments.lib.figures import legs
from experiments.lib.figures.style import Look


def test_ranks_of_legs_are_a_panel_for_each_model(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(legs, "save", lambda figure, path, look: figures.append(figure))
    along = {"position": [0, 8], "mean": [1.0, 2.0], "low": [0.5, 1.0], "high": [1.5, 3.0]}
    entry = {"trained": 4, "starts": [0, 6], "heads": {}, "along": along}
    ranks = {"36m_3": 3, "36m_transformer": None, "36m_2": 2, "36m_2_gated": 2}
    found = [
        {"leg": leg, "seed": 0, "ranks": n and entry | {"num_householder": n}}
        for leg, n in ranks.items()
    ]
    legs.draw_ranks_of_legs(found, tmp_path, Look())
    figure = figures.pop()
    panels = figure.axes
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend[-2:] == ["a document begins", "80 % of the heads"]
    titles = ["36M, $n_h$ = 2", "36M, $n_h$ = 2, gated", "36M, $n_h$ = 3"]
    assert [axes.get_title() for axes in panels] == titles
    first = panels[0].lines
    assert [line.get_label() for line in first[2:]] == ["$n_h$ = 2", "length trained"]
    assert [line.get_xdata()[0] for line in first[:2]] == [0, 6]  # starts of documents
    assert list(panels[2].lines[2].get_ydata()) == [1.0, 2.0]
    assert legs.draw_ranks_of_legs(found[1:2], tmp_path, Look()) == []


def curves_of(leg, seed, above=0.0):
    position = [256.0, 512.0, 1024.0]
    values = [3.0 - position.index(x) + above for x in position]
    entry = {"data": "code", "label": "x", "trained": 512, "position": position, "loss": values}
    rows = [{"tokens": 10 * n, "loss": 4.0 - n / 10, "valid_loss": 5.0 - n + above} for n in (1, 2)]
    return {
        "leg": leg, "seed": seed, "curve": [{"tokens": 1, "loss": 9.0}, *rows],
        "positions": [entry | {"error": None, "running_loss": values}],
    }  # fmt: skip


def test_seeds_are_thin_and_models_stand_above_the_first_of_their_size(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(legs, "save", lambda figure, path, look: figures.append(figure))
    found = [curves_of("36m_1", 0), curves_of("213m_2", 0), curves_of("36m_2", 1, -0.3)]
    found += [
        curves_of("36m_2", 0, -0.1),
        {"leg": "36m_3", "seed": 0, "positions": [], "curve": []},
    ]
    legs.draw_positions(found, tmp_path, Look())
    panels = figures.pop().axes
    assert [axes.get_title() for axes in panels] == ["213M, code", "", "36M, code", ""]
    *_, median, trained = panels[3].lines
    assert (median.get_label(), trained.get_label()) == ("$n_h$ = 2", "length trained")
    np.testing.assert_allclose(median.get_ydata(), [-0.2] * 3)
    thin = [line.get_ydata()[0] for line in panels[3].lines if line.get_linewidth() < 1]
    np.testing.assert_allclose(thin, [-0.3, -0.1])
    assert panels[3].get_ylabel() == "above $n_h$ = 1, nats per token"
    legs.draw_losses_of_legs(found[:-1], tmp_path, Look())
    first, second = figures.pop().axes
    assert [axes.get_title() for axes in (first, second)] == ["213M", "36M"]
    assert min(line.get_xdata()[0] for line in second.lines) == 10  # from the first validation on
    named = {line.get_label(): list(line.get_ydata()) for line in second.lines}
    assert named["$n_h$ = 2"] == pytest.approx([3.8, 2.8])


@pytest.mark.parametrize(("far", "scale"), [(-0.3, "linear"), (2.5, "symlog"), (-9.0, "symlog")])
def test_a_model_far_from_the_first_leaves_room_for_those_near(far, scale, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(legs, "save", lambda figure, path, look: figures.append(figure))
    near = curves_of("36m_2", 0, -0.1)
    legs.draw_positions([curves_of("36m_1", 0), near, curves_of("36m_3", 0, far)], tmp_path, Look())
    below = figures.pop().axes[1]
    assert below.get_yscale() == scale
    least, most = below.get_ylim()
    assert least < min(far, -0.1)
    assert max(far, 0) < most
    assert all(least <= tick <= most for tick in below.get_yticks()) or scale == "linear"
    height = below.transData.transform([(256, 0), (256, -0.1)])[:, 1]
    assert height[0] - height[1] > 0.08 * below.bbox.height
