"""Pictures in one style: colours that colour-blind people tell apart, and marks beside them."""

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsys.report.page import Picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito, "Color universal design", 2008; without the yellow, which is lost on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
_SIZE = (5.6, 3.9)  # inches; legible on a phone
_WIDEST = 72  # characters of a legend
_DECADES = 1e3  # from the least to the largest: more ticks than the powers of ten have room


@contextmanager
def style() -> Iterator[None]:
    """Draw with these settings; names of users' keys may hold dollars, which are no mathematics."""
    from matplotlib import rc_context

    settings: Any = {
        "text.parse_math": False,
        "font.size": 9.0,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.3,
        "axes.axisbelow": True,
        "legend.frameon": False,
        "figure.constrained_layout.use": True,
    }
    with rc_context(settings):
        yield


def new_figure() -> tuple["Figure", "Axes"]:
    """Return a figure with one pair of axes, without pyplot, which would keep it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, dpi=130)
    return figure, figure.add_subplot()


def look(index: int) -> dict[str, Any]:
    """Return colour and mark of a series; both differ, and together they do for seventy."""
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKS[index % len(MARKS)]}


def legend(figure: "Figure", axes: "Axes") -> None:
    """Name the series below the axes, in as many columns as there is room for."""
    handles, labels = axes.get_legend_handles_labels()
    columns = min(4, _WIDEST // (4 + max(map(len, labels), default=1))) or 1
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def as_picture(figure: "Figure", name: str, caption: str, folder: Path | None = None) -> Picture:
    """Return a figure as part of a page; with ``folder`` also write it there, as name.png.

    The same figure gives the same text: nothing in it is drawn by lot or dated.
    """
    from matplotlib import rc_context

    if folder is not None:
        figure.savefig(folder / f"{name}.png", metadata={"Software": None})
    buffer = io.StringIO()
    unsaid = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata=unsaid)
    return Picture(caption, svg=_embedded(buffer.getvalue(), name, caption))


def _embedded(svg: str, name: str, caption: str) -> str:
    """Return SVG that can stand in HTML: of any width, described, with names of its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(caption)}"', 1)
    return re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", svg)


def thinned(
    points: Sequence[tuple[float, float]], most: int = 800
) -> Sequence[tuple[float, float]]:
    """Return at most about ``most`` of the points, with the first and the last."""
    step = -(-len(points) // most)
    kept = list(points[:: max(step, 1)])
    return kept if not points or kept[-1] == points[-1] else [*kept, points[-1]]


def plain_numbers(axis: Any) -> None:
    """Write the ticks of an axis as plain numbers, on a logarithmic scale too."""
    _mark(axis, lambda value: f"{value:g}")


def in_bytes(axis: Any) -> None:
    """Write the ticks of an axis as sizes."""
    from fedsys.console import size

    _mark(axis, size)


def _mark(axis: Any, show: Callable[[float], str]) -> None:
    """Write ticks by ``show``; of a few decades, not the powers of ten alone."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    if axis.get_scale() == "log" and high < _DECADES * low:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: show(value)))
    axis.set_minor_formatter(NullFormatter())
