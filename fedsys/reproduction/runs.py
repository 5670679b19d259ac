"""A table from its first run to its verdict.

Each run is a ``fedsys run`` that is done once and kept: one that was interrupted goes on, one that
is complete is read, and runs of other settings in the same folder are never touched.
"""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from fedsys.reproduction.jobs import Outcome, check, outcome, plan
from fedsys.reproduction.processes import finished
from fedsys.reproduction.result import Result, judge
from fedsys.reproduction.rows import Numbers
from fedsys.reproduction.tables import Table
from fedsys.sweeps.processes import run_all

Tell = Callable[[str], None]


def reproduce(
    table: Table,
    out: Path,
    overrides: Sequence[str] = (),
    processes: int = 1,
    tell: Tell = lambda _: None,
) -> Result:
    """Do the runs of a table that are missing, ``processes`` at a time, and judge all of them.

    Raises ``ConfigError`` before the first run for settings that no run could have, ``RunError``
    when a run breaks down. A run that ends because every client failed has diverged, and counts.
    """
    began = time.monotonic()
    check(table, out, overrides)
    jobs = plan(table, out, overrides)
    missing = [job for job in jobs if outcome(job.folder) is None]
    tell(f"{table.name}: {len(jobs)} runs in {out}, {len(jobs) - len(missing)} of them there")
    for number, ended in enumerate(run_all(missing, processes), start=1):
        job, seconds = ended.job, ended.seconds
        value = numbers(table, [finished(job)]).mean
        said = f"{value:.4g}" if math.isfinite(value) else "diverged"
        tell(
            f"{number} of {len(missing)}: {job.row.name}, seed {job.seed}: {said}, {seconds:.0f} s"
        )
    outcomes = {row.name: [finished(job) for job in jobs if job.row is row] for row in table.rows}
    measured = {name: numbers(table, found) for name, found in outcomes.items()}
    curves = {
        name: [table.measure.curve(outcome.lines) for outcome in found]
        for name, found in outcomes.items()
    }
    return judge(table, measured, curves, list(overrides), time.monotonic() - began)


def numbers(table: Table, outcomes: Sequence[Outcome]) -> Numbers:
    """Return what the runs of a row have measured."""
    measure = table.measure
    return Numbers(
        values=[float("nan") if o.stopped else measure.value(o.lines) for o in outcomes],
        starts=[measure.first(outcome.lines) for outcome in outcomes],
        stopped=[outcome.stopped for outcome in outcomes],
        higher=measure.better == "higher",
    )
