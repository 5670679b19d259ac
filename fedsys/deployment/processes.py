"""Processes of this machine: whose children they are, and their end."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from threading import Thread

_PROC = Path("/proc")
_DEAD = (b"Z", b"X")  # states of those whose parents have not noticed


def descendants(ancestor: int) -> list[int]:
    """Return the processes that ``ancestor`` has started, theirs included, parents first."""
    children: dict[int, list[int]] = {}
    for process, parent in _parents():
        children.setdefault(parent, []).append(process)
    found, front = [], [ancestor]
    while front:
        front = [child for process in front for child in children.get(process, ())]
        found += front
    return found


def title(process: int) -> str:
    """Return what a process calls itself, by default its command; "" when it has ended."""
    if not (_PROC / "self" / "cmdline").exists():  # not Linux
        words = ["ps", "-p", str(process), "-o", "command="]
        return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
    try:
        return (_PROC / str(process) / "cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def kill(processes: Iterable[int]) -> None:
    """End processes at once; those that are gone are passed over."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(process, signal.SIGKILL)


def kill_group(group: int, sign: signal.Signals = signal.SIGKILL) -> None:
    """Signal all processes of a group; passed over when there is none."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, sign)


def when_orphaned(work: Callable[[], None], parent: int, every: float = 0.25) -> None:
    """Do ``work`` in a thread as soon as this process is no longer a child of ``parent``."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(every)
        work()

    Thread(target=watch, name="orphaned", daemon=True).start()


def _parents() -> list[tuple[int, int]]:
    """Return every process with its parent; those are no more that have ended."""
    if not (_PROC / "self" / "stat").exists():  # not Linux
        listed = subprocess.run(
            ["ps", "-A", "-o", "pid=,ppid=,stat="], capture_output=True, text=True, check=True
        )
        words = [line.split() for line in listed.stdout.splitlines()]
        return [(int(w[0]), int(w[1])) for w in words if w[2][:1].encode() not in _DEAD]
    found = []
    for entry in _PROC.iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                stat = (entry / "stat").read_bytes()
                # The name stands in brackets and may hold anything, brackets included.
                state, parent, *_ = stat.rpartition(b")")[2].split()
                if state not in _DEAD:
                    found.append((int(entry.name), int(parent)))
    return found
