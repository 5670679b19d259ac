"""The page of a sweep."""

import shlex

from fedsys.report.grids import pictures
from fedsys.report.page import Link, Page, Section, Table, link
from fedsys.sweeps.grid import SEED
from fedsys.sweeps.results import COMPLETED, Results, Row
from fedsys.sweeps.tables import by_seed, failures


def page_of_sweep(results: Results) -> Page:
    """Return what came of a sweep so far, and write its pictures into its folder."""
    head, *rows = by_seed(results)
    done = sum(row.status == COMPLETED for row in results.rows)
    left_out = [row for row in results.rows if row.status == "refused"]
    wanted = len(results.rows) - len(left_out)
    sections = [
        Section("Results", notes=_notes(results), table=Table(head, rows)),
        Section("Pictures", pictures=pictures(results)),
        _problems("Not complete", results.unfinished),
        _problems("Left out", left_out),
        Section("Runs", table=_runs(results)),
    ]
    return Page(
        title=f"Sweep over {', '.join(results.keys) or 'nothing'}",
        status=f"{done} of {wanted} runs completed",
        good=done == wanted,
        facts=[
            ("command", f"fedsys sweep {shlex.join(results.overrides)}"),
            ("folder", str(results.folder.resolve())),
        ],
        sections=[s for s in sections if s.table or s.pictures],
    )


def _notes(results: Results) -> list[str]:
    text = f"The {results.measure} is that of the last evaluation of a run"
    if SEED in results.keys:
        text += "; means over the seeds, and +- the standard deviation of the sample"
    return [f"{text}. results.csv has a row for each run."]


def _problems(title: str, rows: list[Row]) -> Section:
    found = failures(rows)
    table = Table(["run", "status", "reason"], [[n, s.rstrip(":"), r] for n, s, r in found])
    return Section(title, table=table if found else None)


def _runs(results: Results) -> Table:
    measure = results.measure
    rows = [
        [
            _link(row),
            row.status,
            *(_number(row, f"{which}_{measure}") for which in ("final", "best")),
        ]
        for row in results.rows
    ]
    return Table(["run", "status", f"final {measure}", f"best {measure}"], rows)


def _link(row: Row) -> Link | str:
    name = row.point.name
    if not (row.point.folder / "report.html").is_file():
        return name
    return link(name, "points", name, "report.html")


def _number(row: Row, column: str) -> str:
    value = row.numbers.get(column)
    return "" if value is None else f"{value:.4g}"
