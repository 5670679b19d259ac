"""Epsilon of what was released, by three accountants.

The figure that is shown is by privacy loss distributions (PLD, ``fedsys.privacy.pld``). Opacus'
accountants by Renyi differential privacy (RDP) and by privacy loss random variables (PRV) check
it: they share no code with it.

Gopi, Lee and Wutschitz, "Numerical Composition of Differential Privacy" (PRV), NeurIPS 2021,
https://arxiv.org/abs/2106.02848; for RDP see ``fedsys.privacy.renyi``.
"""

import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from fedsys.errors import RunError
from fedsys.privacy import pld, renyi
from fedsys.privacy.calibration import noise_multiplier
from fedsys.privacy.maximum import largest
from fedsys.privacy.release import (
    NO_NOISE,
    Initialisation,
    Release,
    Sampling,
    Spent,
    Statement,
    Unit,
    check_delta,
    merged,
    require_delta,
)

__all__ = [
    "AccountingError",
    "Figures",
    "Initialisation",
    "Release",
    "Sampling",
    "Spent",
    "Statement",
    "Unit",
    "check",
    "check_delta",
    "epsilon",
    "largest",
    "merged",
    "noise_multiplier",
    "prv_epsilon",
    "rdp_epsilon",
    "upper_bound",
]

# PRV states its error: what it returns is between the true epsilon and twice this above it.
PRV_ERROR = 0.01
# What PLD may be beside the truth in relative terms, its grid and delta's share for PRV together;
# at most 1.5e-3 was measured for z in [.12, 8], q in [1e-6, .9] and up to 50,000 steps.
TOLERANCE = 0.01


class AccountingError(RunError):
    """Accountants disagree by more than their errors allow: one of them is wrong."""


@dataclass(frozen=True)
class Figures:
    """Epsilon of the same releases by three accountants."""

    pld: float
    rdp: float
    prv: float | None  # None where the accountant gives up, or PLD does: see `pld.out_of_reach`

    def as_dict(self) -> dict[str, float | None]:
        """Return the figures by name."""
        return asdict(self)


def epsilon(spent: Iterable[Release], delta: float) -> float:
    """Return epsilon by PLD, in [0, inf]: 0 for nothing released, inf for no noise.

    ``delta`` is in (0, 1), else ``ValueError``. See ``fedsys.privacy.pld.epsilon`` for its errors.
    """
    return pld.epsilon(merged(spent), delta)


def upper_bound(spent: Iterable[Release], delta: float) -> float:
    """Return a bound on epsilon in about 0.1 ms, 5 to 30 % above it at an epsilon over 3.

    It bounds the true epsilon. The figure by PLD, itself never below the truth, was not seen above
    it, but nothing proves that.
    """
    return renyi.bound(merged(spent), delta)


def rdp_epsilon(spent: Iterable[Release], delta: float) -> float:
    """Return epsilon by Opacus' RDP accountant, in [0, inf]."""
    require_delta(delta)
    releases = _that_can_be_seen(spent)
    if _without_noise(releases):
        return math.inf
    if not releases:
        return 0.0
    with _quiet():
        from opacus.accountants import RDPAccountant
        from opacus.accountants.analysis.rdp import get_privacy_spent

        total = sum(r.steps * _renyi(r.noise_multiplier, r.sample_rate) for r in releases)
        found, _ = get_privacy_spent(orders=RDPAccountant.DEFAULT_ALPHAS, rdp=total, delta=delta)
    return max(0.0, float(found))


def prv_epsilon(spent: Iterable[Release], delta: float, error: float = PRV_ERROR) -> float | None:
    """Return epsilon by Opacus' PRV accountant, in [0, inf]: at most 2 * ``error`` above the truth.

    None where it gives up, as for a delta that is lost among the roundings of its grid.
    """
    require_delta(delta)
    releases = _that_can_be_seen(spent)
    if _without_noise(releases):
        return math.inf
    if not releases:
        return 0.0
    with _quiet():
        from opacus.accountants import PRVAccountant

        accountant = PRVAccountant()
        accountant.history = [(r.noise_multiplier, r.sample_rate, r.steps) for r in releases]
        try:
            found = float(accountant.get_epsilon(delta, eps_error=error))
        except (ArithmeticError, RuntimeError, ValueError, IndexError, MemoryError):
            return None
    return max(0.0, found) if math.isfinite(found) else None


def check(spent: Iterable[Release], delta: float) -> Figures:
    """Return epsilon by all accountants; raises ``AccountingError`` when they cannot all be right.

    RDP must not be below PLD, and PRV must be as near to it as both claim to be to the truth. How
    far RDP is above says nothing: ten times and more where epsilon is small and q tiny. Seconds.
    """
    spent = merged(spent)
    shown, rdp = epsilon(spent, delta), rdp_epsilon(spent, delta)
    if pld.out_of_reach(spent, delta):
        figures, error = Figures(shown, rdp, None), math.inf
    else:
        # PRV's grid grows with epsilon over its error: 0.2 % keeps it payable.
        error = max(PRV_ERROR, 0.002 * shown)
        figures = Figures(shown, rdp, prv_epsilon(spent, delta, error))
    _agree(figures, error)
    return figures


def _agree(figures: Figures, prv_error: float) -> None:
    shown, rdp, prv = figures.pld, figures.rdp, figures.prv
    margin = TOLERANCE * shown + 1e-3
    if math.isnan(shown) or math.isnan(rdp) or shown > rdp + margin:
        raise AccountingError(f"epsilon {shown:.5g} by PLD is above its bound by RDP, {rdp:.5g}")
    if prv is not None and not prv - 2 * prv_error - margin <= shown <= prv + margin:
        raise AccountingError(
            f"epsilon {shown:.5g} by PLD and {prv:.5g} by PRV differ by more than their errors,"
            f" {margin:.2g} and {2 * prv_error:.2g}"
        )


def _that_can_be_seen(spent: Iterable[Release]) -> Spent:
    return tuple(r for r in merged(spent) if r.noise_multiplier < math.inf)


def _without_noise(spent: Spent) -> bool:
    return any(r.noise_multiplier < NO_NOISE for r in spent)


@lru_cache(maxsize=1024)  # 20 to 500 ms each
def _renyi(noise_multiplier: float, sample_rate: float) -> Any:
    """Return the divergence of one step at each of Opacus' orders."""
    from opacus.accountants import RDPAccountant
    from opacus.accountants.analysis.rdp import compute_rdp

    return compute_rdp(
        q=sample_rate,
        noise_multiplier=noise_multiplier,
        steps=1,
        orders=RDPAccountant.DEFAULT_ALPHAS,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what Opacus says of orders at the end of its list, and of logarithms of 0."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        yield
