"""How a client trains in a round: the optimizer, its step sizes and its batches."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from clients.descent import SGD, Adam, Descent
from fedsys.seeds import generator

Schedule = Literal["constant", "linear", "cosine"]
Kind = Literal["sgd", "adam", "adamw"]
Order = Literal["shuffled", "stream"]
By = Literal["step", "epoch"]
_CHOICES = {
    "optimizer": Kind,
    "order": Order,
    "schedule": Schedule,
    "schedule_by": By,
    "round_schedule": Schedule,
}


@dataclass(frozen=True)
class LocalTraining:
    """Hyperparameters of local training; the optimizer starts afresh in every round."""

    lr: float
    optimizer: Kind = "sgd"
    momentum: float = 0.0  # sgd
    nesterov: bool = False  # sgd
    weight_decay: float = 0.0
    beta1: float = 0.9  # adam, adamw
    beta2: float = 0.999  # adam, adamw
    eps: float = 1e-8  # adam, adamw
    batch_size: int = 32
    epochs: int = 1
    steps: int | None = None  # local steps; overrides epochs
    order: Order = "shuffled"  # of rows; stream: as they come, a round going on from the last
    group_by_length: bool = False  # text: batches of similar length, to save padding
    schedule: Schedule = "constant"  # of lr over a client's local steps
    schedule_by: By = "step"  # how often lr changes by it
    warmup: float = 0.0  # fraction of the local steps with rising lr
    round_schedule: Schedule = "constant"  # of lr over the rounds
    round_decay: float = 1.0  # lr is multiplied by this after each round

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "round_decay"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("momentum", "beta1", "beta2", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        for name in ("batch_size", "epochs", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay must not be negative, got {self.weight_decay}")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")
        if self.group_by_length and self.order == "stream":
            raise ValueError("group_by_length changes the order of rows, and order=stream keeps it")
        for name, kind in _CHOICES.items():
            if getattr(self, name) not in get_args(kind):
                allowed = ", ".join(get_args(kind))
                raise ValueError(f"{name} is one of {allowed}, got {getattr(self, name)!r}")

    def make_optimizer(self, lr: float) -> Descent:
        """Return a fresh optimizer, which acts on every number by itself and so on every client."""
        if self.optimizer == "sgd":
            return SGD(lr, self.momentum, self.weight_decay, self.nesterov)
        betas, decoupled = (self.beta1, self.beta2), self.optimizer == "adamw"
        return Adam(lr, betas, self.eps, self.weight_decay, decoupled)

    def round_lr(self, round: int, rounds: int) -> float:
        """Return the base step size of ``round`` in [1, rounds]."""
        progress = (round - 1) / max(rounds, 1)
        return self.lr * self.round_decay ** (round - 1) * _curve(self.round_schedule, progress)

    def step_factors(self, step: int, steps: Tensor) -> Tensor:
        """Return lr's factor (K,) at local step ``step`` of clients that take ``steps`` (K,)."""
        if self.schedule == "constant" and not self.warmup:
            return torch.ones(len(steps))
        factors = [self._factor(step, total) for total in steps.tolist()]
        return torch.tensor(factors, dtype=torch.float64)

    def _factor(self, step: int, total: int) -> float:
        rising = int(self.warmup * total)
        if step < rising:
            return (step + 1) / (rising + 1)
        place, left = step - rising, max(total - rising, 1)
        if self.schedule_by == "epoch":
            place -= place % math.ceil(left / self.epochs)
        return _curve(self.schedule, place / left)

    @property
    def varies_in_round(self) -> bool:
        """Whether lr changes from one local step to the next."""
        return self.schedule != "constant" or self.warmup > 0

    def num_steps(self, num_examples: int) -> int:
        """Return how many local steps a client with ``num_examples`` takes."""
        each = math.ceil(num_examples / self.batch_size)
        return self.steps if self.steps is not None else self.epochs * each

    def batches(
        self, rows: Tensor, seed: int, round: int, client: int, lengths: Tensor | None = None
    ) -> Tensor:
        """Return the rows of every local step, (steps, batch_size), -1 where a batch is short.

        Each epoch is a fresh permutation drawn from (seed, round, client); ``steps`` beyond an
        epoch go on with the next one. With ``group_by_length`` and ``lengths`` (n,) of the rows,
        an epoch's rows are put into batches by length, and the batches into an order that all
        clients of the round share, so that little of a pass is padding.

        With ``order="stream"`` an epoch is ``rows`` as they stand, nothing is drawn, and round t
        goes on where t - 1 rounds of this length have ended: rows that stand for data that come
        once, in the order in which they come.
        """
        if self.order == "stream":
            return self._stream(rows, round)
        draw = generator(seed, "batches", round, client)
        count, size = rows.shape[0], self.batch_size  # len(rows) takes longer
        total, each = self.num_steps(count), math.ceil(count / size)
        epochs = []
        for epoch in range(math.ceil(total / each)):
            order = torch.randperm(count, generator=draw)
            if (left := total - epoch * each) < each:
                order = order[: left * size]
            if self.group_by_length and lengths is not None:
                order = order[lengths[order].argsort(stable=True)]
            epochs.append(_filled(rows.index_select(0, order), size))
        plan = _joined(epochs, size)
        if self.group_by_length:
            plan = plan[torch.randperm(total, generator=generator(seed, "batch order", round))]
        return plan

    def _stream(self, rows: Tensor, round: int) -> Tensor:
        size, left = self.batch_size, self.num_steps(len(rows))
        each = math.ceil(len(rows) / size)
        first = (round - 1) * left % each
        parts = []
        while left:
            last = min(first + left, each)
            parts.append(_filled(rows[first * size : last * size], size))
            left, first = left - (last - first), 0
        return _joined(parts, size)


def _filled(rows: Tensor, size: int) -> Tensor:
    """Return ``rows`` (n,) with -1 after them up to a multiple of ``size``."""
    short = -rows.shape[0] % size
    return nn.functional.pad(rows, (0, short), value=-1) if short else rows


def _joined(parts: list[Tensor], size: int) -> Tensor:
    return (torch.cat(parts) if len(parts) > 1 else parts[0]).view(-1, size)


def _curve(schedule: Schedule, progress: float) -> float:
    """Return the factor after the fraction ``progress`` in [0, 1) of the way."""
    if schedule == "linear":
        return 1 - progress
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1.0
