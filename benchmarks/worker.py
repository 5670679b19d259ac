"""The processes: one for each case, and one that measures the machine."""

import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, Self

import torch

from benchmarks import bare, ours
from benchmarks.cases import Case
from benchmarks.pace import Finished, Pace, Report
from fedsys.config import configure
from fedsys.run_folder import environment

SIZE = 2048  # of the square matrices
_SPAWN = get_context("spawn")  # a fork would share threads and memory


@dataclass(frozen=True)
class Machine:
    """Where the figures come from."""

    gflops: dict[str, float]  # of a matrix product, by dtype
    threads: int
    environment: dict[str, Any]


class Worker:
    """A case in a process of its own, which runs only when it is its turn."""

    def __init__(self, case: Case, threads: int) -> None:
        """Start the process, which gets ready."""
        self._link, theirs = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=serve, args=(theirs, case, threads), daemon=True)
        self._process.start()
        theirs.close()  # so that its end is noticed

    def turn(self, rounds: int) -> Report:
        """Run ``rounds`` more rounds; raises ``EOFError`` when the process has died."""
        self._link.send(rounds)
        report: Report = self._link.recv()
        return report

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._link.close()
        self._process.join()


def serve(link: Connection, case: Case, threads: int) -> None:
    """Run ``case`` as ``link`` orders."""
    torch.set_num_threads(threads)
    experiment = configure([*case.overrides, f"engine.threads={threads}", "device=cpu"])
    engine = {"ours": ours.run, "bare": bare.run}[case.engine]
    try:
        engine(experiment, Pace(link))
    except Finished:
        link.close()


def measure_machine(threads: int) -> Machine:
    """Measure matrix products in a process of their own."""
    with ProcessPoolExecutor(1, mp_context=_SPAWN) as pool:
        return pool.submit(_machine, threads).result()


def _machine(threads: int) -> Machine:
    torch.set_num_threads(threads)
    gflops = {name: _gflops(getattr(torch, name)) for name in ("float32", "bfloat16")}
    return Machine(gflops, threads, environment())


def _gflops(dtype: torch.dtype) -> float:
    """Return the best of a few products, in 10^9 operations a second."""
    a, b = (torch.randn(SIZE, SIZE).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - began)
    return 2e-9 * SIZE**3 / min(seconds)
