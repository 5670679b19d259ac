"""Randomness by name: every draw comes from a generator keyed by (seed, purpose, path).

Two draws with different names are independent, and none depends on what was drawn before it, so the
order of clients, the number of workers and a resume in between cannot change a result.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def _key(seed: int, purpose: str, path: tuple[int, ...]) -> int:
    name = f"{seed}/{purpose}/{'/'.join(map(str, path))}"
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def generator(seed: int, purpose: str, *path: int) -> torch.Generator:
    """Return a CPU generator for ``purpose`` at ``path``, such as ``(round, client)``."""
    # torch keeps only 63 bits of a seed without complaint about the sign.
    return torch.Generator().manual_seed(_key(seed, purpose, path) >> 1)


def numpy_generator(seed: int, purpose: str, *path: int) -> np.random.Generator:
    """Return NumPy's counterpart of :func:`generator`."""
    return np.random.default_rng(_key(seed, purpose, path))


@contextmanager
def forked(seed: int, purpose: str, *path: int) -> Iterator[None]:
    """Seed torch's global generator inside the block and restore it after.

    For libraries that initialise modules from the global generator and take no other.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_key(seed, purpose, path) >> 1)
        yield
