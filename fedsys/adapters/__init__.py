"""Adapters: what of a model is trained. Each has ``attach(model, seed)``, which works in place."""

from dataclasses import dataclass
from typing import Protocol

from torch import nn

from fedsys.adapters.lora import FFA, LoRA
from fedsys.adapters.lora_sb import LoRASB, LoRAXS

__all__ = ["FFA", "Adapter", "Full", "LoRA", "LoRASB", "LoRAXS"]


class Adapter(Protocol):
    """The contract of an adapter."""

    def attach(self, model: nn.Module, seed: int) -> None:
        """Change ``model`` in place so that its trainable tensors require gradients."""
        ...


@dataclass(frozen=True)
class Full:
    """Every tensor of the model is trained."""

    def attach(self, model: nn.Module, seed: int) -> None:
        """Make all parameters trainable."""
        model.requires_grad_(True)
