"""What was released of private data, and the words that stand beside every epsilon.

A release is a number of steps of the subsampled Gaussian mechanism: each record (or client) takes
part in a step with probability q, independently; what is released is the sum of the clipped
contributions plus N(0, (z C)^2 I).

Symbols: z noise_multiplier, q sample_rate, C the clipping norm.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal, get_args

Unit = Literal["record", "client"]
Sampling = Literal["Poisson", "none claimed"]
Initialisation = Literal["included", "excluded", "not private data"]


# Noise below this is counted as none: one step of everyone is then an epsilon of 200 or more.
NO_NOISE = 0.05
MOST_NOISE = 1e6  # and finite noise above this as this: its square must remain a number


@dataclass(frozen=True, order=True)
class Release:
    """Steps of one subsampled Gaussian mechanism; steps on empty batches are among them."""

    noise_multiplier: float  # z, in [0, inf]; below NO_NOISE epsilon is inf; inf: spends nothing
    sample_rate: float  # q, in (0, 1], of Poisson sampling; 1: everyone takes part
    steps: int  # at least 0

    def __post_init__(self) -> None:
        """Check ranges; raises ``ValueError``."""
        if not self.noise_multiplier >= 0:
            raise ValueError(f"noise_multiplier is 0 or more, got {self.noise_multiplier}")
        if not 0 < self.sample_rate <= 1:
            raise ValueError(f"sample_rate is a probability in (0, 1], got {self.sample_rate}")
        if self.steps < 0:
            raise ValueError(f"steps is a count of at least 0, got {self.steps}")


Spent = tuple[Release, ...]  # as `merged` returns it


def merged(releases: Iterable[Release]) -> Spent:
    """Return the releases sorted, each mechanism once, without those of no steps."""
    steps: Counter[tuple[float, float]] = Counter()
    for release in releases:
        steps[release.noise_multiplier, release.sample_rate] += release.steps
    return tuple(Release(z, q, count) for (z, q), count in sorted(steps.items()) if count)


def require_delta(delta: float) -> None:
    """Raise ``ValueError`` unless delta is in (0, 1)."""
    if not 0 < delta < 1:
        raise ValueError(f"delta is a probability in (0, 1), got {delta}")


def check_delta(delta: float, num_units: int) -> None:
    """Refuse a delta that permits to publish a unit outright; raises ``ValueError``.

    A mechanism that publishes one record of n, picked uniformly, is (0, 1/n)-DP: delta means
    something below 1/n only. ``num_units`` is n, records at sample level and clients at client
    level.
    """
    if num_units < 1:
        raise ValueError(f"num_units counts records or clients, at least 1, got {num_units}")
    require_delta(delta)
    if delta >= 1 / num_units:
        raise ValueError(
            f"delta must be below 1/n = {1 / num_units:.3g} for n = {num_units} units, got"
            f" {delta:g}: with 1/n, one of them could be published as it is"
        )


_WORDS = {
    "Poisson": "Poisson sampling",
    "none claimed": "no sampling claimed",
    "included": "initialisation included",
    "excluded": "initialisation EXCLUDED",
    "not private data": "initialisation reads no private data",
}


@dataclass(frozen=True)
class Statement:
    """What an epsilon is a statement about; ``str`` gives the words to print beside it."""

    unit: Unit  # whose presence is hidden
    delta: float  # in (0, 1)
    initialisation: Initialisation  # whether the start of training is in the epsilon
    sampling: Sampling = "Poisson"  # what amplification is claimed from
    adjacency: str = "add or remove one"
    accountant: str = "PLD"

    def __post_init__(self) -> None:
        """Check the words and delta; raises ``ValueError``."""
        for name, known in (
            ("unit", get_args(Unit)),
            ("sampling", get_args(Sampling)),
            ("initialisation", get_args(Initialisation)),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is one of {known}, got {getattr(self, name)!r}")
        require_delta(self.delta)

    def facts(self) -> dict[str, str]:
        """Return the same as ``str``, by name."""
        return {name: f"{value}" for name, value in asdict(self).items()}

    def __str__(self) -> str:
        return (
            f"delta {self.delta:g} per {self.unit}, {self.adjacency}, {_WORDS[self.sampling]},"
            f" {self.accountant} accountant, {_WORDS[self.initialisation]}"
        )
