"""One round of messages: who was asked, what came back, what it weighed."""

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import Result

from fedsys import checks, messages
from fedsys.errors import ClientFailure
from fedsys.params import Layout, Params
from fedsys.privacy.release import Spent
from fedsys.records import RoundRecord
from fedsys.update import Update

Shapes = Mapping[str, tuple[int, ...]]
Ask = Callable[[str, Shapes], Iterator[tuple[int, Params]]]
Excluded = Callable[[ClientFailure], None]

log = logging.getLogger(__name__)


class Round:
    """The messages of one round and the checks on their replies."""

    def __init__(
        self,
        index: int,
        nodes: Mapping[int, int],  # client -> node
        sent: ArrayRecord,
        layout: Layout | None = None,
        basis: str = "",
        decode: Callable[[int, Params], Params] | None = None,  # of (client, arrays)
        shadow: Collection[int] = (),
        spent: dict[int, Spent] | None = None,
    ) -> None:
        """Expect replies to ``sent`` from the clients of ``nodes``, trained with ``basis``.

        Clients in ``shadow`` train for an adversary's knowledge: what they send is not counted.
        With ``spent``, where rows are protected, what each client says it has released is noted
        there, and a reply that does not say it is not used.
        """
        self.index = index
        self.nodes = nodes
        self.sent = sent
        self.layout = layout
        self.basis = basis
        self.decode = decode
        self.shadow = shadow
        self.spent = spent
        self.answered: list[int] = []
        self.failures: list[ClientFailure] = []
        self.discarded = ""  # why all that was answered is of no use
        self.bytes_up = self.bytes_down = self.bytes_init = 0
        self._kind = ""  # of the messages
        self._outgoing: list[Message] = []
        self._examples = 0
        self._totals: dict[str, float] = {}  # metric -> sum of examples * value
        self._weights: dict[str, int] = {}  # metric -> examples of the clients that report it
        self._heard: set[int] = set()

    def address(self, kind: str, contents: Iterable[tuple[int, RecordDict]]) -> list[Message]:
        """Return one message of ``kind`` to each (client, content), counting bytes."""
        sizes: dict[int, tuple[int, int]] = {}
        group, self._kind = str(self.index), kind
        for client, content in contents:
            if id(content) not in sizes:
                sizes[id(content)] = _sizes(content)
            down, init = sizes[id(content)]
            if client not in self.shadow:
                self.bytes_down += down
                self.bytes_init += init
            message = Message(content, self.nodes[client], kind, group_id=group)
            self._outgoing.append(message)
        return self._outgoing

    def updates(self, replies: Iterable[Message], excluded: Excluded) -> Iterator[Update]:
        """Yield the usable updates in order of clients; tell ``excluded`` of the others."""
        for client, reply in self._arrivals(replies, excluded):
            decode = partial(self.decode, client) if self.decode else None
            try:
                self._note_spent(client, reply)
                update = checks.read_update(
                    reply, client, self.sent, self.layout, self.basis, decode
                )
            except ClientFailure as failure:
                self.exclude(failure, excluded)
                continue
            if client not in self.shadow:
                self.answered.append(client)
                self._note(update.metrics, update.num_examples)
            yield update

    def arrays(
        self, replies: Iterable[Message], shapes: Shapes, excluded: Excluded
    ) -> Iterator[tuple[int, Params]]:
        """Yield (client, finite arrays of ``shapes``) of the usable replies in order of clients."""
        for client, reply in self._arrivals(replies, excluded):
            try:
                self._note_spent(client, reply)
                yield client, checks.read_arrays(reply, client, shapes)
            except ClientFailure as failure:
                self.exclude(failure, excluded)

    def contents(
        self, replies: Iterable[Message], excluded: Excluded
    ) -> Iterator[tuple[int, RecordDict]]:
        """Yield (client, content) of the replies that are no errors in order of clients."""
        for client, reply in self._arrivals(replies, excluded):
            try:
                content = checks.read_content(reply, client)
            except ClientFailure as failure:
                self.exclude(failure, excluded)
                continue
            yield client, content

    def masked(
        self,
        replies: Iterable[Message],
        take: Callable[[int, RecordDict], bool],
        excluded: Excluded,
    ) -> None:
        """Offer ``take`` (client, content) of the replies that can be used in order of clients.

        It says whether the arrays are of use, which only a sum can show.
        """
        for client, reply in self._arrivals(replies, excluded):
            try:
                self._note_spent(client, reply)
                num_examples = checks.read_masked(reply, client, self.basis)
            except ClientFailure as failure:
                self.exclude(failure, excluded)
                continue
            if take(client, reply.content):
                self.answered.append(client)
                self._note({}, num_examples)

    def metrics(
        self, replies: Iterable[Message], excluded: Excluded
    ) -> Iterator[tuple[int, dict[str, float]]]:
        """Yield (num_examples, metrics) of the usable evaluation replies in order of clients."""
        for client, reply in self._arrivals(replies, excluded):
            try:
                metrics = checks.read_reply_metrics(reply, client)
            except ClientFailure as failure:
                self.exclude(failure, excluded)
                continue
            self.answered.append(client)
            yield int(metrics.pop(messages.NUM_EXAMPLES)), metrics

    def close(self, excluded: Excluded) -> None:
        """Count every client that never answered as a failure."""
        for client in sorted(self.nodes.keys() - self._heard):
            self.exclude(ClientFailure(client, "no reply before the deadline"), excluded)

    def excuse(self, clients: Iterable[int]) -> None:
        """Expect no reply of ``clients``: they are not asked after all."""
        self._heard.update(clients)

    def absorb(self, phase: "Round") -> None:
        """Count the bytes and the failures of a ``phase`` of this round."""
        self.bytes_up += phase.bytes_up
        self.bytes_down += phase.bytes_down
        self.bytes_init += phase.bytes_init
        self.failures += phase.failures

    def discard(self, reason: str) -> None:
        """Count no update as used, for a ``reason`` that is no client's."""
        log.warning("round %d uses no update: %s", self.index, reason)
        self.discarded = reason
        self.answered.clear()
        self._examples = 0

    @property
    def reasons(self) -> list[str]:
        """Why replies, or all of them, were not used."""
        return [*map(str, self.failures), *([self.discarded] if self.discarded else [])]

    def train_metrics(self) -> MetricRecord:
        """Return the metrics of the usable updates, averaged by examples, and the examples."""
        means = {name: total / self._weights[name] for name, total in self._totals.items()}
        return MetricRecord({**means, messages.NUM_EXAMPLES: self._examples})

    def record(self, result: Result, seconds: float) -> RoundRecord:
        """Return the round as a line of ``metrics.jsonl``."""
        train = result.train_metrics_clientapp.get(self.index)
        central = result.evaluate_metrics_serverapp.get(self.index)
        local = result.evaluate_metrics_clientapp.get(self.index)
        return RoundRecord(
            round=self.index,
            clients=len(self.answered),
            failures=len(self.failures),
            train_loss=_number(train, "train_loss"),
            eval_loss=_number(central, "eval_loss"),
            eval_accuracy=_number(central, "eval_accuracy"),
            norm=_number(central, "norm"),
            bytes_up=self.bytes_up,
            bytes_down=self.bytes_down,
            bytes_init=self.bytes_init,
            seconds=seconds,
            clients_accuracy=_number(local, "eval_accuracy"),
            clients_accuracy_worst_decile=_number(local, "eval_accuracy_worst_decile"),
            participants=list(self.answered),
            reasons=self.reasons,
        )

    def _arrivals(
        self, replies: Iterable[Message], excluded: Excluded
    ) -> Iterator[tuple[int, Message]]:
        clients = {node: client for client, node in self.nodes.items()}
        if isinstance(replies, Collection):  # of any order; a stream comes in order of clients
            last = len(clients)
            replies = sorted(replies, key=lambda r: clients.get(r.metadata.src_node_id, last))
        expected = (str(self.index), "")
        for reply in replies:
            metadata = reply.metadata
            client = clients.get(metadata.src_node_id)
            if client is None:
                client = self._client_asked(reply, clients)
            if client is None:
                self.exclude(ClientFailure(-1, _stranger(reply)), excluded)
            elif metadata.group_id not in expected:
                reason = f"answered round {metadata.group_id!r:.40} in round {self.index}"
                self.exclude(ClientFailure(client, reason), excluded)
            elif self._kind and metadata.message_type != self._kind:
                reason = f"answered {metadata.message_type!r:.40}, and was asked to {self._kind}"
                self.exclude(ClientFailure(client, checks.legible(reason)), excluded)
            elif client in self._heard:
                self.exclude(ClientFailure(client, "answered twice"), excluded)
            else:
                self._heard.add(client)
                if reply.has_content() and client not in self.shadow:
                    self.bytes_up += messages.reply_bytes(reply)
                yield client, reply

    def _client_asked(self, reply: Message, clients: Mapping[int, int]) -> int | None:
        """Return whom an error is about that the server, not the client's node, replied."""
        if not reply.has_error():
            return None
        asked = reply.metadata.reply_to_message_id
        for message in self._outgoing:
            if asked and message.metadata.message_id == asked:
                return clients.get(message.metadata.dst_node_id)
        return None

    def exclude(self, failure: ClientFailure, excluded: Excluded) -> None:
        """Leave out a client's reply and tell ``excluded``."""
        if failure.client in self.shadow:  # a server that is under attack would not know of it
            log.warning("round %d: an accomplice trained for nothing: %s", self.index, failure)
            return
        self.failures.append(failure)
        excluded(failure)

    def _note_spent(self, client: int, reply: Message) -> None:
        """Note what a private client has spent, whether or not its reply can be used."""
        if self.spent is not None and reply.has_content():
            before = self.spent.get(client, ())
            self.spent[client] = checks.read_spent(reply, client, before)

    def _note(self, metrics: dict[str, float], num_examples: int) -> None:
        self._examples += num_examples
        for name, value in metrics.items():
            self._totals[name] = self._totals.get(name, 0.0) + num_examples * value
            self._weights[name] = self._weights.get(name, 0) + num_examples


