"""The ledger of what clients have spent of their privacy: append-only, chained, on disk.

A client reads it before the first step and writes to it before anything leaves, in this order: the
reply is computed, stored (``clients.replies``), entered here, sent. Whoever is killed in between
finds the stored reply, enters it unless ``find`` knows it, and sends that very reply: nothing is
spent twice and nothing forgotten. Spending is added up by the client's name alone, over all runs
and data, so that neither a changed data set nor another run begins from zero.

One process holds the file at a time. In memory a client takes its merged releases, an entry three
short digests.
"""

import hashlib
import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from fedsys.errors import LedgerError, PrivacyBudgetExceeded
from fedsys.privacy.accounting import Release, Spent, epsilon, merged, upper_bound
from fedsys.privacy.entries import (
    FILE,
    GENESIS,
    Entry,
    Head,
    NewEntry,
    Streams,
    chain,
    line_of,
    short,
)
from fedsys.privacy.held_file import HeldFile

__all__ = ["Entry", "Head", "Ledger", "NewEntry", "Totals", "afford", "read"]

_HASH = hashlib.sha256().digest_size


class Totals:
    """What clients have released, added up by name."""

    def __init__(self) -> None:
        """Begin from zero."""
        self._steps: dict[str, dict[tuple[float, float], int]] = {}  # client -> (z, q) -> steps
        self._mechanisms: dict[tuple[float, float], tuple[float, float]] = {}  # each kept once

    @property
    def clients(self) -> set[str]:
        """Who has released anything."""
        return set(self._steps)

    def add(self, client: str, release: Release) -> None:
        """Count ``release`` of ``client``."""
        mechanism = (release.noise_multiplier, release.sample_rate)
        mechanism = self._mechanisms.setdefault(mechanism, mechanism)
        steps = self._steps.setdefault(client, {})
        steps[mechanism] = steps.get(mechanism, 0) + release.steps

    def spent(self, client: str) -> Spent:
        """Return everything that ``client`` has released."""
        steps = self._steps.get(client, {})
        return merged(Release(z, q, count) for (z, q), count in steps.items())


class Ledger:
    """The ledger in ``folder``, held by this process until it is closed or the process ends."""

    def __init__(self, folder: Path) -> None:
        """Read and check the ledger, or begin one.

        A last line that was torn in mid-write is cut off with a warning. Raises ``LedgerError``
        when anything else was altered, when another process holds the ledger, or when it cannot be
        written.
        """
        self._hashes = bytearray()  # of all entries, one after the other
        self._totals = Totals()
        self._streams = Streams()
        self._releases: set[bytes] = set()
        self._file = HeldFile(folder / FILE)
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        """Return the ledger."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Let go of the file."""
        self.close()

    def close(self) -> None:
        """Let go of the file; what was read can still be asked for."""
        self._file.close()

    @property
    def path(self) -> Path:
        """The file."""
        return self._file.path

    @property
    def head(self) -> Head:
        """Where the ledger ends now, to be anchored elsewhere."""
        length = len(self._hashes) // _HASH
        return Head(length, self._hash(length))

    def check(self, anchor: Head) -> None:
        """Raise ``LedgerError`` when the ledger does not go on from ``anchor``."""
        length = self.head.length
        if anchor.length > length:
            raise LedgerError(
                f"{self.path} has {length} entries and once had {anchor.length}: its end is"
                " missing; bring back the file as it was"
            )
        if anchor.hash != self._hash(anchor.length):
            raise LedgerError(
                f"{self.path} is another ledger than the one of {anchor.length} entries that is"
                " known here; bring back the file as it was"
            )

    @property
    def clients(self) -> set[str]:
        """Who has released anything."""
        return self._totals.clients

    def spent(self, client: str) -> Spent:
        """Return everything that ``client`` has released, in all runs and of all data."""
        return self._totals.spent(client)

    def find(self, run: str, round: int, client: str, reply: str) -> bool:
        """Return whether the release of ``reply`` by ``client`` in ``round`` is entered."""
        return _release_id(run, round, client, reply) in self._releases

    def append(self, entries: Sequence[NewEntry]) -> None:
        """Enter releases, all of them or none: they are on disk when this returns.

        Raises ``LedgerError`` when a stream of noise was used before, when the file was changed by
        somebody else, and when it cannot be written; nothing may leave the client then.
        """
        self._check_streams(entries)
        self._file.check()
        (length, previous), now = self.head, time.time()
        lines, hashes = [], []
        for index, entry in enumerate(entries, length):
            line, previous = line_of(entry, index, now, previous)
            lines.append(line)
            hashes.append(previous)
        if lines:
            self._file.add(b"".join(lines))
        for entry, digest in zip(entries, hashes, strict=True):
            self._note(entry, digest)

    def _read(self) -> None:
        size = 0
        try:
            for entry, size in chain(self.path):  # noqa: B007
                self._check_streams([entry])
                self._note(entry, entry.hash)
        except OSError as error:
            raise LedgerError(f"{self.path} cannot be read: {error}") from error
        self._file.mend(size)

    def _check_streams(self, entries: Sequence[NewEntry]) -> None:
        entry = self._streams.used_twice(entries)
        if entry is not None:
            raise LedgerError(
                f"{self.path}: the noise of client {entry.client} in round {entry.round} was used"
                " before; whoever has both replies can take it off"
            )

    def _note(self, entry: NewEntry, digest: str) -> None:
        self._totals.add(entry.client, entry.release)
        self._releases.add(_release_id(entry.run, entry.round, entry.client, entry.reply))
        self._streams.add(entry)
        self._hashes += bytes.fromhex(digest)

    def _hash(self, length: int) -> str:
        end = length * _HASH
        return self._hashes[end - _HASH : end].hex() if length else GENESIS


def read(folder: Path) -> list[Entry]:
    """Return the entries of a ledger that nobody need hold; a torn last line is left out.

    Raises ``LedgerError`` when there is none or when it was altered.
    """
    try:
        return [entry for entry, _ in chain(folder / FILE)]
    except OSError as error:
        raise LedgerError(f"{folder / FILE} cannot be read: {error}") from error


def afford(
    client: str, spent: Spent, planned: Iterable[Release], target: float | None, delta: float
) -> None:
    """Raise ``PrivacyBudgetExceeded`` when ``spent`` and ``planned`` together cost above target.

    ``spent`` is all that ``client`` has released; ``target`` is its budget, None where it has none.
    """
    if target is None:
        return
    after = merged((*spent, *planned))
    # The bound is cheap and holds by itself; the tight figure is for those near their end.
    if upper_bound(after, delta) > target and (figure := epsilon(after, delta)) > target:
        raise PrivacyBudgetExceeded(client, figure, target)


def _release_id(run: str, round: int, client: str, reply: str) -> bytes:
    return short(json.dumps([run, round, client, reply]))
