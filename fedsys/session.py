"""A strategy's run under way: where it stands, whom it asks, what it sends."""

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result

from fedsys import messages
from fedsys.engines.base import connected, exchange
from fedsys.errors import ClientFailure, RunError
from fedsys.params import Params, digest
from fedsys.records import EvaluateFn, Recorder
from fedsys.rounds import Round, Shapes
from fedsys.seeds import numpy_generator
from fedsys.snapshot import Snapshot, State

if TYPE_CHECKING:
    from fedsys.strategy import Strategy

_ATTEMPTS = 1000  # to find a cohort that is not empty, before round 1


class Session:
    """What lasts from round to round of one run; ``now`` alone goes to a checkpoint."""

    def __init__(
        self,
        strategy: "Strategy",
        grid: Grid,
        arrays: ArrayRecord,
        timeout: float,
        recorder: Recorder,
    ) -> None:
        """Stand before round 1 with ``arrays`` as x_0."""
        self.strategy = strategy
        self.grid = grid
        self.timeout = timeout
        self.recorder = recorder
        self.given = arrays  # what the driver of the rounds holds as x_t
        params = messages.decode(arrays, strategy.layout)
        num_clients = len(self.nodes())
        self.now = Snapshot(
            round=0,
            params=params,
            state=strategy.init(params, num_clients),
            participation=strategy.participation.init(num_clients),
        )
        self.round = self.evaluation = Round(0, {}, arrays)
        self._fruitless = 0  # rounds in a row in which every client failed
        self._encode()

    # ---- before the rounds

    def prepare(self) -> None:
        """Run what comes before round 1: the strategy's ``prepare``."""
        now, asked = self.now, list[Round]()

        def ask(action: str, shapes: Shapes) -> Iterator[tuple[int, Params]]:
            drawn = (self.draw(0, attempt)[0] for attempt in range(_ATTEMPTS))
            cohort: dict[int, int] = next(filter(None, drawn), {})
            phase = Round(0, cohort, self.arrays)
            asked.append(phase)
            settings = ConfigRecord({messages.ROUND: 0, messages.BASIS: ""})
            content = RecordDict({messages.ARRAYS: self.arrays, messages.CONFIG: settings})
            outgoing = phase.address(f"train.{action}", ((c, content) for c in cohort))
            replies = exchange(self.grid, outgoing, self.timeout)
            yield from phase.arrays(replies, shapes, self.excluded)
            phase.close(self.excluded)

        now.params, now.frozen = self.strategy.prepare(now.params, ask)
        self._encode()
        self.recorder.prepared(now, sum(phase.bytes_up + phase.bytes_down for phase in asked))

    def restore(self) -> bool:
        """Continue from the recorder's last checkpoint; return whether there was one."""
        snapshot = self.recorder.restore(self.now)
        if snapshot is None:
            return False
        self.now = snapshot
        self._encode()
        self.recorder.prepared(snapshot, 0)
        return True

    # ---- in a round

    def nodes(self) -> range | list[int]:
        """Return the connected nodes, client by client."""
        return connected(self.grid, self.strategy.min_clients, self.strategy.patience)

    def draw(self, server_round: int, *attempt: int) -> tuple[dict[int, int], State]:
        """Return the cohort of a round as {client: node}, and the participation's next state."""
        nodes = self.nodes()
        rng = numpy_generator(self.strategy.seed, "participation", server_round, *attempt)
        clients, state = self.strategy.participation.draw(
            server_round, len(nodes), self.now.participation, rng
        )
        return {client: nodes[client] for client in clients}, state

    def take_over(self, arrays: ArrayRecord) -> None:
        """Go on from ``arrays`` where somebody else's loop or wrapper has changed x_t."""
        if arrays is self.given or arrays is self.arrays:
            return
        changed = messages.decode(arrays, self.strategy.layout)
        self.now.params = {n: changed[n].to(p.dtype) for n, p in self.now.params.items()}
        self.given = arrays
        self._encode()

    def contents(self, arrays: ArrayRecord, config: ConfigRecord) -> tuple[RecordDict, RecordDict]:
        """Return what is sent to a client that holds the frozen factors, and to any other."""
        known = RecordDict({messages.ARRAYS: arrays, messages.CONFIG: config})
        if not self.sends_factors:
            return known, known
        first = known.copy()
        first[messages.FROZEN] = self._frozen
        return known, first

    def close(self, server_round: int) -> None:
        """Count the round as done, and whoever has not answered as failed."""
        now, current = self.now, self.round
        current.close(self.excluded)
        now.round = server_round
        if self.sends_factors:
            now.informed.update(current.answered)
            # One that failed may have lost them, and gets them again.
            now.informed.difference_update(failure.client for failure in current.failures)

    def adopt(self, params: Params) -> None:
        """Make ``params`` x_{t+1}."""
        self.now.params = params
        self.arrays = self.given = messages.encode(params, self.strategy.layout)

    def excluded(self, failure: ClientFailure) -> None:
        """Report a reply that is not used, or stop the run for it."""
        if self.strategy.on_client_error == "fail":
            raise failure
        self.recorder.failed(failure)

    # ---- the loop

    def run_round(
        self,
        server_round: int,
        num_rounds: int,
        configs: tuple[ConfigRecord, ConfigRecord],
        evaluate_fn: EvaluateFn | None,
        result: Result,
    ) -> None:
        """Train, evaluate and record; raises ``RunError`` when the run learns nothing."""
        began, strategy, arrays = time.perf_counter(), self.strategy, self.arrays
        outgoing = strategy.configure_train(server_round, arrays, configs[0], self.grid)
        replies = exchange(self.grid, outgoing, self.timeout)
        _, metrics = strategy.aggregate_train(server_round, replies)
        if metrics is not None:
            result.train_metrics_clientapp[server_round] = metrics
        # Before the round is recorded: a resumed run does it again.
        self._check_progress(last=server_round == num_rounds)
        arrays = self.arrays
        outgoing = strategy.configure_evaluate(server_round, arrays, configs[1], self.grid)
        replies = exchange(self.grid, outgoing, self.timeout) if outgoing else []
        metrics = strategy.aggregate_evaluate(server_round, replies)
        if metrics is not None:
            result.evaluate_metrics_clientapp[server_round] = metrics
        self.evaluate(server_round, evaluate_fn, result)
        record = self.round.record(result, time.perf_counter() - began)
        for failure in self.evaluation.failures:
            record.failures += 1
            record.reasons.append(f"evaluation: {failure}")
        self.recorder.finished(self.now, record)

    def evaluate(self, server_round: int, evaluate_fn: EvaluateFn | None, result: Result) -> None:
        """Evaluate x_t at the server."""
        metrics = evaluate_fn(server_round, self.arrays) if evaluate_fn else None
        if metrics is not None:
            result.evaluate_metrics_serverapp[server_round] = metrics

    @property
    def sends_factors(self) -> bool:
        """Whether clients are sent frozen factors at first contact."""
        return bool(self.now.frozen) and self.strategy.sends_factors

    def _check_progress(self, *, last: bool) -> None:
        """Stop after three rounds in a row, or a last one, in which every client failed."""
        current = self.round
        self._fruitless = self._fruitless + 1 if current.nodes and not current.answered else 0
        if self._fruitless == 3 or (self._fruitless and last):
            raise RunError(
                f"every client failed in round {current.index}; the first: {current.failures[0]}"
            )

    def _encode(self) -> None:
        self.arrays = messages.encode(self.now.params, self.strategy.layout)
        self._frozen = messages.encode(self.now.frozen)
        self.basis = digest(self.now.frozen) if self.now.frozen else ""
