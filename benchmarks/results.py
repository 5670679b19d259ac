"""From turns to figures: a row a case, a row a ratio, a row for what else is to hold."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import numpy as np

from benchmarks.cases import FIRST_ROUND, IDLE_BYTES, SHARE, Case, Group, Ratio
from benchmarks.machine import Machine
from benchmarks.pace import Lap
from benchmarks.worker import Report, Update

Row = dict[str, Any]


@dataclass
class Result:
    """The turns of a case, the first of which warmed it up and gave the update of round 1."""

    case: Case
    first: Report
    update: Update
    turns: list[Report] = field(default_factory=list)

    def laps(self, what: Callable[[Lap], float]) -> list[float]:
        """Return a figure of every round, warm-up excluded."""
        return [what(lap) for turn in self.turns for lap in turn.laps]

    @property
    def peak_mb(self) -> float:
        """The peak memory of the process and all below it."""
        return max(turn.peak_mb for turn in (self.first, *self.turns))


def wall(lap: Lap) -> float:
    """Return the seconds that passed."""
    return lap[0]


def cpu(lap: Lap) -> float:
    """Return the seconds that processors worked."""
    return lap[1]


def ratios(slow: Result, fast: Result, what: Callable[[Lap], float]) -> list[float]:
    """Return how many times longer than its neighbour ``fast`` ``slow`` took, turn by turn."""
    return [
        median(map(what, mine.laps)) / median(map(what, theirs.laps))
        for mine, theirs in zip(slow.turns, fast.turns, strict=True)
    ]


def difference(base: Update, other: Update) -> float:
    """Return the distance of two updates, relative to the norm of ``base``.

    Infinite when they are not of the same tensors.
    """
    if {n: v.shape for n, v in base.items()} != {n: v.shape for n, v in other.items()}:
        return float("inf")
    gap = sum(float(np.square(base[name] - other[name]).sum()) for name in base)
    return float(np.sqrt(gap / sum(float(np.square(value).sum()) for value in base.values())))


def case_rows(group: Group, results: Sequence[Result]) -> list[Row]:
    """Return the figures of each case; the update's distance is that from the first case."""
    rows = []
    for result in results:
        compared = result.case.tolerance is not None
        rows.append(
            {
                "kind": "case",
                "group": group.name,
                "name": result.case.name,
                **asdict(result.case),
                "wall_seconds": result.laps(wall),
                "cpu_seconds": result.laps(cpu),
                "peak_mb": result.peak_mb,
                "first_seconds": result.first.seconds,
                "update_off": difference(results[0].update, result.update) if compared else None,
            }
        )
    return rows


def ratio_rows(group: Group, results: Sequence[Result]) -> list[Row]:
    """Return the ratios of cases that were run; the worse of wall and CPU time decides."""
    by_name = {result.case.name: result for result in results}
    rows = []
    for ratio in group.ratios:
        if ratio.slow in by_name and ratio.fast in by_name:
            pair = by_name[ratio.slow], by_name[ratio.fast]
            figures = {"wall_ratios": ratios(*pair, wall), "cpu_ratios": ratios(*pair, cpu)}
            middles = [median(values) for values in figures.values()]
            value = max(middles) if ratio.least is None else min(middles)
            rows.append(_ratio_row(group, ratio) | figures | _verdict(value, ratio))
    return rows


def _ratio_row(group: Group, ratio: Ratio) -> Row:
    return {"kind": "ratio", "group": group.name, "name": f"{ratio.slow} / {ratio.fast}"}


def _verdict(value: float, bound: Ratio) -> Row:
    least, most = bound.least, bound.most
    return {"value": value, "least": least, "most": most, "met": met(value, least, most)}


def met(value: float, least: float | None, most: float | None) -> bool | None:
    """Return whether ``value`` is within its bounds; None if it has none."""
    if least is None and most is None:
        return None
    return (least is None or value >= least) and (most is None or value <= most)


def adapter_figures(results: Sequence[Result], flop: int, machine: Machine) -> list[Row]:
    """Return what is to hold of fedsys on W2: its first round, its share of the limit."""
    rows = []
    for result in results:
        case = result.case
        if case.engine == "ours":
            if case.threads is None:  # the limit is one thread's
                share = share_of_limit(flop, median(result.laps(cpu)), case.precision, machine)
                name = f"{case.name}: share of the limit of matrix products"
                rows.append(_figure("w2", name, share, least=SHARE[case.precision]))
            name = f"{case.name}: seconds from the start to the end of round 1"
            rows.append(_figure("w2", name, result.first.seconds, most=FIRST_ROUND))
    return rows


def share_of_limit(flop: int, seconds: float, precision: str, machine: Machine) -> float:
    """Return the operations a CPU second, over those of one thread in a product of matrices."""
    return flop / seconds / (1e9 * machine.gflops[precision] / machine.threads)


def scaling_figures(results: Sequence[Result], clients: Mapping[str, int]) -> list[Row]:
    """Return the memory of an idle client, between the fewest and the most ``clients`` by name."""
    ordered = sorted(results, key=lambda result: clients[result.case.name])
    fewest, most = ordered[0], ordered[-1]
    apart = clients[most.case.name] - clients[fewest.case.name]
    each = (most.peak_mb - fewest.peak_mb) * 2**20 / apart
    return [_figure("scaling", "bytes of an idle client", each, most=IDLE_BYTES)]


def _figure(
    group: str, name: str, value: float, least: float | None = None, most: float | None = None
) -> Row:
    return {"kind": "figure", "group": group, "name": name, "value": value} | {
        "least": least,
        "most": most,
        "met": met(value, least, most),
    }
