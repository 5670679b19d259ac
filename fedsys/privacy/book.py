"""What one run entered in a ledger, and the epsilon that its entries come to, round by round.

What a client had spent in a round counts everything it ever released up to its last entry of that
round, in other runs too.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from fedsys.errors import LedgerError
from fedsys.privacy.accounting import Spent, largest
from fedsys.privacy.entries import GENESIS, Entry, Streams, chain
from fedsys.privacy.ledger import Totals


class Step(NamedTuple):
    """An entry of the run, with all that its client had spent by then."""

    entry: Entry
    spent: Spent


class Figure(NamedTuple):
    """The largest epsilon of any client, and whose it is."""

    epsilon: float
    client: str | None


@dataclass
class Book:
    """A ledger, as far as one run goes."""

    heads: dict[int, str]  # hashes after so many entries, where somebody asked for them
    length: int = 0  # entries of all runs
    head: str = GENESIS
    steps: list[Step] = field(default_factory=list)  # of this run, in the ledger's order

    def figures(self, rounds: Sequence[int]) -> dict[int, Figure]:
        """Return the figure after each of ``rounds``, which rise."""
        steps = sorted(self.steps, key=lambda step: (step.entry.round, step.entry.index))
        figures, figure = {}, Figure(0.0, None)
        latest: dict[str, int] = {}
        place = 0
        for round in rounds:
            changed: dict[str, Step] = {}
            while place < len(steps) and steps[place].entry.round <= round:
                entry = steps[place].entry
                # A round done again after a kill is entered behind later ones.
                if entry.index > latest.get(entry.client, -1):
                    latest[entry.client] = entry.index
                    changed[entry.client] = steps[place]
                place += 1
            # Spending only grows, so nobody else can have become the largest.
            if changed:
                figure = max(figure, worst(list(changed.values())), key=lambda f: f.epsilon)
            figures[round] = figure
        return figures


def bound(books: Sequence[Book]) -> Book:
    """Return ledgers of different clients as one, which has no head of its own."""
    steps = [step for book in books for step in book.steps]
    return Book({0: GENESIS}, sum(book.length for book in books), "one a client", steps)


def worst(steps: Sequence[Step]) -> Figure:
    """Return the largest epsilon of ``steps``, at least one, which have one delta."""
    spent = {place: step.spent for place, step in enumerate(steps)}
    epsilon, place = largest(spent, steps[0].entry.delta)
    return Figure(epsilon, None if place is None else steps[place].entry.client)


def open_book(path: Path, run: str | None, anchored: Collection[int]) -> Book:
    """Read a whole ledger and keep what ``run`` entered, and its hashes at lengths ``anchored``.

    ``run`` may be None where it is the only one. Raises ``LedgerError`` for a ledger that cannot
    be believed and ``OSError`` for one that cannot be read.
    """
    book, totals = Book({0: GENESIS}), Totals()
    streams = Streams()
    runs: set[str] = set()
    for entry, _ in chain(path):
        if streams.used_twice([entry]):
            raise LedgerError(f"{path}: entry {entry.index} uses noise for a second time")
        streams.add(entry)
        totals.add(entry.client, entry.release)
        book.length, book.head = entry.index + 1, entry.hash
        if book.length in anchored:
            book.heads[book.length] = entry.hash
        runs.add(entry.run)
        if run is None or entry.run == run:
            book.steps.append(Step(entry, totals.spent(entry.client)))
    if run is None and len(runs) > 1:
        raise LedgerError(f"{path} holds several runs, and env.json does not say which this is")
    return book
