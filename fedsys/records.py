"""The numbers of a run: one record a round, and who wants to hear of it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from flwr.app import ArrayRecord, MetricRecord

from fedsys.errors import ClientFailure
from fedsys.snapshot import Snapshot
from fedsys.update import Update

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]


@dataclass
class RoundRecord:
    """A line of ``metrics.jsonl`` and of ``participation.jsonl``; ``None``: was not measured."""

    round: int
    clients: int = 0  # whose updates were used
    failures: int = 0
    train_loss: float | None = None  # mean over the cohort, by examples
    eval_loss: float | None = None
    eval_accuracy: float | None = None
    norm: float | None = None  # of x_t, over all trainable tensors; measured with the others
    bytes_up: int = 0
    bytes_down: int = 0
    bytes_init: int = 0  # initialisation and first contact
    seconds: float = 0.0
    epsilon: float | None = None
    clients_accuracy: float | None = None  # on the clients' own data
    clients_accuracy_worst_decile: float | None = None
    reasons: list[str] = field(default_factory=list)  # of the failures
    participants: list[int] = field(default_factory=list)  # whose updates were used, rising

    def as_dict(self) -> dict[str, object]:
        """Return the line of ``metrics.jsonl`` as a JSON object."""
        return {name: value for name, value in vars(self).items() if name != "participants"}

    def attendance(self) -> dict[str, object]:
        """Return the line of ``participation.jsonl`` as a JSON object."""
        return {"round": self.round, "clients": self.participants}


class Recorder(Protocol):
    """Is told what happens, in this order; a run without one keeps nothing."""

    def restore(self, like: Snapshot) -> Snapshot | None:
        """Return the state to continue from, of the same structure as ``like``."""
        ...

    def prepared(self, snapshot: Snapshot, bytes_init: int) -> None:
        """Round 1 may start (or the run continues) from ``snapshot``."""
        ...

    def checkpoints(self) -> list[int]:
        """Return the rounds that a resumed run may go back to."""
        ...

    def failed(self, failure: ClientFailure) -> None:
        """A reply was excluded."""
        ...

    def watch(self, snapshot: Snapshot, updates: Iterator[Update]) -> Iterator[Update]:
        """Pass on the updates of a round from ``snapshot.params``, as they were decoded."""
        ...

    def moved(self, snapshot: Snapshot) -> None:
        """The frozen base has moved to ``snapshot.base``."""
        ...

    def finished(self, snapshot: Snapshot, record: RoundRecord) -> None:
        """A round is over."""
        ...


class NoRecorder:
    """Keeps nothing."""

    def restore(self, like: Snapshot) -> Snapshot | None:
        """Return None: there is nothing to continue from."""
        return None

    def prepared(self, snapshot: Snapshot, bytes_init: int) -> None:
        """Do nothing."""

    def checkpoints(self) -> list[int]:
        """Return none."""
        return []

    def failed(self, failure: ClientFailure) -> None:
        """Do nothing."""

    def watch(self, snapshot: Snapshot, updates: Iterator[Update]) -> Iterator[Update]:
        """Return the updates."""
        return updates

    def moved(self, snapshot: Snapshot) -> None:
        """Do nothing."""

    def finished(self, snapshot: Snapshot, record: RoundRecord) -> None:
        """Do nothing."""
