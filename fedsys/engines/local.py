"""The embedded engine: a Flower Grid that runs the ClientApp in this process.

No server, no Ray: a message is handed to the ClientApp and its reply handed back. An app that
offers ``train_cohort(messages, contexts)`` trains up to ``chunk`` clients of a round in one pass;
any other app runs one client at a time. Flower's private names are used in this file only.
"""

import itertools
import logging
from collections.abc import Callable, Container, Iterable, Iterator
from copy import copy
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from flwr.app import ArrayRecord, Context, Error, Message, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedsys.memory import is_shortage

log = logging.getLogger(__name__)

FIRST_NODE = 2  # Flower keeps 1 for the server
_RUN_ID = 1


@dataclass(frozen=True)
class Local:
    """Settings of the embedded engine."""

    chunk: int | None = None  # clients trained in one pass; None: by the work and the memory
    threads: int | None = None  # CPU threads of torch; None: one a core

    def __post_init__(self) -> None:
        for name, value in (("chunk", self.chunk), ("threads", self.threads)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


@runtime_checkable
class TrainsCohorts(Protocol):
    """A ClientApp that trains several clients at once, unless mods make it run one by one."""

    runs_alone: bool

    def train_cohort(self, messages: list[Message], contexts: list[Context]) -> list[Message]:
        """Return one reply a message, in their order; an error reply for a client that failed.

        They stay in this process.
        """
        ...


class LocalGrid(Grid):
    """``num_clients`` simulated clients; one that was never asked costs nothing.

    ``offline`` holds clients that are not connected, ``lost(message)`` says whether a client
    drops out before it replies. Client n is node n + 2, and knows itself as partition n.
    """

    def __init__(
        self,
        app: ClientApp,
        num_clients: int,
        *,
        chunk: int = 1,
        run_config: UserConfig | None = None,
        offline: Container[int] = (),
        lost: Callable[[Message], bool] | None = None,
    ) -> None:
        """Create nothing per client; raises ``ValueError`` without a client or a chunk."""
        if num_clients < 1 or chunk < 1:
            raise ValueError(f"need a client and a chunk, got {num_clients} and {chunk}")
        self.app = app
        self.num_clients = num_clients
        self.chunk = chunk
        self.states: dict[int, RecordDict] = {}  # of clients that keep any
        self._run_config = run_config or {}
        self._offline = offline
        self._lost = lost
        self._counter = itertools.count(1)
        self._replies: dict[str, Message] = {}
        self._run = Run.create_empty(_RUN_ID)
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = _RUN_ID, 1, 1

    # ---- Flower's Grid

    def set_run(self, run: Run) -> None:
        """Set the run."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run."""
        return self._run

    def get_node_ids(self) -> Iterable[int]:
        """Return the connected nodes, as a range when all are."""
        every = range(FIRST_NODE, FIRST_NODE + self.num_clients)
        if self._offline == ():
            return every
        return [node for node in every if node - FIRST_NODE not in self._offline]

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a message."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Run every message now and keep the replies; return the messages' ids."""
        outgoing = list(messages)
        for reply in self.stream(outgoing):
            self._replies[reply.metadata.reply_to_message_id] = reply
        return [message.metadata.message_id for message in outgoing]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Hand over the replies kept for ``message_ids``, each once."""
        return [self._replies.pop(i) for i in message_ids if i in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Return all replies as a list."""
        return list(self.stream(messages))

    # ---- the simulation

    def stream(self, messages: Iterable[Message], timeout: float = 0.0) -> Iterator[Message]:
        """Yield replies in the order of ``messages``, a chunk trained whenever one is asked for.

        ``timeout`` is there for the protocol: whoever runs here answers before it is left alone.
        """
        for (kind, _, reachable), group in itertools.groupby(messages, self._shared_work):
            while chunk := list(itertools.islice(group, self.chunk)):
                for message in chunk:
                    message.metadata.__dict__["_message_id"] = str(next(self._counter))
                if self._lost is not None:
                    chunk = [message for message in chunk if not self._lost(message)]
                if not reachable:
                    yield from map(_not_connected, chunk)
                elif kind == "train" and len(chunk) > 1 and self._together:
                    yield from self._run_together(chunk)
                else:
                    yield from map(self._run_one, chunk)

    @property
    def _together(self) -> bool:
        return isinstance(self.app, TrainsCohorts) and not self.app.runs_alone

    def _shared_work(self, message: Message) -> tuple[str, int, bool]:
        """Return what is equal for messages that start from the same arrays and train together."""
        metadata = message.metadata
        client = metadata.dst_node_id - FIRST_NODE
        reachable = 0 <= client < self.num_clients and client not in self._offline
        arrays = message.content.get("arrays")
        return metadata.message_type, id(arrays) if arrays is not None else 0, reachable

    def _run_together(self, chunk: list[Message]) -> Iterator[Message]:
        contexts = [self._context(message) for message in chunk]
        try:
            replies = self.app.train_cohort(chunk, contexts)  # type: ignore[attr-defined]
            for _, reply in zip(chunk, replies, strict=True):
                _check_message(reply)
        except Exception as error:
            log.debug("a cohort of %d failed", len(chunk), exc_info=True)
            short = is_shortage(error)
        else:
            return self._kept(chunk, contexts, replies)
        # Here, where the error no longer holds what was in memory.
        if short:
            return self._smaller(chunk)
        # One at a time, so that what broke the pass fails its own client only.
        return map(self._run_one, chunk)

    def _smaller(self, chunk: list[Message]) -> Iterator[Message]:
        """Train ``chunk``, for which memory was too short, in passes half as large.

        So are all that follow.
        """
        self.chunk = min(self.chunk, (len(chunk) + 1) // 2)
        log.warning("%d clients did not fit into memory: now %d a pass", len(chunk), self.chunk)
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
        while chunk:
            part, chunk = chunk[: self.chunk], chunk[self.chunk :]
            yield from self._run_together(part) if len(part) > 1 else map(self._run_one, part)

    def _kept(
        self, chunk: list[Message], contexts: list[Context], replies: list[Message]
    ) -> Iterator[Message]:
        for message, context in zip(chunk, contexts, strict=True):
            self._keep(message, context)
        return iter(replies)

    def _run_one(self, message: Message) -> Message:
        context = self._context(message)
        try:
            reply = self.app(_copy(message), context)
            _check_message(reply)
        except Exception as exception:
            log.debug("client %d raised", message.metadata.dst_node_id, exc_info=True)
            reason = f"{type(exception).__name__}: {exception}"
            error = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason)
            return Message(error, reply_to=message)
        self._keep(message, context)
        return reply

    def _context(self, message: Message) -> Context:
        node = message.metadata.dst_node_id
        kept = self.states.get(node - FIRST_NODE)
        return Context(
            run_id=_RUN_ID,
            node_id=node,
            node_config={"partition-id": node - FIRST_NODE, "num-partitions": self.num_clients},
            state=_copy_content(kept) if kept is not None else RecordDict(),
            run_config=self._run_config.copy(),
        )

    def _keep(self, message: Message, context: Context) -> None:
        client = message.metadata.dst_node_id - FIRST_NODE
        if context.state or client in self.states:
            self.states[client] = context.state


def _check_message(reply: object) -> None:
    if not isinstance(reply, Message):
        raise TypeError(f"the ClientApp returned {type(reply).__name__}, not a Message")


def _not_connected(message: Message) -> Message:
    return Message(Error(ErrorCode.NODE_UNAVAILABLE, "the node is not connected"), reply_to=message)


def _copy(message: Message) -> Message:
    make: Any = Message  # its signature does not show the metadata that Flower's own engines pass
    copied: Message = make(_copy_content(message.content), metadata=copy(message.metadata))
    return copied


def _copy_content(content: RecordDict) -> RecordDict:
    """Copy records and arrays, so that no app can change what another one was sent."""
    copied = RecordDict()
    for name, record in content.items():
        own = record.copy()
        if isinstance(own, ArrayRecord):
            for key, array in own.items():
                own[key] = copy(array)
        copied[name] = own
    return copied
