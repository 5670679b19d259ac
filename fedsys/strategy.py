"""The base of every strategy: Flower's Strategy done once, with pure hooks for a paper.

    d, s       = combine({Delta_n : n in S_t}, s)      how the cohort is merged
    x_{t+1}, s = step(x_t, d, s)                       the server optimizer

The defaults are FedAvg (McMahan et al. 2017, https://arxiv.org/abs/1602.05629, Algorithm 1). A paper
overrides ``init``, ``combine``, ``step`` and, for what it changes at the client,
``local_gradient``. State goes in and comes out as a tree of tensors, so a checkpoint is complete.
"""

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result
from flwr.serverapp.strategy import Strategy as FlowerStrategy

from fedsys import messages, rounds
from fedsys.engines.base import exchange
from fedsys.errors import ClientFailure, RunError
from fedsys.params import Layout, Params, add, digest, weighted_mean
from fedsys.participation import Participation, Uniform
from fedsys.records import EvaluateFn, NoRecorder, Recorder
from fedsys.rounds import Ask, Round, Shapes
from fedsys.seeds import numpy_generator
from fedsys.snapshot import Snapshot
from fedsys.update import Update

log = logging.getLogger(__name__)

State = Any  # a tree (tuples, dicts) of tensors


@dataclass(kw_only=True)
class Strategy(FlowerStrategy):
    """Federated averaging, and the machinery every other strategy shares.

    The hyperparameters of a paper come first in its class; the fields below belong to the run.
    """

    server_lr: float = 1.0  # eta
    weighting: Literal["examples", "uniform"] = "examples"

    participation: Participation = field(default_factory=Uniform)
    seed: int = 0
    fraction_evaluate: float = 1.0  # of the clients, for evaluation on their own data
    min_clients: int = 1  # connected before a round may start
    patience: float = 600.0  # seconds to wait for them
    on_client_error: Literal["skip", "fail"] = "skip"
    layout: Layout | None = None  # how arrays are packed; None: named arrays, as any app sends them

    def __post_init__(self) -> None:
        if self.server_lr <= 0:
            raise ValueError(f"server_lr must be positive, got {self.server_lr}")
        if self.weighting not in ("examples", "uniform"):
            raise ValueError(f"weighting is 'examples' or 'uniform', got {self.weighting!r}")

    # ---- what a paper overrides

    def init(self, params: Params, num_clients: int) -> State:
        """Return the strategy's state before the first round."""
        return ()

    def combine(self, updates: Iterable[Update], state: State) -> tuple[Params, State]:
        """Merge the updates, which arrive one by one in order of clients, into one direction."""
        return weighted_mean((self.weight(u), u.delta) for u in updates), state

    def step(self, params: Params, direction: Params, state: State) -> tuple[Params, State]:
        """Return the next global params; not called in a round without updates."""
        return add(params, direction, self.server_lr), state

    def local_gradient(self, params: Params, start: Params) -> Params:
        """Return what is added to a client's gradient at ``params``; {} for nothing.

        ``params`` (K, *shape) holds a cohort of K clients, ``start`` (*shape) is x_t.
        """
        return {}

    def prepare(self, params: Params, ask: Ask) -> tuple[Params, Params]:
        """Return x_0 and the frozen factors that all clients share; runs before round 1.

        ``ask(action, shapes)`` sends ``train.<action>`` to a cohort and yields (client, arrays).
        """
        return params, {}

    @property
    def sends_factors(self) -> bool:
        """Whether a client gets the frozen factors at first contact, or derives them itself."""
        return True

    def train_config(self) -> dict[str, float]:
        """Return what every train message tells the client besides the round."""
        return {}

    def weight(self, update: Update) -> float:
        """Return an update's weight, up to a common factor."""
        return float(update.num_examples) if self.weighting == "examples" else 1.0

    # ---- Flower's methods

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Draw the cohort of the round and address one message to each of its clients."""
        nodes = self._nodes(grid)
        if self._arrays is not arrays:
            self._begin(arrays, len(nodes))
        now = self._now
        rng = numpy_generator(self.seed, "participation", server_round)
        clients, now.participation = self.participation.draw(
            server_round, len(nodes), now.participation, rng
        )
        self._round = Round(server_round, {c: nodes[c] for c in clients}, arrays, self.layout)
        settings = ConfigRecord({**dict(config), **self.train_config()})
        settings[messages.ROUND] = server_round
        settings[messages.BASIS] = self._round.basis = digest(now.frozen) if now.frozen else ""
        known = RecordDict({messages.ARRAYS: arrays, messages.CONFIG: settings})
        first = known
        if now.frozen and self.sends_factors:
            first = known.copy()
            first[messages.FROZEN] = self._frozen
        return self._round.address(
            "train", [(c, known if c in now.informed else first) for c in clients]
        )

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check, combine and step; (None, None) when no update could be used."""
        now, current = self._now, self._round
        updates = current.updates(replies, self._excluded)
        direction, now.state = self.combine(updates, now.state)
        for _ in updates:  # a combine that stopped early must not hide failures
            pass
        current.close(self._excluded)
        now.round = server_round
        if now.frozen and self.sends_factors:
            now.informed.update(current.answered)
        if not direction:
            return None, None
        now.params, now.state = self.step(now.params, direction, now.state)
        self._arrays = messages.encode(now.params, self.layout)
        return self._arrays, current.train_metrics()

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Ask ``fraction_evaluate`` of all clients to evaluate x_t on their own data."""
        nodes = self._nodes(grid)
        count = round(self.fraction_evaluate * len(nodes))
        if count == 0:
            return []
        rng = numpy_generator(self.seed, "evaluation", server_round)
        clients = sorted(rng.choice(len(nodes), count, replace=False, shuffle=False).tolist())
        settings = ConfigRecord({**dict(config), messages.ROUND: server_round})
        content = RecordDict({messages.ARRAYS: arrays, messages.CONFIG: settings})
        self._evaluation = Round(server_round, {c: nodes[c] for c in clients}, arrays, self.layout)
        return self._evaluation.address("evaluate", [(c, content) for c in clients])

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Return the clients' metrics, averaged by examples, and accuracy's worst decile."""
        metrics = list(self._evaluation.metrics(replies, self._excluded))
        self._evaluation.close(self._excluded)
        return rounds.summarise(metrics)

    def summary(self) -> None:
        """Log the hyperparameters."""
        log.info("%s", self)

    # ---- the run

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
        *,
        recorder: Recorder | None = None,
    ) -> Result:
        """Run rounds 1 to ``num_rounds``, or on from the recorder's last checkpoint.

        Takes Flower's arguments and returns Flower's result. Raises ``RunError`` when too few
        clients are connected or every client of a round failed, ``ClientFailure`` when one did
        and ``on_client_error`` is "fail".
        """
        self.summary()
        self._recorder = recorder or NoRecorder()
        result = Result()
        self._begin(initial_arrays, len(self._nodes(grid)))
        resumed = self._recorder.restore(self._now)
        if resumed is not None:
            self._continue(resumed)
        else:
            self._prepare(grid, timeout)
            self._evaluate(evaluate_fn, 0, result)
        result.arrays = self._arrays
        for server_round in range(self._now.round + 1, num_rounds + 1):
            began = time.perf_counter()
            outgoing = self.configure_train(
                server_round, self._arrays, train_config or ConfigRecord(), grid
            )
            arrays, metrics = self.aggregate_train(server_round, exchange(grid, outgoing, timeout))
            if metrics is not None:
                result.train_metrics_clientapp[server_round] = metrics
            result.arrays = arrays or result.arrays
            self._check_progress(server_round, num_rounds)
            outgoing = self.configure_evaluate(
                server_round, self._arrays, evaluate_config or ConfigRecord(), grid
            )
            if outgoing:
                answers = self.aggregate_evaluate(server_round, exchange(grid, outgoing, timeout))
                if answers is not None:
                    result.evaluate_metrics_clientapp[server_round] = answers
            self._evaluate(evaluate_fn, server_round, result)
            record = self._round.record(result, time.perf_counter() - began)
            self._recorder.finished(self._now, record)
        return result

    def _begin(self, arrays: ArrayRecord, num_clients: int) -> None:
        params = messages.decode(arrays, self.layout)
        self._arrays = arrays
        self._frozen = ArrayRecord()
        self._fruitless = 0  # rounds in a row in which every client failed
        self._now = Snapshot(
            round=0,
            params=params,
            state=self.init(params, num_clients),
            participation=self.participation.init(num_clients),
        )

    def _continue(self, snapshot: Snapshot) -> None:
        self._now = snapshot
        self._arrays = messages.encode(snapshot.params, self.layout)
        self._frozen = messages.encode(snapshot.frozen)
        self._recorder.prepared(snapshot, 0)

    def _prepare(self, grid: Grid, timeout: float) -> None:
        asked: list[Round] = []

        def ask(action: str, shapes: Shapes) -> Iterator[tuple[int, Params]]:
            nodes = self._nodes(grid)
            rng = numpy_generator(self.seed, "participation", 0)
            clients, _ = self.participation.draw(0, len(nodes), self._now.participation, rng)
            phase = Round(0, {c: nodes[c] for c in clients}, self._arrays, self.layout)
            asked.append(phase)
            settings = ConfigRecord({messages.ROUND: 0, messages.BASIS: ""})
            content = RecordDict({messages.ARRAYS: self._arrays, messages.CONFIG: settings})
            outgoing = phase.address(f"train.{action}", [(c, content) for c in clients])
            yield from phase.arrays(
                exchange(grid, outgoing, timeout), shapes, self._excluded
            )
            phase.close(self._excluded)

        now = self._now
        now.params, now.frozen = self.prepare(now.params, ask)
        self._arrays = messages.encode(now.params, self.layout)
        self._frozen = messages.encode(now.frozen)
        moved = sum(phase.bytes_up + phase.bytes_down for phase in asked)
        self._recorder.prepared(now, moved)

    def _nodes(self, grid: Grid) -> Sequence[int]:
        """Return the nodes, client by client, as soon as ``min_clients`` are connected."""
        deadline = time.monotonic() + self.patience
        said = -10.0
        while True:
            nodes = grid.get_node_ids()
            known = nodes if isinstance(nodes, range) else sorted(nodes)
            if len(known) >= self.min_clients:
                return known
            left = deadline - time.monotonic()
            waiting = f"{len(known)} of the {self.min_clients} clients needed are connected"
            if left <= 0:
                raise RunError(f"{waiting} after {self.patience:.0f} s")
            if time.monotonic() - said >= 10:
                log.warning("%s; giving up in %.0f s", waiting, left)
                said = time.monotonic()
            time.sleep(min(1.0, left))

    def _evaluate(self, evaluate_fn: EvaluateFn | None, server_round: int, result: Result) -> None:
        metrics = evaluate_fn(server_round, self._arrays) if evaluate_fn else None
        if metrics is not None:
            result.evaluate_metrics_serverapp[server_round] = metrics

    def _excluded(self, failure: ClientFailure) -> None:
        if self.on_client_error == "fail":
            raise failure
        self._recorder.failed(failure)

    def _check_progress(self, server_round: int, num_rounds: int) -> None:
        """Stop a run that learns nothing: three rounds in a row, or the last, without an update."""
        current = self._round
        self._fruitless = self._fruitless + 1 if current.nodes and not current.answered else 0
        if self._fruitless and (self._fruitless == 3 or server_round == num_rounds):
            raise RunError(
                f"every client failed in round {server_round}; the first: {current.failures[0]}"
            )
