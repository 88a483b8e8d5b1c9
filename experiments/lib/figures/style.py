"""What every figure shares: its size and files, colours and lines, one legend, and its axes.

matplotlib is imported here alone, and only where a figure is drawn: all else goes without it.
"""

import dataclasses
import functools
import io
import math
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.files import write_file
from deltaproduct_jax.settings import check_fields, setting
from experiments.lib.figures.texts import LINE, fit_texts, letters

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

FORMATS = ("png", "pdf", "svg")
WIDTHS = {"column": 3.3, "page": 6.9}  # inches, of the usual two-column page
DPI = 200
# Okabe and Ito's colours, which the colour-blind tell apart, without yellow: it is pale on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
# Nothing divides the numbers of both, so that 36 series differ in print without colour.
LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
HATCHES = ("", "////", "....", "xxxx", "\\\\\\\\", "++++", "oooo")
GREY = "0.6"
TRAINED = "length trained"  # what the line of `mark_trained` is called
SETTINGS: dict[str, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "figure.titlesize": 8,
    "lines.linewidth": 1.3,
    "lines.markersize": 3.5,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "legend.handlelength": 2.6,  # a dash and its gap
    "legend.columnspacing": 1.2,
    "hatch.linewidth": 0.5,
    "pdf.fonttype": 42,  # letters stay letters: journals refuse type 3
    "svg.hashsalt": "deltaproduct",  # the same file every time
}
# A label of the legend: inches of a letter, and of its line and the gaps.
LETTER, HANDLE = 0.058, 0.5
# Inches of a power of ten along an axis, below which the numbers of neighbours would meet.
LEAST_DECADE = 0.25


@dataclasses.dataclass(frozen=True)
class Look:
    """How a figure is written; its fields are flags of every command that draws."""

    format: tuple[str, ...] = setting(
        ("png",),
        f"files of each figure, a comma list of {', '.join(FORMATS)}",
        filled=True,
        one_of=FORMATS,
    )
    width: str | None = setting(
        None,
        "column (3.3 inches) or page (6.9); none: column for one panel, page for several",
        one_of=WIDTHS,
    )

    def __post_init__(self) -> None:
        """Checks both."""
        check_fields(self)

    def is_narrow(self, panels: int) -> bool:
        """Whether a figure of so many panels is to be a column wide."""
        return (self.width or ("page" if panels > 1 else "column")) == "column"

    def grid(self, panels: int, columns: int) -> tuple[int, int]:
        """Rows and columns for the panels, ``columns`` at most on a page and 2 in a column.

        As many rows as these need, filled evenly: four panels for three columns are two by two.
        """
        rows = math.ceil(panels / (2 if self.is_narrow(panels) else columns))
        return rows, math.ceil(panels / rows)

    def files(self, path: Path) -> list[Path]:
        """What a figure's path without its ending becomes."""
        return [path.with_name(f"{path.name}.{name}") for name in dict.fromkeys(self.format)]


SECTION = {"figures": Look}  # of a command's flags


class NoMatplotlibError(ConfigError):
    """A figure is to be drawn, and matplotlib is not installed."""


def new_panels(
    look: Look, rows: int, columns: int, height: float, *, sparse: bool = False, **subplots: Any
) -> "tuple[Figure, np.ndarray]":
    """A figure that no window shows, and its panels ``[rows, columns]``.

    Args:
        look: its width.
        rows: of panels.
        columns: of panels.
        height: inches of a row on a page; in a column it is three quarters of that, with several
            columns, so that panels keep some of their shape.
        sparse: a column is enough for its panels, unless a flag says otherwise.
        subplots: as matplotlib's ``subplots`` takes them.

    Raises:
        NoMatplotlibError: matplotlib is missing.
    """
    try:
        import matplotlib
        from matplotlib import category, units
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "matplotlib":
            raise  # it is there, and something that it needs is not
        raise NoMatplotlibError(
            "no figure is drawn: package matplotlib is not installed; install it by pip install "
            "matplotlib, which is in the project's extra 'experiments'"
        ) from error
    # For the whole process, as parts are made as late as when a figure is written.
    matplotlib.rcParams.update(SETTINGS)
    # A text among numbers would be drawn, as one of several categories, and so would they.
    for kind, converter in list(units.registry.items()):
        if isinstance(converter, category.StrCategoryConverter):
            del units.registry[kind]
    narrow = look.is_narrow(1 if sparse else rows * columns)
    height *= 0.75 if narrow and columns > 1 else 1
    size = (WIDTHS["column" if narrow else "page"], 0.45 + height * rows)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **subplots)


