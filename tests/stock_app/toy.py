"""Tiny apps and helpers for tests of the server side."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedsys.engines.local import FIRST_NODE, LocalGrid
from fedsys.records import RoundRecord

Answer = Callable[[Message, Context], RecordDict]


def app_of(answer: Answer) -> ClientApp:
    """A foreign ClientApp that replies to ``train`` with ``answer(message, context)``."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(answer(message, context), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        client = client_of(message)
        metrics = {"num-examples": 1, "eval_accuracy": client / 100}
        return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)

    return app


def client_of(message: Message) -> int:
    return message.metadata.dst_node_id - FIRST_NODE


def reply_of(state: dict[str, torch.Tensor], examples: object = 1, **metrics) -> RecordDict:
    values = {"num-examples": examples, **metrics}
    return RecordDict({"arrays": ArrayRecord(state), "metrics": MetricRecord(values)})


def drift(message: Message, context: Context) -> RecordDict:
    """Each client moves by an amount of its own; client n has n + 1 examples."""
    client = client_of(message)
    state = message.content["arrays"].to_torch_state_dict()
    moved = {
        name: value + 0.1 * (client + 1) * torch.sin(value + client)
        for name, value in state.items()
    }
    return reply_of(moved, client + 1, train_loss=float(client))


def state_of(seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(3, 2, generator=draw), "b": torch.randn(4, generator=draw)}


def arrays_of(seed: int = 0) -> ArrayRecord:
    return ArrayRecord(state_of(seed))


def final(result) -> dict[str, torch.Tensor]:
    return dict(result.arrays.to_torch_state_dict())


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def close(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], tol=1e-5) -> bool:
    return left.keys() == right.keys() and all(
        torch.allclose(left[n].double(), right[n].double(), rtol=tol, atol=tol) for n in left
    )


class Notes:
    """A recorder that keeps all it is told."""

    def __init__(self) -> None:
        self.failures = []
        self.records: list[RoundRecord] = []
        self.init_bytes = 0
        self.events: list[str] = []

    def restore(self, like):
        self.events.append("restore")
        return None

    def prepared(self, snapshot, bytes_init):
        self.events.append("prepared")
        self.init_bytes = bytes_init

    def failed(self, failure):
        self.failures.append((failure.client, failure.reason))

    def watch(self, snapshot, updates):
        return updates

    def finished(self, snapshot, record):
        self.events.append(f"finished {snapshot.round}")
        self.records.append(record)


class Batch(LocalGrid):
    """A grid that returns lists, tampered with by ``change(list) -> list``, as remote ones do."""

    stream = None  # not a StreamingGrid

    def __init__(self, app, num_clients, change: Callable[[list[Message]], Iterable[Message]]):
        super().__init__(app, num_clients)
        self.change = change

    def send_and_receive(self, messages, *, timeout=None):
        outgoing = list(messages)
        return self.change(list(LocalGrid.stream(self, outgoing)))


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
