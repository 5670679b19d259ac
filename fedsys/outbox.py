"""What is sent to whom: x_t for all, and what is frozen for those who do not have it."""

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fedsys import messages
from fedsys.codec import Codec
from fedsys.params import Params
from fedsys.rounds import Round
from fedsys.snapshot import Snapshot

if TYPE_CHECKING:
    from fedsys.strategy import Strategy

_LOST = -1  # the version held by a client that may have lost all, and gets it again


class Outbox:
    """The records of a run that leave the server; ``arrays`` is x_t as it is sent."""

    def __init__(self, strategy: "Strategy", codec: Codec | None) -> None:
        """Hold nothing until ``encode``."""
        self._strategy, self._codec = strategy, codec
        self._frozen: Params = {}
        self._records: dict[str, ArrayRecord] = {}
        self.packs = False  # other arrays than x_t
        self.arrays = ArrayRecord()

    def encode(self, now: Snapshot) -> None:
        """Make ``arrays`` and the records of what is frozen those of ``now``."""
        packed = self._codec.pack(now.params) if self._codec is not None else None
        self.packs = packed is not None
        if packed is None:
            self.arrays = messages.encode(now.params, self._strategy.layout)
        else:
            self.arrays = messages.encode(packed)
        if self._frozen is not now.frozen:
            self._frozen, self._records[messages.FROZEN] = now.frozen, messages.encode(now.frozen)
        if now.base:
            self._records[messages.BASE] = messages.encode(now.base)
            self._records[messages.MOVES] = messages.encode(now.moves)

    def contents(
        self,
        now: Snapshot,
        clients: Iterable[int],
        arrays: ArrayRecord,
        config: ConfigRecord,
        checkpoints: Callable[[], list[int]],
    ) -> Iterator[tuple[int, RecordDict]]:
        """Yield each client with what is sent to it; what is equal is one object.

        ``checkpoints()`` are the rounds that the server may go back to.
        """
        config[messages.BASIS] = now.basis
        keeps = self._remembers or self._strategy.account is not None
        if rounds := checkpoints() if keeps else []:  # Flower has no empty lists
            config[messages.CHECKPOINTS] = rounds
        known = RecordDict({messages.ARRAYS: arrays, messages.CONFIG: config})
        missing: dict[str, RecordDict] = {}
        for client in clients:
            content, lacks = known, self._lacks(now, client)
            if lacks is not None:
                if lacks not in missing:
                    missing[lacks] = known.copy()
                    missing[lacks][lacks] = self._records[lacks]
                content = missing[lacks]
            if self._tells_numbers:
                content = content.copy()
                own = {messages.CLIENT: client}
                if self._remembers:
                    own[messages.ACCEPTED] = now.accepted.get(client, 0)
                content[messages.CONFIG] = ConfigRecord({**config, **own})
            yield client, content

    def delivered(self, now: Snapshot, current: Round) -> None:
        """Note in ``now`` what the clients of a round hold from now on."""
        if now.base or self._sends_factors(now):
            now.informed.update(dict.fromkeys(current.answered, now.version))
            for client in {failure.client for failure in current.failures} & current.nodes.keys():
                if client not in current.answered:
                    now.informed[client] = _LOST
        if self._remembers:
            now.accepted.update(dict.fromkeys(current.answered, now.round))

    def _lacks(self, now: Snapshot, client: int) -> str | None:
        """Return which record the client needs before it can train; None when it has all."""
        held = now.informed.get(client)
        if now.base:  # which everybody holds as it was at the beginning
            behind = now.version - (held or 0)
            cheap = 0 < messages.numbers(now.moves) < messages.numbers(now.base)
            if not behind:
                return None
            return messages.MOVES if behind == 1 and cheap else messages.BASE
        return messages.FROZEN if self._sends_factors(now) and held in (None, _LOST) else None

    def _sends_factors(self, now: Snapshot) -> bool:
        return bool(now.frozen) and self._strategy.sends_factors

    @property
    def _remembers(self) -> bool:
        return self._codec is not None and self._codec.remembers

    @property
    def _tells_numbers(self) -> bool:
        # Which rows it holds does not tell a client how the server numbers its node.
        attack = self._strategy.attack
        return self._codec is not None or (attack is not None and attack.flips_labels)
