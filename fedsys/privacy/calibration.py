"""The least noise with which planned steps stay within a budget."""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import lru_cache

from fedsys.privacy import pld, renyi
from fedsys.privacy.release import MOST_NOISE, NO_NOISE, Release, Spent, merged

SLACK = 1e-3  # of the target, that may be left unspent
_ROUGH = 8  # a grid this much coarser finds the neighbourhood
_TURNS = 40  # of which a handful is needed
_LEAST, _MOST = math.log(NO_NOISE), math.log(MOST_NOISE)

Figure = Callable[[float], float]  # epsilon by the logarithm of z, falling


def noise_multiplier(
    target_epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    before: Iterable[Release] = (),
) -> float:
    """Return z with which ``before`` and ``steps`` more cost at most ``target_epsilon``.

    Epsilon by PLD is then in [0.999, 1] of the target. It is below that where even ``NO_NOISE``,
    the least z there is, costs less, which is then returned; and it may be a few percent below
    where steps * sample_rate is about delta, since z is then so small that the grid shows.
    0.0 for an infinite target. Raises ``ValueError`` for a target that is not positive or that
    ``before`` has already spent, and for no steps.
    """
    if not target_epsilon > 0:
        raise ValueError(f"target_epsilon must be positive, or inf, got {target_epsilon}")
    if steps < 1:
        raise ValueError(f"steps counts planned steps, at least 1, got {steps}")
    planned = Release(math.inf, sample_rate, steps)
    gone = pld.epsilon(merged(before), delta)
    if target_epsilon == math.inf:
        return 0.0
    if gone >= target_epsilon * (1 - SLACK):
        raise ValueError(
            f"epsilon {gone:.4g} of {target_epsilon:.4g} is spent already: nothing is left for"
            f" {steps} steps"
        )
    return _least(target_epsilon, delta, planned, merged(before))


@lru_cache(maxsize=4096)  # clients of equal size plan the same
def _least(target: float, delta: float, planned: Release, before: Spent) -> float:
    def spent(log_noise: float) -> Spent:
        return merged((*before, replace(planned, noise_multiplier=math.exp(log_noise))))

    place, slope = 0.0, -1.0
    if renyi.bound(spent(_MOST), delta) < target:
        place, slope = _within(lambda x: renyi.bound(spent(x), delta), target, place, slope)
    place, slope = _within(lambda x: pld.on_grid(spent(x), delta, _ROUGH), target, place, slope)
    place, _ = _within(lambda x: pld.epsilon(spent(x), delta), target, place, slope)
    return math.exp(place)


def _within(figure: Figure, target: float, place: float, slope: float) -> tuple[float, float]:
    """Return where ``figure`` is within the target's slack, and its slope, from a guess at both.

    In logarithms of noise and epsilon, where it is nearly straight, by the secant; the middle of
    the bracket where that leads out of it, or gets nowhere.
    """
    costs_more, costs_less = _LEAST - 1, _MOST
    goal = math.log(target) - SLACK / 2
    before: tuple[float, float] | None = None
    for turn in range(_TURNS):
        value = figure(place)
        if value <= target and (value >= target * (1 - SLACK) or place <= _LEAST):
            return place, slope
        # Cut, for inf and 0 have no logarithm to go by.
        excess = math.log(min(max(value, target / 100), target * 100)) - goal
        if value > target:
            costs_more = place
        else:
            costs_less = place
        if before is not None and place != before[0]:
            slope = min((excess - before[1]) / (place - before[0]), -0.1)
        before = place, excess
        place = max(place - excess / slope, _LEAST)
        if not costs_more < place < costs_less or turn % 4 == 3:
            place = (max(costs_more, _LEAST) + costs_less) / 2
    return costs_less, slope
