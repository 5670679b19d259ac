"""The clock of an engine, which also holds it between rounds until its next turn."""

import resource
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np
from numpy.typing import NDArray

from fedsys.params import Params


@dataclass(frozen=True)
class Lap:
    """One round."""

    wall: float  # seconds
    cpu: float  # seconds, of all threads


@dataclass(frozen=True)
class Report:
    """A case's turn."""

    laps: list[Lap]
    peak_mb: float  # of the process so far
    update: dict[str, NDArray[np.float64]]  # of the last round of the turn


class Finished(Exception):
    """No more rounds are wanted."""


class Pace:
    """Times rounds and reports them whenever as many are done as were ordered."""

    def __init__(self, link: Connection) -> None:
        """Take orders, numbers of rounds, from ``link``; 0 is the end."""
        self._link = link
        self._laps: list[Lap] = []
        self._wanted = self._order()
        self._wall = self._cpu = 0.0

    def start(self) -> None:
        """A round begins."""
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    def stop(self, before: Params, after: Params) -> None:
        """The round has ended; raises ``Finished`` when it was the last."""
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        self._laps.append(Lap(wall, cpu))
        if len(self._laps) < self._wanted:
            return
        update = {n: (after[n].double() - before[n].double()).numpy() for n in before}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        self._link.send(Report(self._laps, peak, update))
        self._laps, self._wanted = [], self._order()

    def _order(self) -> int:
        try:
            wanted: int = self._link.recv()
        except EOFError:  # whoever gave the orders is gone
            wanted = 0
        if not wanted:
            raise Finished
        return wanted
