"""Which rows of a local step run together, so that little of a pass is padding.

A gradient is a sum over rows, so a step may run its rows in several passes, each padded to its own
longest row. Where every client has one copy of what trains, a pass takes as many rows of each of
them; where every row has a copy, any rows of about one length.

Symbols: K clients, B rows of a client in this step, -1 among them for no row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsys.cohort import CohortModel
from fedsys.data.examples import Batch, Examples
from fedsys.losses import weightless

# Positions that take as long as a pass by itself: on a core 40 to 110 for MiniLM, and 390 for two
# small layers. Elsewhere a pass is mostly launches; that figure is a guess.
OVERHEAD = {"cpu": 128}
OVERHEAD_ELSEWHERE = 32768
LARGEST_PASS = 16_000_000  # numbers in the rows' copies of the trainable tensors


@dataclass(frozen=True)
class Passes:
    """Row numbers of each pass, with what stands for them; and what all passes cost.

    By column the row numbers are (K, b), every client's as many as every other's, and beside them
    stands which are without weight, bool. By row they are (n,), and beside them stands which client
    (n,) each belongs to.
    """

    parts: list[tuple[Tensor, Tensor]]
    cost: int | None = None  # in positions of a row; None: rows are of one size


def by_column(examples: Examples, rows: Tensor, device: torch.device) -> Passes:
    """Return passes of ``rows`` (K, B) for models with a copy of what trains for each client.

    A client's own row fills it up, so that what is broken in one client's data breaks no other
    client; and its shortest.
    """
    absent = rows < 0
    lengths = examples.lengths(rows.clamp(min=0).flatten())
    if lengths is None and not absent.any():
        return Passes([(rows, absent)])
    if lengths is None:
        own = rows.amax(1, keepdim=True).clamp(min=0)
        some = ~absent.all(0)
        return Passes([(torch.where(absent, own, rows)[:, some], absent[:, some])])
    lengths = lengths.view(rows.shape).masked_fill(absent, -1)
    order = lengths.argsort(dim=1, stable=True)
    rows, absent, lengths = (part.gather(1, order) for part in (rows, absent, lengths))
    shortest = absent.sum(1, keepdim=True).clamp(max=rows.shape[1] - 1)
    rows = torch.where(absent, rows.gather(1, shortest).clamp(min=0), rows)
    lengths = torch.where(absent, lengths.gather(1, shortest), lengths)
    some = ~absent.all(0)
    counts, cost = widths(lengths[:, some], _overhead(device))
    parts = zip(rows[:, some].split(counts, 1), absent[:, some].split(counts, 1), strict=True)
    return Passes(list(parts), cost)


def by_row(examples: Examples, rows: Tensor, device: torch.device, size: int) -> Passes:
    """Return passes of ``rows`` (K, B) for models with a copy of what trains for each row.

    A copy has ``size`` numbers.
    """
    owner, column = (rows >= 0).nonzero(as_tuple=True)
    chosen = rows[owner, column]
    lengths, cost = examples.lengths(chosen), None
    counts = [len(chosen)]
    if lengths is not None:
        order = lengths.argsort(stable=True)
        chosen, owner = chosen[order], owner[order]
        counts, cost = widths(lengths[order][None], _overhead(device))
    most = max(1, LARGEST_PASS // size)
    parts = [
        pair
        for whole in zip(chosen.split(counts), owner.split(counts), strict=True)
        for pair in zip(*(part.split(most) for part in whole), strict=True)
    ]
    if cost is not None:
        cost += (len(parts) - len(counts)) * _overhead(device)
    return Passes(parts, cost)


def widths(lengths: Tensor, overhead: int) -> tuple[list[int], int]:
    """Return how many columns of ``lengths`` (K, B) to run in each pass, and what they cost.

    ``lengths`` are the tokens of the clients' rows, each client's in rising order. The choice is
    the cheapest where a pass takes K * columns * longest row positions and ``overhead`` more.
    """
    clients, columns = lengths.shape
    if not columns:
        return [0], 0
    longest = lengths.amax(0)
    ends = [*((longest.diff() > 0).nonzero().flatten() + 1).tolist(), columns]
    # The first passes of the cheapest choice up to a column are the cheapest up to theirs.
    starts = torch.tensor([0, *ends[:-1]])
    cost, chosen = torch.zeros(len(ends) + 1, dtype=torch.int64), []
    for n, end in enumerate(ends):
        positions = clients * (end - starts[: n + 1]) * longest[end - 1]
        least = (cost[: n + 1] + positions).min(0)
        cost[n + 1] = least.values + overhead
        chosen.append(int(least.indices))
    found, n = [], len(ends)
    while n:
        first = chosen[n - 1]
        found.append(ends[n - 1] - int(starts[first]))
        n = first
    return found[::-1], int(cost[-1])


def gather(
    examples: Examples,
    rows: Tensor,
    device: torch.device,
    absent: Tensor | None = None,
    model: CohortModel | None = None,
) -> Batch:
    """Return the batch of ``rows``, of any shape, one after the other.

    ``absent`` marks those without weight; for ``model`` it holds what that remembers of the rows.
    """
    rows = rows.flatten()
    batch = examples.batch(rows)
    if absent is not None and absent.any():
        batch["labels"][absent.flatten()] = weightless(batch["labels"])
    if model is not None:
        batch |= model.states(examples, rows)
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


def _overhead(device: torch.device) -> int:
    return OVERHEAD.get(device.type, OVERHEAD_ELSEWHERE)
