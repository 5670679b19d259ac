"""Runs in processes of their own, several at a time; each is begun, or goes on where it stopped.

A process a run, and not a pool of workers: one that is killed takes no other with it, its peak of
memory is its own, and nothing is pickled.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from omegaconf import OmegaConf

from fedsys.known import leaves
from fedsys.schema import show

# What a run writes before its config.yaml, which makes its folder one that can be resumed.
_BEFORE_CONFIG = ("partition.json", "partition.png", "env.json", "overrides.yaml", ".lock")


class Job(Protocol):
    """A run that is wanted."""

    @property
    def overrides(self) -> list[str]:
        """What is typed after ``fedsys run``, but for ``out``."""
        ...

    @property
    def folder(self) -> Path:
        """The run folder."""
        ...


_J = TypeVar("_J", bound=Job)


@dataclass(frozen=True)
class Ended(Generic[_J]):
    """A run whose process has ended."""

    job: _J
    seconds: float
    code: int  # of its exit; -9: it was killed


def run_all(jobs: Sequence[_J], processes: int) -> Iterator[Ended[_J]]:
    """Do runs, ``processes`` at a time, and yield each as it ends, however it ended."""
    children = _Children()
    threads = max(1, cores() // processes)
    with ThreadPoolExecutor(processes) as pool:
        try:
            futures = [pool.submit(_run, job, threads, children) for job in jobs]
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            children.stop()


def cores() -> int:
    """Return how many processors this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def log_of(folder: Path) -> Path:
    """Return the file with what a run wrote to the terminal it did not have."""
    return folder.with_name(folder.name + ".log")


def end_of_log(folder: Path, lines: int) -> list[str]:
    """Return the last lines that a run wrote; none where there is no log."""
    log = log_of(folder)
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    return text.splitlines()[-lines:]


def difference(folder: Path, wanted: dict[str, object]) -> str | None:
    """Return how the run in ``folder`` differs from the resolved configuration ``wanted``."""
    path = folder / "config.yaml"
    if not path.is_file():
        return None
    found: object = OmegaConf.to_container(OmegaConf.load(path))
    # As it comes back from the file it is saved in.
    saved: object = OmegaConf.to_container(OmegaConf.create(OmegaConf.to_yaml(wanted)))
    both = [tree for tree in (found, saved) if isinstance(tree, dict)]
    for key in sorted({key for tree in both for key in leaves(tree)} - {"out"}):
        there, here = _at(found, key), _at(saved, key)
        if there != here:
            return f"{folder}: holds a run with {key}={show(there)}, and here it is {show(here)}"
    return None


def _at(tree: object, key: str) -> object:
    for name in key.split("."):
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


class _Children:
    """Processes that can be stopped at once, and none of them begun after that."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped = threading.Event()

    def run(self, words: list[str], log: Path, environment: dict[str, str]) -> int:
        """Run a process to its end with its output in ``log``, and return its exit code."""
        with log.open("wb") as file:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
            )
        self._running.add(process)
        if self._stopped.is_set():
            process.terminate()
        code = process.wait()
        self._running.discard(process)
        return code

    def stop(self) -> None:
        """End the processes that run."""
        self._stopped.set()
        for process in list(self._running):
            process.terminate()


def _run(job: _J, threads: int, children: _Children) -> Ended[_J]:
    """Begin or go on with a run, and wait for its end."""
    began, folder, log = time.monotonic(), job.folder, log_of(job.folder)
    words = ["run", *job.overrides, f"out={_quoted(folder)}"]
    if (folder / "config.yaml").is_file():
        words = ["resume", str(folder)]
    elif folder.is_dir():
        _clear(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    code = children.run([sys.executable, "-m", "fedsys", *words], log, environment)
    if code < 0:  # it could not say so itself
        with log.open("a", encoding="utf-8") as file:
            file.write(f"the process was ended by {signal.Signals(-code).name}\n")
    return Ended(job, time.monotonic() - began, code)


def _clear(folder: Path) -> None:
    """Remove what a run left that was killed before it had a configuration."""
    files = [path for path in folder.iterdir() if path.is_file()]
    if len(files) == len(list(folder.iterdir())):
        for path in files:
            if path.name.removesuffix(".partial") in (*_BEFORE_CONFIG, "config.yaml"):
                path.unlink()


def _quoted(folder: Path) -> str:
    text = str(folder).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'
