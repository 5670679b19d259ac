"""The ClientApp: decode, train, encode; one client at a time, or a cohort together."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from torch import Tensor

from clients import summed
from clients.cohort import Task, train_cohort
from clients.guard import Answer, Charge, Guard
from clients.passes import gather
from clients.private import Private
from clients.site import Site, partition_of
from fedsys import messages as wire
from fedsys.adapters.lora_sb import summed_gradients
from fedsys.arrays import tensor_of
from fedsys.codec import At
from fedsys.errors import PrivacyBudgetExceeded
from fedsys.evaluate import evaluate
from fedsys.messages import arrays_of, config_of
from fedsys.params import Params, digest
from fedsys.privacy.release import Spent
from fedsys.secagg.replies import ACTIONS


class CohortApp(ClientApp):
    """A Flower ClientApp whose ``train_cohort`` serves many messages together."""

    def __init__(self, site: Callable[[Context], Site], mods: list[Any] | None = None) -> None:
        """Serve the clients of ``site(context)``; ``mods`` see one message at a time."""
        super().__init__(mods=mods)
        self._site = site
        self.train()(self._train_one)
        self.train("gradient")(self._gradient)
        for action in ACTIONS:
            self.train(action)(partial(summed.answer, action, site))
        self.evaluate()(self._evaluate)
        self.query("whoami")(self._whoami)

    @property
    def runs_alone(self) -> bool:
        """Whether mods are installed, which see one message at a time."""
        return bool(self._mods)

    def train_cohort(self, messages: list[Message], contexts: list[Context]) -> list[Message]:
        """Train the clients of ``messages``, which carry the same arrays and the same round."""
        site = self._guarded(contexts[0])
        for content in {id(m.content): m.content for m in messages}.values():
            site.load(content)
        train = partial(self._train, site)
        if site.guard is not None:
            train = partial(self._train_privately, site, site.guard)
        if site.secagg is not None:
            return summed.train_masked(site, train, _refusal, messages, contexts)
        return train(messages, contexts)

    def _train_one(self, message: Message, context: Context) -> Message:
        """Train one client, and reply with a message of Flower's own class, which can travel."""
        (reply,) = self.train_cohort([message], [context])
        return reply.plain(message) if isinstance(reply, wire.TensorReply) else reply

    def _train(self, site: Site, messages: list[Message], contexts: list[Context]) -> list[Message]:
        """Train, and reply with what comes of it."""
        rows = [site.rows(context) for context in contexts]
        results = self._trained(site, messages, contexts, rows, ())
        basis = basis_of(messages[0])  # and of all, who carry the same arrays
        return [
            _answer(message, arrays, {wire.NUM_EXAMPLES: len(own), "train_loss": loss}, basis)
            for message, own, (arrays, loss) in zip(messages, rows, results, strict=True)
        ]

    def _train_privately(
        self, site: Site, guard: Guard, messages: list[Message], contexts: list[Context]
    ) -> list[Message]:
        """Train who can pay for it; nothing leaves before it stands in the ledger."""
        round, arrays = round_of(messages[0]), arrays_of(messages[0].content)
        start = start_of(site, arrays)
        guard.prune(wire.checkpoints_of(config_of(messages[0].content)))
        answers: dict[int, Answer] = {}
        replies: dict[int, Message] = {}
        fresh: dict[int, Charge] = {}
        for place, (message, context) in enumerate(zip(messages, contexts, strict=True)):
            client = partition_of(context)
            try:
                owner = site.owner(client, site.rows(context))
                charge = guard.charge(client, owner, site.training, round, start)
            except (PrivacyBudgetExceeded, ValueError) as error:
                replies[place] = _refusal(message, error)
                continue
            if (known := guard.known(charge)) is None:
                fresh[place] = charge
            else:
                answers[place] = known
        if fresh:
            chosen = [messages[place] for place in fresh], [contexts[place] for place in fresh]
            made = self._answers(site, guard, *chosen, list(fresh.values()), len(messages) == 1)
            answers.update(zip(fresh, made, strict=True))
        for place, answer in answers.items():
            message, basis = messages[place], basis_of(messages[place])
            replies[place] = _answer(message, answer.arrays, answer.metrics, basis, answer.spent)
        return [replies[place] for place in range(len(messages))]

    def _answers(
        self,
        site: Site,
        guard: Guard,
        messages: list[Message],
        contexts: list[Context],
        charges: list[Charge],
        alone: bool,
    ) -> list[Answer]:
        """Train on what ``charges`` pay for, and return the answers, which are kept and entered."""
        rows = [site.rows(context) for context in contexts]
        private = tuple(guard.private(charge) for charge in charges)
        with guard.silent(charges, alone):
            results = self._trained(site, messages, contexts, rows, private)
        answers = [
            guard.answer(charge, arrays, {wire.NUM_EXAMPLES: charge.owner.num_examples})
            for charge, (arrays, _) in zip(charges, results, strict=True)
        ]
        guard.keep(charges, answers)
        return answers

    def _trained(
        self,
        site: Site,
        messages: list[Message],
        contexts: list[Context],
        rows: list[Tensor],
        private: tuple[Private, ...],
    ) -> list[tuple[Params, float]]:
        """Return the arrays that each client sends, and its mean loss."""
        round, arrays = round_of(messages[0]), arrays_of(messages[0].content)
        clients = [partition_of(context) for context in contexts]
        numbers = [number_of(m, client) for m, client in zip(messages, clients, strict=True)]
        flips = [number < site.flips_below for number in numbers]
        task = Task(
            site.model,
            site.examples,
            site.training,
            site.local_gradient,
            site.device,
            torch.tensor(flips) if any(flips) else None,
            site.num_classes,
            private,
        )
        start = site.starts(site.start(arrays, round), numbers)
        batches = site.batches(rows, clients, round, private)
        lr = site.training.round_lr(round, site.rounds)
        trained, losses = train_cohort(task, start, batches, lr)
        encoded = self._encoder(site, start.cpu(), round, wire.PACKED in arrays)
        results = zip(messages, clients, trained.cpu(), losses.tolist(), strict=True)
        return [(encoded(m, client, k, x), loss) for k, (m, client, x, loss) in enumerate(results)]

    def _encoder(
        self, site: Site, start: Tensor, round: int, packed: bool
    ) -> Callable[[Message, int, int, Tensor], Params]:
        """Return what makes the arrays of a reply from (message, client, its place, x_n)."""
        layout, codec = site.model.layout, site.codec
        if codec is None:
            if packed:
                return lambda message, client, place, x: {wire.PACKED: x}
            return lambda message, client, place, x: layout.unpack(x)

        def encode(message: Message, client: int, place: int, x: Tensor) -> Params:
            begin = layout.unpack(start[place] if start.dim() == 2 else start)
            memory = site.remember(client, config_of(message.content)) if codec.remembers else {}
            at = At(site.seed, round, number_of(message, client))
            arrays, memory = codec.encode(begin, layout.unpack(x), memory, at)
            if codec.remembers:
                site.store.save(client, round, memory)
            return arrays

        return encode

    def _guarded(self, context: Context) -> Site:
        """Return the site of ``context``, from which something is about to leave."""
        site = self._site(context)
        if site.protects and site.guard is None:
            raise RuntimeError("this client's rows are private, and nobody keeps its ledger")
        return site

    def _gradient(self, message: Message, context: Context) -> Message:
        """Reply with the summed gradients of the adapted layers at x_t: LoRA-SB's phase 0."""
        site = self._guarded(context)
        arrays = arrays_of(message.content)
        site.model.bind(site.model.layout.unpack(site.start(arrays)[None]))
        rows = site.rows(context)
        guard = site.guard
        owner = site.owner(partition_of(context), rows)
        if guard is not None and guard.initial_rows != 0:
            charge = guard.initial_charge(partition_of(context), owner, start_of(site, arrays))
            answer = guard.known(charge)
            if answer is None:
                with guard.silent([charge], alone=True):
                    sums = site.noised_gradients(rows, guard.private(charge))
                answer = guard.answer(charge, sums, {wire.NUM_EXAMPLES: len(rows)})
                guard.keep([charge], [answer])
            basis = basis_of(message)
            reply = _answer(message, answer.arrays, answer.metrics, basis, answer.spent)
            return reply.plain(message)
        if site.secagg is not None:
            raise ValueError("this client sends sums of many clients only, and this one is its own")
        rows = rows[: site.init_examples]
        size = site.training.batch_size
        batches = (
            gather(site.examples, rows[i : i + size], site.device)
            for i in range(0, len(rows), size)
        )
        sums = summed_gradients(site.model, batches)
        spent = guard.spent(owner) if guard is not None else None
        reply = _answer(message, sums, {wire.NUM_EXAMPLES: len(rows)}, basis_of(message), spent)
        return reply.plain(message)

    def _evaluate(self, message: Message, context: Context) -> Message:
        """Reply with the loss and accuracy of x_t on the client's own rows."""
        site = self._site(context)
        if site.protects:
            raise ValueError("this client's rows are private, and so are metrics on them")
        site.load(message.content)
        start = site.start(arrays_of(message.content), round_of(message))
        rows = site.rows(context)
        metrics = evaluate(site.model, start, site.examples, rows, site.evaluate_batch, site.device)
        record = MetricRecord({**metrics, wire.NUM_EXAMPLES: len(rows)})
        return Message(RecordDict({wire.METRICS: record}), reply_to=message)

    def _whoami(self, message: Message, context: Context) -> Message:
        record = MetricRecord({"partition-id": partition_of(context)})
        return Message(RecordDict({wire.METRICS: record}), reply_to=message)


