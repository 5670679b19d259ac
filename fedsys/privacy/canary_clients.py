"""Clients planted to be looked for: an audit asks what trace each has left in the model.

In every round a canary client takes part by a coin, at the rate of the others, and sends C u, where
u is a direction of its own, drawn uniformly: the most that a client may send, and nearly orthogonal
to what anybody else does. What is left of it at the end is the cosine of u with x_T - x_0.

Symbols: C clipping_norm, x_0 and x_T the global params before and after the run.

Andrew et al., "One-shot Empirical Privacy Estimation for Federated Learning", ICLR 2024,
https://arxiv.org/abs/2302.03098. The directions follow from the seed, so nothing of them is kept.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsys.params import Params, norm
from fedsys.seeds import generator
from fedsys.update import Update


@dataclass(frozen=True)
class CanaryClients:
    """``count`` clients beyond those that are connected."""

    count: int
    rate: float  # of taking part in a round
    clipping_norm: float  # C
    seed: int

    def present(self, round: int) -> list[int]:
        """Return which canaries take part in ``round``."""
        draw = generator(self.seed, "canary clients", round)
        coins = torch.rand(self.count, generator=draw, dtype=torch.float64) < self.rate
        return [int(canary) for canary in coins.nonzero()]

    def direction(self, canary: int, params: Params) -> Params:
        """Return the direction of ``canary`` in float64 and the shapes of ``params``, of norm 1."""
        draw = generator(self.seed, "canary direction", canary)
        drawn = {
            name: torch.randn(p.shape, generator=draw, dtype=torch.float64)
            for name, p in params.items()
        }
        length = norm(drawn)
        return {name: value / length for name, value in drawn.items()}

    def updates(self, params: Params, round: int) -> Iterator[Update]:
        """Yield what the canaries of ``round`` send; their numbers are those of no client."""
        for canary in self.present(round):
            direction = self.direction(canary, params)
            delta = {name: self.clipping_norm * value for name, value in direction.items()}
            yield Update(-1 - canary, delta, num_examples=1)

    def cosines(self, moved: Params, rounds: int) -> Tensor:
        """Return the cosine with ``moved`` of each canary that took part in ``rounds``, (k,).

        Raises ``ValueError`` when nothing has moved.
        """
        length = norm(moved)
        if not length:
            raise ValueError("the model has not moved, so it holds no trace of a canary")
        found = sorted({canary for t in range(1, rounds + 1) for canary in self.present(t)})
        return torch.tensor([self._along(canary, moved) / length for canary in found])

    def _along(self, canary: int, moved: Params) -> float:
        direction = self.direction(canary, moved)
        return sum(float((direction[name] * moved[name].cpu()).sum()) for name in moved)