def beside_records(draw: Callable[..., Any]) -> Callable[..., list[Path]]:
    """Of a function that draws what records hold: where matplotlib is missing, a line says so.

    What was computed is kept then, and the command goes on. The function returns the files that it
    wrote, none where it could not draw.
    """

    @functools.wraps(draw)
    def drawn(*arguments, **named) -> list[Path]:
        try:
            return draw(*arguments, **named)
        except NoMatplotlibError as error:
            print(f"note: {error}", file=sys.stderr)
            return []

    return drawn


def series(index: int) -> dict[str, Any]:
    """Colour, line and marker of the series of a number, markers where others' are not."""
    return {
        "color": COLORS[index % len(COLORS)],
        "linestyle": LINES[index % len(LINES)],
        "marker": MARKERS[index % len(MARKERS)],
        "markerfacecolor": "white" if index >= len(COLORS) else COLORS[index],
        "markevery": (0.03 + 0.021 * (index % 7), 0.15),
    }


def marked(index: int, count: int, *, log: bool = False) -> dict[str, Any]:
    """The same of a series of ``count`` points that is too rough for places along its line."""
    places = np.geomspace(1, count, 8) - 1 if log else np.linspace(0, count - 1, 8)
    shift = 1 + index % 7
    last = np.append(places[1:], count - 1)
    found = np.unique((places + (last - places) * shift / 8).astype(int)).tolist()
    return series(index) | {"markevery": found}


def points(index: int) -> dict[str, Any]:
    """The same of a series whose every point counts."""
    return {name: value for name, value in series(index).items() if name != "markevery"}


def bars(index: int) -> dict[str, Any]:
    """Colour and hatch of the bars of a number."""
    face = COLORS[index % len(COLORS)]
    return {"facecolor": face, "hatch": HATCHES[index % len(HATCHES)], "edgecolor": "white"}


def add_legend(
    figure: "Figure", named: Mapping[str, Any] | None = None, note: str | None = None
) -> None:
    """One legend for all panels, below them: every label once, in as many columns as fit.

    Args:
        figure: with panels.
        named: what stands for each label; None for what the panels have drawn under labels.
        note: what is to be said of all panels, between them and the legend.
    """
    if named is None:
        named = {}
        for axes in figure.axes:
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                named.setdefault(label, handle)
        # Behind what only later panels have drawn.
        named |= {label: named.pop(label) for label in (TRAINED,) if label in named}
    if not named:
        return
    widest = max(letters(label) for label in named) * LETTER + HANDLE
    columns = max(1, min(len(named), int(figure.get_size_inches()[0] / widest)))
    rows = math.ceil(len(named) / columns)
    columns = math.ceil(len(named) / rows)  # as full as the others
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.15 * rows)
    figure.legend(
        list(named.values()),
        list(named),
        loc="outside lower center",
        ncols=columns,
        title="\n".join(room_for(figure, note)) or None,
        title_fontsize="small",
    )


def room_for(figure: "Figure", note: str | None) -> list[str]:
    """A note in lines that are no wider than the figure, which becomes higher by them."""
    width, height = figure.get_size_inches()
    lines = textwrap.wrap(note or "", int(width / LETTER))
    figure.set_size_inches(width, height + LINE * len(lines))
    return lines


def close_grid(panels: np.ndarray, used: int, xlabel: str = "", ylabel: str | None = None) -> None:
    """Labels the outer panels; of places without a panel, nothing is shown."""
    for axes in panels.flat[used:]:
        axes.set_axis_off()
    for axes in panels.flat[max(0, used - panels.shape[1]) : used]:
        axes.tick_params(labelbottom=True)
        axes.set_xlabel(xlabel)
    for axes in panels[:, 0] if ylabel is not None else ():
        axes.set_ylabel(ylabel)


def mark_trained(axes: "Axes", length: int) -> None:
    """A line at the longest length of training."""
    axes.axvline(length, color="0.35", linestyle=(0, (1, 1)), linewidth=1, label=TRAINED)


