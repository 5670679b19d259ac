"""Gaussian noise and Poisson samples that nobody can predict, safe in floating point.

    released = g (rint(total / g) + rint(N / g))
    N ~ N(0, std^2 I) of d coordinates,    g = 2^(floor(log2 std) - 26)

With f = g rint(total / g) this is
g rint((f + N) / g): the Gaussian mechanism on f, then rounded, with the epsilon of real arithmetic.
Neighbouring totals at distance C lie up to C + sqrt(d) g apart once rounded (:func:`rounding`).
With z = std / C that divides the noise multiplier by at most 1 + z sqrt(d) 2^-26: 1 + 2e-6 for
d = 20,000 and z = 1, finer than accountants compute. Records rounded toward zero to the grid before
the sum cost nothing. The total itself is taken as exact: sum in float64.

Floating-point Gaussians have holes, values that no random bits lead to, which move with the total
and give it away (Mironov, "On significance of the least significant bits for differential privacy",
CCS 2012; Holohan and Braghin, "Secure random sampling in differential privacy", ESORICS 2021). Here
rint(N / g) is the rounding of the real Box-Muller pair

    N = std sqrt(-2 ln u) (cos 2 pi v, sin 2 pi v),    u, v uniform of 256 bits.

float64 and the first 64 bits of u and v give N / std to within DOUBT = 2^-44; cells are 2^-27 wide
or wider. Where an integer and a half lies that near (for one number in 2^16), and where u is near 0
or 1, the pair is worked out again with all bits. No cell gains or loses by float64, whatever a
CPU's logarithm rounds to, and a seeded stream gives the same bits everywhere. What is left, u and v
cut at 256 bits, changes the distribution of a number by less than 2^-200 in total variation, the
tail beyond 18.9 std, the largest value, included: delta grows by 2^-140 for 2^60 numbers.

The bits are ChaCha20's (RFC 8439) under a key of 256 bits: the guarantee holds against who cannot
break it. What is done to released numbers alone, as a cast to float32, is post-processing.
"""

import hashlib
import math
import os
from collections.abc import Sequence
from functools import cache
from typing import Any, NoReturn

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]
Stds = Sequence[float] | Tensor  # (K,)

LIMIT = 2**38  # bytes of one key: ChaCha20 counts 2^32 blocks of 64 bytes
GRID_BITS = 26
DOUBT = 2.0**-44  # std; twice the sum of errors from NEAR to FAR, with functions right to 4 ulp
NEAR = 2.0**-16  # of r^2 = -2 ln u: nearer to 0, a u rounded to 53 bits says too little of r
FAR = 2 * 20 * math.log(2)  # beyond u = 2^-20, 64 bits of u do
LARGEST = 2.0**52  # grid cells: sums below it are exact integers of float64
BLOCK = 8192  # pairs worked on at a time, few enough for the CPU's cache and for one thread
_ZEROS = bytes(1 << 16)


def _chacha20(key: bytes, nonce: bytes) -> CipherContext:
    return Cipher(algorithms.ChaCha20(key, bytes(4) + nonce), mode=None).encryptor()


