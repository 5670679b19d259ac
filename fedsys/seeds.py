"""Randomness by name: every draw comes from a generator keyed by (seed, purpose, path).

Two draws with different names are independent, and none depends on what was drawn before it, so the
order of clients, the number of workers and a resume in between cannot change a result.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.random.bit_generator import ISeedSequence
from numpy.typing import NDArray


def _name(seed: int, purpose: str, path: tuple[int, ...]) -> bytes:
    return f"{seed}/{purpose}/{'/'.join(map(str, path))}".encode()


def _key(seed: int, purpose: str, path: tuple[int, ...]) -> int:
    # torch keeps only 63 bits of a seed without complaint about the sign.
    name = _name(seed, purpose, path)
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little") >> 1


class _Hash(ISeedSequence):
    """The words of a hash as a bit generator's initial state: no need to mix them again."""

    def __init__(self, digest: bytes) -> None:
        self._digest = digest

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> NDArray[Any]:
        return np.frombuffer(self._digest, dtype, n_words)


def generator(seed: int, purpose: str, *path: int) -> torch.Generator:
    """Return a CPU generator for ``purpose`` at ``path``, such as ``(round, client)``."""
    return torch.Generator().manual_seed(_key(seed, purpose, path))


def numpy_generator(seed: int, purpose: str, *path: int) -> np.random.Generator:
    """Return NumPy's counterpart of :func:`generator`."""
    digest = hashlib.blake2b(_name(seed, purpose, path), digest_size=64).digest()
    words: Any = _Hash(digest)  # NumPy's stubs know of no seeds but its own
    return np.random.Generator(np.random.PCG64(words))


@contextmanager
def forked(seed: int, purpose: str, *path: int) -> Iterator[None]:
    """Seed torch's global generator inside the block and restore it after.

    For libraries that initialise modules from the global generator and take no other.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_key(seed, purpose, path))
        yield
