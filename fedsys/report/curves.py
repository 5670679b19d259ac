"""How a run went: its numbers over the rounds, and over what was sent."""

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from fedsys.report.drawing import (
    as_picture,
    in_bytes,
    legend,
    look,
    new_figure,
    plain_numbers,
    style,
    thinned,
)
from fedsys.report.page import Picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Lines = Sequence[Mapping[str, Any]]  # of metrics.jsonl
_Points = Sequence[tuple[float, float]]

_NAMES = {
    "eval_accuracy": "held-out data",
    "clients_accuracy": "clients' own data",
    "clients_accuracy_worst_decile": "worst decile of clients",
    "eval_loss": "held-out data",
    "train_loss": "training",
    "epsilon": "largest over clients",
}
_MOST_MARKED = 40  # points
_WIDE = 20.0  # from the least to the largest: a logarithmic scale


def curves(lines: Lines) -> list[Picture]:
    """Return the pictures for which there are numbers."""
    rounds = [float(line["round"]) for line in lines]
    sent = list(accumulate(_bytes(line) for line in lines))
    accuracies = ("eval_accuracy", "clients_accuracy", "clients_accuracy_worst_decile")
    losses = ("eval_loss", "train_loss")
    pictures = [
        _picture(lines, rounds, accuracies, "accuracy", "rounds"),
        _picture(lines, rounds, losses, "loss", "rounds"),
        _picture(lines, sent, accuracies[:1], "accuracy", "bytes"),
        _picture(lines, sent, losses[:1], "loss", "bytes"),
        _picture(lines, rounds, ("epsilon",), "epsilon", "rounds"),
    ]
    return [picture for picture in pictures if picture]


def _bytes(line: Mapping[str, Any]) -> float:
    return float(sum(line.get(key) or 0 for key in ("bytes_up", "bytes_down", "bytes_init")))


def _picture(
    lines: Lines, places: Sequence[float], columns: Sequence[str], what: str, over: str
) -> Picture | None:
    """Return the columns over the places of the lines; None where no line has a number."""
    series = {column: _points(lines, places, column) for column in columns}
    series = {column: points for column, points in series.items() if points}
    if not series:
        return None
    with style():
        figure, axes = new_figure()
        for index, (column, points) in enumerate(series.items()):
            marked = look(index) if len(points) <= _MOST_MARKED else {**look(index), "marker": ""}
            axes.plot(
                *zip(*points, strict=True),
                label=_NAMES[column],
                linewidth=1.5,
                markersize=4,
                **marked,
            )
        _scales(axes, [value for points in series.values() for _, value in points], what, over)
        if len(series) > 1:
            legend(figure, axes)
        return as_picture(figure, f"{what}-{over}", f"{what.capitalize()} over {over}.")


def _points(lines: Lines, places: Sequence[float], column: str) -> _Points:
    found = ((place, line.get(column)) for place, line in zip(places, lines, strict=True))
    return thinned(
        [
            (place, float(value))
            for place, value in found
            if isinstance(value, int | float) and math.isfinite(value)
        ]
    )


def _scales(axes: "Axes", values: Sequence[float], what: str, over: str) -> None:
    from matplotlib.ticker import MaxNLocator

    low, high = min(values), max(values)
    if what == "loss" and low > 0 and high > _WIDE * low:
        axes.set_yscale("log")
    plain_numbers(axes.yaxis)
    axes.set_ylabel(what)
    if over == "bytes":
        in_bytes(axes.xaxis)
        axes.set_xlabel("bytes sent, up and down and at first")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlabel("round")
