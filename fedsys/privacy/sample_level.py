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
from pathlib import Path
from typing import ClassVar

from fedsys.privacy.accounting import noise_multiplier
from fedsys.privacy.release import Release, Spent


@dataclass(frozen=True, kw_only=True)
class SamplePrivacy:
    """Rows are protected by DP-SGD at the clients; n_i itself is public.

    With ``epsilon`` alone the noise is calibrated; with ``noise_multiplier`` alone there is no
    limit; with both, clients leave when their budget is spent. ``epsilon=inf`` clips without noise.
    """

    unit: ClassVar[str] = "record"

    epsilon: float | None  # the budget of every client, over all rounds
    noise_multiplier: float | None  # z: std of the noise / clipping_norm
    delta: float | None  # None: 1 / (2 max n_i)
    clipping_norm: float  # C
    rounds: int | None  # that a client may take part in; None: all
    initial_share: float  # of epsilon, for adapter.init=private
    reproducible: bool  # noise from the seed, for tests: who knows the seed sees through it
    ledger: Path | None  # folder of what clients have spent; None: in the run folder
    allow_unprotected_initialisation: bool  # epsilon then says nothing of adapter.init
    canaries: int | None = None  # rows planted for an audit

    def __post_init__(self) -> None:
        """Check ranges; raises ``ValueError``."""
        if self.epsilon is None and self.noise_multiplier is None:
            raise ValueError(
                "epsilon or noise_multiplier must be given, such as privacy.epsilon=3: the budget"
                " of every client over the whole run"
            )
        if self.epsilon is not None and not self.epsilon > 0:
            raise ValueError(f"epsilon must be positive, or inf for no noise, got {self.epsilon}")
        if self.noise_multiplier is not None and not 0 < self.noise_multiplier < math.inf:
            raise ValueError(
                f"noise_multiplier must be positive, got {self.noise_multiplier};"
                " privacy.epsilon=inf clips without noise"
            )
        if self.epsilon == math.inf and self.noise_multiplier is not None:
            raise ValueError("epsilon=inf is without noise, so noise_multiplier has no meaning")
        if self.delta is not None and not 0 < self.delta < 1:
            raise ValueError(f"delta must be in (0, 1), got {self.delta}")
        if not 0 < self.clipping_norm < math.inf:
            raise ValueError(f"clipping_norm must be positive, got {self.clipping_norm}")
        if self.rounds is not None and self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {self.rounds}")
        if not 0 < self.initial_share < 1:
            raise ValueError(f"initial_share must be in (0, 1), got {self.initial_share}")
        if self.canaries is not None and self.canaries < 1:
            raise ValueError(f"canaries must be at least 1, or null, got {self.canaries}")

    @property
    def noiseless(self) -> bool:
        """Whether gradients are clipped and nothing is added."""
        return self.epsilon == math.inf

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
