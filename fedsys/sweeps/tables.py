"""The results of a sweep as text in columns."""

import math
from collections.abc import Callable, Sequence

from fedsys.console import size
from fedsys.sweeps.results import Group, Results, Row, Spread

_LONGEST = 200  # characters of a reason; results.csv has all of it


def by_seed(results: Results) -> list[list[str]]:
    """Return a line for each combination of keys: mean and spread over the seeds."""
    columns = [column for column in _columns(results) if any(map(column[1], results.groups))]
    head = [*results.others, "runs", *(name for name, _ in columns)]
    return [head, *(_line(group, results.others, columns) for group in results.groups)]


def failures(rows: Sequence[Row]) -> list[list[str]]:
    """Return a line for each point that is not complete, with the reason."""
    return [[row.point.name, f"{row.status}:", _short(row.reason)] for row in rows]


_Column = tuple[str, Callable[[Group], str]]


def _columns(results: Results) -> list[_Column]:
    measure = results.measure
    return [
        (measure, lambda group: _mean(group.of(f"final_{measure}"))),
        ("+-", lambda group: _deviation(group.of(f"final_{measure}"))),
        ("best", lambda group: _mean(group.of(f"best_{measure}"))),
        *([("loss", _of("final_loss"))] if measure == "accuracy" else []),
        ("epsilon", _of("epsilon")),
        ("delta", _of("delta")),
        ("sent up", _of("bytes_up", size)),
        ("sent down", _of("bytes_down", size)),
        ("sent at first", _of("bytes_init", size)),
        ("trained numbers", _of("trainable_parameters", lambda v: f"{v:,.0f}")),
        ("seconds", _of("seconds", lambda v: f"{v:.1f}")),
    ]


def _of(column: str, show: Callable[[float], str] | None = None) -> Callable[[Group], str]:
    def cell(group: Group) -> str:
        found = group.of(column)
        return "" if found is None else show(found.mean) if show else _mean(found)

    return cell


def _line(group: Group, keys: Sequence[str], columns: Sequence[_Column]) -> list[str]:
    done, wanted = len(group.done), len(group.rows)
    runs = f"{done}" if done == wanted else f"{done} of {wanted}"
    return [*(group.swept[key] for key in keys), runs, *(cell(group) for _, cell in columns)]


def _mean(found: Spread | None) -> str:
    return "" if found is None else f"{found.mean:.4g}"


def _deviation(found: Spread | None) -> str:
    if found is None or found.deviation is None or not math.isfinite(found.deviation):
        return ""
    return f"{found.deviation:.2g}"


def _short(reason: str) -> str:
    text = " ".join(reason.split())
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
