"""From an update to whole numbers of which no sum can wrap around, and back.

    step s = C / (L - 1)      L = 2^(bits - 1) - 1, the largest number of one client
    q      = floor(x / s) or the number above it, at random, so that E[q] s = x
    2^k    > 2 c L            the sum of c clients in a field of k bits, whole bytes

A vector of norm C at most has no entry above C, so |q| <= L. What is larger is refused, never cut
off: cut off, all large updates would have the same sum. |s sum q - sum x| < c s in every entry.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Whole = NDArray[np.int64]
Field = NDArray[np.unsignedinteger[Any]]  # numbers that wrap around at 2^32 or 2^64

_FEWEST_BITS, _MOST_BITS = 3, 32


@dataclass(frozen=True)
class Quantiser:
    """The whole numbers that stand for numbers from -``clipping_norm`` to ``clipping_norm``."""

    clipping_norm: float  # C
    bits: int  # of one client's number

    def __post_init__(self) -> None:
        """Check ranges; raises ``ValueError``."""
        if not 0 < self.clipping_norm < math.inf:
            raise ValueError(f"clipping_norm must be positive, got {self.clipping_norm}")
        if not _FEWEST_BITS <= self.bits <= _MOST_BITS:
            raise ValueError(f"bits must be from {_FEWEST_BITS} to {_MOST_BITS}, got {self.bits}")

    @property
    def largest(self) -> int:
        """L: the largest whole number of one client."""
        return (1 << self.bits - 1) - 1

    @property
    def step(self) -> float:
        """What one more is worth: s."""
        # One step of room, so that rounding in floating point never makes C itself too large.
        return self.clipping_norm / (self.largest - 1)

    def width(self, members: int) -> int:
        """Return the bytes of a field, k / 8, in which sums of so many clients do not wrap."""
        width = -(-((members * self.largest).bit_length() + 1) // 8)
        if width > 8:
            raise ValueError(f"sums of {members} clients at {self.bits} bits exceed 64 bits")
        return width

    def error(self, clients: int) -> float:
        """Return what no entry of a sum of so many clients is off by: c s."""
        return clients * self.step

    def longest(self, size: int) -> float:
        """Return the norm that no clipped vector (``size``,) exceeds once it is rounded.

        This, not C, is the sensitivity of the sum.
        """
        return self.clipping_norm + self.step * math.sqrt(size)

    def clip(self, vector: Floats) -> tuple[Floats, bool]:
        """Return ``vector`` (d,) scaled down to norm C where it is longer, and whether it was.

        Raises ``ValueError`` when it holds NaN or Inf.
        """
        peak = float(np.abs(vector).max(initial=0.0))
        if not math.isfinite(peak):
            raise ValueError("an update that holds NaN or Inf cannot be clipped")
        if peak == 0:
            return vector, False
        direction = vector / peak  # whose squares neither overflow nor vanish
        norm = float(np.linalg.norm(direction))
        if peak * norm <= self.clipping_norm:
            return vector, False
        clipped: Floats = direction * (self.clipping_norm / norm)
        return clipped, True

    def quantise(self, vector: Floats, rng: np.random.Generator) -> Whole:
        """Return the numbers q of ``vector`` (d,), rounded up or down at random.

        Raises ``ValueError`` where an entry is NaN or beyond what a number can stand for.
        """
        scaled = vector / self.step
        beyond = int((~(np.abs(scaled) <= self.largest)).sum())
        if beyond:
            raise ValueError(
                f"{beyond} of {vector.size} entries are beyond clipping_norm={self.clipping_norm}:"
                " clip the update first"
            )
        low = np.floor(scaled)
        return (low + (rng.random(vector.shape) < scaled - low)).astype(np.int64)

    def values(self, total: Whole) -> Floats:
        """Return the sum that the whole numbers ``total`` stand for."""
        return np.multiply(total, self.step, dtype=np.float64)


def field(width: int) -> np.dtype[np.unsignedinteger[Any]]:
    """Return a type whose numbers wrap around at a multiple of the field's 2^(8 ``width``)."""
    return np.dtype("<u4" if width <= 4 else "<u8")


def to_bytes(numbers: Field, width: int) -> NDArray[np.uint8]:
    """Return the field elements of ``numbers`` (d,) as bytes (d, width), lowest first."""
    whole = np.ascontiguousarray(numbers).view(np.uint8).reshape(-1, numbers.itemsize)
    return np.ascontiguousarray(whole[:, :width])


def from_bytes(data: NDArray[np.uint8]) -> Field:
    """Return the field elements of ``data`` (d, width) as numbers (d,)."""
    kind = field(data.shape[1])
    whole = np.zeros((len(data), kind.itemsize), np.uint8)
    whole[:, : data.shape[1]] = data
    numbers: Field = whole.view(kind).reshape(-1)
    return numbers


def centred(numbers: Field, width: int) -> Whole:
    """Return the whole numbers in [-2^(k-1), 2^(k-1)) that field elements stand for, k = 8 width.

    What ``numbers`` hold above the field is ignored.
    """
    unused = 64 - 8 * width
    # Up, so that the sign of the field is that of the type, and down again with it.
    return (numbers.astype(np.uint64) << np.uint64(unused)).view(np.int64) >> np.int64(unused)
