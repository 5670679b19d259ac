"""Epsilon by privacy loss distributions: the figure that fedsys shows.

The distribution of the privacy loss of one step is put on a grid by connect-the-dots, convolved
with itself over the steps, and with those of other mechanisms; epsilon is read off it. Each of
these errs to the safe side, so the figure is not below the true epsilon. How far it is above
depends on the grid, see ``resolution``.

Doroshenko et al., "Connect the Dots: Tighter Discrete Approximations of Privacy Loss
Distributions", PoPETs 2022, https://arxiv.org/abs/2207.04380, as the library dp-accounting has it.
"""

import math
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from fedsys.privacy import renyi
from fedsys.privacy.release import MOST_NOISE, Release, Spent, require_delta

_COARSEST = 1e-3  # of the grid, in nats; the grids are this times powers of 2
_MOST_POINTS = 2e5  # of one step's distribution: about 2 s
_BEYOND = 1e4  # an epsilon at which exp(epsilon) has long overflowed: RDP is exact enough
_LEAST_DELTA = 1e-12  # below this, masses that are rounded off are no longer small: RDP again


def epsilon(spent: Spent, delta: float) -> float:
    """Return epsilon in [0, inf]; ``spent`` is merged, delta in (0, 1), else ``ValueError``.

    Measured against grids 4 times as fine, for z in [.3, 8], q in [1e-5, 1] and up to 50,000 steps:
    at most 0.12 % above them for an epsilon over 0.01, and 1e-5 in absolute terms below that. The
    grid moves in steps, so what costs more may show 0.1 % less; more steps of the same, 0.001 %.
    """
    return on_grid(spent, delta, 1)


@lru_cache(maxsize=4096)
def on_grid(spent: Spent, delta: float, coarser: int) -> float:
    """Return epsilon on a grid ``coarser`` times as coarse, a power of 2.

    It is not below ``epsilon``: the points of a coarse grid are among those of a fine one, and
    leaving out dots raises the line that connects them (the loss curve is convex in exp(epsilon)).
    """
    require_delta(delta)
    if out_of_reach(spent, delta):
        return renyi.bound(spent, delta)
    mechanisms = _gaussians_as_one(spent)
    if not mechanisms:
        return 0.0
    step, tail = resolution(spent, delta)
    first, *others = (
        _one_step(m.noise_multiplier, m.sample_rate, coarser * step, tail).self_compose(m.steps)
        for m in mechanisms
    )
    for other in others:
        first = first.compose(other)
    return max(0.0, float(first.get_epsilon_for_delta(delta)))


def out_of_reach(spent: Spent, delta: float) -> bool:
    """Whether the figure is the bound by RDP, since floats do not hold what PLD needs."""
    return delta < _LEAST_DELTA or renyi.bound(spent, delta) > _BEYOND


def resolution(spent: Spent, delta: float) -> tuple[float, float]:
    """Return the grid's interval h in nats, 1e-3 times a power of 2, and the log of tails left out.

    A loss between two points of the grid is split among them, which adds up to h^2 / 6 to its
    variance s^2; with h = s / 8 that makes 0.13 % of the standard deviation. s^2 is the mean over
    all steps, of about q^2 (exp(1 / z^2) - 1) each. Where that takes more points than anybody waits
    for, the grid is coarser and the figure is less tight.
    """
    mechanisms = _gaussians_as_one(spent)
    steps = max(sum(m.steps for m in mechanisms), 1)
    variance = sum(m.steps * _variance(m) for m in mechanisms) / steps
    # Of each step's noise, mass that may count as an infinite loss: 1e-4 of delta over all steps.
    # In tens, so that one distribution serves many rounds.
    tail = 10.0 * math.floor((math.log(1e-4 / steps) + math.log(delta)) / 10)
    widest = max((_widest(m, math.sqrt(-2 * tail)) for m in mechanisms), default=0.0)
    scale = renyi.bound(spent, delta)
    least = max(2e-6 * scale, widest / _MOST_POINTS, 1e-9)
    wanted = max(min(math.sqrt(variance) / 8, max(_COARSEST, 1e-5 * scale)), least)
    return _COARSEST * 2.0 ** math.floor(math.log2(wanted / _COARSEST)), tail


