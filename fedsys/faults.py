"""Faults on the way back from a client: which befalls a reply, and how often.

    drop        the reply never arrives
    delay       it arrives after ``seconds``: out of order, or from ``timeout`` on a round late
    duplicate   it arrives twice
    corrupt     it arrives malformed, in one of several ways
    crash       an error arrives in its place, as of a client that died

``fedsys.engines.faulty`` carries them out.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from fedsys.seeds import numpy_generator

Kind = Literal["drop", "delay", "duplicate", "corrupt", "crash"]


@dataclass(frozen=True, kw_only=True)
class Fault(ABC):
    """Which faults there are, and how often."""

    @property
    @abstractmethod
    def shares(self) -> Mapping[Kind, float]:
        """The share of the replies that each kind of fault befalls; one reply has one at most."""

    def draw(self, seed: int, round: str, client: int, message_type: str) -> Kind | None:
        """Return what befalls a reply, or None."""
        left = numpy_generator(seed, f"fault {message_type} {round}", client).random()
        for kind, share in self.shares.items():
            if left < share:
                return kind
            left -= share
        return None


@dataclass(frozen=True, kw_only=True)
class _One(Fault):
    """One kind of fault."""

    kind: ClassVar[Kind]

    fraction: float  # of the replies

    def __post_init__(self) -> None:
        """Check ranges; raises ``ValueError``."""
        _check_share("fraction", self.fraction)

    @property
    def shares(self) -> Mapping[Kind, float]:
        """One share."""
        return {self.kind: self.fraction}


@dataclass(frozen=True, kw_only=True)
class Drop(_One):
    """Replies get lost."""

    kind = "drop"


@dataclass(frozen=True, kw_only=True)
class Delay(_One):
    """Replies take longer."""

    kind = "delay"

    seconds: float  # how much longer; from ``timeout`` on, they are a round late

    def __post_init__(self) -> None:
        """Check ranges; raises ``ValueError``."""
        super().__post_init__()
        _check_seconds(self.seconds)


@dataclass(frozen=True, kw_only=True)
class Duplicate(_One):
    """Replies come twice."""

    kind = "duplicate"


@dataclass(frozen=True, kw_only=True)
class Corrupt(_One):
    """Replies come malformed."""

    kind = "corrupt"


@dataclass(frozen=True, kw_only=True)
class Crash(_One):
    """Clients die before they reply, which their engine tells."""

    kind = "crash"


@dataclass(frozen=True, kw_only=True)
class Mixed(Fault):
    """Faults of all kinds, each of a share of the replies."""

    drop: float
    delay: float
    duplicate: float
    corrupt: float
    crash: float
    seconds: float  # how long a delayed reply takes; from ``timeout`` on, it is a round late

    def __post_init__(self) -> None:
        """Check ranges; raises ``ValueError``."""
        for name, share in self.shares.items():
            _check_share(name, share)
        total = sum(self.shares.values())
        if total > 1 + 1e-9:
            raise ValueError(f"one reply has one fault at most, so shares add up to 1, not {total}")
        _check_seconds(self.seconds)

    @property
    def shares(self) -> Mapping[Kind, float]:
        """The share of each kind."""
        return {
            "drop": self.drop,
            "delay": self.delay,
            "duplicate": self.duplicate,
            "corrupt": self.corrupt,
            "crash": self.crash,
        }


def _check_share(name: str, share: float) -> None:
    if not 0 <= share <= 1:
        raise ValueError(f"{name} is a share of the replies in [0, 1], got {share}")


def _check_seconds(seconds: float) -> None:
    if not 0 <= seconds < float("inf"):
        raise ValueError(f"seconds must be 0 or more, got {seconds}")
