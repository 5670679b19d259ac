"""A sweep from its first point to its report.

Each point is a ``fedsys run`` that is done once and kept. Started again with the same folder, a
sweep reads what is complete and goes on with what is not.
"""

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from fedsys.sweeps.checks import check
from fedsys.sweeps.grid import Point, expand
from fedsys.sweeps.processes import Ended, cores, run_all
from fedsys.sweeps.results import COMPLETED, Results, Row, read, write_index, write_table

Tell = Callable[[str], None]


def sweep(
    overrides: Sequence[str],
    processes: int | None = None,
    skip_refused: bool = False,
    tell: Tell = lambda _: None,
) -> Results:
    """Do the runs of a grid that are missing, ``processes`` at a time, and return all of them.

    Without ``processes``, one for each processor, or one alone where there is an accelerator.
    Raises ``ConfigError`` before the first run for points that cannot be run. One that breaks down
    later stops no other.
    """
    grid = expand(overrides)
    tell(f"checking {len(grid.points)} points")
    checked = check(grid, skip_refused)
    for name, problems in checked.refused.items():
        tell(f"left out: {name}: {'; '.join(problems)}")
    write_index(grid, checked.refused)
    missing = _missing(read(grid.folder))
    there = len(checked.accepted) - len(missing)
    tell(f"sweep folder: {grid.folder}: {len(checked.accepted)} runs, {there} of them there")
    try:
        _run_all(grid.folder, missing, processes or _processes(), tell)
    except KeyboardInterrupt:
        tell(f"interrupted; to go on: fedsys sweep {shlex.quote(f'out={grid.folder}')}")
        raise
    finally:
        results = read(grid.folder)
        write_table(results)
    return results


def _missing(results: Results) -> list[Point]:
    return [row.point for row in results.unfinished]


def _processes() -> int:
    """Return how many runs go on at a time: an accelerator's memory is shared by all of them."""
    import torch

    return 1 if torch.accelerator.is_available() else cores()


def _run_all(folder: Path, points: Sequence[Point], processes: int, tell: Tell) -> None:
    if not points:
        return
    seconds = 0.0
    at_once = min(processes, len(points))
    for number, ended in enumerate(run_all(points, at_once), start=1):
        results = read(folder)
        write_table(results)  # whoever waits can look
        seconds += ended.seconds
        left = seconds / number * (len(points) - number) / at_once
        row = next(row for row in results.rows if row.point.name == ended.job.name)
        eta = f", ETA {left:.0f} s" if left else ""
        tell(f"{number} of {len(points)}: {_said(row, ended, results.measure)}{eta}")


def _said(row: Row, ended: Ended[Point], measure: str) -> str:
    text = f"{row.point.name}: "
    if row.status != COMPLETED:
        first = (row.reason.splitlines() or [f"exit code {ended.code}"])[0]
        return f"{text}{row.status}, {first}"
    value = row.numbers.get(f"final_{measure}")
    shown = "" if value is None else f"{measure} {value:.4g}, "
    return f"{text}{shown}{ended.seconds:.0f} s"
