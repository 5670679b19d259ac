"""The process of an engine, which runs only when it is its turn."""

import json
import os
import select
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import psutil  # type: ignore[import-untyped]
from numpy.typing import NDArray

from benchmarks.cases import Case
from benchmarks.pace import Lap

ROOT = Path(__file__).parents[1]
PEERS = ROOT / ".bench"
PERIOD = 0.5  # seconds between two looks at the memory
PATIENCE = 60.0  # seconds for an engine to end
LONGEST = 900.0  # seconds of a turn
Update = dict[str, NDArray[np.float64]]


class Died(Exception):
    """An engine has ended before its time."""


@dataclass(frozen=True)
class Report:
    """A case's turn."""

    laps: list[Lap]
    seconds: float  # of the turn; of the first one, since the process was started
    peak_mb: float  # of the process and all below it, shared pages once


def python_of(engine: str) -> Path:
    """Return the interpreter of an engine: its own environment for a peer, else this one."""
    peers = {"on_pfl": "pfl", "on_flower": "flower"}
    return PEERS / peers[engine] / "bin/python" if engine in peers else Path(sys.executable)


class Worker:
    """A case in a process of its own."""

    def __init__(self, case: Case, arguments: list[str], threads: int, folder: Path) -> None:
        """Start the process, which gets ready; ``folder`` is for its log and its update."""
        self._case, self._update = case, folder / f"{case.name}.npz"
        self._log = (folder / f"{case.name}.log").open("w+")
        self._began = time.perf_counter()
        module = f"benchmarks.{case.engine}"
        self._process = psutil.Popen(
            [python_of(case.engine), "-m", module, str(threads), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)},
        )

    def first(self) -> tuple[Report, Update]:
        """Run the first round; return also its update. Raises ``Died``."""
        report = self._turn(1, self._began, self._update)
        with np.load(self._update) as update:
            return report, dict(update)

    def turn(self, rounds: int) -> Report:
        """Run ``rounds`` more rounds. Raises ``Died``."""
        return self._turn(rounds, time.perf_counter(), None)

    def _turn(self, rounds: int, began: float, update: Path | None) -> Report:
        order = {"rounds": rounds, "update": None if update is None else str(update)}
        with suppress(BrokenPipeError):
            print(json.dumps(order), file=self._process.stdin, flush=True)
        peak = 0.0
        while not select.select([self._process.stdout], [], [], PERIOD)[0]:
            peak = max(peak, memory_mb(self._process))
            if time.perf_counter() - began > LONGEST:
                raise Died(f"{self._case.name} has not answered for {LONGEST:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise Died(f"{self._case.name} has ended; its last words:\n{self._log.read()[-3000:]}")
        seconds = time.perf_counter() - began
        laps = [(wall, cpu) for wall, cpu in json.loads(line)["laps"]]
        return Report(laps, seconds, max(peak, memory_mb(self._process)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        below = self._process.children(recursive=True)
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        psutil.wait_procs([self._process, *below], timeout=PATIENCE)
        for process in (self._process, *below):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()
        self._process.stdout.close()
        self._log.close()


def memory_mb(process: psutil.Process) -> float:
    """Return the memory of ``process`` and all below it, a shared page divided among its users."""
    total = 0
    with suppress(psutil.NoSuchProcess):
        for one in (process, *process.children(recursive=True)):
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                total += one.memory_full_info().pss
    return total / 2**20