def summarise(metrics: list[tuple[int, dict[str, float]]]) -> MetricRecord | None:
    """Return the means by examples, and the mean of the worst tenth as ``..._worst_decile``."""
    examples = sum(count for count, _ in metrics)
    if not examples:
        return None
    names = set.intersection(*(set(values) for _, values in metrics))
    record = MetricRecord(
        {n: sum(count * values[n] for count, values in metrics) / examples for n in sorted(names)}
    )
    if "eval_accuracy" in names:
        worst = sorted(values["eval_accuracy"] for _, values in metrics)
        worst = worst[: max(1, len(worst) // 10)]
        record["eval_accuracy_worst_decile"] = sum(worst) / len(worst)
    return record


def _number(metrics: MetricRecord | None, name: str) -> float | None:
    value = metrics.get(name) if metrics is not None else None
    return float(value) if isinstance(value, int | float) else None


def _sizes(content: RecordDict) -> tuple[int, int]:
    """Return the bytes of ``content`` without and of the frozen factors."""
    frozen = {name: record for name, record in content.items() if name == messages.FROZEN}
    init = messages.wire_bytes(RecordDict(frozen))
    return messages.wire_bytes(content) - init, init


def _stranger(reply: Message) -> str:
    reason = f": {checks.legible(reply.error.reason or '')}" if reply.has_error() else ""
    return f"node {reply.metadata.src_node_id} was not asked in this round{reason}"