def positions_axis(axes: "Axes", curves: Sequence[np.ndarray], beyond: int = 0) -> None:
    """An axis of positions for curves from 1 down: logarithmic if one falls in the first eighth.

    Args:
        axes: the panel.
        curves: fractions by position.
        beyond: a position that is shown as well.
    """
    length = max(len(curve) for curve in curves)
    last = max(length - 1, beyond)
    if any(curve[min(len(curve) - 1, length // 8)] < 0.5 for curve in curves):
        axes.set_xscale("log", base=2)
        axes.set_xlim(1, last)
        plain_log(axes.xaxis, (1, last), base=2)
    else:
        axes.set_xlim(0, last)


def fractions_axis(axes: "Axes", lowest: float) -> None:
    """An axis of fractions, cut below where nothing is, and marked there."""
    if lowest <= 0.5:
        axes.set_ylim(-0.03, 1.03)
        return
    floor = max(0.5, math.floor(lowest * 20 - 0.5) / 20)
    axes.set_ylim(floor, 1 + 0.03 * (1 - floor))
    slash = {"marker": [(-1, -0.6), (1, 0.6)], "markersize": 6, "color": "k", "clip_on": False}
    for height in (0.03, 0.06):
        axes.plot(0, height, transform=axes.transAxes, linestyle="none", **slash)


def close_and_far_axis(axes: "Axes", close: float) -> None:
    """An axis of differences, logarithmic beyond ``close`` where they reach three times as far."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    least, most = axes.get_ylim()
    if max(-least, most) < 3 * close:
        return
    ticks = [0.0]
    for size in (close / 2, close, *(10.0**exponent for exponent in range(8))):
        ticks += [-size, size]
    axes.set_yscale("symlog", linthresh=close, linscale=1)
    axes.set_ylim(least, most)
    axes.yaxis.set_major_locator(FixedLocator([tick for tick in ticks if least <= tick <= most]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def plain_log(axis: "Axis", limits: tuple[float, float], base: int = 10) -> None:
    """Ticks of a logarithmic axis: plain numbers, and more of them where it is short."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    steps = math.log(limits[1] / limits[0], base)
    if base == 2:
        axis.set_major_locator(LogLocator(base=4 if steps > 5 else 2, numticks=20))
    else:
        subs = (1, 2, 5) if steps < 1.7 else (1,)
        if steps < 1 and axis.axis_name == "y":  # where there is room for more
            subs = (1, 1.5, 2, 3, 4, 5, 7)
        along = axis.axis_name == "x" and steps > 0  # not where all is at one number
        room = axis.axes.bbox.width / axis.figure.dpi / steps if along else math.inf
        if room < LEAST_DECADE * len(subs):
            subs = (1,)
        if room < LEAST_DECADE:
            base *= base
        axis.set_major_locator(LogLocator(base=base, subs=subs, numticks=20))
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(
        FuncFormatter(lambda value, _: plain(value, 1024 if base == 2 else 1000))
    )


def plain(value: float, thousand: int = 1000) -> str:
    """A number as a tick shows it: 20,000 is 20k, 0.02 stays, beyond are multiples of powers."""
    if 1e-3 <= abs(value) < (1e4 if thousand == 1000 else thousand):
        return f"{value:g}"
    for unit, letter in ((thousand**2, "M"), (thousand, "k")):
        if unit <= abs(value) < thousand * unit:
            return f"{value / unit:g}{letter}"
    if value == 0:
        return "0"
    times, power = f"{value:.5e}".split("e")
    factor = {1.0: "", -1.0: "-"}.get(float(times), rf"{float(times):g}\cdot ")
    return f"${factor}10^{{{int(power)}}}$"


def draw_unit_circle(axes: "Axes") -> None:
    """The unit circle of a plane of eigenvalues, and its limits."""
    from matplotlib.patches import Circle

    axes.add_patch(Circle((0, 0), 1, fill=False, color=GREY, linewidth=0.6))
    axes.set(aspect="equal", xlim=(-1.2, 1.2), ylim=(-1.2, 1.2), xticks=(-1, 0, 1))
    axes.set(yticks=(-1, 0, 1))


def mark(**style: Any) -> Any:
    """What stands in a legend for what is drawn in this style."""
    from matplotlib.lines import Line2D

    return Line2D([], [], **style)


def save(figure: "Figure", path: Path, look: Look) -> list[Path]:
    """Writes a figure in each of its formats, its texts broken where they must be; their paths.

    Args:
        figure: as `new_panels` made it.
        path: without an ending.
        look: the formats.

    Raises:
        RunDirectoryError: that fails.
    """
    fit_texts(figure)
    files = look.files(path)
    for file in files:
        kind, buffer = file.suffix[1:], io.BytesIO()
        if kind == "png":
            figure.savefig(buffer, dpi=DPI, format=kind)
            buffer = _few_colors(buffer)
        else:
            date = {"CreationDate": None} if kind == "pdf" else {"Date": None}
            figure.savefig(buffer, format=kind, metadata=date)
        write_file(file, buffer.getvalue())
    return files


def _few_colors(png: io.BytesIO) -> io.BytesIO:
    """The same picture with a palette: a third of the bytes."""
    from PIL import Image  # which matplotlib needs

    found = Image.open(png).convert("RGB")
    few = found.quantize(256, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    few.save(buffer, "png", optimize=True)
    return buffer
