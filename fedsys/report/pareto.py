"""What a sweep compares against what was sent, and the settings that no other one beats."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedsys.console import size
from fedsys.report.drawing import (
    as_picture,
    in_bytes,
    legend,
    look,
    new_figure,
    plain_numbers,
    style,
)
from fedsys.report.page import Picture
from fedsys.sweeps.results import Group, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EPSILON = "privacy.epsilon"
_DECADE = 8.0  # from the least to the largest: a logarithmic scale
_CROWDED = (0.15, 0.035)  # of the width and of the height: labels that are nearer would overlap


def front(costs: Sequence[tuple[float, ...]]) -> list[int]:
    """Return the places of those that no other one beats: costs no more in any way, less in one."""

    def beaten(cost: tuple[float, ...]) -> bool:
        return any(
            other != cost and all(o <= c for o, c in zip(other, cost, strict=True))
            for other in costs
        )

    return [place for place, cost in enumerate(costs) if not beaten(cost)]


def against_bytes(results: Results, groups: Sequence[Group]) -> Picture | None:
    """Return all groups as points, with the front ringed; None where nothing is finite.

    Where a target epsilon is swept, less of it is better too: what spends more is often more
    accurate, and would alone make up the front.
    """
    measure = results.measure
    points = [
        _Point(group, group.total_bytes, found.mean, found.deviation or 0.0)
        for group in groups
        if (found := group.of(f"final_{measure}")) and math.isfinite(found.mean)
    ]
    if not points:
        return None
    sign = -1.0 if measure == "accuracy" else 1.0
    best = [points[i] for i in front([(p.bytes, sign * p.value, p.target or 0.0) for p in points])]
    key = _coloured_by(results)
    with style():
        figure, axes = new_figure()
        _scatter(axes, points, _colours(results, key), key)
        _ring(axes, best)
        in_bytes(axes.xaxis)
        axes.set_xlabel("bytes sent in all, up and down and at first")
        axes.set_ylabel(f"final {measure}")
        plain_numbers(axes.yaxis)
        _name(axes, best, key)
        legend(figure, axes)
        caption = _caption(measure, best)
        return as_picture(figure, f"{measure}_bytes", caption, results.folder)


class _Point:
    """A group where it stands in the picture."""

    def __init__(self, group: Group, bytes: float, value: float, bar: float) -> None:
        self.group, self.bytes, self.value, self.bar = group, bytes, value, bar
        self.target = as_number(group.swept.get(EPSILON, ""))


def called(swept: dict[str, str]) -> str:
    """Return keys and values in few words: options by their name alone, others after their key."""
    return ", ".join(_word(key, value) for key, value in swept.items()) or "all"


def _word(key: str, value: str) -> str:
    option = "." not in key and as_number(value) is None
    return value if option else f"{key.rpartition('.')[2]} {value}"


def as_number(text: str) -> float | None:
    """Return the number that a value is, None for a text and for NaN."""
    try:
        value = float(text)
    except ValueError:
        return None
    return None if math.isnan(value) else value


def _coloured_by(results: Results) -> str | None:
    """Return the key that colours stand for: the strategy, or whatever comes first."""
    keys = results.others
    return "strategy" if "strategy" in keys else keys[0] if keys else None


def _colours(results: Results, key: str | None) -> dict[str, int]:
    """Return a number for each value, the same whether or not all of them have results."""
    values = dict.fromkeys(group.swept[key] if key else "all" for group in results.groups)
    return {value: number for number, value in enumerate(values)}


def _scatter(
    axes: "Axes", points: Sequence[_Point], colours: dict[str, int], key: str | None
) -> None:
    for value, number in colours.items():
        ours = [p for p in points if key is None or p.group.swept[key] == value]
        if ours:
            bars = [point.bar for point in ours]
            axes.errorbar(
                [point.bytes for point in ours],
                [point.value for point in ours],
                yerr=bars if any(bars) else None,
                linestyle="",
                capsize=2,
                elinewidth=0.8,
                markersize=5,
                label=_word(key, value) if key else value,
                **look(number),
            )
    sizes = [point.bytes for point in points]
    if min(sizes) > 0 and max(sizes) >= _DECADE * min(sizes):
        axes.set_xscale("log")


def _ring(axes: "Axes", best: Sequence[_Point]) -> None:
    """Ring the points of the front, and join those of one epsilon."""
    for target in {point.target for point in best}:
        joined = sorted((p.bytes, p.value) for p in best if p.target == target)
        x, y = zip(*joined, strict=True)
        axes.step(x, y, where="post", color="#888888", linewidth=1, zorder=1)
        axes.plot(x, y, "o", markersize=11, fillstyle="none", color="#1a1a1a", zorder=4)


def _name(axes: "Axes", best: Sequence[_Point], key: str | None) -> None:
    """Write at the rings what their colours do not say, as far as there is room."""
    taken: list[tuple[float, float]] = []
    for point in sorted(best, key=lambda point: -point.value):
        others = {name: value for name, value in point.group.swept.items() if name != key}
        at = axes.transAxes.inverted().transform(
            axes.transData.transform((point.bytes, point.value))
        )
        near = any(abs(at[0] - x) < _CROWDED[0] and abs(at[1] - y) < _CROWDED[1] for x, y in taken)
        if others and not near:
            taken.append((at[0], at[1]))
            place = (point.bytes, point.value)
            axes.annotate(
                called(others),
                place,
                (9, -3),
                textcoords="offset points",
                fontsize=7,
                bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 0.5},
            )


def _caption(measure: str, best: Sequence[_Point]) -> str:
    ways = f"bytes, {measure} and epsilon" if best[0].target is not None else f"bytes and {measure}"
    named = "; ".join(
        f"{called(point.group.swept)} ({size(point.bytes)}, {point.value:.4g})" for point in best
    )
    return (
        f"Final {measure} against bytes. Ringed is the Pareto front, the settings that no other"
        f" one beats in {ways}: {named}."
    )
