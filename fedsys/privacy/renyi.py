"""An upper bound on epsilon that costs microseconds, by Renyi differential privacy.

    A_a = E[((1 - q) + q exp((2 x - 1) / (2 z^2)))^a],  x ~ N(0, z^2)
    epsilon <= T log(A_a) / (a - 1) + log(1 - 1 / a) - log(delta a) / (a - 1)  for every a > 1

Symbols: a order, q sample_rate, z noise_multiplier, T steps.

Mironov, Talwar and Zhang, "Renyi Differential Privacy of the Sampled Gaussian Mechanism",
https://arxiv.org/abs/1908.10530, Section 3; Balle et al., "Hypothesis Testing Interpretations and
Renyi Differential Privacy", AISTATS 2020, https://arxiv.org/abs/1905.09982, Theorem 21.

Departs from the former in one respect: for fractional orders it sums a series that alternates and,
for q near 1/2, takes long to converge; here the mean is taken by the trapezoidal rule.
"""

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fedsys.privacy.release import MOST_NOISE, NO_NOISE, Spent, require_delta

Array = NDArray[np.float64]

_FRACTIONAL = np.concatenate([[1.005, 1.01, 1.02, 1.05], np.arange(11, 110) / 10])
_WHOLE = np.unique(np.concatenate([np.arange(11, 65), np.geomspace(64, 256, 13).round()]))
_ORDERS = np.concatenate([_FRACTIONAL, _WHOLE])
_LOG_FACTORIALS = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, 257)))])


@lru_cache(maxsize=65536)  # asked of every client in every round, and small
def bound(spent: Spent, delta: float) -> float:
    """Return an epsilon that is not below the true one; ``spent`` is merged, delta in (0, 1)."""
    require_delta(delta)
    if any(release.noise_multiplier < NO_NOISE for release in spent):
        return math.inf
    total = np.zeros_like(_ORDERS)
    for release in spent:
        total += release.steps * log_moments(release.noise_multiplier, release.sample_rate)
    if not total.any():
        return 0.0
    less = _ORDERS - 1
    epsilon = (total - np.log(delta * _ORDERS)) / less + np.log(less / _ORDERS)
    return max(0.0, float(epsilon.min()))


@lru_cache(maxsize=4096)
def log_moments(noise_multiplier: float, sample_rate: float) -> Array:
    """Return log A_a of one step at each order."""
    if noise_multiplier == math.inf:
        return np.zeros_like(_ORDERS)
    z, q = min(noise_multiplier, MOST_NOISE), sample_rate
    if q == 1:
        return np.asarray(_ORDERS * (_ORDERS - 1) / (2 * z**2))
    # A_a >= 1, whatever rounding says.
    return np.concatenate([_by_quadrature(z, q), _by_binomials(z, q)]).clip(0.0)


def _by_quadrature(z: float, q: float) -> Array:
    """Return log A_a at the fractional orders.

    The integrand is analytic within pi z^2 of the real axis, so that nodes z^2 / 2 apart leave an
    error of exp(-4 pi^2); its mass lies within 12 z of 0 or, under the a-th power, of at most a.
    """
    gap = min(z**2 / 2, z / 4)
    x = np.arange(-12 * z, _FRACTIONAL[-1] + 12 * z, gap)
    ratio = np.logaddexp(math.log1p(-q), math.log(q) + (2 * x - 1) / (2 * z**2))
    density = -((x / z) ** 2) / 2 + math.log(gap / (z * math.sqrt(2 * math.pi)))
    return _log_sum(_FRACTIONAL[:, None] * ratio + density)


def _by_binomials(z: float, q: float) -> Array:
    """Return log A_a at the whole orders: sum_k C(a, k) (1-q)^(a-k) q^k exp(k (k-1) / (2 z^2))."""
    order = _WHOLE.astype(np.int64)[:, None]
    drawn = np.arange(order.max() + 1)
    rest = order - drawn  # negative beyond the last term
    coefficient = _LOG_FACTORIALS[order] - _LOG_FACTORIALS[drawn] - _LOG_FACTORIALS[rest.clip(0)]
    chance = drawn * math.log(q) + rest * math.log1p(-q)
    terms = coefficient + chance + drawn * (drawn - 1) / (2 * z**2)
    return _log_sum(np.where(rest < 0, -np.inf, terms))


def _log_sum(logs: Array) -> Array:
    """Return log(sum(exp(logs))) over the last axis."""
    most = logs.max(axis=-1)
    total: Array = most + np.log(np.exp(logs - most[..., None]).sum(axis=-1))
    return total
