"""The runs of a table: what each is asked for, whether it can be, and what is left of it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedsys.compose import compose
from fedsys.config import build
from fedsys.errors import ConfigError
from fedsys.json_lines import with_numbers
from fedsys.reproduction.rows import Row
from fedsys.reproduction.tables import Line, Table
from fedsys.sweeps.processes import difference

OURS = ("experiment", "seed", "out")  # keys that a table sets itself


@dataclass(frozen=True)
class Job:
    """One run: what is typed after ``fedsys run``, but for ``out``, and where its folder is."""

    row: Row
    seed: int
    overrides: list[str]
    folder: Path


@dataclass(frozen=True)
class Outcome:
    """What is left of a run."""

    lines: list[Line]  # of metrics.jsonl
    stopped: str  # why it ended early, "" if it did not


def plan(table: Table, out: Path, overrides: Sequence[str]) -> list[Job]:
    """Return the runs of a table, none of which has begun anything yet."""
    return [
        Job(
            row,
            seed,
            [*table.overrides(row), *overrides, f"seed={seed}"],
            folder,
        )
        for row in table.rows
        for seed in table.seeds
        for folder in [out / row.name / f"seed_{seed}"]
    ]


def check(table: Table, out: Path, overrides: Sequence[str]) -> None:
    """Raise ``ConfigError`` with all that keeps the runs of a table from being done in ``out``."""
    problems: dict[str, None] = {}
    for text in overrides:
        key = text.partition("=")[0].lstrip("+~")
        if key in OURS:
            problems[f"{text}: {key} is set by the table; --out names another folder"] = None
    for job in plan(table, out, overrides) if not problems else ():
        path = job.folder / "config.yaml"
        if job.seed != table.seeds[0] and not path.is_file():
            continue  # nothing to compare with, and as good as the first seed
        try:
            wanted = build(compose(job.overrides)).resolved
            if other := difference(job.folder, wanted):
                problems[f"{other}; choose another folder with --out"] = None
        except ConfigError as error:
            problems |= dict.fromkeys(error.problems)
    if problems:
        raise ConfigError(list(problems))


def outcome(folder: Path) -> Outcome | None:
    """Return what is left of the run in ``folder``, or None if it is not over."""
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    reason = str(summary.get("reason", ""))
    # Any other failure, such as a full disk, says nothing of the strategy: the run goes on.
    diverged = summary["status"] == "failed" and "every client failed" in reason
    if summary["status"] != "completed" and not diverged:
        return None
    return Outcome([with_numbers(json.loads(line)) for line in lines], reason if diverged else "")