class Stream:
    """Random numbers of one key, each given once: no copy, no new seed, no way back."""

    def __init__(self, key: bytes, kind: str) -> None:
        self._key = key  # 32 bytes
        self._cipher = _chacha20(key, bytes(12))
        self._process = os.getpid()
        self.given = 0  # bytes
        name = hashlib.blake2b(key, digest_size=16, person=b"fedsys stream").hexdigest()
        self.id = f"{kind}-{name}"  # names the key without giving it away

    def normal(self, shape: Sequence[int], std: float) -> Tensor:
        """Return draws of N(0, std^2) in float64, rounded to :func:`grid`."""
        return normals([self], math.prod(shape), [std]).reshape(tuple(shape))

    def bernoulli(self, count: int, rate: float) -> Tensor:
        """Return a (count,) mask, each entry true with probability ``floor(rate 2^53) / 2^53``."""
        if not 0 <= rate <= 1:
            raise ValueError(f"rate is a probability in [0, 1], got {rate}")
        words = np.empty(count, np.uint64)
        self.fill(words)
        return torch.from_numpy((words >> np.uint64(11)) < np.uint64(int(rate * 2**53)))

    def fill(self, words: NDArray[Any]) -> int:
        """Overwrite ``words``, contiguous, and return the position of its first byte.

        Raises:
            OverflowError: the key has no more bytes to give.
            RuntimeError: the process was forked; both halves would get the same noise.
        """
        start, end = self.given, self.given + words.nbytes
        if end > LIMIT:
            raise OverflowError(f"stream {self.id} gave {start} of {LIMIT} bytes; make another")
        if os.getpid() != self._process:
            raise RuntimeError(f"stream {self.id} belongs to another process; make another")
        self.given = end  # first: after an error nothing is given a second time
        view = words.data.cast("B") if words.size else memoryview(b"")
        for begin in range(0, len(view), len(_ZEROS)):
            part = view[begin : begin + len(_ZEROS)]
            self._cipher.update_into(_ZEROS[: len(part)], part)
        return start

    def more(self, position: int) -> bytes:
        """Return 64 further bytes for the number at ``position``, not counted among ``given``."""
        # By position, not in order: which numbers are in doubt may differ from CPU to CPU.
        return _chacha20(self._key, position.to_bytes(8, "little") + b"more").update(bytes(64))

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(f"stream {self.id} cannot be copied or pickled: noise is used once")


class SecureStream(Stream):
    """A stream whose key the operating system drew."""

    def __init__(self) -> None:
        super().__init__(os.urandom(32), "secure")


class SeededStream(Stream):
    """A stream named as in :mod:`fedsys.seeds`. Who knows the seed knows the noise: not private."""

    def __init__(self, seed: int, purpose: str, *path: int) -> None:
        name = f"{seed}/{purpose}/{'/'.join(map(str, path))}".encode()
        key = hashlib.blake2b(name, digest_size=32, person=b"fedsys noise").digest()
        super().__init__(key, "seeded")


def stream(reproducible_seed: int | None, purpose: str, *path: int) -> Stream:
    """Return a secure stream, or with a seed the reproducible one of that name."""
    seed = reproducible_seed
    return SecureStream() if seed is None else SeededStream(seed, purpose, *path)


def grid(std: float) -> float:
    """Return g, the distance of numbers that can be released, for ``std`` 0 or in 1e-200..1e200."""
    if std == 0:
        return 0.0
    if not 1e-200 <= std <= 1e200:
        raise ValueError(f"std is 0 or between 1e-200 and 1e200, got {std}")
    return math.ldexp(1.0, math.frexp(std)[1] - 1 - GRID_BITS)


def rounding(count: int, std: float) -> float:
    """Return by how much rounding ``count`` coordinates raises their L2 sensitivity, at most.

    ``std = z * (C + 2 * rounding(d, z * C))`` makes up for it; 2, as its grid may be the next one.
    """
    # Each of two neighbours moves by up to g / 2 a coordinate, in opposite directions.
    return math.sqrt(count) * grid(std)


def noised(total: Tensor, std: float, stream: Stream) -> Tensor:
    """Return ``total``, of any shape, with noise, in float64; see :func:`noised_rows`."""
    return noised_rows(total.reshape(1, -1), [std], [stream]).reshape(total.shape)


def noised_rows(totals: Tensor, std: Stds, streams: Sequence[Stream]) -> Tensor:
    """Return ``totals`` (K, size) plus N(0, std_k^2) in row k, in float64 and on row k's grid.

    A row of std 0 is returned as it is.

    Raises:
        ValueError: a total is not finite or above 2^25 std, which no clipped sum is.
    """
    if len(totals) != len(streams):
        raise ValueError(f"every row needs its stream: {len(totals)} rows, {len(streams)} streams")
    counts, grids = _noise(streams, totals.shape[1], std)
    values = totals.detach().cpu().double().numpy()
    if not np.all(np.abs(values) <= np.where(grids > 0, LARGEST * grids, np.finfo(float).max)):
        raise ValueError("a total is not finite or above 2^25 std; clip and sum finite records")
    cells = np.rint(values / np.where(grids > 0, grids, 1.0))
    cells += counts
    cells *= grids
    np.copyto(cells, values, where=grids == 0)
    return torch.from_numpy(cells).to(totals.device)


