"""What a run shows: progress on stderr, live or line by line, and a table on stdout at its end."""

import logging
import math
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from fedsys.config import Experiment

Record = Mapping[str, Any]  # with the keys of a line of metrics.jsonl

_FAILURES_SHOWN = 5  # a round; all of them stand in metrics.jsonl
# Seconds: a run of 20,000 rounds would spend as long on its lines as on itself.
_BETWEEN_LINES = 0.1


class Outcome(Protocol):
    """What is left of a run that is over."""

    @property
    def folder(self) -> Path:
        """The run folder."""
        ...

    @property
    def summary(self) -> Mapping[str, Any]:
        """The content of summary.json."""
        ...

    @property
    def metrics(self) -> Sequence[Record]:
        """The lines of metrics.jsonl."""
        ...


class Observer(Protocol):
    """Is told how a run goes, in this order; it cannot change anything."""

    def started(self, experiment: "Experiment") -> None:
        """The configuration is accepted and the run folder exists."""
        ...

    def phase(self, text: str) -> None:
        """Something that takes time begins, such as "loading data"."""
        ...

    def round(self, record: Record, total: int) -> None:
        """A round of ``total`` is over; round 0 is the evaluation before the first."""
        ...

    def failure(self, client: int, reason: str) -> None:
        """A client was left out of the current round."""
        ...

    def finished(self, result: Outcome) -> None:
        """The run is over and its folder is complete."""
        ...


class Silent:
    """The observer of a run that nobody watches."""

    def started(self, experiment: "Experiment") -> None:
        """Show nothing."""

    def phase(self, text: str) -> None:
        """Show nothing."""

    def round(self, record: Record, total: int) -> None:
        """Show nothing."""

    def failure(self, client: int, reason: str) -> None:
        """Show nothing."""

    def finished(self, result: Outcome) -> None:
        """Show nothing."""


