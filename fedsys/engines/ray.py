"""The distributed simulation: Flower's own engine on Ray, on one machine or a cluster.

Clients are Flower's virtual SuperNodes and answer in Ray's processes, whichever is free: what they
remember is in the run folder, which all machines of a cluster must see. They train one by one.
"""

import json
import logging
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp

from fedsys.deployment.processes import descendants, kill, title
from fedsys.errors import ClientFailure, ConfigError, RunError
from fedsys.privacy.entries import FILE

if TYPE_CHECKING:
    from fedsys.config import Experiment
    from fedsys.console import Observer
    from fedsys.experiment import RunResult
    from fedsys.far import Place


@dataclass(frozen=True)
class Ray:
    """Settings of the engine on Ray."""

    cpus: int = 1  # cores of a client
    gpus: float = 0.0  # of a client
    threads: int | None = 1  # of torch, in each process; None: torch's own choice
    address: str | None = None  # of a cluster; None: this machine
    min_clients: int | None = None  # connected before a round may start; None: all

    def __post_init__(self) -> None:
        for name in ("cpus", "threads", "min_clients"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= self.gpus < float("inf"):
            raise ValueError(f"gpus must be at least 0, got {self.gpus}")

    def check(self) -> list[str]:
        """Return the problems that can be found without starting."""
        return [] if find_spec("ray") else ["no Ray is installed: pip install 'fedsys[ray]'"]

    def run(self, experiment: "Experiment", observer: "Observer") -> "RunResult":
        """Run ``experiment`` with its clients on Ray."""
        from flwr.simulation import run_simulation

        from fedsys.experiment import run_federation
        from fedsys.far import FarClients
        from fedsys.federation import assemble
        from fedsys.protection import ledger_folder
        from fedsys.run_folder import id_of, new_run_id

        federation = assemble(experiment, observer.phase)
        run = id_of(experiment.out) or new_run_id()
        results: list[RunResult] = []
        server, interrupted = ServerApp(), Event()

        @server.main()
        def main(grid: Grid, _: Context) -> None:
            _watch(grid, interrupted)
            results.append(run_federation(federation, grid, {}, observer, engine="ray", run=run))

        settings = json.dumps(experiment.resolved)
        folder, ledgers = experiment.out.absolute(), ledger_folder(experiment).absolute()
        if (ledgers / FILE).exists():
            raise ConfigError(
                [
                    f"privacy.ledger: {ledgers} is one ledger of all clients, and on Ray"
                    " each holds its own: name another folder"
                ]
            )
        place = partial(_place, run, folder, ledgers)
        observer.phase("starting Ray")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # or it warns
        logging.getLogger("flwr").setLevel(logging.ERROR)  # run_simulation is deprecated, not gone
        try:
            with _ended_by_sigint(interrupted):
                run_simulation(
                    server,
                    FarClients(lambda _: settings, place).app(),
                    len(federation.shards),
                    backend_config={
                        "client_resources": {"num_cpus": self.cpus, "num_gpus": self.gpus},
                        "init_args": {"log_to_driver": False, **self._cluster},
                    },
                )
        except (RunError, ClientFailure):
            raise
        except RuntimeError as error:
            raise RunError(f"Ray: {error.__cause__ or error}") from error
        return results[0]

    @property
    def _cluster(self) -> dict[str, str]:
        return {} if self.address is None else {"address": self.address}


@contextmanager
def _ended_by_sigint(interrupted: Event) -> Iterator[None]:
    """Let SIGINT end what Flower has started, and raise ``KeyboardInterrupt`` when it has ended.

    Raised at once it would leave threads that wait for Ray for ever, and the process with them.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        interrupted.set()
        signal.signal(signal.SIGINT, before)  # the next one ends this process
        logging.getLogger("flwr").setLevel(logging.CRITICAL)  # clients will be missed
        kill([p for p in descendants(os.getpid()) if title(p).startswith("ray::")])

    before = signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if interrupted.is_set():  # whatever came of it
            raise KeyboardInterrupt


def _watch(grid: Any, interrupted: Event) -> None:
    """Have ``grid`` end the ServerApp's thread, which no signal reaches, once ``interrupted``."""
    pull = grid.pull_messages

    def pull_messages(message_ids: Iterable[str]) -> Iterable[Message]:
        if interrupted.is_set():
            raise SystemExit("interrupted")
        found: Iterable[Message] = pull(message_ids)
        return found

    grid.pull_messages = pull_messages


def _place(run: str, folder: Path, ledgers: Path, context: Context) -> "Place":
    """Return where a client keeps things; each has a ledger of its own, that it holds alone."""
    from fedsys.far import Place

    return Place(run, folder, ledgers / str(context.node_config["partition-id"]))
