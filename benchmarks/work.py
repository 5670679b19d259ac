"""What an engine is to train, in a file that needs no fedsys to be read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Noise:
    """DP-SGD, by the row."""

    clipping_norm: float
    noise_multiplier: float


@dataclass(frozen=True)
class Work:
    """A model, rows, and which of them each client of each round trains on, step by step."""

    model: nn.Module  # called with one tensor of inputs, returns logits; holds x_0
    inputs: Tensor  # (rows, ...)
    labels: Tensor  # (rows,)
    plan: Tensor  # (rounds, cohort, steps, batch), rows
    lr: float  # of SGD
    num_clients: int  # registered; a round's are a cohort of them
    noise: Noise | None

    @property
    def cohort(self) -> int:
        """Clients of a round."""
        return self.plan.shape[1]

    def save(self, path: Path) -> None:
        """Write the file."""
        torch.save(self, path)

    @classmethod
    def load(cls, path: str) -> Self:
        """Read the file, which is our own and may hold a whole module."""
        work: Self = torch.load(path, weights_only=False)
        return work
