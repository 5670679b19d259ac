"""A run folder that another process writes, followed from here."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsys.json_lines import JsonLines, with_numbers

Metrics = dict[str, Any]
Stamp = tuple[int, int, int] | None

_CLIENT = re.compile(r"client (\d+): (.*)", re.DOTALL)


class Followed:
    """What is new in a run folder since this object was made."""

    def __init__(self, folder: Path) -> None:
        """Take note of what is there already: a run that is gone on with."""
        self.folder = folder
        self._log = JsonLines(folder / "metrics.jsonl")
        lines = self._log.read()
        self._shown = lines[-1]["round"] if lines else -1
        self._stamp = _stamp(self._log.path)
        self._summary = _stamp(self.folder / "summary.json")
        self.moved = False  # whether a round was recorded since

    def rounds(self) -> list[Metrics]:
        """Return the lines of the rounds that are new; a run that resumed writes some again."""
        stamp = _stamp(self._log.path)
        if stamp == self._stamp:
            return []
        self._stamp = stamp
        new = [line for line in self._log.read() if line["round"] > self._shown]
        if new:
            self._shown, self.moved = new[-1]["round"], True
        return new

    def lines(self) -> list[Metrics]:
        """Return the lines of all rounds."""
        return self._log.read()

    def summary(self) -> Metrics | None:
        """Return summary.json once it was written since; None before."""
        path = self.folder / "summary.json"
        if _stamp(path) in (None, self._summary):
            return None
        found: Metrics = with_numbers(json.loads(path.read_text()))
        return found


def finished(folder: Path, rounds: int) -> Metrics | None:
    """Return the summary of a run that has completed its ``rounds``; None of any other."""
    path = folder / "summary.json"
    if not path.exists():
        return None
    found: Metrics = with_numbers(json.loads(path.read_text()))
    complete = found["status"] == "completed" and found.get("rounds") == rounds
    return found if complete else None


def failures(line: Mapping[str, Any]) -> list[tuple[int, str]]:
    """Return which clients were left out of a round, and why."""
    found = [_CLIENT.fullmatch(text) for text in line.get("reasons") or ()]
    return [(int(match[1]), match[2]) for match in found if match]


def _stamp(path: Path) -> Stamp:
    """Return what changes when a file is written; None when there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns
