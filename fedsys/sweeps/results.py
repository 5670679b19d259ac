"""What came of the points of a sweep: a row each, and mean and spread over the seeds."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from fedsys.errors import ConfigError
from fedsys.json_lines import write_whole
from fedsys.sweeps.grid import SEED, Grid, Point
from fedsys.sweeps.processes import end_of_log

INDEX = "sweep.json"
TABLE = "results.csv"
COMPLETED = "completed"

# Column of the table -> where summary.json has it.
COLUMNS: dict[str, tuple[str, ...]] = {
    "final_accuracy": ("final", "eval_accuracy"),
    "final_loss": ("final", "eval_loss"),
    "best_accuracy": ("best", "eval_accuracy"),
    "best_loss": ("best", "eval_loss"),
    "best_round": ("best", "round"),
    "epsilon": ("epsilon",),
    "delta": ("delta",),
    "bytes_up": ("bytes_up",),
    "bytes_down": ("bytes_down",),
    "bytes_init": ("bytes_init",),
    "seconds": ("seconds",),
    "trainable_parameters": ("trainable_parameters",),
}
_BYTES = ("bytes_up", "bytes_down", "bytes_init")


@dataclass(frozen=True)
class Row:
    """A point and its numbers, as far as there are any."""

    point: Point
    status: str  # completed, failed, interrupted, unfinished, not begun or refused
    reason: str  # why it is not completed, "" if it is
    numbers: Mapping[str, float]  # by column

    @property
    def total_bytes(self) -> float:
        """What was sent up, down and for the initialisation."""
        return sum(self.numbers.get(column, 0.0) for column in _BYTES)


@dataclass(frozen=True)
class Spread:
    """A number over the seeds."""

    count: int
    mean: float
    deviation: float | None  # of the sample; None for fewer than two, or what is not finite


@dataclass(frozen=True)
class Group:
    """Points that differ in nothing but their seed."""

    swept: dict[str, str]  # without the seed
    rows: Sequence[Row]

    @property
    def done(self) -> list[Row]:
        """The runs that count."""
        return [row for row in self.rows if row.status == COMPLETED]

    def of(self, column: str) -> Spread | None:
        """Return a column's mean and spread over the completed runs, None if none has it."""
        return spread([row.numbers[column] for row in self.done if column in row.numbers])

    @property
    def total_bytes(self) -> float:
        """The mean of what the completed runs sent."""
        return fmean(row.total_bytes for row in self.done)


@dataclass(frozen=True)
class Results:
    """A sweep as its folder has it."""

    folder: Path
    overrides: list[str]
    keys: list[str]
    rows: list[Row]  # in the order of the grid

    @cached_property
    def groups(self) -> list[Group]:
        """The rows by all that is swept but the seed, in the order of the grid."""
        found: dict[tuple[tuple[str, str], ...], list[Row]] = {}
        for row in self.rows:
            found.setdefault(row.point.others, []).append(row)
        return [Group(dict(others), rows) for others, rows in found.items()]

    @property
    def table(self) -> Path:
        """Where the rows are written."""
        return self.folder / TABLE

    @property
    def others(self) -> list[str]:
        """The keys that are swept, without the seed."""
        return [key for key in self.keys if key != SEED]

    @property
    def unfinished(self) -> list[Row]:
        """The points that should be complete and are not."""
        return [row for row in self.rows if row.status not in (COMPLETED, "refused")]

    @property
    def measure(self) -> str:
        """What the sweep compares: accuracy where any run has one, else loss."""
        accurate = any("final_accuracy" in row.numbers for row in self.rows)
        return "accuracy" if accurate else "loss"


def spread(values: Sequence[float]) -> Spread | None:
    """Return mean and standard deviation of a sample, None for an empty one."""
    if not values:
        return None
    mean = fmean(values)
    known = len(values) > 1 and math.isfinite(mean)
    return Spread(len(values), mean, stdev(values) if known else None)


def write_index(grid: Grid, refused: Mapping[str, list[str]]) -> None:
    """Write down what the points of a sweep are, so that its folder is enough to read it."""
    content = {
        "overrides": grid.overrides,
        "keys": grid.keys,
        "points": [
            {"name": point.name, "swept": point.swept, "overrides": point.overrides}
            for point in grid.points
        ],
        "refused": refused,
    }
    grid.folder.mkdir(parents=True, exist_ok=True)
    write_whole(grid.folder / INDEX, json.dumps(content, indent=2) + "\n")


def read(folder: Path) -> Results:
    """Return what came of the sweep in ``folder``, so far; raises ``ConfigError`` if none is."""
    index = _json(folder / INDEX)
    if index is None:
        raise ConfigError([f"{folder}: is no folder of a sweep, it has no {INDEX} that is whole"])
    rows = [
        _row(Point(entry["swept"], entry["overrides"], folder / "points" / entry["name"]), refused)
        for entry in index["points"]
        for refused in [index["refused"].get(entry["name"], [])]
    ]
    return Results(folder, index["overrides"], index["keys"], rows)


def write_table(results: Results) -> None:
    """Write results.csv, a row a point."""
    file = io.StringIO()
    table = csv.writer(file, lineterminator="\n")
    table.writerow([*results.keys, "status", *COLUMNS, "folder", "reason"])
    for row in results.rows:
        values = [row.numbers.get(column, "") for column in COLUMNS]
        swept = [row.point.swept[key] for key in results.keys]
        folder = row.point.folder.relative_to(results.folder)
        table.writerow([*swept, row.status, *values, folder, row.reason])
    write_whole(results.table, file.getvalue())


def _row(point: Point, refused: Sequence[str]) -> Row:
    summary = _json(point.folder / "summary.json")
    if refused:
        return Row(point, "refused", "; ".join(refused), {})
    if summary is None:
        begun = (point.folder / "config.yaml").is_file()
        status = "unfinished" if begun else "not begun"
        return Row(point, status, _last_words(point), {})
    status = str(summary.get("status"))
    reason = "" if status == COMPLETED else str(summary.get("reason") or _last_words(point))
    values = {column: _at(summary, path) for column, path in COLUMNS.items()}
    return Row(point, status, reason, {c: v for c, v in values.items() if v is not None})


def _last_words(point: Point) -> str:
    """Return what the run wrote last; of an error in several lines, all of them."""
    lines = end_of_log(point.folder, 20)
    starts = [place for place, line in enumerate(lines) if line.startswith("fedsys: ")]
    return "\n".join(lines[starts[-1] :] if starts else lines[-1:])


def _json(path: Path) -> Any:
    """Return the content of a file, or None where it is missing or torn."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def _at(tree: Any, path: Sequence[str]) -> int | float | None:
    for name in path:
        tree = tree.get(name) if isinstance(tree, dict) else None
    # An epsilon without bound may be a text in JSON, which has no such number.
    if tree in ("inf", "Infinity"):
        return math.inf
    return tree if isinstance(tree, int | float) and not isinstance(tree, bool) else None