class Terminal(logging.Handler):
    """An observer, a handler of log records and a context manager: what people see of a run."""

    def __init__(self) -> None:
        """Draw a live bar where stderr is a terminal, else write plain lines."""
        super().__init__(logging.WARNING)
        self._console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=16),
            TextColumn("{task.fields[numbers]}", markup=False),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=None, numbers="")
        self._first: int | None = None  # round that was shown
        self._bytes = Counter[str]()
        self._written = -math.inf  # when the last plain line was
        self._failures = 0
        self._began = time.monotonic()
        self._folder: Path | None = None

    def __enter__(self) -> Self:
        """Show the bar and take over the log."""
        self._bar.start()
        logging.getLogger().addHandler(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove the bar; after an interruption, say how to go on."""
        logging.getLogger().removeHandler(self)
        self._bar.stop()
        begun = self._folder is not None and (self._folder / "config.yaml").exists()
        if kind is KeyboardInterrupt and begun:
            self._say(f"interrupted; to go on: fedsys resume {self._folder}")

    def emit(self, record: logging.LogRecord) -> None:
        """Write a log record above the bar."""
        self._say(f"{record.levelname.lower()}: {record.getMessage()}")

    def started(self, experiment: "Experiment") -> None:
        """Say where the run is kept."""
        self._folder = experiment.out
        self._say(f"run folder: {experiment.out}")

    def phase(self, text: str) -> None:
        """Show what is being done."""
        self._bar.update(self._task, description=text)
        if not self._console.is_terminal:
            self._say(text)

    def round(self, record: Record, total: int) -> None:
        """Show a round's numbers."""
        if self._first is None:
            self._began = time.monotonic() - (record.get("seconds") or 0.0)
            self._first = record["round"]
        self._bytes.update({key: record.get(key) or 0 for key in ("bytes_up", "bytes_down")})
        self._failures = 0
        title, numbers = f"round {record['round']}/{total}", self._numbers(record)
        self._bar.update(
            self._task, description=title, total=total, completed=record["round"], numbers=numbers
        )
        if not self._console.is_terminal and self._due(record["round"], total):
            self._say(f"{title}  {numbers}  {self._left(record, total)}".rstrip())

    def _due(self, round: int, total: int) -> bool:
        """Return whether to write a line: always at the ends, else not too many a second."""
        now = time.monotonic()
        if round in (self._first, total) or now - self._written >= _BETWEEN_LINES:
            self._written = now
            return True
        return False

    def failure(self, client: int, reason: str) -> None:
        """Say who was left out and why, unless it happens very often."""
        self._failures += 1
        if self._failures <= _FAILURES_SHOWN:
            self._say(f"client {client} left out: {reason}")
        elif self._failures == _FAILURES_SHOWN + 1:
            self._say("more clients left out of this round: see metrics.jsonl")

    def finished(self, result: Outcome) -> None:
        """Write the table of results to stdout."""
        self._bar.stop()
        show_table(self._results(result))

    def _say(self, line: str) -> None:
        self._console.print(line)

    def _numbers(self, record: Record) -> str:
        loss = record.get("train_loss")
        loss = record.get("eval_loss") if loss is None else loss
        parts = [
            _number("loss", loss),
            _number("accuracy", record.get("eval_accuracy")),
            f"up {size(self._bytes['bytes_up'])}",
            f"down {size(self._bytes['bytes_down'])}",
            _number("epsilon", record.get("epsilon")),
        ]
        return "  ".join(part for part in parts if part)

    def _left(self, record: Record, total: int) -> str:
        first = self._first or 0
        done = record["round"] - first + (first > 0)
        if not done:
            return ""
        seconds = (time.monotonic() - self._began) / done * (total - record["round"])
        return f"ETA {seconds:.0f} s"

    def _results(self, result: Outcome) -> list[tuple[str, str]]:
        summary = result.summary
        rows = [
            _course(result.metrics, "eval_accuracy", max),
            _course(result.metrics, "eval_loss", min),
        ]
        for name, key, text in (
            ("rounds", "rounds", str),
            ("sent up", "bytes_up", size),
            ("sent down", "bytes_down", size),
            ("sent at first", "bytes_init", size),
            ("seconds", "seconds", lambda v: f"{v:.1f}"),
            ("seconds a round", "seconds_per_round", lambda v: f"{v:.4g}"),
            ("peak memory", "peak_memory_mb", lambda v: f"{v:.0f} MB"),
            ("trained numbers", "trainable_parameters", lambda v: f"{v:,}"),
            ("epsilon", "epsilon", lambda v: f"{v:.3g}"),
            ("delta", "delta", lambda v: f"{v:.3g}"),
        ):
            if summary.get(key) is not None:
                rows.append((name, text(summary[key])))
        # An epsilon says nothing without what it is an epsilon of.
        rows += [(n, text) for n, text in (summary.get("privacy") or {}).items() if n != "delta"]
        return [row for row in rows if row[1]] + [("run folder", str(result.folder))]


def size(count: float) -> str:
    """Return a number of bytes in a unit that suits it."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


def show_table(rows: Sequence[Sequence[str]]) -> None:
    """Write rows to stdout in columns; nothing is cut or wrapped, for people copy folders."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        sys.stdout.write("  ".join(cells).rstrip() + "\n")


def _number(name: str, value: float | None) -> str:
    return "" if value is None else f"{name} {value:.4g}"


def _course(rounds: Sequence[Record], key: str, best: Any) -> tuple[str, str]:
    """Return how a metric went: its first, last and best value."""
    name = key.removeprefix("eval_")
    seen = [(record[key], record["round"]) for record in rounds if record.get(key) is not None]
    if not seen:
        return name, ""
    (first, start), (last, end) = seen[0], seen[-1]
    top = best(value for value, _ in seen)
    return name, f"{first:.4g} (round {start}) -> {last:.4g} (round {end}), best {top:.4g}"
