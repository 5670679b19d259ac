"""Client-level privacy: the server hides whether a client, with all its rows, took part at all.

    d = (sum_{n in S_t} min(1, C / |Delta_n|) Delta_n + N(0, (z C)^2 I)) / m

Its sum changes by at most C when a client is left out; m, the expected cohort, is known beforehand,
as what the realised cohort divides is as private as the cohort. So a round is one step of the
Gaussian mechanism, also one in which nobody answers: noise alone is released then, and counted.

With ``quantile`` = gamma, C follows the gamma-quantile of the norms:

    b       = 1/2 + (sum_{n in S_t} (1[|Delta_n| <= C] - 1/2) + N(0, sigma_b^2)) / m
    C      <- C exp(-eta (b - gamma))
    z_Delta = (z^-2 - (2 sigma_b)^-2)^(-1/2)      in place of z in d

A client moves the count by at most 1/2, so that count and sum together cost what one sum with noise
multiplier z does. Where fewer than m clients answer, b is drawn to 1/2.

Symbols: S_t cohort, Delta_n update.delta, C clipping_norm, z noise multiplier, m expected_cohort,
sigma_b count_noise, eta quantile_lr.

McMahan et al., "Learning Differentially Private Recurrent Language Models", ICLR 2018,
https://arxiv.org/abs/1710.06963; Andrew et al., "Differentially Private Learning with Adaptive
Clipping", NeurIPS 2021, https://arxiv.org/abs/1905.03871, Algorithm 1 and Theorem 1.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedsys.params import Params, norm
from fedsys.participation import Bernoulli, Participation, SupportsMarginals, Uniform
from fedsys.privacy.accounting import epsilon, noise_multiplier
from fedsys.privacy.budget import Budget
from fedsys.privacy.noise import Stream, grid, noised, rounding
from fedsys.privacy.release import Release, Spent
from fedsys.update import Update

BOUND = "clipping_norm"  # its name in the server's memory


@dataclass(frozen=True, kw_only=True)
class ClientPrivacy(Budget):
    """Clients are protected by noise at the server, which is trusted; how many there are is public.

    The noise multiplier includes what the count of unclipped updates takes; ``rounds`` are those
    that a client may be asked in; delta is by default 1 / (2 num_clients).
    """

    unit: ClassVar[str] = "client"

    clipping_norm: float  # C; with a quantile, that of round 1; inf only without noise
    quantile: float | None  # gamma, the share of updates that C shall leave as they are; None: C
    quantile_lr: float  # eta
    count_noise: float | None  # sigma_b, in clients; None: expected cohort / 20, as in the paper
    canaries: int | None = None  # clients planted for an audit

    def __post_init__(self) -> None:
        """Check ranges; raises ``ValueError``."""
        super().__post_init__()
        if not self.clipping_norm > 0:
            raise ValueError(f"clipping_norm must be positive, got {self.clipping_norm}")
        if self.clipping_norm == math.inf and (self.quantile is not None or not self.noiseless):
            raise ValueError("clipping_norm=inf bounds nothing: it needs epsilon=inf, no quantile")
        if self.canaries is not None:
            self._check_canaries(self.canaries)
        if self.quantile is not None and not 0 < self.quantile < 1:
            raise ValueError(f"quantile is a share in (0, 1), got {self.quantile}")
        for name in ("quantile_lr", "count_noise"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive, got {value}")

    def _check_canaries(self, canaries: int) -> None:
        if canaries < 2:
            raise ValueError(f"canaries must be at least 2, or null for none, got {canaries}")
        if self.quantile is not None or self.clipping_norm == math.inf:
            raise ValueError(
                f"canaries={canaries} send updates as long as clipping_norm, which they would drive"
                " up; set privacy.quantile=null and a finite privacy.clipping_norm"
            )

    # ---- the mechanism

    def start(self) -> Params:
        """Return the server's memory before round 1: C, where it adapts."""
        if self.quantile is None:
            return {}
        return {BOUND: torch.tensor(self.clipping_norm, dtype=torch.float64)}

    def merge(
        self,
        updates: Iterable[Update],
        params: Params,
        memory: Params,
        expected_cohort: float,
        multiplier: float,
        stream: Stream,
    ) -> tuple[Params, Params]:
        """Return the direction in float64 and the next memory; one update is held at a time.

        ``params`` is x_t, for the shapes of a round without updates; ``multiplier`` is z of the
        plan, ``stream`` is for this round alone. Raises ``ValueError`` as ``split`` does.
        """
        bound = self.clipping_norm if self.quantile is None else memory[BOUND].item()
        z, count_noise = self.split(multiplier, expected_cohort)
        std = z * bound if z else 0.0
        total, surplus = clipped_sum(updates, params, bound, grid(std))
        direction = {n: noised(value, std, stream) / expected_cohort for n, value in total.items()}
        if self.quantile is None:
            return direction, {}
        count = noised(torch.tensor(surplus, dtype=torch.float64), count_noise, stream)
        share = 0.5 + count / expected_cohort
        return direction, {BOUND: bound * torch.exp(-self.quantile_lr * (share - self.quantile))}

    def release(
        self,
        total: Params,
        bound: float,
        expected_cohort: float,
        multiplier: float,
        stream: Stream,
    ) -> Params:
        """Return the direction, in float64, of a sum that no client moves by more than ``bound``.

        It is of clients who clip themselves, and of a fixed C.
        """
        std = multiplier * bound
        if std:  # the entries are of another grid than the noise
            size = sum(value.numel() for value in total.values())
            std = multiplier * (bound + 2 * rounding(size, std))
        return {n: noised(value, std, stream) / expected_cohort for n, value in total.items()}

    def split(self, multiplier: float, expected_cohort: float) -> tuple[float, float]:
        """Return z_Delta and sigma_b, which together cost what ``multiplier`` alone does.

        Raises ``ValueError`` where the count alone would cost more.
        """
        if self.quantile is None or not multiplier:
            return multiplier, 0.0
        given = self.count_noise
        count_noise = expected_cohort / 20 if given is None else given
        left = multiplier**-2 - (2 * count_noise) ** -2
        if not left > 0:
            whence = f"{expected_cohort:.4g} clients / 20" if given is None else "as it is set"
            raise ValueError(
                f"privacy.count_noise={count_noise:.4g} ({whence}) must be above half of the noise"
                f" multiplier, {multiplier:.4g}: the count of unclipped updates alone would spend"
                f" the budget; set privacy.count_noise={multiplier:.4g} or more, ask more clients a"
                " round, or set privacy.quantile=null"
            )
        return left**-0.5, count_noise

    # ---- its cost

    def delta_of(self, num_clients: int) -> float:
        """Return delta for so many clients."""
        return 1 / (2 * num_clients) if self.delta is None else self.delta

    def plan(
        self, participation: Participation, rounds: int, delta: float, before: Spent = ()
    ) -> Release:
        """Return what a client that is charged most will have released after ``rounds``.

        Its noise multiplier is z for every round; ``before`` is what had been spent already.
        """
        rate = amplification(participation)
        steps = rounds if rate or self.rounds is None else min(rounds, self.rounds)
        if self.noiseless:
            return Release(0.0, rate or 1.0, steps)
        if self.noise_multiplier is not None:
            return Release(self.noise_multiplier, rate or 1.0, steps)
        z = noise_multiplier(self.epsilon or 0.0, delta, rate or 1.0, steps, before)
        return Release(z, rate or 1.0, steps)

    def affords(self, spent: Spent, release: Release, delta: float) -> bool:
        """Whether a client that has released ``spent`` may release ``release`` besides."""
        if self.epsilon is None or self.noiseless:
            return True
        return epsilon((*spent, release), delta) <= self.epsilon