def _gaussians_as_one(spent: Spent) -> list[Release]:
    """Return what can be seen of ``spent``, all steps in which everyone took part as one.

    Gaussian steps compose exactly: sum_j 1 / z_j^2 is 1 / z^2 of one step.
    """
    seen = [
        replace(release, noise_multiplier=min(release.noise_multiplier, MOST_NOISE))
        for release in spent
        if release.noise_multiplier < math.inf
    ]
    sampled = [release for release in seen if release.sample_rate < 1]
    precision = sum(r.steps / r.noise_multiplier**2 for r in seen if r.sample_rate == 1)
    return sampled + ([Release(precision**-0.5, 1.0, 1)] if precision else [])


def _variance(mechanism: Release) -> float:
    if mechanism.sample_rate == 1:
        return mechanism.noise_multiplier**-2
    # At 60 the grid is as coarse as it gets anyway, and exp does not overflow.
    return mechanism.sample_rate**2 * math.expm1(min(mechanism.noise_multiplier**-2, 60.0))


def _widest(mechanism: Release, reach: float) -> float:
    """Return about the largest loss of one step, for noise ``reach`` standard deviations off."""
    z, q = mechanism.noise_multiplier, mechanism.sample_rate
    log_ratio = (reach * z + 0.5) / z**2
    return log_ratio + math.log(q) if log_ratio > 60 else math.log1p(q * math.expm1(log_ratio))


@lru_cache(maxsize=64)  # some MB each at the most
def _one_step(noise_multiplier: float, sample_rate: float, step: float, tail: float) -> Any:
    """Return what ``from_gaussian_mechanism`` of the library does, which takes 6 times as long."""
    # Slow to import, and not needed where nothing is private.
    from dp_accounting.pld.privacy_loss_distribution import (  # type: ignore[import-untyped]
        PrivacyLossDistribution,
    )

    both = (True,) if sample_rate == 1 else (True, False)
    return PrivacyLossDistribution(
        *(_masses(noise_multiplier, sample_rate, step, tail, removed) for removed in both)
    )


def _masses(z: float, q: float, step: float, tail: float, removed: bool) -> Any:
    """Return the masses of one step's loss when a unit is removed, or added.

    The library's classes throughout, except that it looks up in a Python loop at which output x
    the loss is a given one: log(1 - q + q exp(-(x + 1/2) / z^2)) when removed, and the opposite of
    that at -x when added.
    """
    from dp_accounting.pld import pld_pmf, privacy_loss_mechanism  # type: ignore[import-untyped]

    kinds = privacy_loss_mechanism.AdjacencyType
    mechanism = privacy_loss_mechanism.GaussianPrivacyLoss(
        z,
        log_mass_truncation_bound=tail,
        sampling_prob=q,
        adjacency_type=kinds.REMOVE if removed else kinds.ADD,
    )
    bounds = mechanism.connect_dots_bounds()
    first, last = math.floor(bounds.epsilon_lower / step), math.ceil(bounds.epsilon_upper / step)
    losses = np.arange(first, last + 1) * step
    sign = 1 if removed else -1
    signed = sign * losses
    inner = np.expm1(np.minimum(signed, 50.0)) / q
    reached = inner > -1  # elsewhere no output has this loss
    # Beyond 50, 1 is nothing beside exp(50), which must not overflow later on.
    log_ratio = np.where(signed > 50, signed - math.log(q), np.log1p(np.maximum(inner, -1 + 1e-16)))
    x = -sign * (0.5 + z**2 * log_ratio[reached])
    deltas = (-np.expm1(np.minimum(losses, 0.0))) if removed else np.zeros_like(losses)
    deltas[reached] = mechanism.mu_upper_cdf(x) - np.exp(
        losses[reached] + mechanism.mu_lower_log_cdf(x)
    )
    return pld_pmf.create_pmf_pessimistic_connect_dots_fixed_gap(
        step, first, last, deltas.clip(0, 1)
    )
