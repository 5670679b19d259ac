"""The largest epsilon of many clients, at the price of a few.

Clients hold different records, so what the federation guarantees is the largest epsilon of theirs
(parallel composition; McSherry, "Privacy Integrated Queries", SIGMOD 2009, Theorem 4).
"""

import heapq
import math
from collections.abc import Mapping

from fedsys.privacy import pld, renyi
from fedsys.privacy.release import Spent, merged, require_delta

MARGIN = 0.01  # by which PLD, which errs upwards, may exceed a bound on the true epsilon
_GRIDS = (8, 2, 1)  # times as coarse as the figure's, level by level; a coarse one costs little


def largest(spent_by_client: Mapping[int, Spent], delta: float) -> tuple[float, int | None]:
    """Return the largest epsilon by PLD and its client, the first of equal ones; (0.0, None) of {}.

    Best first: the client whose bound is highest has it tightened, from RDP to a coarse grid to the
    figure itself, until a figure is at the top. Who is dominated is left out, so a cohort takes a
    few figures a round. What is assumed: PLD is at most MARGIN above the bound by RDP.
    """
    require_delta(delta)
    first: dict[Spent, int] = {}
    for client in sorted(spent_by_client):
        first.setdefault(merged(spent_by_client[client]), client)
    queue = [(-_bound(spent, delta, 0), 0, client, spent) for spent, client in first.items()]
    heapq.heapify(queue)
    tightened: list[Spent] = []
    while queue:
        negative, level, client, spent = heapq.heappop(queue)
        if level == len(_GRIDS) or negative == -math.inf:
            return -negative, client
        if level == 0:
            if any(_dominates(other, spent, delta) for other in tightened):
                continue
            tightened.append(spent)
        bound = _bound(spent, delta, level + 1)
        heapq.heappush(queue, (-bound, level + 1, client, spent))
    return 0.0, None


def _bound(spent: Spent, delta: float, level: int) -> float:
    """Return what the figure is not above: by RDP, on coarse grids, and the figure itself."""
    if level == 0:
        return (1 + MARGIN) * renyi.bound(spent, delta) + 1e-3
    figure = pld.on_grid(spent, delta, _GRIDS[level - 1])
    return figure if level == len(_GRIDS) else figure * (1 + 1e-6) + 1e-9  # roundings


def _dominates(spent: Spent, other: Spent, delta: float) -> bool:
    """Whether the figure of ``spent`` is not below that of ``other``, seen without computing them.

    Sampling at a lower rate, adding noise and leaving out steps are done to what was released, and
    so are post-processing. That holds of figures, too, unless ``other`` is computed less finely.
    """
    if len(spent) != len(other) or not all(
        a.noise_multiplier <= b.noise_multiplier
        and a.sample_rate >= b.sample_rate
        and a.steps >= b.steps
        for a, b in zip(spent, other, strict=True)
    ):
        return False
    pairs = zip(pld.resolution(spent, delta), pld.resolution(other, delta), strict=True)
    return all(mine >= theirs for mine, theirs in pairs)
