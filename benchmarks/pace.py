"""The clock of an engine, which also holds it between rounds until its next turn.

Orders and replies are lines of JSON, the same for every engine and environment:
``{"rounds": 5, "update": null}`` is answered by ``{"laps": [[wall, cpu], ...]}`` when so many more
rounds are done; ``update`` is a file for the update of the last of them, or null. The end of the
orders is the end of the run.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, TextIO

import numpy as np
import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor

from benchmarks.work import Work

Lap = tuple[float, float]  # of a round: seconds that passed, seconds that processors worked


class Finished(Exception):
    """No more rounds are wanted."""


class Pace:
    """Times rounds and reports them whenever as many are done as were ordered."""

    def __init__(self, orders: TextIO, replies: TextIO) -> None:
        """Wait for the first order; raises ``Finished`` if there is none."""
        self._orders, self._replies = orders, replies
        self._laps: list[Lap] = []
        self._wall = self._own = self._others = 0.0
        self._next_order()

    def start(self) -> None:
        """A round begins."""
        self._others = cpu_of_descendants()
        self._own, self._wall = time.process_time(), time.perf_counter()

    def stop(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
        """The round has ended; raises ``Finished`` when it was the last."""
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._own
        self._laps.append((wall, cpu + cpu_of_descendants() - self._others))
        if len(self._laps) < self._wanted:
            return
        if self._update is not None:
            update: Any = {n: (after[n].double() - before[n].double()).numpy() for n in before}
            np.savez(self._update, **update)
        print(json.dumps({"laps": self._laps}), file=self._replies, flush=True)
        self._laps = []
        self._next_order()

    def _next_order(self) -> None:
        line = self._orders.readline()
        if not line:
            raise Finished
        order = json.loads(line)
        self._wanted: int = order["rounds"]
        self._update: str | None = order["update"]


def cpu_of_descendants() -> float:
    """Return the CPU seconds of all processes below this one, those that have ended included."""
    own = os.times()
    seconds = own.children_user + own.children_system
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            seconds += sum(process.cpu_times()[:4])  # user, system, and both of its ended children
    return seconds


def serve(run: Callable[[Work, Pace], None]) -> None:
    """Run an engine on the work in a file: ``python -m benchmarks.ENGINE THREADS FILE``."""
    pace = open_pace()
    with suppress(Finished):
        run(Work.load(sys.argv[2]), pace)


def open_pace() -> Pace:
    """Return the clock that listens to stdin, with torch's threads set to the first argument."""
    torch.set_num_threads(int(sys.argv[1]))
    # What libraries print is not to get among the replies.
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        return Pace(sys.stdin, replies)
    except Finished:
        sys.exit()
