"""How far constructions are from exact arithmetic as they read on."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.lib.figures.style import beside_records, new_figure, save


@beside_records
def draw_deviations(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws the deviation from exact arithmetic over length, a panel a dtype."""
    cases = list(dict.fromkeys((row["dtype"], row["implementation"]) for row in rows))
    names = list(dict.fromkeys(row["construction"] for row in rows))
    figure = new_figure(5.5 * len(cases) + 2.5, 5)
    panels = figure.subplots(1, len(cases), sharey=True, squeeze=False)[0]
    for axes, case in zip(panels, cases, strict=True):
        for row in rows:
            if (row["dtype"], row["implementation"]) != case:
                continue
            index = names.index(row["construction"])
            x = [point["length"] for point in row["curve"]]
            y = [max(point["deviation"], 1e-9) for point in row["curve"]]
            style = {"color": f"C{index % 10}", "linestyle": ("-", "--")[index // 10 % 2]}
            (line,) = axes.loglog(x, y, **style, label=row["construction"])
            if row["errors"]:
                reached = next(point for point in row["curve"] if point["errors"])
                axes.plot(
                    reached["length"], reached["deviation"], "x", color=line.get_color(), ms=9
                )
        axes.set(title=", ".join(case), xlabel="tokens (x: an answer was wrong)")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("distance of the logits' direction from exact (below 1e-9: 1e-9)")
    panels[-1].legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    save(figure, path)
