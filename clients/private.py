"""DP-SGD for a cohort: gradients by row, clipped, summed within each client, noised.

    g_k = (sum_{b in L_k} min(1, C / ||g_b||) g_b + N(0, (z_k C)^2 I)) / (q_k n_k)

(Abadi et al. 2016, https://arxiv.org/abs/1607.00133, Algorithm 1, as Opacus takes it: Poisson lots,
the expected lot as denominator.) The gradient g_b of a row is that of a client of one row: every
row gets its own copy of the trainable tensors, so whatever layer trains in a cohort trains
privately, and lots of different sizes need no padding. An empty lot is noise alone.

Symbols: L_k the lot of client k, C clipping_norm, z_k noise_multiplier, q_k sample_rate, n_k rows.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedsys.cohort import CohortModel, row_gradients
from fedsys.data.examples import Batch
from fedsys.privacy.noise import Stream, grid, noised_rows

_DRAWS = 1_000_000  # rows that a pass of Poisson sampling decides on


@dataclass(frozen=True)
class Private:
    """What makes a client's round private."""

    clipping_norm: float  # C
    noise_multiplier: float  # z
    sample_rate: float  # q
    expected_lot: float  # q n, rows
    stream: Stream  # of its sampling and its noise, for this round alone

    def lots(self, rows: Tensor, steps: int) -> Tensor:
        """Return Poisson lots of ``rows`` (n,): (steps, largest lot), -1 where there is no row."""
        each = max(1, _DRAWS // len(rows))
        parts = []
        for first in range(0, steps, each):
            count = min(each, steps - first)
            drawn = self.stream.bernoulli(count * len(rows), self.sample_rate)
            parts += [rows[lot] for lot in drawn.view(count, len(rows))]
        # One column at least, so that a round of empty lots has its steps all the same.
        width = max(1, *map(len, parts))
        return torch.stack([nn.functional.pad(p, (0, width - len(p)), value=-1) for p in parts])


def private_gradients(
    model: CohortModel,
    params: Tensor,
    batches: Iterable[tuple[Batch, Tensor]],
    clients: Sequence[Private],
) -> Tensor:
    """Return the noised gradients (K, size) at ``params`` (K, size), in its dtype.

    ``batches`` hold the rows of all lots, and beside each who owns its rows (rows,).
    """
    stds = [client.noise_multiplier * client.clipping_norm for client in clients]
    norms = torch.tensor([client.clipping_norm for client in clients], dtype=torch.float64)
    cells = torch.tensor([grid(std) for std in stds], dtype=torch.float64)
    norms, cells = norms.to(params.device), cells.to(params.device)
    sums = clipped_sums(model, params, batches, norms, cells)
    sums = noised_rows(sums.cpu(), stds, [client.stream for client in clients])
    lots = torch.tensor([client.expected_lot for client in clients], dtype=torch.float64)
    return (sums / lots[:, None]).to(params)


def clipped_sums(
    model: CohortModel,
    params: Tensor,
    batches: Iterable[tuple[Batch, Tensor]],
    norms: Tensor,
    cells: Tensor,
) -> Tensor:
    """Return the sums (K, size) of each client's row gradients, clipped to ``norms`` (K,).

    They are in float64, and every entry of a row is cut towards zero to a multiple of the client's
    cell (K,), where that is above 0: sums of those are exact, so a row moves its sum by no more
    than its norm however many rows there are. Sums in float32 would round by more than that.
    """
    sums = params.new_zeros(params.shape, dtype=torch.float64)
    parts = [part.reshape(len(part), -1) for part in model.layout.unpack(sums).values()]
    for batch, owner in batches:
        if not len(owner):
            continue
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        _, found = row_gradients(model, params[owner], inputs, batch["labels"])
        gradients = [gradient.double() for gradient in found]
        squares = torch.stack([g.square().sum(1) for g in gradients]).sum(0)
        # A gradient that is not finite has no direction to keep: it counts as zero.
        finite = squares.isfinite()
        if not finite.all():
            gradients = [torch.where(finite[:, None], g, 0) for g in gradients]
            squares = torch.where(finite, squares, 0)
        factors = (norms[owner] / squares.sqrt()).clamp(max=1)[:, None]
        cell = cells[owner][:, None]
        for part, gradient in zip(parts, gradients, strict=True):
            part.index_add_(0, owner, _cut(gradient.mul_(factors), cell))
    return sums


def _cut(values: Tensor, cell: Tensor) -> Tensor:
    """Return ``values`` (rows, n) cut towards zero to multiples of ``cell`` (rows, 1), in place."""
    if not cell.all():  # without noise there is no grid
        return values
    return values.div_(cell).trunc_().mul_(cell)
