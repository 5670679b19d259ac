"""Losses and accuracies by row, for classification, language modelling and regression.

A label of -100 has no weight. ``labels`` (rows,) are classes of logits (rows, C); ``labels``
(rows, L) are tokens of logits (rows, L, V), of which position t predicts token t + 1.

Floating ``labels`` (rows, D) are vectors b that outputs y (rows, D) are to hit, at the loss
1/2 ||y - b||^2; there is no accuracy, and NaN has no weight.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fedsys.data.examples import IGNORE

NARROW = 16  # classes
MANY = 4096  # logits

__all__ = [
    "IGNORE",
    "client_losses",
    "client_targets",
    "row_hits",
    "row_losses",
    "row_targets",
    "weightless",
]


def row_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the summed loss (rows,) of each row's targets.

    The loss of a class or a token is its cross-entropy.
    """
    if logits.dtype not in (torch.float32, torch.float64):
        logits = logits.float()
    if labels.is_floating_point():
        unknown = labels.isnan()
        # Filled before it is squared: the derivative of a NaN that is left out later is NaN.
        distance = (logits - labels).masked_fill(unknown, 0)
        return distance.square().sum(1) / 2
    logits, labels = _aligned(logits, labels)
    flat = _cross_entropy(logits.flatten(0, 1), labels.flatten())
    return flat.view(labels.shape).sum(1)


def row_targets(labels: Tensor) -> Tensor:
    """Return how many targets (rows,) each row has: a class or a vector is one."""
    if labels.is_floating_point():
        return (~labels.isnan()).any(1).long()
    return (_targets(labels) != IGNORE).sum(1)


def row_hits(logits: Tensor, labels: Tensor) -> Tensor:
    """Return how many targets of each row (rows,), classes or tokens, the highest logit names."""
    logits, labels = _aligned(logits, labels)
    return ((logits.argmax(-1) == labels) & (labels != IGNORE)).sum(1)


def client_targets(labels: Tensor, clients: int) -> Tensor:
    """Return how many targets (K,) there are among each client's share of the rows."""
    return row_targets(labels).view(clients, -1).sum(1)


def client_losses(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Return each client's part (K,) of its mean loss: the losses of its rows over its targets.

    ``targets`` (K,) counts them, those of other passes included. A client without any has loss 0
    and no gradient.
    """
    sums = row_losses(logits, labels)
    return sums.view(len(targets), -1).sum(1) / targets.clamp(min=1)


def weightless(labels: Tensor) -> float:
    """Return the value that a label without weight has among ``labels``."""
    return math.nan if labels.is_floating_point() else IGNORE


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the loss (n,) of each row of ``logits`` (n, C); 0 where the label is ``IGNORE``."""
    narrow = logits.shape[1] < NARROW and logits.numel() > MANY
    if narrow and logits.device.type == "cpu":
        # Over few classes the kernel takes one number at a time; over rows it does not.
        by_class = logits.t()[None], labels[None]
        return F.cross_entropy(*by_class, reduction="none", ignore_index=IGNORE)[0]
    return F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORE)


def _aligned(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits (rows, T, C) and the labels (rows, T) that they are to predict."""
    return (logits[:, None] if labels.dim() == 1 else logits[:, :-1]), _targets(labels)


def _targets(labels: Tensor) -> Tensor:
    """Return the labels (rows, T) that are predicted: not the first token of a row."""
    return labels[:, None] if labels.dim() == 1 else labels[:, 1:]
