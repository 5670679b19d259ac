"""A file that one process holds at a time, and lets go of at the latest when it ends."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedsys.errors import Busy


@contextmanager
def hold(path: Path, taken: str) -> Iterator[None]:
    """Hold the file at ``path``, in a folder that exists; raises ``Busy(taken)`` if it is held."""
    with path.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(taken) from None
        yield