def normals(streams: Sequence[Stream], size: int, std: Stds) -> Tensor:
    """Return (K, size) in float64: in row k what ``streams[k].normal`` gives with std_k."""
    counts, grids = _noise(streams, size, std)
    counts *= grids
    return torch.from_numpy(counts)


def _noise(streams: Sequence[Stream], size: int, std: Stds) -> tuple[Floats, Floats]:
    """Return rint(N / g) as (K, size) and g as (K, 1)."""
    stds: list[float] = std.tolist() if isinstance(std, Tensor) else list(std)
    if len(stds) != len(streams):
        raise ValueError(f"every stream needs its std: {len(streams)} streams, {len(stds)} stds")
    grids = np.array([grid(value) for value in stds]).reshape(-1, 1)
    scales = np.array(stds).reshape(-1, 1) / np.where(grids > 0, grids, 1.0)
    counts = np.empty((len(streams), size))
    for start in range(0, size, 2 * BLOCK):
        pairs = (min(size - start, 2 * BLOCK) + 1) // 2
        step = max(1, BLOCK // pairs)
        for row in range(0, len(streams), step):
            block = _block(streams[row : row + step], pairs, scales[row : row + step])
            part = counts[row : row + step, start : start + 2 * pairs]
            part[...] = block[:, : part.shape[1]]  # an odd size leaves the last sine unused
    return counts, grids


def _block(streams: Sequence[Stream], pairs: int, scales: Floats) -> Floats:
    """Return rint(scale N) as (K, 2 pairs): the cosines, then the sines."""
    words = np.empty((len(streams), 2, pairs), np.uint64)
    starts = [one.fill(row) for one, row in zip(streams, words, strict=True)]
    counts, doubtful = _fast(words, scales)
    for row, pair in zip(*np.nonzero(doubtful), strict=True):
        more = streams[row].more(starts[row] + 8 * int(pair))
        u, v = (int(word) for word in words[row, :, pair])
        counts[row, :, pair] = _exact(u, v, more, float(scales[row, 0]))
    counts += 0.0  # no -0.0: its sign would say where a total lies within its cell
    return counts.reshape(len(streams), 2 * pairs)


def _fast(words: NDArray[np.uint64], scales: Floats) -> tuple[Floats, NDArray[np.bool_]]:
    """Return rint(scale N) in float64 as (K, 2, pairs), and (K, pairs) where it may be wrong."""
    square = words[:, 0].astype(np.float64)
    square += 0.5
    square *= 2.0**-64
    np.log(square, out=square)
    square *= -2.0
    radius = np.sqrt(square)
    radius *= scales
    # Signed, so that an angle is within pi of 0 and its rounding error small.
    angle = words[:, 1].view(np.int64) * (math.pi * 2.0**-63)
    cells = np.empty(words.shape)
    # NumPy's sine of a float64 takes three times as long as torch's.
    torch.cos(torch.from_numpy(angle), out=torch.from_numpy(cells[:, 0]))
    torch.sin(torch.from_numpy(angle), out=torch.from_numpy(cells[:, 1]))
    cells *= radius[:, None]
    counts = np.rint(cells)
    cells -= counts
    np.abs(cells, out=cells)
    doubtful = np.maximum(cells[:, 0], cells[:, 1]) > 0.5 - DOUBT * scales
    doubtful |= (square < NEAR) | (square > FAR)
    return counts, doubtful


def _exact(u: int, v: int, more: bytes, scale: float) -> list[int]:
    """Return the rounded pair for words ``u`` and ``v``, continued by 192 bits each of ``more``."""
    u = (u << 192) | int.from_bytes(more[:24], "little")
    v = (v << 192) | int.from_bytes(more[24:48], "little")
    mp = _arithmetic()
    radius = scale * mp.sqrt(-2 * mp.log(mp.mpf(2 * u + 1) / 2**257))
    angle = mp.pi * mp.mpf(v) / 2**255  # a turn more or less than the signed angle
    return [int(mp.nint(radius * turn(angle))) for turn in (mp.cos, mp.sin)]


@cache
def _arithmetic() -> Any:
    """Return numbers of 320 bits. Few draws need them, and to load them takes 0.2 s."""
    import mpmath  # type: ignore[import-untyped]

    context = mpmath.mp.clone()
    context.prec = 320
    return context
