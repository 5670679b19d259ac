"""Pictures of a sweep: what it compares against what is swept, and against what was sent."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedsys.report.drawing import as_picture, legend, look, new_figure, plain_numbers, style
from fedsys.report.page import Picture
from fedsys.report.pareto import EPSILON, against_bytes, as_number, called
from fedsys.sweeps.results import Group, Results, Spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_LINES = 12  # more cannot be told apart
_DECADE = 8.0  # from the least to the largest: a logarithmic scale
_CROWDED = 0.05  # of the axis: ticks that are nearer would overlap


def pictures(results: Results) -> list[Picture]:
    """Draw what can be drawn, also as PNG into the folder of the sweep."""
    groups = [group for group in results.groups if group.of(f"final_{results.measure}")]
    keys = sorted(_numeric(groups, results.others), key=lambda key: key != EPSILON)
    drawn = [_against(results, groups, key) for key in keys]
    return [picture for picture in (*drawn, against_bytes(results, groups)) if picture]


def _numeric(groups: Sequence[Group], keys: Sequence[str]) -> list[str]:
    """Return the keys with at least two values, all of which are numbers."""
    found = []
    for key in keys:
        values = {as_number(group.swept[key]) for group in groups}
        if None not in values and len(values) > 1:
            found.append(key)
    return found


def _against(results: Results, groups: Sequence[Group], key: str) -> Picture | None:
    """Return a line for each combination of the other keys, over the values of ``key``."""
    # A series keeps its colour whether or not all of them have results.
    series: dict[str, list[tuple[float, Spread]]] = {
        _without(group, key): [] for group in results.groups
    }
    for group in groups:
        value, found = as_number(group.swept[key]), group.of(f"final_{results.measure}")
        if value is not None and found is not None and math.isfinite(found.mean):
            series[_without(group, key)].append((value, found))
    if len(series) > _MOST_LINES:
        return None
    places = _Places([value for points in series.values() for value, _ in points], key == EPSILON)
    with style():
        figure, axes = new_figure()
        for index, (label, points) in enumerate(series.items()):
            if points:
                _line(axes, sorted(points, key=lambda point: point[0]), places, index, label)
        places.mark(axes)
        axes.set_xlabel(key)
        axes.set_ylabel(f"final {results.measure}")
        plain_numbers(axes.yaxis)
        if len(series) > 1:
            legend(figure, axes)
        name = f"{results.measure}_{key.rpartition('.')[2]}"
        return as_picture(figure, name, _caption(results, groups, key), results.folder)


def _without(group: Group, key: str) -> str:
    return called({name: value for name, value in group.swept.items() if name != key})


def _line(
    axes: "Axes", points: list[tuple[float, Spread]], places: "_Places", index: int, label: str
) -> None:
    x = [places.of(value) for value, _ in points]
    means = [found.mean for _, found in points]
    bars = [found.deviation or 0.0 for _, found in points]
    shape = look(index)
    finite = sum(math.isfinite(value) for value, _ in points)
    axes.errorbar(
        x,
        means,
        yerr=bars if any(bars) else None,
        linestyle="",
        capsize=3,
        elinewidth=1,
        markersize=5,
        label=label,
        **shape,
    )
    axes.plot(x[:finite], means[:finite], color=shape["color"], linewidth=1.5)
    # To where nothing is spent is no step along the axis.
    axes.plot(x[max(finite - 1, 0) :], means[max(finite - 1, 0) :], ":", color=shape["color"])


class _Places:
    """Where values stand on the horizontal axis; those without bound have a place of their own."""

    def __init__(self, values: Sequence[float], log: bool) -> None:
        self.values = sorted({value for value in values if math.isfinite(value)})
        self.infinite = math.inf in values
        low, high = (self.values[0], self.values[-1]) if self.values else (1.0, 1.0)
        self.log = low > 0 and (log or high >= _DECADE * low)
        self.low, self.high = low, high
        # As far from the last as a sixth of the axis, and never on top of it.
        self.edge = (
            high * max((high / low) ** 0.2, 1.5)
            if self.log
            else high + 0.2 * ((high - low) or abs(high) or 1.0)
        )

    def of(self, value: float) -> float:
        return value if math.isfinite(value) else self.edge

    def mark(self, axes: "Axes") -> None:
        """Set scale and ticks: at the values themselves, unless they are crowded."""
        if self.log:
            axes.set_xscale("log")
        plain_numbers(axes.xaxis)
        ticks = [*self.values, *([self.edge] if self.infinite else [])]
        if not self._crowded(ticks) or self.infinite:
            kept = ticks if not self._crowded(ticks) else self._spaced(ticks)
            labels = [f"{tick:g}" if tick in self.values else "inf" for tick in kept]
            axes.set_xticks(kept, labels)
            axes.set_xticks([], minor=True)
        if self.infinite and self.values:
            between = (self.high * self.edge) ** 0.5 if self.log else (self.high + self.edge) / 2
            axes.axvline(between, color="#888888", linewidth=0.8, linestyle=(0, (1, 3)))

    def _crowded(self, ticks: Sequence[float]) -> bool:
        return len(self._spaced(ticks)) < len(ticks)

    def _spaced(self, ticks: Sequence[float]) -> list[float]:
        """Return ticks that are not too near to each other, from the last one down."""
        scale = [math.log(tick) if self.log else tick for tick in ticks]
        wide = (scale[-1] - scale[0]) or 1.0
        kept: list[int] = []
        for index in reversed(range(len(ticks))):
            if not kept or scale[kept[-1]] - scale[index] >= _CROWDED * wide:
                kept.append(index)
        return [ticks[index] for index in reversed(kept)]


def _caption(results: Results, groups: Sequence[Group], key: str) -> str:
    text = f"Final {results.measure} against {key}."
    counts = [len(group.done) for group in groups]
    if max(counts) > 1:
        runs = f"{max(counts)}" if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"
        text += f" Mean over {runs} seeds; bars are one standard deviation of the sample."
    return text
