"""How much a run's updates look as if a canary had been trained on.

The server sees what each client sends. To first order, x_n - x_t is a sum of clipped gradients of
n's rows, canaries among them or not. The score of canary c is its share in that sum,

    s_c = sum_t beta_c(t),   beta(t) = argmin ||x_t - x_n - G^T beta||^2 + lambda ||beta||^2,

where the rows of G are the clipped gradients at x_t of n's canaries and of reference rows that
nobody trained on. Those explain away what all rows have in common, which alone would drown a
canary: plain inner products <x_t - x_n, g_c> tell almost nothing.

The scores use what an observer of all replies knows and nothing of the coins, so that an epsilon
for what the clients send holds for them.

Symbols: m canaries, p reference rows, x_t global params, x_n - x_t what client n sent.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsys.cohort import CohortModel, row_gradients
from fedsys.data.examples import Examples
from fedsys.privacy.canaries import Planted

_RIDGE = 0.1  # lambda over the mean squared norm of the reference gradients
_NUMBERS = 16_000_000  # in one pass's copies of the trainable tensors
_POSITIONS = 4096  # of work in one pass: rows times tokens


@dataclass(frozen=True)
class Seen:
    """What the server saw of one round."""

    start: Tensor  # x_t (size,)
    moves: Mapping[int, Tensor]  # x_n - x_t (size,) by client, of those that were averaged in


def scores(
    model: CohortModel,
    planted: Planted,
    reference: Examples,
    rounds: Iterable[Seen],
    clipping_norm: float,
) -> Tensor:
    """Return the score of every canary (m,) float64, the higher the likelier it was in.

    ``reference`` are rows like the clients' that none of them holds, some 100 to 300. ``model`` is
    as it was in training, its frozen tensors included.
    """
    total = torch.zeros(len(planted.rows), dtype=torch.float64)
    every = torch.arange(len(reference))
    for seen in rounds:
        asked = torch.isin(planted.owners, torch.tensor(list(seen.moves), dtype=torch.int64))
        places = asked.nonzero()[:, 0]
        train, rows = planted.dataset.train, planted.rows[places]
        canaries = clipped_gradients(model, train, rows, seen.start, clipping_norm)
        others = clipped_gradients(model, reference, every, seen.start, clipping_norm)
        total[places] += shares(canaries, others, planted.owners[places], seen.moves)
    return total


def shares(canaries: Tensor, others: Tensor, owners: Tensor, moves: Mapping[int, Tensor]) -> Tensor:
    """Return beta of ``canaries`` (b, size), those of each owner being solved for together.

    The reference gradients ``others`` (p, size) are eliminated first, once for all owners.
    """
    penalty = _RIDGE * others.square().sum(1).mean().clamp(min=torch.finfo(others.dtype).tiny)
    gram = others @ others.T
    gram.diagonal().add_(penalty)
    left = canaries - torch.linalg.solve(gram, others @ canaries.T).T @ others
    found = torch.zeros(len(canaries), dtype=torch.float64)
    for client, move in moves.items():
        own = owners == client
        system = left[own] @ canaries[own].T
        system.diagonal().add_(penalty)
        found[own] = torch.linalg.solve(system, -(left[own] @ move.to(left))).double()
    return found


def clipped_gradients(
    model: CohortModel, examples: Examples, rows: Tensor, params: Tensor, clipping_norm: float
) -> Tensor:
    """Return the gradients (b, size) of ``rows`` (b,) at ``params`` (size,), clipped, on the CPU.

    Every row is a client of one row, as in private training; a gradient that is not finite counts
    as zero there and here.
    """
    clipped = torch.zeros(len(rows), model.layout.size, dtype=params.dtype)
    each = max(1, min(_NUMBERS // model.layout.size, _POSITIONS // examples.positions))
    for first in range(0, len(rows), each):
        gradients = _gradients(model, examples, rows[first : first + each], params).cpu()
        gradients[~gradients.isfinite().all(1)] = 0
        norms = gradients.norm(dim=1, keepdim=True).clamp(min=torch.finfo(params.dtype).tiny)
        clipped[first : first + each] = gradients * (clipping_norm / norms).clamp(max=1)
    return clipped


def _gradients(model: CohortModel, examples: Examples, rows: Tensor, params: Tensor) -> Tensor:
    batch = {name: value.to(params.device) for name, value in examples.batch(rows).items()}
    labels = batch.pop("labels")
    _, gradients = row_gradients(model, params.expand(len(rows), -1), batch, labels)
    return torch.cat(gradients, 1)
