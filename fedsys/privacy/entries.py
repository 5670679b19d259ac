"""What a line of a privacy ledger says, and the chain that its lines make.

    hash_i = SHA-256(hash_{i-1} + body_i),  hash_{-1} = 64 zeros

body_i is the entry as JSON: its fields in the order of ``_FIELDS``, no spaces, ASCII, floats by
``repr``, so that they come back to the bit. A line is the body with ``previous`` and ``hash`` at
its end. No byte of the file can change without breaking the chain, but for its tail, which whoever
remembers a ``Head`` will miss.
"""

import hashlib
import json
import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, Self

from fedsys.errors import LedgerError
from fedsys.privacy.accounting import Release

log = logging.getLogger(__name__)

FILE = "ledger.jsonl"
GENESIS = "0" * 64  # what stands for the hash before the first entry
MECHANISMS = ("dp-sgd", "initialisation", "client", "clip")
_SUFFIX = b',"previous":"%s","hash":"%s"}'
_SUFFIX_BYTES = len(_SUFFIX) - 2 * len("%s") + 2 * len(GENESIS)


class Head(NamedTuple):
    """Where a ledger ended at some time; it must go on from there."""

    length: int  # in entries
    hash: str  # of the last one

    def as_dict(self) -> dict[str, Any]:
        """Return the head as a JSON object, as run folders anchor it."""
        return {"length": self.length, "sha256": self.hash}

    @classmethod
    def of(cls, anchor: Any) -> Self:
        """Return the head that ``as_dict`` made; raise ``LedgerError`` for anything else."""
        try:
            length, digest = anchor["length"], anchor["sha256"]
        except (KeyError, TypeError):
            length = digest = None
        if type(length) is not int or length < 0 or not isinstance(digest, str):
            raise LedgerError(f"this is no head of a ledger: {anchor!r:.100}")
        return cls(length, digest)


@dataclass(frozen=True, kw_only=True)
class NewEntry:
    """One release that is about to leave, as the caller knows it."""

    run: str  # the run's id
    round: int
    client: str  # its name, under which everything it ever releases is added up
    data: str  # the data set's name
    fingerprint: str  # of the client's rows
    num_examples: int
    mechanism: str  # one of MECHANISMS
    release: Release
    clipping_norm: float
    target: float | None  # the client's budget; None: it has none
    delta: float
    stream: str  # id of the noise, never used again; "" only where there is no noise
    reply: str = ""  # digest of what is released

    def __post_init__(self) -> None:
        """Check types and ranges; raises ``ValueError`` and ``TypeError``."""
        for name in _TEXTS:
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name} of a ledger entry must be text")
        if self.mechanism not in MECHANISMS:
            raise ValueError(f"mechanism must be one of {MECHANISMS}, got {self.mechanism!r:.40}")
        if min(self.round, self.num_examples) < 0:
            raise ValueError("round and num_examples of a ledger entry must not be negative")
        target = math.inf if self.target is None else self.target
        if not (self.clipping_norm > 0 and target >= 0 and 0 < self.delta < 1):
            raise ValueError(
                "an entry needs clipping_norm > 0, target >= 0 and delta in (0, 1), got "
                f"{self.clipping_norm}, {self.target} and {self.delta}"
            )
        if self.release.noise_multiplier > 0 and not self.stream:
            raise ValueError("a release with noise must name the stream that it came from")


@dataclass(frozen=True, kw_only=True)
class Entry(NewEntry):
    """One release, as the ledger holds it."""

    index: int  # its place, from 0
    time: float  # seconds since 1970, for people: nothing depends on it
    previous: str  # hash of the entry before
    hash: str


_RELEASE = tuple(field.name for field in fields(Release))
_TEXTS = ("run", "client", "data", "fingerprint", "mechanism", "stream", "reply")
_OWN = tuple(field.name for field in fields(NewEntry) if field.name != "release")
_FIELDS = ("index", "time", *_OWN, *_RELEASE)
_FLOATS = ("time", "clipping_norm", "target", "delta", "noise_multiplier", "sample_rate")


