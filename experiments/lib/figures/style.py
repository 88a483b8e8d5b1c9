"""What every figure shares: how one is made, the look of its parts, and how it is written.

matplotlib is imported here alone, and only where a figure is drawn: all else goes without it.
"""

import functools
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.files import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Entries of a legend within the axes, and the room that a longer one takes beside them.
MOST_INSIDE, LEGEND_INCHES = 6, 2.2
COLORS = tuple(f"C{index}" for index in range(10))


class NoMatplotlibError(ConfigError):
    """A figure is to be drawn, and matplotlib is not installed."""


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of so many inches, which no window shows.

    Raises:
        NoMatplotlibError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "matplotlib":
            raise  # it is there, and something that it needs is not
        raise NoMatplotlibError(
            "no figure is drawn: package matplotlib is not installed; install it by pip install "
            "matplotlib, which is in the project's extra 'experiments'"
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def new_axes(width: float = 6.4, height: float = 4.0) -> "tuple[Figure, Axes]":
    """A figure of one panel with a grid; raises as `new_figure`."""
    figure = new_figure(width, height)
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    return figure, axes


def beside_records(draw: Callable[..., None]) -> Callable[..., bool]:
    """Of a function that draws what records hold: where matplotlib is missing, a line says so.

    What was computed is kept then, and the command goes on. The function returns whether it drew.
    """

    @functools.wraps(draw)
    def drawn(*arguments, **named) -> bool:
        try:
            draw(*arguments, **named)
        except NoMatplotlibError as error:
            print(f"note: {error}", file=sys.stderr)
            return False
        return True

    return drawn


def add_legend(axes: "Axes") -> None:
    """Within the axes, or beside them where it would cover what is drawn."""
    if len(axes.get_legend_handles_labels()[0]) <= MOST_INSIDE:
        axes.legend(fontsize="small")
        return
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)
    width, height = axes.figure.get_size_inches()
    axes.figure.set_size_inches(width + LEGEND_INCHES, height)


def mark_trained(axes: "Axes", length: int) -> None:
    """A line at the longest length of training."""
    axes.axvline(length, color="grey", linestyle="--", label="trained up to here")


def draw_unit_circle(axes: "Axes") -> None:
    """The unit circle of a plane of eigenvalues, and its limits."""
    from matplotlib.patches import Circle

    axes.add_patch(Circle((0, 0), 1, fill=False, color="grey", linewidth=0.8))
    axes.set(xlabel="Re", ylabel="Im", aspect="equal", xlim=(-1.15, 1.15), ylim=(-1.15, 1.15))


def save(figure: "Figure", path: Path) -> None:
    """Writes a figure as PNG; RunDirectoryError where that fails."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150, format="png")
    write_file(path, buffer.getvalue())
