"""Sample-level privacy: what a client promises about each of its rows, and the noise that takes.

A client trains by DP-SGD (``clients.private``) with Poisson lots of expected size L, so at rate
q = min(1, L / n). Its noise multiplier z is the least with which all rounds it may take part in,
and its share of an initialisation from private gradients, cost no more than ``epsilon``:

    epsilon(initialisation + rounds * steps of (z, q)) <= target

Every client has its own n, q and z. Clients hold different rows, so the federation's epsilon is
the largest of theirs (parallel composition).
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from fedsys.privacy.accounting import noise_multiplier
from fedsys.privacy.budget import Budget
from fedsys.privacy.release import Release, Spent


@dataclass(frozen=True, kw_only=True)
class SamplePrivacy(Budget):
    """Rows are protected by DP-SGD at the clients; n_i is public, delta 1 / (2 max n_i) if open."""

    unit: ClassVar[str] = "record"

    clipping_norm: float  # C
    initial_share: float  # of epsilon, for adapter.init=private
    allow_unprotected_initialisation: bool  # epsilon then says nothing of adapter.init
    canaries: int | None = None  # rows planted for an audit

    def __post_init__(self) -> None:
        """Check ranges; raises ``ValueError``."""
        super().__post_init__()
        if not 0 < self.clipping_norm < math.inf:
            raise ValueError(f"clipping_norm must be positive, got {self.clipping_norm}")
        if not 0 < self.initial_share < 1:
            raise ValueError(f"initial_share must be in (0, 1), got {self.initial_share}")
        if self.canaries is not None and self.canaries < 1:
            raise ValueError(f"canaries must be at least 1, or null, got {self.canaries}")

    def initial(self, rate: float, delta: float) -> Release:
        """Return the release of one noised sum of clipped gradients, of rows drawn at ``rate``."""
        if self.noiseless:
            return Release(0.0, rate, 1)
        if self.noise_multiplier is not None or self.epsilon is None:
            return Release(self.noise_multiplier or 0.0, rate, 1)
        share = self.initial_share * self.epsilon
        return Release(noise_multiplier(share, delta, rate, 1), rate, 1)

    def plan(self, rate: float, steps: int, delta: float, before: Spent) -> Release:
        """Return the release of ``steps`` local steps in all, with the noise they take.

        ``rate`` is the expected lot over the rows; ``before`` is what an initialisation spends.
        """
        if self.noiseless:
            return Release(0.0, rate, steps)
        if self.noise_multiplier is not None:
            return Release(self.noise_multiplier, rate, steps)
        target = self.epsilon or 0.0
        return Release(noise_multiplier(target, delta, rate, steps, before), rate, steps)
