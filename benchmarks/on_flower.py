"""Flower's own simulation: FedAvg over Ray, with an actor on each of two processors.

Every node holds all rows and is told whose turn of the plan it plays, for which node is drawn is
Flower's own affair.
"""

import logging
import os
import sys
from collections.abc import Iterable
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from benchmarks.flower_clients import WORK, app
from benchmarks.pace import Finished, Pace, serve
from benchmarks.plain import trained_of
from benchmarks.work import Work

ACTORS = 2


class Timed(FedAvg):
    """FedAvg that times its rounds."""

    def __init__(self, pace: Pace, start: ArrayRecord, **settings: Any) -> None:
        super().__init__(**settings)
        self.pace, self.params = pace, start.to_torch_state_dict()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Start the clock and tell each node its place in the plan."""
        self.pace.start()
        messages = list(super().configure_train(server_round, arrays, config, grid))
        for place, message in enumerate(messages):
            whose = ConfigRecord({"round": server_round - 1, "place": place})
            message.content = RecordDict({"arrays": arrays, "config": whose})
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Stop the clock."""
        received = list(replies)
        for reply in received:
            if reply.has_error():
                raise RuntimeError(reply.error.reason)
        arrays, metrics = super().aggregate_train(server_round, received)
        if arrays is None:
            raise RuntimeError("nobody answered")
        before, self.params = self.params, arrays.to_torch_state_dict()
        self.pace.stop(before, self.params)
        return arrays, metrics


def run(work: Work, pace: Pace) -> None:
    """Train until ``pace`` has had enough."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    os.environ[WORK] = sys.argv[2]
    os.environ["RAY_ADDRESS"] = "local"  # not a cluster that happens to run here
    # 15 by default, so that whatever else runs would go first; the case of letters is Ray's.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
    start = ArrayRecord({name: p.detach() for name, p in trained_of(work.model).items()})
    server = ServerApp()

    @server.main()
    def main(grid: Grid, _: Context) -> None:
        strategy = Timed(
            pace,
            start,
            fraction_train=(work.cohort + 0.5) / work.num_clients,  # it is rounded down
            fraction_evaluate=0.0,
            min_train_nodes=work.cohort,  # for the fraction may be of nodes that are still joining
            min_available_nodes=work.num_clients,
        )
        try:
            strategy.start(grid=grid, initial_arrays=start, num_rounds=len(work.plan))
        except Finished:
            return

    init: Any = {"num_cpus": ACTORS, "include_dashboard": False, "logging_level": "error"}
    run_simulation(
        server,
        app,
        work.num_clients,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0},
            "init_args": init,
        },
    )


if __name__ == "__main__":
    serve(run)
