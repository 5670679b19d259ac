"""Who takes part in a round.

A participation is a frozen dataclass with one pure method. It is asked round by round and never
draws a table of clients by rounds; what it must remember goes in and out as ``state``.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

State = Any  # a tree (tuples, dicts) of tensors; () for a memoryless participation


class Participation(Protocol):
    """The contract of a participation."""

    def init(self, num_clients: int) -> State:
        """Return the state before the first round."""
        ...

    def draw(
        self, round: int, num_clients: int, state: State, rng: np.random.Generator
    ) -> tuple[list[int], State]:
        """Return the clients of ``round`` in rising order (perhaps none) and the next state."""
        ...


@dataclass(frozen=True)
class Uniform:
    """A cohort of fixed size, drawn uniformly without replacement (McMahan et al. 2017)."""

    cohort: int | None = None  # clients a round; None: everyone

    def __post_init__(self) -> None:
        """Check ranges; raises ``ValueError``."""
        if self.cohort is not None and self.cohort < 1:
            raise ValueError(f"cohort counts clients and must be at least 1, got {self.cohort}")

    def init(self, num_clients: int) -> State:
        """Return (): nothing is remembered."""
        return ()

    def draw(
        self, round: int, num_clients: int, state: State, rng: np.random.Generator
    ) -> tuple[list[int], State]:
        """Return the clients of ``round``; everyone when there are no more than ``cohort``."""
        if self.cohort is None or self.cohort >= num_clients:
            return list(range(num_clients)), state
        # shuffle=False keeps the draw proportional to the cohort, whatever num_clients.
        drawn = rng.choice(num_clients, self.cohort, replace=False, shuffle=False)
        return sorted(drawn.tolist()), state


@dataclass(frozen=True)
class Bernoulli:
    """Every client takes part with probability ``rate``, independently; a round may be empty."""

    rate: float  # in (0, 1]

    def __post_init__(self) -> None:
        """Check ranges; raises ``ValueError``."""
        if not 0 < self.rate <= 1:
            raise ValueError(f"rate is a probability in (0, 1], got {self.rate}")

    def init(self, num_clients: int) -> State:
        """Return (): nothing is remembered."""
        return ()

    def draw(
        self, round: int, num_clients: int, state: State, rng: np.random.Generator
    ) -> tuple[list[int], State]:
        """Return the clients of ``round``, perhaps none."""
        # A binomial count and a uniform subset of that size cost O(cohort), not O(num_clients).
        count = int(rng.binomial(num_clients, self.rate))
        drawn = rng.choice(num_clients, count, replace=False, shuffle=False)
        return sorted(drawn.tolist()), state
