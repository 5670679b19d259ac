"""The budget that both kinds of privacy are given, and where its spending is kept."""

import math
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much may be spent, for how long, and on what noise.

    With ``epsilon`` alone the noise is calibrated; with ``noise_multiplier`` alone there is no
    limit; with both, clients leave when their budget is spent. ``epsilon=inf`` clips without noise.
    """

    epsilon: float | None  # the budget of every client, over all rounds
    noise_multiplier: float | None  # z: std of the noise / clipping_norm
    delta: float | None  # None: half of 1 / the number of units
    rounds: int | None  # that a client may take part in; None: all
    reproducible: bool  # noise from the seed, for tests: who knows the seed sees through it
    ledger: Path | None  # folder of what clients have spent; None: in the run folder

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
        if self.noiseless and self.noise_multiplier is not None:
            raise ValueError("epsilon=inf is without noise, so noise_multiplier has no meaning")
        if self.delta is not None and not 0 < self.delta < 1:
            raise ValueError(f"delta must be in (0, 1), got {self.delta}")
        if self.rounds is not None and self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {self.rounds}")

    @property
    def noiseless(self) -> bool:
        """Whether contributions are clipped and nothing is added."""
        return self.epsilon == math.inf