def clipped_sum(
    updates: Iterable[Update], params: Params, bound: float, cell: float
) -> tuple[Params, float]:
    """Return the sum of the clipped deltas, and by how much over half of them were not clipped.

    With ``cell`` > 0, a power of 2, entries are cut towards zero to multiples of it: sums of those
    are exact, so no rounding adds to what one client changes, and their order is of no account. A
    delta that is not finite is none.
    """
    total = {n: torch.zeros(p.shape, dtype=torch.float64) for n, p in params.items()}
    surplus, unit = 0.0, cell or 1.0
    for update in updates:
        length = norm(update.delta)
        surplus += 0.5 if length <= bound else -0.5
        if math.isfinite(length):
            scale = 1.0 if length <= bound else bound / length
            for name, value in total.items():
                share = update.delta[name].to(torch.float64, copy=True).mul_(scale / unit)
                value += share.trunc_() if cell else share
    return {name: value.mul_(unit) for name, value in total.items()}, surplus


def amplification(participation: Participation) -> float | None:
    """Return the rate at which each client takes part by a coin of its own; None for any other.

    With a rate, every client is charged for every round, at that rate, and nobody may learn who
    took part. Without, a client is charged for the rounds in which it is asked, at rate 1, and who
    took part may be known.
    """
    # A subclass may draw as it likes, and rates that differ would be a figure for each client.
    if type(participation) is not Bernoulli:
        return None
    if participation.alpha is not None or participation.rates is not None:
        return None
    return participation.rate


def expected_cohort(participation: Participation, num_clients: int) -> float:
    """Return m, how many clients take part in a round on average; raises ``ValueError``.

    It may depend on no client's data, and must be known before the first round.
    """
    alpha = getattr(participation, "alpha", None)
    if alpha is not None:
        raise ValueError(
            f"participation.alpha={alpha} draws rates from the clients' labels, so that the size"
            " of a cohort depends on private data; set participation.alpha=null"
        )
    if isinstance(participation, Uniform):
        return float(min(participation.cohort or num_clients, num_clients))
    rate = amplification(participation)
    if rate is not None:
        return rate * num_clients
    if isinstance(participation, SupportsMarginals):
        return float(participation.marginals(num_clients).sum())
    name = type(participation).__name__
    raise ValueError(
        f"{name} does not say how many clients to expect in a round, by which the sum of their"
        " updates is divided; set participation=uniform, bernoulli, markov or cyclic"
    )
