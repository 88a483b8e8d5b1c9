"""How far constructions are from exact arithmetic as they read on."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.lib.figures import names
from experiments.lib.figures.style import (
    Look,
    add_legend,
    beside_records,
    mark,
    new_panels,
    plain_log,
    save,
    series,
)

EXACT = 1e-9  # below it nothing is told apart


@beside_records
def draw_deviations(rows: Sequence[Mapping[str, Any]], path: Path, look: Look) -> list[Path]:
    """The deviation from exact arithmetic over length: a family of constructions by a dtype."""
    cases = list(dict.fromkeys((row["dtype"], row["implementation"]) for row in rows))
    cases.sort(key=lambda case: case[0] != "float32")
    said = {row["construction"]: names.construction(row["construction"]) for row in rows}
    families = list(dict.fromkeys(family for family, _ in said.values()))
    members = list(dict.fromkeys(member for _, member in said.values()))
    narrow = look.is_narrow(len(cases) * len(families))
    shape = (len(families), len(cases)) if narrow else (len(cases), len(families))
    figure, panels = new_panels(look, *shape, 1.45, sharex=True, sharey=True)
    panels = panels.T if narrow else panels  # [cases, families]
    for row in rows:
        family, member = said[row["construction"]]
        place = (cases.index((row["dtype"], row["implementation"])), families.index(family))
        axes, style = panels[place], series(members.index(member))
        x = [point["length"] for point in row["curve"]]
        y = [max(point["deviation"], EXACT) for point in row["curve"]]
        axes.loglog(x, y, label=member, **style)
        if row["errors"]:
            reached = next(point for point in row["curve"] if point["errors"])
            axes.plot(reached["length"], reached["deviation"], **WRONG)
    lengths = [point["length"] for row in rows for point in row["curve"]]
    plain_log(panels[0, 0].xaxis, (min(lengths), max(lengths)))
    outer = [panels[0], panels[:, 0]]
    for axes, family in zip(outer[0], families, strict=True):
        axes.set_ylabel(family) if narrow else axes.set_title(family)
    for axes, (dtype, implementation) in zip(outer[1], cases, strict=True):
        same = len({case[1] for case in cases}) == 1
        text = dtype if same else f"{dtype}, {implementation}"
        axes.set_title(text) if narrow else axes.set_ylabel(text)
    for axes in (panels.T if narrow else panels)[-1]:
        axes.set_xlabel("tokens")
    figure.supylabel("distance of the logits' direction from exact", fontsize="medium")
    named = {m: mark(**series(i) | {"markevery": None}) for i, m in enumerate(members)}
    if any(row["errors"] for row in rows):
        named["first wrong answer"] = mark(**WRONG)
    add_legend(figure, named)
    return save(figure, path, look)


WRONG = {"marker": "x", "color": "k", "markersize": 5, "linestyle": "none", "zorder": 5}
