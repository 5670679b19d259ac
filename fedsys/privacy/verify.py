"""Whether a run was as private as it says: epsilon recomputed from the ledger alone.

What stands in ``metrics.jsonl``, ``summary.json`` and the checkpoints was written by the server.
Here the ledger is read afresh: its chain must be whole and go on from every head anchored in the
run folder, every update used must have been entered, nobody may be above the budget in its own
entries, and every epsilon shown must be the one that the entries come to.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedsys.errors import LedgerError
from fedsys.privacy.book import Book, Figure, Step, bound, open_book, worst
from fedsys.privacy.claims import Claims

_TOLERANCE = 1e-6  # relative: another version of the accountant may round otherwise
_SHOWN = 5  # problems of one kind
_NOWHERE = "there is no ledger, so nothing was private or is proved"
_ON_DEVICES = (
    "the ledgers are on the devices, and so is the proof: there, `fedsys join FOLDER --dry-run`"
    " shows what was spent"
)


@dataclass
class Report:
    """What was found in a run folder."""

    folder: Path
    facts: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    unread: str = ""  # why there is nothing to verify here

    def rows(self) -> list[tuple[str, str]]:
        """Return what was found as rows of a table."""
        count = len(self.problems)
        verdict = f"{count} problem{'s' * (count > 1)}" if count else "as recorded"
        if self.unread and not count:
            verdict = f"not verified: {self.unread}"
        return [("run folder", str(self.folder)), *self.facts, ("result", verdict)]

    def fact(self, name: str, text: str) -> None:
        """Add something that is as it is."""
        self.facts.append((name, text))

    def several(self, problems: Iterable[str]) -> None:
        """Add problems of one kind, of which a few will do."""
        found = list(problems)
        self.problems += found[:_SHOWN]
        if len(found) > _SHOWN:
            self.problems.append(f"... and {len(found) - _SHOWN} more of this kind")


def verify(folder: Path) -> Report:
    """Return what the ledger of the run in ``folder`` says of what the run says."""
    claims = Claims(folder)
    report = Report(folder, problems=list(claims.problems))
    path, anchored = claims.ledger, {anchor.length for anchor in claims.anchors.values()}
    try:
        if claims.far and claims.apart:
            book = bound([open_book(apart, claims.run, ()) for apart in claims.apart])
        else:
            book = open_book(path, claims.run, anchored)
    except FileNotFoundError:
        if claims.far:
            report.unread = _ON_DEVICES
        else:
            report.problems.append(f"{path}: {_NOWHERE}")
        return report
    except (LedgerError, OSError) as error:
        report.problems.append(str(error))
        return report
    report.fact("ledger", str(path))
    report.fact("entries", f"{book.length}, {len(book.steps)} of this run")
    report.fact("head", book.head)
    for check in (_check_anchors, _check_entered, _check_budgets, _check_figures):
        check(book, claims, report)
    return report


def _check_anchors(book: Book, claims: Claims, report: Report) -> None:
    if claims.far:
        report.fact("anchored in", "nothing: every client keeps its own ledger")
        return
    if not claims.anchors:
        report.problems.append(
            "neither summary.json nor a checkpoint knows the head of the ledger: nobody would see"
            " that its end is missing"
        )
    for name, anchor in claims.anchors.items():
        if anchor.length > book.length:
            report.problems.append(
                f"the end of the ledger is missing: it has {book.length} entries, {name} knows of"
                f" {anchor.length}"
            )
        elif book.heads[anchor.length] != anchor.hash:
            report.problems.append(f"the ledger is another one than {name} knows")
    report.fact("anchored in", ", ".join(claims.anchors) or "nothing")


def _check_entered(book: Book, claims: Claims, report: Report) -> None:
    """Every update that was used must be entered; at client level every round that used any."""
    entered: dict[int, set[str]] = defaultdict(set)
    mechanisms = {entry.mechanism for entry, _ in book.steps}
    for entry, _ in book.steps:
        if entry.mechanism != "initialisation":
            entered[entry.round].add(entry.client)
    central = "client" in mechanisms
    report.several(
        f"round {line.round} used {line.clients} updates, the ledger has {len(entered[line.round])}"
        " releases of it"
        for line in claims.lines
        if len(entered[line.round]) < (min(1, line.clients) if central else line.clients)
    )
    if _said(claims).get("initialisation") == "included" and "initialisation" not in mechanisms:
        report.problems.append("the initialisation is said to be included and was never entered")
    # In a round that was not finished, as when a run is killed, nothing is wrong with that.
    end = claims.anchors.get("summary.json")
    after = sum(
        entry.round > claims.last or (end is not None and entry.index >= end.length)
        for entry, _ in book.steps
    )
    if after and claims.completed:
        report.problems.append(f"{after} releases were entered after the end of the run")
    later = sum(entry.round > claims.last for entry, _ in book.steps)
    if later:
        report.fact("not finished", f"{later} releases after round {claims.last}")


def _check_budgets(book: Book, _: Claims, report: Report) -> None:
    last = {(entry.client, entry.target): Step(entry, spent) for entry, spent in book.steps}
    budgets: dict[tuple[float, float], dict[str, Step]] = defaultdict(dict)
    for (client, target), step in last.items():
        if target is not None:
            budgets[target, step.entry.delta][client] = step
    found = []
    for (target, _delta), steps in budgets.items():
        while steps:
            epsilon, who = worst(list(steps.values()))
            if who is None or epsilon <= target * (1 + _TOLERANCE):
                break
            found.append(
                f"client {who} has spent epsilon {epsilon:.6g}, above its target {target:.6g}"
            )
            del steps[who]
    report.several(found)


def _check_figures(book: Book, claims: Claims, report: Report) -> None:
    deltas = sorted({entry.delta for entry, _ in book.steps})
    if len(deltas) > 1:
        report.problems.append(f"the entries of this run have several deltas: {deltas}")
        return
    figures = book.figures([line.round for line in claims.lines])
    report.several(
        problem
        for line in claims.lines
        if line.round or line.epsilon is not None  # round 0 is before anything is shown
        for problem in _compared(
            f"round {line.round} of metrics.jsonl", line.epsilon, figures[line.round].epsilon
        )
    )
    figure = figures.get(claims.last, Figure(0.0, None))
    whose = "" if figure.client is None else f", spent by client {figure.client}"
    report.fact("epsilon", f"{figure.epsilon:.6g}{whose}")
    report.fact("delta", f"{deltas[0]:.6g}" if deltas else "none")
    for name, text in _said(claims).items():
        if name != "delta":
            report.fact(f"{name}, as said", f"{text}")
    if claims.summary:
        _check_summary(claims, figure.epsilon, deltas, report)


def _check_summary(claims: Claims, epsilon: float, deltas: list[float], report: Report) -> None:
    said = claims.summary
    if said.get("rounds") != claims.last:
        if claims.completed:
            report.problems.append(
                f"summary.json tells of {said.get('rounds')} rounds, metrics.jsonl of {claims.last}"
            )
        return  # it is of an interruption, and the run has gone on
    report.problems += _compared("summary.json", said.get("epsilon"), epsilon)
    if deltas and said.get("delta") != deltas[0]:
        report.problems.append(f"summary.json says delta {said.get('delta')}, not {deltas[0]}")


def _said(claims: Claims) -> dict[str, Any]:
    """Return the words that stand beside epsilon."""
    found = claims.summary.get("privacy")
    return found if isinstance(found, dict) else {}


def _compared(where: str, said: Any, computed: float) -> list[str]:
    try:
        shown = 0.0 if said is None else float(said)
    except (TypeError, ValueError):
        return [f"{where}: epsilon is {said!r:.40}, no number"]
    if math.isclose(shown, computed, rel_tol=_TOLERANCE):
        return []
    what = "no epsilon" if said is None else f"epsilon {shown:.6g}"
    return [f"{where} says {what}, the ledger comes to {computed:.6g}"]
