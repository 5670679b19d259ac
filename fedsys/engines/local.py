"""The embedded engine: a Flower Grid that runs the ClientApp in this process.

No server, no Ray: a message is handed to the ClientApp and its reply handed back. An app that offers
``train_cohort(messages, contexts)`` trains up to ``chunk`` clients of a round in one pass; any other
app runs one client at a time. Flower's private names are used in this file only.
"""

import itertools
import logging
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from flwr.app import ArrayRecord, Context, Error, Message, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

log = logging.getLogger(__name__)

FIRST_NODE = 2  # Flower keeps 1 for the server
_RUN_ID = 1


@dataclass(frozen=True)
class Local:
    """Settings of the embedded engine."""

    chunk: int | None = None  # clients trained in one pass; None: by the size of the work
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
        """Return one reply a message, in their order; an error reply for a client that failed."""
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
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def get_node_ids(self) -> Iterable[int]:
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
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        outgoing = list(messages)
        for reply in self.stream(outgoing):
            self._replies[reply.metadata.reply_to_message_id] = reply
        return [message.metadata.message_id for message in outgoing]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(i) for i in message_ids if i in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return list(self.stream(messages))

    # ---- the simulation

    def stream(self, messages: Iterable[Message], timeout: float = 0.0) -> Iterator[Message]:
        """Yield replies in the order of ``messages``, a chunk trained whenever one is asked for."""
        for _, group in itertools.groupby(messages, _shared_work):
            while chunk := list(itertools.islice(group, self.chunk)):
                for message in chunk:
                    message.metadata.__dict__["_message_id"] = str(next(self._counter))
                yield from self._run_chunk([m for m in chunk if not self._is_lost(m)])

    def _is_lost(self, message: Message) -> bool:
        return self._lost is not None and self._lost(message)

    def _run_chunk(self, chunk: list[Message]) -> Iterator[Message]:
        app = self.app
        together = isinstance(app, TrainsCohorts) and not app.runs_alone
        if len(chunk) < 2 or not together or not _is_training(chunk[0]):
            yield from map(self._run_one, chunk)
            return
        unreachable = {id(m): self._unreachable(m) for m in chunk}
        present = [m for m in chunk if unreachable[id(m)] is None]
        contexts = [self._context(m) for m in present]
        try:
            answers = dict(
                zip(map(id, present), app.train_cohort(present, contexts), strict=True)
            )
        except Exception:
            # One at a time, so that what broke the pass fails its own client only.
            log.debug("a cohort of %d failed; running its clients alone", len(chunk), exc_info=True)
            yield from map(self._run_one, chunk)
            return
        for message, context in zip(present, contexts, strict=True):
            self._keep(message, context)
        for message in chunk:
            yield unreachable[id(message)] or answers[id(message)]

    def _run_one(self, message: Message) -> Message:
        error = self._unreachable(message)
        if error is not None:
            return error
        context = self._context(message)
        try:
            reply = self.app(_copy(message), context)
        except Exception as exception:
            log.debug("client %d raised", message.metadata.dst_node_id, exc_info=True)
            reason = f"{type(exception).__name__}: {exception}"
            return _error(message, ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason)
        if not isinstance(reply, Message):
            reason = f"the ClientApp returned {type(reply).__name__}, not a Message"
            return _error(message, ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason)
        self._keep(message, context)
        return reply

    def _unreachable(self, message: Message) -> Message | None:
        client = message.metadata.dst_node_id - FIRST_NODE
        if 0 <= client < self.num_clients and client not in self._offline:
            return None
        return _error(message, ErrorCode.NODE_UNAVAILABLE, "the node is not connected")

    def _context(self, message: Message) -> Context:
        node = message.metadata.dst_node_id
        kept = self.states.get(node - FIRST_NODE)
        return Context(
            run_id=_RUN_ID,
            node_id=node,
            node_config={"partition-id": node - FIRST_NODE, "num-partitions": self.num_clients},
            state=_copy_content(kept) if kept is not None else RecordDict(),
            run_config=self._run_config,
        )

    def _keep(self, message: Message, context: Context) -> None:
        client = message.metadata.dst_node_id - FIRST_NODE
        if context.state or client in self.states:
            self.states[client] = context.state


def _shared_work(message: Message) -> tuple[str, int]:
    """Messages that are equal here start from the same arrays and may train together."""
    arrays = message.content.get("arrays")
    return message.metadata.message_type, id(arrays) if isinstance(arrays, ArrayRecord) else 0


def _is_training(message: Message) -> bool:
    return message.metadata.message_type == "train"


def _copy_content(content: RecordDict) -> RecordDict:
    """Copy the records, so that no app can change what another one was sent."""
    copied = RecordDict()
    for name, record in content.items():
        copied[name] = record.copy()
    return copied


def _copy(message: Message) -> Message:
    copied = Message(_copy_content(message.content), metadata=message.metadata)
    return copied


def _error(message: Message, code: int, reason: str) -> Message:
    return Message(Error(code=code, reason=reason), reply_to=message)
