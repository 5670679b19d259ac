"""Local optimizers over a matrix with a row a client: torch's functions, without its classes.

They are element-wise, so one over (K, size) is K optimizers. ``torch.optim``'s classes load torch's
compiler at their first step, which nothing here uses: a second and more than fifty megabytes in
every process that trains, and on a device that is one a message.
"""

from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd


class Descent(Protocol):
    """An optimizer and its state, which it keeps from step to step."""

    def step(self, params: Tensor, gradient: Tensor) -> None:
        """Change ``params`` (K, size) in place."""
        ...

    def first(self, clients: int) -> Self:
        """Return the optimizer of the first ``clients`` rows."""
        ...


@dataclass
class SGD:
    """``torch.optim.SGD``."""

    lr: float
    momentum: float
    weight_decay: float
    nesterov: bool
    velocity: Tensor | None = None  # (K, size), once there is a momentum

    @torch.no_grad()
    def step(self, params: Tensor, gradient: Tensor) -> None:
        """Change ``params`` (K, size) in place."""
        buffers = [self.velocity]
        sgd(
            [params],
            [gradient],
            buffers,
            weight_decay=self.weight_decay,
            momentum=self.momentum,
            lr=self.lr,
            dampening=0.0,
            nesterov=self.nesterov,
            maximize=False,
        )
        self.velocity = buffers[0]

    def first(self, clients: int) -> Self:
        """Return the optimizer of the first ``clients`` rows."""
        return replace(self, velocity=None if self.velocity is None else self.velocity[:clients])


@dataclass
class Adam:
    """``torch.optim.Adam``, or AdamW where the decay of weights is ``decoupled``."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    decoupled: bool
    moments: tuple[Tensor, Tensor] | None = None  # first and second, each (K, size)
    steps: Tensor | None = None  # taken, one number

    @torch.no_grad()
    def step(self, params: Tensor, gradient: Tensor) -> None:
        """Change ``params`` (K, size) in place."""
        if self.moments is None or self.steps is None:
            self.moments = torch.zeros_like(params), torch.zeros_like(params)
            self.steps = torch.tensor(0.0)
        first, second = self.moments
        adam(
            [params],
            [gradient],
            [first],
            [second],
            [],
            [self.steps],
            decoupled_weight_decay=self.decoupled,
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=self.lr,
            weight_decay=self.weight_decay,
            eps=self.eps,
            maximize=False,
        )

    def first(self, clients: int) -> Self:
        """Return the optimizer of the first ``clients`` rows."""
        if self.moments is None:
            return self
        first, second = self.moments
        return replace(self, moments=(first[:clients], second[:clients]))