def line_of(entry: NewEntry, index: int, time: float, previous: str) -> tuple[bytes, str]:
    """Return the line of ``entry`` with its newline, and its hash."""
    known = vars(entry) | {name: getattr(entry.release, name) for name in _RELEASE}
    known |= {"index": index, "time": time}
    body = json.dumps({name: _plain(name, known[name]) for name in _FIELDS}, **_COMPACT).encode()
    digest = _chained(previous, body)
    return body[:-1] + _SUFFIX % (previous.encode(), digest.encode()) + b"\n", digest


def entry_of(line: bytes, index: int, previous: str) -> Entry:
    """Return what ``line``, without its newline, says.

    Raises ``ValueError`` unless it is entry ``index`` and follows the one with hash ``previous``.
    """
    body, suffix = line[:-_SUFFIX_BYTES] + b"}", line[-_SUFFIX_BYTES:]
    digest = _chained(previous, body)
    if suffix != _SUFFIX % (previous.encode(), digest.encode()):
        raise ValueError("it does not follow from the one before")
    try:
        known = json.loads(body)
        if tuple(known) != _FIELDS or known["index"] != index:
            raise ValueError("it has other fields, or another place")
        for name in _FLOATS:
            known[name] = float(known[name]) if known[name] is not None else None
        release = Release(**{name: known.pop(name) for name in _RELEASE})
        return Entry(**known, release=release, previous=previous, hash=digest)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"it is no entry: {error}") from error


def chain(path: Path) -> Iterator[tuple[Entry, int]]:
    """Yield the entries of a file, each with the offset behind it, and check the chain.

    A last line that was torn in mid-write is passed over with a warning: nothing has left for it.
    Raises ``LedgerError`` for anything else that is not as it was written.
    """
    previous, index, offset = GENESIS, 0, 0
    with path.open("rb") as file:
        for line in file:
            try:
                entry = entry_of(line.removesuffix(b"\n"), index, previous)
            except ValueError as error:
                if not line.endswith(b"\n") and _is_torn(line):
                    log.warning("%s: entry %d was torn in mid-write and is dropped", path, index)
                    return
                raise LedgerError(
                    f"{path}: entry {index} cannot be believed: {error}. The ledger was altered or"
                    " lines of it are missing; bring back the file as it was"
                ) from error
            offset += len(line)
            previous, index = entry.hash, index + 1
            yield entry, offset


class Streams:
    """The noise that was used, each for one release only.

    One release may be charged to several clients, as a server's round is to its cohort: their
    entries stand one behind the other.
    """

    def __init__(self) -> None:
        """Know of none."""
        self._used: set[bytes] = set()
        self._last: NewEntry | None = None

    def add(self, entry: NewEntry) -> None:
        """Note the stream of the next entry."""
        self._last = entry
        if entry.stream:
            self._used.add(short(entry.stream))

    def used_twice(self, entries: Iterable[NewEntry]) -> NewEntry | None:
        """Return the first of the next ``entries`` whose noise has been used before."""
        seen: set[bytes] = set()
        last = self._last
        for entry in entries:
            stream = short(entry.stream)
            known = stream in self._used or stream in seen
            if entry.stream and known and not _one_release(last, entry):
                return entry
            seen.add(stream)
            last = entry
        return None


def short(text: str) -> bytes:
    """Return a digest of 16 bytes that takes little memory."""
    # A lone surrogate in a name has no UTF-8 of its own.
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _one_release(one: NewEntry | None, other: NewEntry) -> bool:
    """Return whether two neighbours are a server's release, charged to two clients."""
    if one is None or {one.mechanism, other.mechanism} != {"client"}:
        return False
    return (one.run, one.round, one.stream) == (other.run, other.round, other.stream)


_COMPACT: dict[str, Any] = {"separators": (",", ":"), "allow_nan": False}


def _is_torn(line: bytes) -> bool:
    """Return whether a line without newline can be the beginning of one.

    A whole entry in front of something else cannot: its newline was there and has been changed.
    """
    try:
        json.JSONDecoder().raw_decode(line.decode("latin-1"))
    except (ValueError, RecursionError):
        return True
    return False


def _chained(previous: str, body: bytes) -> str:
    return hashlib.sha256(previous.encode() + body).hexdigest()


def _plain(name: str, value: Any) -> Any:
    """Return a field as JSON can say it: there is no infinity in it."""
    if name not in _FLOATS or value is None:
        return value
    return "inf" if value == math.inf else float(value)
