"""Which rows of a local step run together, so that little of a pass is padding.

A gradient is a sum over rows, so a step may run its rows in several passes, each padded to its own
longest row. Symbols: K clients, B rows of a client in this step, -1 among them for no row.
"""

import torch
from torch import Tensor

from fedsys.cohort import CohortModel
from fedsys.data.examples import Batch, Examples
from fedsys.losses import weightless

# Positions that take as long as a pass by itself: 40 to 110 for MiniLM on a CPU, 390 for a model of
# two small layers. Elsewhere a pass is mostly launches, and its positions cost next to nothing.
OVERHEAD = {"cpu": 128}
OVERHEAD_ELSEWHERE = 32768


def passes(examples: Examples, rows: Tensor, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Return the passes of ``rows`` (K, B): row numbers (K, b), and which of them have no weight.

    Every client has as many rows in a pass as every other. The shortest row of all fills up, for
    tokens can do no harm; but where rows are numbers, a client's own, so that what is broken in one
    client's data breaks no other client.
    """
    absent = rows < 0
    lengths = examples.lengths(rows.clamp(min=0).flatten())
    if lengths is None:
        if not absent.any():
            return [(rows, absent)]
        own = rows.amax(1, keepdim=True).clamp(min=0)
        some = ~absent.all(0)
        return [(torch.where(absent, own, rows)[:, some], absent[:, some])]
    lengths = torch.where(absent, torch.iinfo(torch.int64).max, lengths.view(rows.shape))
    shortest = lengths.argmin()
    rows = torch.where(absent, rows.flatten()[shortest].clamp(min=0), rows)
    lengths = torch.where(absent, lengths.flatten()[shortest], lengths)
    order = lengths.masked_fill(absent, -1).argsort(dim=1, stable=True)
    rows, absent, lengths = (part.gather(1, order) for part in (rows, absent, lengths))
    some = ~absent.all(0)
    counts = widths(lengths[:, some], _overhead(device))
    return list(zip(rows[:, some].split(counts, 1), absent[:, some].split(counts, 1), strict=True))


def lots(examples: Examples, rows: Tensor, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Return the passes of ``rows`` (K, B) where every row stands for itself.

    Each is its row numbers (n,) and the clients (n,) that they belong to.
    """
    owner, column = (rows >= 0).nonzero(as_tuple=True)
    chosen = rows[owner, column]
    lengths = examples.lengths(chosen)
    if lengths is None:
        return [(chosen, owner)]
    order = lengths.argsort(stable=True)
    counts = widths(lengths[order][None], _overhead(device))
    return list(zip(chosen[order].split(counts), owner[order].split(counts), strict=True))


def widths(lengths: Tensor, overhead: int) -> list[int]:
    """Return how many columns of ``lengths`` (K, B) to run in each pass, from the first on.

    ``lengths`` are the tokens of the clients' rows, each client's in rising order. The choice is
    the cheapest where a pass takes K * columns * longest row positions and ``overhead`` more.
    """
    clients, columns = lengths.shape
    if not columns:
        return [0]
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
    return found[::-1]


def gather(
    examples: Examples,
    rows: Tensor,
    device: torch.device,
    model: CohortModel | None = None,
    absent: Tensor | None = None,
) -> Batch:
    """Return the batch of ``rows``, of any shape, one after the other.

    For ``model`` it holds what that remembers of the rows; ``absent`` marks those without weight.
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
