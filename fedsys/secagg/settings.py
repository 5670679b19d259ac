"""What both sides of secure aggregation must agree on beforehand."""

import math
from dataclasses import dataclass

from fedsys.secagg.quantise import Quantiser

FEWEST = 3  # clients of a sum: of two, each learns the other's update from it
_ROUNDING = 1e-9  # by which a fraction of a whole number may exceed another, as 0.55 * 20 does


@dataclass(frozen=True, kw_only=True)
class SecureAggregation:
    """Sums of clipped updates, each of weight one, of which the server sees no summand."""

    clipping_norm: float = 10.0  # C, of an update as one vector
    bits: int = 24  # of one number of one client
    threshold: float = 0.6  # share of a cohort that must stay to the end of a round
    neighbours: int | None = None  # of a client, with whom it shares masks; None: all others

    def __post_init__(self) -> None:
        """Check ranges; raises ``ValueError``."""
        self.quantiser  # noqa: B018  # checks the two it is made of
        if not 0.5 < self.threshold <= 1:
            raise ValueError(
                f"threshold must be above 0.5, or one half could be told another story than the"
                f" other, and at most 1, got {self.threshold}"
            )
        if self.neighbours is not None and (self.neighbours < 2 or self.neighbours % 2):
            raise ValueError(f"neighbours must be even and at least 2, got {self.neighbours}")

    @property
    def quantiser(self) -> Quantiser:
        """How an update becomes whole numbers."""
        return Quantiser(self.clipping_norm, self.bits)

    def degree(self, members: int) -> int:
        """Return how many neighbours each of so many members has."""
        others = members - 1
        return others if self.neighbours is None else min(self.neighbours, others)

    def least(self, holders: int) -> int:
        """Return t: how many of those who hold shares of a secret restore it, above one half.

        Of a whole cohort, so many must stay to the end: ``FEWEST`` at least.
        """
        return max(FEWEST, holders // 2 + 1, math.ceil(self.threshold * holders - _ROUNDING))
