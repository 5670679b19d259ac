"""fedsys itself: its strategy over its embedded engine.

``python -m benchmarks.ours THREADS OVERRIDE...``
"""

import sys
from contextlib import suppress
from dataclasses import dataclass

from benchmarks.pace import Finished, Pace, open_pace
from clients import CohortApp
from fedsys.chunks import chunk_size
from fedsys.config import Experiment, configure
from fedsys.engines.local import LocalGrid
from fedsys.federation import assemble
from fedsys.params import Params
from fedsys.protection import protected
from fedsys.records import NoRecorder, RoundRecord
from fedsys.snapshot import Snapshot

ENDLESS = 1_000_000  # rounds


@dataclass
class Timekeeper(NoRecorder):
    """Hears of every round as the recorder of a run folder does."""

    pace: Pace
    params: Params  # x_t

    def finished(self, snapshot: Snapshot, record: RoundRecord) -> None:
        """Stop the clock, and start it again for the next round."""
        if record.failures:
            raise RuntimeError(record.reasons[0])
        before, self.params = self.params, snapshot.params
        self.pace.stop(before, self.params)
        self.pace.start()


def run(experiment: Experiment, pace: Pace) -> None:
    """Train until ``pace`` has had enough."""
    federation = assemble(experiment)
    clients, chunk = len(federation.shards), chunk_size(federation)
    grid = LocalGrid(CohortApp(lambda _: federation.site), clients, chunk=chunk)
    start = federation.model.layout.unpack(federation.model.initial)
    with protected(federation, clients_here=True):
        pace.start()
        federation.strategy.start(
            grid, federation.initial, ENDLESS, experiment.timeout, recorder=Timekeeper(pace, start)
        )


if __name__ == "__main__":
    clock = open_pace()
    with suppress(Finished):
        run(configure([*sys.argv[2:], f"engine.threads={sys.argv[1]}", "device=cpu"]), clock)
