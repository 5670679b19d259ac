"""The ClientApp: decode, train, encode; one client at a time, or a cohort in one pass."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from clients.cohort import LocalGradient, Task, gather, train_cohort
from clients.training import LocalTraining
from fedsys import messages as wire
from fedsys.adapters.lora_sb import load_factors, shared_factors, summed_gradients
from fedsys.arrays import tensor_of
from fedsys.cohort import CohortModel
from fedsys.data.examples import Examples
from fedsys.data.shards import Shards
from fedsys.evaluate import evaluate
from fedsys.messages import arrays_of, config_of
from fedsys.params import Layout, Params, digest


@dataclass
class Site:
    """What a process holds for the clients it runs: one model, the data, the settings."""

    model: CohortModel
    examples: Examples
    shards: Shards
    training: LocalTraining
    local_gradient: LocalGradient
    rounds: int
    seed: int
    device: torch.device
    evaluate_batch: int = 256
    init_examples: int | None = None  # rows of a client in the gradient phase; None: all

    @cached_property
    def basis(self) -> str:
        """The digest of the frozen factors now loaded; "" for a model without any."""
        factors = shared_factors(self.model.model)
        return digest(factors) if factors else ""

    def load(self, content: RecordDict) -> None:
        """Take over the frozen factors in ``content``.

        Raises ``ValueError`` when the client then still holds others than the server.
        """
        basis = config_of(content).get(wire.BASIS, "")
        if wire.FROZEN in content and basis != self.basis:
            self.take(wire.decode(arrays_of(content, wire.FROZEN)))
        if basis and basis != self.basis:
            raise ValueError("the frozen factors of this client are not those of the server")

    def take(self, factors: Params) -> None:
        """Make ``factors`` the frozen factors of the model."""
        load_factors(self.model.model, factors)
        self.__dict__.pop("basis", None)

    def start(self, arrays: ArrayRecord) -> Tensor:
        """Return x_t as one vector (size,)."""
        layout = self.model.layout
        if wire.PACKED in arrays:
            flat = tensor_of(arrays[wire.PACKED])
            if flat.shape != (layout.size,):
                raise ValueError("the packed vector does not fit this client's model")
            return flat.to(self.device)
        return layout.pack(wire.decode(arrays)).to(self.device)

    def rows(self, context: Context) -> Tensor:
        """Return the rows of the client that ``context`` belongs to."""
        client = partition_of(context)
        if not 0 <= client < len(self.shards):
            raise ValueError(f"no data for partition {client} of {len(self.shards)}")
        rows = self.shards.rows(client)
        if not len(rows):
            raise ValueError("this client has no examples")
        return rows


class CohortApp(ClientApp):
    """A Flower ClientApp whose ``train_cohort`` serves many messages in one pass."""

    def __init__(self, site: Callable[[Context], Site], mods: list[Any] | None = None) -> None:
        """Serve the clients of ``site(context)``; ``mods`` see one message at a time."""
        super().__init__(mods=mods)
        self._site = site
        self.train()(lambda message, context: self.train_cohort([message], [context])[0])
        self.train("gradient")(self._gradient)
        self.evaluate()(self._evaluate)
        self.query("whoami")(self._whoami)

    @property
    def runs_alone(self) -> bool:
        """Whether mods are installed, which see one message at a time."""
        return bool(self._mods)

    def train_cohort(self, messages: list[Message], contexts: list[Context]) -> list[Message]:
        """Train the clients of ``messages``, which carry the same arrays and the same round."""
        site = self._site(contexts[0])
        for content in {id(m.content): m.content for m in messages}.values():
            site.load(content)
        config, arrays = config_of(messages[0].content), arrays_of(messages[0].content)
        round = int(str(config[wire.ROUND]))
        rows = [site.rows(context) for context in contexts]
        batches = [
            site.training.batches(
                own, site.seed, round, partition_of(context), site.examples.lengths(own)
            )
            for own, context in zip(rows, contexts, strict=True)
        ]
        task = Task(site.model, site.examples, site.training, site.local_gradient, site.device)
        start, lr = site.start(arrays), site.training.round_lr(round, site.rounds)
        trained, losses = train_cohort(task, start, batches, lr)
        layout = None if wire.PACKED in arrays else site.model.layout
        return [
            self._answer(message, x, layout, {wire.NUM_EXAMPLES: len(own), "train_loss": loss})
            for message, x, own, loss in zip(
                messages, trained.cpu(), rows, losses.tolist(), strict=True
            )
        ]

    def _answer(
        self, message: Message, x: Tensor, layout: Layout | None, metrics: dict[str, float]
    ) -> Message:
        """Return the reply with x_n, packed when there is no ``layout`` to unpack it by."""
        reply = RecordDict()
        reply[wire.ARRAYS] = (
            wire.encode_flat(x) if layout is None else wire.encode(layout.unpack(x))
        )
        reply[wire.METRICS] = MetricRecord({**metrics})
        basis = config_of(message.content).get(wire.BASIS)
        if basis:  # ``load`` has checked that it is this client's
            reply[wire.REPLY] = ConfigRecord({wire.BASIS: basis})
        return Message(reply, reply_to=message)

    def _gradient(self, message: Message, context: Context) -> Message:
        """Reply with the summed gradients of the adapted layers at x_t: LoRA-SB's phase 0."""
        site = self._site(context)
        start = site.start(arrays_of(message.content))
        site.model.bind(site.model.layout.unpack(start[None]))
        rows = site.rows(context)[: site.init_examples]
        size = site.training.batch_size
        batches = (
            gather(site.examples, rows[i : i + size][None], site.device)
            for i in range(0, len(rows), size)
        )
        sums = summed_gradients(site.model, batches)
        metrics = MetricRecord({wire.NUM_EXAMPLES: len(rows)})
        reply = RecordDict({wire.ARRAYS: wire.encode(sums), wire.METRICS: metrics})
        return Message(reply, reply_to=message)

    def _evaluate(self, message: Message, context: Context) -> Message:
        """Reply with the loss and accuracy of x_t on the client's own rows."""
        site = self._site(context)
        site.load(message.content)
        start = site.start(arrays_of(message.content))
        rows = site.rows(context)
        metrics = evaluate(site.model, start, site.examples, rows, site.evaluate_batch, site.device)
        record = MetricRecord({**metrics, wire.NUM_EXAMPLES: len(rows)})
        return Message(RecordDict({wire.METRICS: record}), reply_to=message)

    def _whoami(self, message: Message, context: Context) -> Message:
        record = MetricRecord({"partition-id": partition_of(context)})
        return Message(RecordDict({wire.METRICS: record}), reply_to=message)


def partition_of(context: Context) -> int:
    """Return which client's data the node of ``context`` holds."""
    return int(context.node_config["partition-id"])
