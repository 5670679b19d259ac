"""How far two Gaussians are apart, as an epsilon at a delta: exact, in both directions.

    delta(epsilon) = max over P, Q in either order of P[E] - exp(epsilon) Q[E],
    E = {x: log p(x) - log q(x) > epsilon}

E is bounded by the roots of a quadratic. For N(0, 1) and N(mu, 1) this is the Gaussian mechanism of
noise multiplier 1 / mu, delta = Phi(mu/2 - epsilon/mu) - exp(epsilon) Phi(-mu/2 - epsilon/mu).
Balle and Wang, "Improving the Gaussian Mechanism for Differential Privacy", ICML 2018,
https://arxiv.org/abs/1805.06530.
"""

import math
from collections.abc import Callable

import torch

_ACCURACY = 1e-6  # of an epsilon found by bisection, absolute
_LARGEST = 1e6  # an epsilon above which nothing is told apart any more


def gaussians_epsilon(shift: float, width: float, delta: float) -> float:
    """Return the smallest epsilon at which N(0, 1) and N(shift, width^2) are indistinguishable.

    That is, no event's probability under one exceeds exp(epsilon) times that under the other by
    more than ``delta``. ``inf`` beyond 1e6.
    """
    sides = ((0.0, 1.0, shift, width), (shift, width, 0.0, 1.0))
    return largest(lambda epsilon: max(_excess(*side, epsilon) for side in sides) > delta)


def _excess(mean: float, std: float, other: float, other_std: float, epsilon: float) -> float:
    """Return P[E] - exp(epsilon) Q[E] at E = {log p - log q > epsilon}, which makes it largest.

    P and Q are the Gaussians of (mean, std) and (other, other_std). E is where the quadratic
    a x^2 + 2 b x + c is positive.
    """
    p, q = std**-2, other_std**-2
    a, b = (q - p) / 2, (mean * p - other * q) / 2
    c = (q * other**2 - p * mean**2) / 2 + math.log(other_std / std) - epsilon
    parts = _positive(a, b, c)
    inside = _mass(parts, mean, std)
    outside = _mass(parts, other, other_std)
    return math.exp(inside) - math.exp(epsilon + outside)


def _positive(a: float, b: float, c: float) -> list[tuple[float, float]]:
    """Return the intervals where a x^2 + 2 b x + c > 0."""
    infinity = math.inf
    if a == 0 and b == 0:
        return [(-infinity, infinity)] if c > 0 else []
    if a == 0:
        root = -c / (2 * b)
        return [(root, infinity)] if b > 0 else [(-infinity, root)]
    under = b * b - a * c
    if under <= 0:
        return [(-infinity, infinity)] if a > 0 else []
    # One root by the sum of like signs, the other by the product: neither cancels.
    far = -(b + math.copysign(math.sqrt(under), b))
    low, high = sorted((far / a, c / far))
    return [(-infinity, low), (high, infinity)] if a > 0 else [(low, high)]


def _mass(parts: list[tuple[float, float]], mean: float, std: float) -> float:
    """Return the logarithm of the probability of ``parts`` under N(mean, std^2)."""
    total = -math.inf
    for low, high in parts:
        ends = torch.tensor([(low - mean) / std, (high - mean) / std], dtype=torch.float64)
        if ends[0] > 0:  # the upper tail is the lower one of the mirror image, and more exact
            ends = -ends.flip(0)
        below, above = torch.special.log_ndtr(ends).tolist()
        if above > below:
            piece = above + math.log1p(-math.exp(below - above))
            total = torch.logaddexp(*torch.tensor([total, piece], dtype=torch.float64)).item()
    return total


def largest(holds: Callable[[float], bool]) -> float:
    """Return the largest epsilon >= 0 at which ``holds``, which is false from there on."""
    if not holds(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while holds(high):
        low, high = high, 2 * high
        if low > _LARGEST:
            return math.inf
    while high - low > _ACCURACY:
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
