"""A process that outlives whoever started it, and is found again by the lock it holds."""

import fcntl
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from fedsys.deployment.guarded import KINDS

_POLL = 0.1  # seconds
_GRACE = 10.0  # seconds to end by itself
_LOOKS = 5
_LOG = 10_000_000  # bytes; Flower writes a line for each call

_children: set[int] = set()  # else they would stay in the list of processes as long as this one


@dataclass(frozen=True)
class Daemon:
    """One of the two processes of a server home, in a session of its own."""

    kind: str  # superlink or superexec
    home: Path  # absolute

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be superlink or superexec, got {self.kind}")

    @property
    def log(self) -> Path:
        """Return where its output goes."""
        return self.home / "log" / f"{self.kind}.log"

    @property
    def lock(self) -> Path:
        """Return the file that the process holds as long as it lives, and that says its id."""
        return self.home / f".{self.kind}.lock"

    def pid(self) -> int | None:
        """Return its process id; None when it does not run."""
        _reap()
        try:
            with self.lock.open() as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
        except FileNotFoundError:
            return None
        except BlockingIOError:
            return self._written()

    def start(self, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start it, unless it runs."""
        self.log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # "a": two may come here at a time, and only who holds the lock may touch what is in it.
        with self.lock.open("a") as lock:
            if not _taken(lock):
                return
            lock.truncate(0)
            if self.log.exists() and self.log.stat().st_size > _LOG:
                self.log.replace(self.log.with_suffix(".log.1"))
            # The lock is of the open file, which the process inherits: no gap between us and it.
            os.set_inheritable(lock.fileno(), True)
            lock.write(str(self._spawn(arguments, environment)))

    def _spawn(self, arguments: Sequence[str], environment: Mapping[str, str]) -> int:
        # -P: nothing in the folder where `fedsys serve` was typed takes the place of a module.
        words = [sys.executable, "-P", "-m", "fedsys.deployment.guarded", self.kind, str(self.home)]
        append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        pid = os.posix_spawn(
            sys.executable,
            [*words, *arguments],
            environment,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, str(self.log), append, 0o600),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ],
            setsid=True,
        )
        _children.add(pid)
        return pid

    def stop(self) -> None:
        """End it and what it has started; return when it is gone."""
        pid = self.pid()
        if pid is None:
            return
        for order in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(pid, order)
            deadline = time.monotonic() + _GRACE
            while (self.pid() == pid or _group_lives(pid)) and time.monotonic() < deadline:
                time.sleep(_POLL)
            if not _group_lives(pid):
                return

    def tail(self, lines: int = 10) -> str:
        """Return the end of its log."""
        if not self.log.exists():
            return ""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def _written(self) -> int | None:
        """Return the id in the lock, which is there a moment after the lock is taken."""
        deadline = time.monotonic() + _GRACE
        while time.monotonic() < deadline:
            if text := self.lock.read_text():
                return int(text)
            time.sleep(_POLL)
        return None


def _taken(lock: TextIO) -> bool:
    """Take the lock; return False where a process holds it for longer than it takes to look."""
    for _ in range(_LOOKS):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(_POLL)
    return False


def _reap() -> None:
    """Take leave of those that this process has started and that have ended."""
    for child in list(_children):
        with suppress(ChildProcessError):
            if os.waitpid(child, os.WNOHANG) == (0, 0):
                continue
        _children.discard(child)


def _group_lives(leader: int) -> bool:
    try:
        os.killpg(leader, 0)
    except ProcessLookupError:
        return False
    return True
