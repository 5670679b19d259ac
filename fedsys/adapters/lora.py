"""LoRA and FFA-LoRA: W x + (alpha / rank) B A x.

LoRA trains A and B (Hu et al. 2021, https://arxiv.org/abs/2106.09685). FFA-LoRA draws A once from
the shared seed and trains B only, so that the average of products is the product of averages
(Sun et al., ICLR 2024, https://arxiv.org/abs/2403.12313).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedsys.adapters.lowrank import ALL_LINEAR, Layers, attach, check_layers
from fedsys.seeds import generator


@dataclass(frozen=True)
class LoRA:
    """A and B trained; A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0, so W is unchanged at the start."""

    rank: int
    alpha: float
    targets: str | Sequence[str] = ALL_LINEAR
    layers: Layers = None  # of the stack of equal layers: last:2, or numbers from 0; None: all

    def __post_init__(self) -> None:
        check_rank(self.rank)
        check_layers(self.layers)
        if self.alpha <= 0:
            raise ValueError(f"alpha must be positive, got {self.alpha}")

    def attach(self, model: nn.Module, seed: int) -> None:
        """Put the adapters into ``model``, drawn from ``seed``, one generator a layer."""
        scaling, layers = self.alpha / self.rank, self.layers
        placed = attach(model, self.targets, self.rank, scaling, middle=False, layers=layers)
        for index, (_, adapter) in enumerate(placed):
            adapter.A.weight.data = first_a(adapter.A.weight.data, seed, index)
            nn.init.zeros_(adapter.B.weight)
            adapter.A.requires_grad_(self._trains_a)
            adapter.B.requires_grad_(True)

    @property
    def _trains_a(self) -> bool:
        return True


@dataclass(frozen=True)
class FFA(LoRA):
    """A frozen at its seeded draw, B trained."""

    @property
    def _trains_a(self) -> bool:
        return False


def first_a(like: Tensor, seed: int, layer: int, *path: int) -> Tensor:
    """Return A (rank, in) as it begins: U(-1/sqrt(in), 1/sqrt(in)), the same for all who ask."""
    bound = like.shape[1] ** -0.5
    a = torch.empty_like(like, device="cpu")
    return a.uniform_(-bound, bound, generator=generator(seed, "adapter", layer, *path)).to(like)


def check_rank(rank: int) -> None:
    """Raise ``ValueError`` unless ``rank`` is at least 1."""
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