def start_of(site: Site, arrays: ArrayRecord) -> tuple[str, str]:
    """Return the digests of x_t and of what is frozen: what a private reply depends on."""
    return digest({name: tensor_of(array) for name, array in arrays.items()}), site.basis


def round_of(message: Message) -> int:
    """Return the round of a train message."""
    return int(str(config_of(message.content)[wire.ROUND]))


def number_of(message: Message, partition: int) -> int:
    """Return which client the node is to the server; it numbers nodes, of whose data it is blind.

    Where the server does not say, as where nothing depends on it, that is taken for ``partition``.
    """
    return int(str(config_of(message.content).get(wire.CLIENT, partition)))


def basis_of(message: Message) -> str:
    """Return the digest of what is frozen, by which the message is to be answered."""
    return str(config_of(message.content).get(wire.BASIS, ""))


def _answer(
    message: Message,
    arrays: Params,
    metrics: dict[str, float],
    basis: str,
    spent: Spent | None = None,
) -> wire.TensorReply:
    """Return the reply with ``arrays``, and what the client has spent where it is private."""
    facts: dict[str, Any] = {wire.BASIS: basis} if basis else {}  # ``load`` has checked it
    if spent is not None:
        facts[wire.SPENT] = wire.spent_numbers(spent)
    return wire.TensorReply(message, arrays, metrics, facts)


def _refusal(message: Message, error: Exception) -> Message:
    """Return the reply of a client that does not train."""
    reason = f"{type(error).__name__}: {error}"
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
