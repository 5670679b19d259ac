"""A Grid with faults: a wrapper of any Flower Grid that loses, delays and spoils replies.

They befall the replies to train and evaluate messages, those of a phase before round 1 and of
secure aggregation among them, after the client has done its work: what it remembers is not undone.
Errors pass as they are. Which fault befalls a reply depends on the seed, the round, the client and
the type of the message alone, so it is the same in every engine and in a resumed run. A client is
known by the partition that it names in a roll call (``query.whoami``), or else by its node.

A reply that is a round late is kept in this process, and lost with it, as in a server that is
restarted. The next exchange of its type gets it, before its own replies.
"""

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from copy import copy
from functools import partial
from typing import Any

from flwr.app import Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fedsys.engines.base import StreamingGrid
from fedsys.engines.local import FIRST_NODE
from fedsys.faults import Fault, Kind
from fedsys.garbling import garbled
from fedsys.seeds import numpy_generator

_BEFALLEN = ("train", "evaluate")
_CRASHED = 8  # Flower's code for a ClientApp that has died


class FaultGrid(Grid):
    """``grid`` with faults; it streams where ``grid`` does.

    They befall what ``stream`` and ``send_and_receive`` return. Whoever pulls messages one by one
    gets them as they are.
    """

    def __init__(self, grid: Grid, fault: Fault, seed: int) -> None:
        """Keep no reply but those that are a round late."""
        self.grid = grid
        self.fault = fault
        self.seed = seed
        self._seconds: float = getattr(fault, "seconds", 0.0)  # that a delayed reply takes
        self._partitions: dict[int, int] = {}  # by node, of those that have said so
        self._exchanges: Counter[str] = Counter()  # by type of message
        self._late: dict[tuple[str, int], list[Message]] = {}  # by type, and number of exchange
        if isinstance(grid, StreamingGrid):
            self.stream = partial(self._stream, grid)  # which makes this a StreamingGrid

    # ---- Flower's Grid

    def set_run(self, run: Any) -> None:
        """Set the run."""
        self.grid.set_run(run)

    @property
    def run(self) -> Any:
        """The run."""
        return self.grid.run

    def get_node_ids(self) -> Iterable[int]:
        """Return the connected nodes."""
        return self.grid.get_node_ids()

    def get_nodes(self) -> Iterable[Any]:
        """Return what is known of the connected nodes."""
        return self.grid.get_nodes()

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a message."""
        return self.grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Push messages; return their ids."""
        return self.grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pull replies, which no fault befalls."""
        return self.grid.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Return the replies that are left, delayed ones last."""
        outgoing, began = list(messages), time.monotonic()
        replies = self.grid.send_and_receive(outgoing, timeout=timeout)
        in_time: list[Message] = []
        delayed: list[Message] = []
        for kind, reply in self._befallen(outgoing, replies, timeout):
            (delayed if kind == "delay" else in_time).append(reply)
        if delayed:
            self._wait(began)
        return [*in_time, *delayed]

    # ---- faults

    def _stream(
        self, grid: StreamingGrid, messages: Iterable[Message], timeout: float
    ) -> Iterator[Message]:
        """Yield the replies that are left in the order of ``messages``."""
        outgoing, began = list(messages), time.monotonic()
        replies = grid.stream(outgoing, timeout)
        for kind, reply in self._befallen(outgoing, replies, timeout):
            if kind == "delay":  # those behind it wait: a stream has its order
                self._wait(began)
            yield reply

    def _befallen(
        self, outgoing: list[Message], replies: Iterable[Message], timeout: float | None
    ) -> Iterator[tuple[Kind | None, Message]]:
        """Yield the replies that arrive, each with its fault; late ones of before come first."""
        kind = outgoing[0].metadata.message_type if outgoing else ""
        self._exchanges[kind] += 1
        number = self._exchanges[kind]
        for reply in self._late.pop((kind, number), ()):
            yield None, reply
        for reply in replies:
            fault = self._fault_of(reply)
            if fault == "drop":
                continue
            if fault == "delay" and timeout is not None and self._seconds >= timeout:
                self._late.setdefault((kind, number + 1), []).append(reply)
                continue
            yield fault, self._spoiled(reply, fault)
            if fault == "duplicate":
                yield fault, reply

    def _fault_of(self, reply: Message) -> Kind | None:
        said = reply.metadata
        if not reply.has_content():
            return None
        if said.message_type.partition(".")[0] not in _BEFALLEN:
            self._meet(reply)
            return None
        client = self._client_of(reply)
        return self.fault.draw(self.seed, said.group_id, client, said.message_type)

    def _spoiled(self, reply: Message, fault: Kind | None) -> Message:
        """Return ``reply``, or a copy that is malformed or an error."""
        if fault not in ("corrupt", "crash"):
            return reply
        said, changed = reply.metadata, copy(reply)
        if fault == "corrupt":
            purpose = f"corrupt {said.message_type} {said.group_id}"
            rng = numpy_generator(self.seed, purpose, self._client_of(reply))
            changed.content = garbled(reply.content, rng)
            return changed
        changed.content = None  # type: ignore[assignment]  # or it could be no error
        changed.error = Error(_CRASHED, "the client has crashed: fault=crash")
        return changed

    def _client_of(self, reply: Message) -> int:
        node = reply.metadata.src_node_id
        return self._partitions.get(node, node - FIRST_NODE)

    def _meet(self, reply: Message) -> None:
        """Note which partition a node holds, where that is what it was asked."""
        for record in reply.content.values():
            partition = record.get("partition-id") if isinstance(record, MetricRecord) else None
            if isinstance(partition, int):
                self._partitions[reply.metadata.src_node_id] = partition

    def _wait(self, began: float) -> None:
        """Sleep until the delayed replies have arrived; those of one exchange wait together."""
        time.sleep(max(0.0, began + self._seconds - time.monotonic()))
