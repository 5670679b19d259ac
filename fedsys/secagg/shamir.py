"""Shamir's secret sharing of 256 bits: any t shares restore the secret, t - 1 say nothing of it.

    f(x) = secret + a_1 x + ... + a_{t-1} x^{t-1}  mod p,    share of holder x: f(x)
    secret = f(0) = sum_x f(x) prod_{z != x} z / (z - x)

Shamir, "How to Share a Secret", Communications of the ACM 22(11), 1979. A prime field of Python's
own integers, since a secret shares its Lagrange coefficients with all others of its holders.
"""

import secrets
from collections.abc import Mapping, Sequence
from functools import lru_cache

PRIME = 2**256 + 297  # the smallest above every secret
SECRET_BYTES, SHARE_BYTES = 32, 33


def split(secret: bytes, threshold: int, points: Sequence[int]) -> dict[int, bytes]:
    """Return the share of every one of ``points``, of which any ``threshold`` restore ``secret``.

    Points are whole numbers from 1. Raises ``ValueError`` for a secret of another length than 32
    bytes, for points that are not distinct or too few.
    """
    _check(points)
    if len(secret) != SECRET_BYTES or not 1 <= threshold <= len(points):
        raise ValueError(
            f"a secret of {SECRET_BYTES} bytes is shared among {threshold} points or more,"
            f" got {len(secret)} bytes and {len(points)} points"
        )
    rest = [secrets.randbelow(PRIME) for _ in range(threshold - 1)]
    coefficients = [*rest, int.from_bytes(secret, "little")]  # the highest power first
    return {x: _value(coefficients, x).to_bytes(SHARE_BYTES, "little") for x in points}


def combine(shares: Mapping[int, bytes]) -> bytes:
    """Return the secret that as many ``shares`` as its threshold, by point, were made of.

    Fewer or wrong shares give another secret, or a ``ValueError`` where they give none.
    """
    points = tuple(sorted(shares))
    _check(points)
    values = [_number(shares[x]) for x in points]
    at_zero = sum(c * v for c, v in zip(_weights(points), values, strict=True)) % PRIME
    try:
        return at_zero.to_bytes(SECRET_BYTES, "little")
    except OverflowError:
        raise ValueError("the shares are not all of one secret") from None


def _value(coefficients: Sequence[int], x: int) -> int:
    value = 0
    for coefficient in coefficients:
        value = (value * x + coefficient) % PRIME
    return value


@lru_cache(maxsize=256)
def _weights(points: tuple[int, ...]) -> list[int]:
    """Return the Lagrange coefficients of ``points`` at zero."""
    weights = []
    for x in points:
        above = below = 1
        for z in points:
            if z != x:
                above, below = above * z % PRIME, below * (z - x) % PRIME
        weights.append(above * pow(below, -1, PRIME) % PRIME)
    return weights


def _number(share: bytes) -> int:
    number = int.from_bytes(share, "little")
    if len(share) != SHARE_BYTES or number >= PRIME:
        raise ValueError("a share is no element of the field")
    return number


def _check(points: Sequence[int]) -> None:
    if not points or len(set(points)) < len(points) or min(points) < 1 or max(points) >= PRIME:
        raise ValueError("shares belong to distinct points from 1")
