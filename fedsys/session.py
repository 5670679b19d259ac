"""A strategy's run under way: where it stands, whom it asks, what it sends."""

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result

from fedsys import messages
from fedsys.adapters.lowrank import moved
from fedsys.attacks import corrupt
from fedsys.codec import At
from fedsys.engines.base import exchange
from fedsys.errors import ClientFailure, RunError
from fedsys.invitations import ATTEMPTS, Invitations
from fedsys.outbox import Outbox
from fedsys.params import Params, chained, digest
from fedsys.privacy.account import ClientAccount
from fedsys.privacy.release import Release, Spent, merged
from fedsys.records import EvaluateFn, Recorder
from fedsys.registry import Registry
from fedsys.rounds import Round, Shapes
from fedsys.secagg.session import Sums
from fedsys.seeds import generator
from fedsys.snapshot import Snapshot
from fedsys.update import Update

if TYPE_CHECKING:
    from fedsys.strategy import Strategy


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
        self.codec = strategy.codec(params)
        self.invitations = Invitations(strategy, grid)
        num_clients = len(self.registry)
        self.now = Snapshot(
            round=0,
            params=params,
            state=strategy.init(params, num_clients),
            participation=strategy.participation.init(num_clients),
            memory=self.codec.start(params, num_clients) if self.codec else {},
            base=strategy.base(),
            nodes=self.registry.nodes,
            shield=account.start() if (account := strategy.account) is not None else {},
        )
        self.round = self.evaluation = Round(0, {}, arrays)
        self.sums = Sums(self, secagg, params) if (secagg := strategy.secagg) else None
        self._fruitless = 0  # rounds in a row in which every client failed
        self._learned = False  # from any client, in this run
        self.outbox = Outbox(strategy, self.codec)
        self.outbox.encode(self.now)

    @property
    def registry(self) -> Registry:
        """Which client each node is."""
        return self.invitations.registry

    @property
    def arrays(self) -> ArrayRecord:
        """x_t as it is sent."""
        return self.outbox.arrays

    # ---- before the rounds

    def prepare(self) -> None:
        """Run what comes before round 1: the strategy's ``prepare``."""
        now, asked = self.now, list[Round]()

        def ask(action: str, shapes: Shapes) -> Iterator[tuple[int, Params]]:
            draw = self.invitations.draw
            drawn = (draw(now.participation, 0, attempt)[0] for attempt in range(ATTEMPTS))
            cohort: dict[int, int] = next(filter(None, drawn), {})
            phase = Round(0, cohort, self.arrays, spent=self._spent)
            asked.append(phase)
            settings = ConfigRecord({messages.ROUND: 0, messages.BASIS: ""})
            content = RecordDict({messages.ARRAYS: self.arrays, messages.CONFIG: settings})
            outgoing = phase.address(f"train.{action}", ((c, content) for c in cohort))
            replies = exchange(self.grid, outgoing, self.timeout)
            yield from phase.arrays(replies, shapes, self.excluded)
            phase.close(self.excluded)

        try:
            now.params, now.frozen = self.strategy.prepare(now.params, ask)
        except RunError as error:
            reasons = [reason for phase in asked for reason in phase.reasons]
            raise RunError(f"{error}; {reasons[0]}" if reasons else str(error)) from error
        now.basis = digest(now.frozen) if now.frozen else ""
        self.outbox.encode(self.now)
        self.recorder.prepared(now, sum(phase.bytes_up + phase.bytes_down for phase in asked))

    def restore(self) -> bool:
        """Continue from the recorder's last checkpoint; return whether there was one."""
        snapshot = self.recorder.restore(self.now)
        if snapshot is None:
            return False
        self.now, self._learned = snapshot, snapshot.round > 0
        self.invitations.resume(snapshot.nodes)
        self.outbox.encode(self.now)
        self.recorder.prepared(snapshot, 0)
        return True

    # ---- in a round

    def contents(
        self, clients: Iterable[int], arrays: ArrayRecord, config: ConfigRecord
    ) -> Iterator[tuple[int, RecordDict]]:
        """Yield each client with what is sent to it; what is equal is one object."""
        return self.outbox.contents(
            self.now, clients, arrays, config, lambda: self.recorder.checkpoints()
        )

    def open(self, server_round: int) -> Round:
        """Draw the cohort of a round, and begin it."""
        now = self.now
        cohort, now.participation = self.invitations.cohort(
            now.participation, now.spent, server_round
        )
        shadow = self.invitations.accomplices(server_round, cohort)
        asked = dict(sorted({**cohort, **shadow}.items()))
        decode = None
        if (codec := self.codec) is not None:
            seed = self.strategy.seed

            def decode(client: int, arrays: Params) -> Params:
                return codec.decode(arrays, At(seed, server_round, client))

        layout, basis = self.strategy.layout, now.basis
        self.round = Round(
            server_round, asked, self.arrays, layout, basis, decode, shadow, self._spent
        )
        return self.round

    def outgoing(self, config: ConfigRecord) -> Iterator[tuple[int, RecordDict]]:
        """Yield each client that is to train in the round with what it is sent."""
        if self.sums is None:
            return self.contents(self.round.nodes, self.arrays, config)
        records = self.sums.open()
        return self.sums.enclosed(records, self.contents(records, self.arrays, config))

    def direction(self, replies: Iterable[Message]) -> Params:
        """Return what the replies of the round come to; {} where no update could be used."""
        if self.sums is not None:
            return self.sums.direction(replies)
        updates = self.recorder.watch(self.now, self.round.updates(replies, self.excluded))
        direction = self.merge(self.received(updates))
        for _ in updates:  # a combine that stopped early must not hide failures
            pass
        return direction

    def received(self, updates: Iterable[Update]) -> Iterable[Update]:
        """Return the updates as the attack leaves them and the defence lets them through."""
        strategy, current = self.strategy, self.round
        attack, total = strategy.attack, len(self.registry)
        cohort = [client for client in current.nodes if client not in current.shadow]
        if attack is not None:
            rng = generator(strategy.seed, "attack", current.index)
            updates = corrupt(updates, attack, total, rng, current.shadow, len(cohort))
        if strategy.defence is not None:
            malicious = attack.count(cohort, total) if attack is not None else 0
            updates = strategy.defence.defend(updates, malicious)
        return updates

    def merge(self, updates: Iterable[Update]) -> Params:
        """Return the direction of ``updates``, and advance the memory it is made with."""
        now = self.now
        now.state = self.strategy.resize(now.state, len(self.registry))
        account = self.strategy.account
        asked = [client for client in self.round.nodes if client not in self.round.shadow]
        if isinstance(account, ClientAccount) and not account.releases(asked):
            return {}
        if isinstance(account, ClientAccount):
            direction, now.shield, costs = account.merge(
                updates, now.params, now.shield, asked, self.round.index
            )
            self.charge(costs)
        elif self.codec is not None and self.codec.merges:
            direction, now.memory = self.codec.merge(updates, now.memory, len(self.registry))
        else:
            direction, now.state = self.strategy.combine(updates, now.state)
        return direction

    def charge(self, costs: Mapping[int, Release]) -> None:
        """Add what a round cost each client to what it had spent."""
        for client, cost in costs.items():
            self.now.spent[client] = merged((*self.now.spent.get(client, ()), cost))

    def take_over(self, arrays: ArrayRecord) -> None:
        """Go on from ``arrays`` where somebody else's loop or wrapper has changed x_t."""
        if arrays is self.given or arrays is self.arrays:
            return
        if self.outbox.packs:
            raise ValueError("the arrays of a round may not be changed where a codec packs them")
        changed = messages.decode(arrays, self.strategy.layout)
        self.now.params = {n: changed[n].to(p.dtype) for n, p in self.now.params.items()}
        self.given = arrays
        self.outbox.encode(self.now)

    def close(self, server_round: int) -> None:
        """Count the round as done, and whoever has not answered as failed."""
        now, current = self.now, self.round
        current.close(self.excluded)
        now.round = server_round
        self.outbox.delivered(now, current)

    def adopt(self, params: Params, moves: Params) -> None:
        """Make ``params`` x_{t+1}, and move the base by ``moves`` if there are any."""
        now = self.now
        now.params, now.moves = params, moves
        if moves:
            now.base = moved(now.base, moves)
            now.basis, now.version = chained(now.basis, moves), now.version + 1
            self.recorder.moved(now)
        self.outbox.encode(self.now)
        self.given = self.arrays

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
        if metrics is not None and strategy.account is None:  # no noise is on them
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
        if strategy.account is not None:
            record.epsilon = strategy.account.epsilon(self.now.spent)
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
    def _spent(self) -> dict[int, Spent] | None:
        """Where clients that protect their rows are noted with what that has cost; else None."""
        account = self.strategy.account
        return self.now.spent if account is not None and account.unit == "record" else None

    def _check_progress(self, *, last: bool) -> None:
        """Stop after three rounds in a row, or a last one, in which every client failed.

        When all budgets are spent that is no failure of a run that has learned something.
        """
        current = self.round
        self._learned = self._learned or bool(current.answered)
        fruitless = current.nodes and not current.answered
        if self._learned and all(failure.spent for failure in current.failures):
            fruitless = False
        self._fruitless = self._fruitless + 1 if fruitless else 0
        if self._fruitless == 3 or (self._fruitless and last):
            raise RunError(
                f"every client failed in round {current.index}; the first: {current.reasons[0]}"
            )
