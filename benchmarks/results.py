"""From turns to figures, a table of them, and a file."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from benchmarks.cases import Case, Group
from benchmarks.pace import Lap, Report
from benchmarks.worker import SIZE, Machine


@dataclass
class Result:
    """The turns of a case, the first of which warmed it up and gave the update of round 1."""

    case: Case
    first: Report
    turns: list[Report] = field(default_factory=list)

    def laps(self, what: Callable[[Lap], float]) -> list[float]:
        """Return a figure of every round, warm-up excluded."""
        return [what(lap) for turn in self.turns for lap in turn.laps]

    @property
    def peak_mb(self) -> float:
        """The peak memory of the process."""
        return max(turn.peak_mb for turn in (self.first, *self.turns))


def wall(lap: Lap) -> float:
    """Return the seconds that passed."""
    return lap.wall


def cpu(lap: Lap) -> float:
    """Return the seconds that processors worked."""
    return lap.cpu


def ratios(base: Result, other: Result, what: Callable[[Lap], float]) -> list[float]:
    """Return how many times longer than ``other`` its neighbour ``base`` took, turn by turn."""
    return [
        median(map(what, mine.laps)) / median(map(what, theirs.laps))
        for mine, theirs in zip(base.turns, other.turns, strict=True)
    ]


def difference(base: Result, other: Result) -> float:
    """Return the distance of the updates of round 1, relative to the norm of that of ``base``.

    Infinite when they are not of the same tensors.
    """
    mine, theirs = base.first.update, other.first.update
    if {n: v.shape for n, v in mine.items()} != {n: v.shape for n, v in theirs.items()}:
        return float("inf")
    gap = sum(float(np.square(mine[name] - theirs[name]).sum()) for name in mine)
    return float(np.sqrt(gap / sum(float(np.square(value).sum()) for value in mine.values())))


def summarise(group: Group, results: list[Result]) -> list[dict[str, Any]]:
    """Return a row a case."""
    base = results[0]
    rows = []
    for result in results:
        case = result.case
        row: dict[str, Any] = {"group": group.name, **asdict(case), "peak_mb": result.peak_mb}
        for name, what in (("wall", wall), ("cpu", cpu)):
            row[f"{name}_seconds"] = result.laps(what)
            row[f"{name}_ratios"] = [] if result is base else ratios(base, result, what)
        same_work = result is not base and case.engine != base.case.engine
        row["update_difference"] = difference(base, result) if same_work else None
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]], machine: Machine) -> Table:
    """Return all rows and the machine as one table."""
    versions = machine.environment["packages"]
    products = ", ".join(f"{name} {value:.0f}" for name, value in machine.gflops.items())
    shown = Table(
        title=f"A round on {machine.threads} of {machine.environment['cpus']} CPUs: median, range",
        caption=f"Products of {SIZE} x {SIZE} matrices, GFLOP/s: {products}. "
        f"torch {versions.get('torch')}, flwr {versions.get('flwr')}, "
        f"transformers {versions.get('transformers')}. Ratios: the first of a group over this one.",
        box=box.SIMPLE_HEAD,
    )
    for _ in ("group", "case"):
        shown.add_column("", overflow="fold")
    heads = (
        "wall\nms",
        "CPU\nms",
        "peak\nMB",
        "wall\nratio",
        "CPU\nratio",
        "target",
        "update\noff",
    )
    for head in heads:
        shown.add_column(head, justify="right", overflow="fold")
    group = None
    for row in rows:
        if group not in (None, row["group"]):
            shown.add_section()
        shown.add_row("" if group == row["group"] else row["group"], *_cells(row))
        group = row["group"]
    return shown


def _cells(row: dict[str, Any]) -> list[str]:
    off = row["update_difference"]
    return [
        row["label"],
        _spread(row["wall_seconds"], 1000),
        _spread(row["cpu_seconds"], 1000),
        f"{row['peak_mb']:.0f}",
        _spread(row["wall_ratios"]),
        _spread(row["cpu_ratios"]),
        _verdict(row),
        "" if off is None else f"{off:.1e}",
    ]


def _verdict(row: dict[str, Any]) -> str:
    if row["target"] is None:
        return ""
    met = median(row["cpu_ratios"]) >= row["target"]
    return f">= {row['target']:.2g}\n{'met' if met else '[bold red]missed'}"


def _spread(values: list[float], scale: float = 1) -> str:
    if not values:
        return ""
    low, middle, high = (scale * value for value in (min(values), median(values), max(values)))
    digits = 0 if middle >= 100 else 1 if middle >= 10 else 2
    return f"{middle:.{digits}f}\n[dim]{low:.{digits}f}-{high:.{digits}f}"
