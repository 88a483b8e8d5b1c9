"""Texts of a figure that are longer than the room they have."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


LINE = 0.14  # inches that a further line takes
SPARE = 0.95  # of the room, as letters differ in width


def fit_texts(figure: "Figure") -> None:
    """Breaks titles and labels of axes into lines where they would meet others, or be cut.

    Args:
        figure: with all that is to be on it; it grows by the lines, so that panels do not shrink.
    """
    figure.draw_without_rendering()
    whole, boxes = figure.bbox, {axes: axes.get_window_extent() for axes in figure.axes}
    more: dict[tuple[str, float], int] = {}  # lines above and below the panels of a height
    for axes, box in boxes.items():
        beside = [b for b in boxes.values() if b.y0 < box.y1 and box.y0 < b.y1]
        above = [b for b in boxes.values() if b.x0 < box.x1 and box.x0 < b.x1]
        # Half the way to the next panel belongs to each.
        left = max([whole.x0, *((b.x1 + box.x0) / 2 for b in beside if b.x1 <= box.x0)])
        right = min([whole.x1, *((b.x0 + box.x1) / 2 for b in beside if b.x0 >= box.x1)])
        labels = (a.yaxis.label for a, b in boxes.items() if b in beside and b.x0 >= box.x1)
        right = min([right, *(t.get_window_extent().x0 for t in labels if t.get_text())])
        below = max([whole.y0, *((b.y1 + box.y0) / 2 for b in above if b.y1 <= box.y0)])
        top = min([whole.y1, *((b.y0 + box.y1) / 2 for b in above if b.y0 >= box.y1)])
        across, up = (box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2
        width, height = 2 * min(across - left, right - across), 2 * min(up - below, top - up)
        for name, text in (("title", axes.title), ("label", axes.xaxis.label)):
            lines = _break(text, text.get_window_extent().width, width)
            place = name, round(box.y0)
            more[place] = max(lines, more.get(place, 0))
        _break(axes.yaxis.label, axes.yaxis.label.get_window_extent().height, height)
    for title in figure.texts:
        if title.get_text() == figure.get_suptitle():
            more["whole", 0] = _break(title, title.get_window_extent().width, whole.width)
    wide, high = figure.get_size_inches()
    figure.set_size_inches(wide, high + LINE * sum(more.values()))


def _break(text: Any, size: float, room: float) -> int:
    """Breaks a text of so many pixels into lines that have room, behind commas where it can.

    Returns:
        How many lines it has more than before.
    """
    said = text.get_text()
    if size <= room or "\n" in said:
        return 0
    most = int(letters(said) * room * SPARE / size)
    lines: list[str] = []
    for part in said.split(", "):
        joined = f"{lines[-1]}, {part}" if lines else part
        if lines and letters(joined) <= most:
            lines[-1] = joined
            continue
        if lines:
            lines[-1] += ","
        lines.append("")
        for word in part.split(" "):
            joined = f"{lines[-1]} {word}".strip()
            if lines[-1] and letters(joined) > most:
                lines.append(word)
            else:
                lines[-1] = joined
    text.set_text("\n".join(lines))
    return len(lines) - 1


def letters(label: str) -> int:
    """Those that are seen, of a label with mathematics."""
    return len(label) - sum(label.count(sign) for sign in "$_{}\\")
