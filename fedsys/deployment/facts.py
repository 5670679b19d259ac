"""What a reply is, as the policy of its device judges it. Nothing it says is believed unseen."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedsys.arrays import tensor_of
from fedsys.checks import MAX_EXAMPLES, read_spent
from fedsys.deployment.policy import Facts, Level
from fedsys.errors import ClientFailure, LedgerError
from fedsys.messages import ARRAYS, BASIS, METRICS, NUM_EXAMPLES, REPLY, SPENT
from fedsys.params import digest
from fedsys.privacy.accounting import Spent, merged
from fedsys.privacy.ledger import Entry, read
from fedsys.secagg.rounds import MASKED, SECAGG

_PARTS = {ARRAYS: ArrayRecord, METRICS: MetricRecord, REPLY: ConfigRecord, SECAGG: ConfigRecord}
_LONGEST_BASIS = 64  # a digest


@dataclass(frozen=True)
class Asked:
    """The message that a reply answers, and what its run promises."""

    kind: str  # its type
    level: Level
    run: str  # the run's id, as in the ledger
    round: int | None
    summed: bool  # whether updates leave masked, as parts of a sum


def facts_of(reply: Message, asked: Asked, size: int, ledger: Path) -> Facts:
    """Return the facts of ``reply``, which takes ``size`` bytes; ``ledger`` is a folder.

    Raises ``ValueError`` for arrays that cannot be read.
    """
    content = reply.content
    unknown = [n for n, part in content.items() if type(part) is not _PARTS.get(n)]
    unknown += _unknown_in(content, asked)
    arrays, metrics = content.get(ARRAYS), content.get(METRICS)
    entered, norm = None, None
    if isinstance(arrays, ArrayRecord) and asked.level == "sample":
        entered, norm = _entered(arrays, asked, ledger)
    named = dict(metrics.items()) if isinstance(metrics, MetricRecord) else {}
    return Facts(
        kind=asked.kind,
        level=asked.level,
        size=size,
        # By kind, and not by name: whatever it is called, it would leave.
        arrays=any(isinstance(part, ArrayRecord) for part in content.values()),
        num_examples=_count(named.pop(NUM_EXAMPLES, None)),
        metrics=frozenset(named),
        unknown=tuple(map(str, unknown)),
        spent=_said(reply),
        entered=entered,
        clipping_norm=norm,
    )


def _unknown_in(content: RecordDict, asked: Asked) -> list[str]:
    """Return the keys that no reply has."""
    reply, found = content.get(REPLY), []
    if isinstance(reply, ConfigRecord):
        found += [name for name in reply if name not in (BASIS, SPENT)]
        basis = reply.get(BASIS, "")
        if not isinstance(basis, str) or len(basis) > _LONGEST_BASIS:
            found.append(BASIS)
    if SECAGG in content and not asked.summed:
        found.append(SECAGG)
    return found


def _count(value: object) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return int(value) if 1 <= value <= MAX_EXAMPLES and value % 1 == 0 else None


def _said(reply: Message) -> Spent | None:
    try:
        return read_spent(reply, -1)
    except (ClientFailure, AttributeError):
        return None


def _entered(arrays: ArrayRecord, asked: Asked, ledger: Path) -> tuple[Spent | None, float | None]:
    """Return all that this device has released, and the bound of the release ``arrays`` are.

    Whatever a run calls its client and its rows, they are those of the device. None where the
    ledger has no such release.
    """
    try:
        entries = read(ledger)  # whoever holds it: it is only ever added to
    except LedgerError:
        return None, None
    is_of = _matcher(arrays, asked)
    found = [entry for entry in entries if entry.reply and is_of(entry)]
    if not found:
        return None, None
    spent = merged(entry.release for entry in entries)
    return spent, max(entry.clipping_norm for entry in found)


def _matcher(arrays: ArrayRecord, asked: Asked) -> Callable[[Entry], bool]:
    """Return what says of an entry whether it is of the release that ``arrays`` are."""
    if asked.summed and list(arrays) == [MASKED]:
        # The ledger knows what is under the mask, of which nothing can be seen here.
        nothing = digest({})
        return lambda e: (e.run, e.round) == (asked.run, asked.round) and e.reply != nothing
    released = digest({name: tensor_of(array) for name, array in arrays.items()})
    return lambda entry: entry.reply == released
