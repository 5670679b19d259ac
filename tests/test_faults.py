"""Runs whose replies get lost, late, doubled or spoiled: the rest counts, and nothing else does."""

import itertools
import json
import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedsys import checks, messages
from fedsys.config import configure
from fedsys.console import Silent
from fedsys.engines.base import StreamingGrid, exchange
from fedsys.engines.faulty import FaultGrid
from fedsys.engines.local import FIRST_NODE, LocalGrid
from fedsys.errors import ClientFailure, ConfigError, RunError
from fedsys.experiment import RunResult, resume, run_experiment
from fedsys.faults import Corrupt, Crash, Delay, Drop, Duplicate, Fault, Mixed
from fedsys.federation import Federation
from fedsys.garbling import garbled
from tests.runs import (
    SMALL,
    Cohorts,
    Scattered,
    Tampering,
    app_of,
    attended_by,
    client_of,
    comparable,
    experiment_of,
    federation_of,
    play,
    round_of,
    same,
)
from tests.stock_app.toy import app_of as toy_app
from tests.stock_app.toy import arrays_of, drift

CLIENTS, ROUNDS = 10, 4
FEDAVG = (f"num_clients={CLIENTS}", f"rounds={ROUNDS}", "strategy=fedavg")
MIXED = ("fault=mixed", *(f"fault.{kind}=0.12" for kind in ("drop", "delay", "corrupt", "crash")))
LATE = 7200.0  # the timeout is an hour
LocalGrid(toy_app(drift), 1)  # Flower refuses to make messages outside an engine


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what says nothing of faults."""
    for name in ("_describe_partition", "_describe_participation", "_export", "_report"):
        monkeypatch.setattr(f"fedsys.experiment.{name}", lambda *_: None)
    monkeypatch.setattr("gc.collect", lambda: 0)


def go(folder: Path, *overrides: str, observer: Silent | None = None) -> RunResult:
    experiment = experiment_of(*FEDAVG, *overrides)
    resolved = experiment.resolved | {"out": str(folder)}
    return run_experiment(replace(experiment, out=folder, resolved=resolved), observer)


def befallen(fault: Fault, seed: int = 0, kind: str = "train") -> dict[int, list[int]]:
    """Return the clients that ``fault`` befalls in each round."""
    draw = fault.draw
    return {
        t: [c for c in range(CLIENTS) if draw(seed, str(t), c, kind)] for t in range(1, ROUNDS + 1)
    }


def without(folder: Path, lost: dict[int, list[int]], *overrides: str) -> Any:
    """Play a run over a grid that loses the replies of ``lost`` in its own way."""
    federation = federation_of(folder, *FEDAVG, *overrides)

    def change(reply: Message) -> Iterable[Message]:
        return [] if client_of(reply) in lost[round_of(reply)] else [reply]

    return play(federation, Tampering(app_of(federation), CLIENTS, change))


def reasons(result: RunResult) -> list[list[str]]:
    return [line["reasons"] for line in result.metrics[1:]]


def lost_lines(lost: dict[int, list[int]], reason: str) -> list[list[str]]:
    return [[f"client {client}: {reason}" for client in lost[t]] for t in sorted(lost)]


# ---- one kind at a time


def test_dropped_replies_are_missed_and_the_mean_is_that_of_the_others(tmp_path: Path) -> None:
    result = go(tmp_path / "run", "fault=drop", "fault.fraction=0.4")
    lost = befallen(Drop(fraction=0.4))
    assert min(map(len, lost.values())) > 0
    assert reasons(result) == lost_lines(lost, "no reply before the deadline")
    assert same(result.params, without(tmp_path / "other", lost).params)


def test_crashes_are_told_as_errors(tmp_path: Path) -> None:
    result = go(tmp_path / "run", "fault=crash", "fault.fraction=0.4")
    lost = befallen(Crash(fraction=0.4))
    assert reasons(result) == lost_lines(lost, "the client has crashed: fault=crash")
    assert same(result.params, without(tmp_path / "other", lost).params)


def test_of_duplicates_the_first_counts_and_only_once(tmp_path: Path) -> None:
    result = go(tmp_path / "run", "fault=duplicate", "fault.fraction=0.4")
    twice = befallen(Duplicate(fraction=0.4))
    assert reasons(result) == lost_lines(twice, "answered twice")
    assert [line["clients"] for line in result.metrics[1:]] == [CLIENTS] * ROUNDS
    assert same(result.params, go(tmp_path / "none").params)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("strategy=fed_sb", "adapter.rank=2"),
        ("strategy=fed_sb", "adapter.rank=2", "compression=topk", "compression.ratio=0.3"),
        ("strategy=frl", "adapter=supermask"),
    ],
    ids=" ".join,
)
def test_corrupt_replies_are_excluded_each_with_a_reason(
    tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    result = go(tmp_path / "run", "fault=corrupt", "fault.fraction=0.4", *overrides)
    lost = befallen(Corrupt(fraction=0.4))
    if "strategy=fed_sb" not in overrides:  # whose gradients before round 1 are befallen too
        assert same(result.params, without(tmp_path / "other", lost, *overrides).params)
    assert [[line.split(":")[0] for line in said] for said in reasons(result)] == [
        [f"client {client}" for client in lost[t]] for t in lost
    ]
    assert len({line.split(": ")[1] for said in reasons(result) for line in said}) >= 3
    assert all(value.isfinite().all() for value in result.params.values())


def test_late_replies_are_missed_in_their_round_and_ignored_in_the_next(tmp_path: Path) -> None:
    result = go(tmp_path / "run", "fault=delay", "fault.fraction=0.4")
    late = befallen(Delay(fraction=0.4, seconds=LATE))
    for t, said in enumerate(reasons(result), 1):
        assert Counter(said) == Counter(
            [f"client {client}: no reply before the deadline" for client in late[t]]
            + [f"client {c}: answered round '{t - 1}' in round {t}" for c in late.get(t - 1, [])]
        )
    assert same(result.params, without(tmp_path / "other", late).params)


def test_a_late_reply_of_who_is_not_asked_again_is_a_strangers(tmp_path: Path) -> None:
    federation = federation_of(tmp_path, *FEDAVG)
    cohorts = Cohorts({1: [0, 1, 2], 2: [3, 4, 5], 3: [0, 4], 4: [1]})
    federation = attended_by(federation, cohorts)
    grid = Faulty(federation, Delay(fraction=0.7, seconds=LATE))
    played = play(federation, grid)  # type: ignore[arg-type]
    late = befallen(grid.fault)
    for line in played.lines:
        t = line["round"]
        asked, before = cohorts.cohorts[t], cohorts.cohorts.get(t - 1, [])
        strangers = set(before) & set(late.get(t - 1, [])) - set(asked)
        assert sum("was not asked in this round" in r for r in line["reasons"]) == len(strangers)
    assert set(late[1]) & {0, 1, 2}


class Faulty(FaultGrid):
    """Faults over an embedded grid, with the memories of its clients."""

    def __init__(self, federation: Federation, fault: Fault, seed: int = 0) -> None:
        inner = LocalGrid(app_of(federation), len(federation.shards))
        super().__init__(inner, fault, seed)
        self.states = inner.states


def test_delays_within_the_deadline_are_waited_for_once_a_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept = []
    now = itertools.count()
    monkeypatch.setattr("fedsys.engines.faulty.time.sleep", slept.append)
    monkeypatch.setattr("fedsys.engines.faulty.time.monotonic", lambda: next(now) * 1e-6)
    result = go(tmp_path / "run", "fault=delay", "fault.fraction=0.4", "fault.seconds=3599")
    assert reasons(result) == [[]] * ROUNDS
    assert slept == pytest.approx([3599] * len(slept))
    assert len(slept) == sum(map(len, befallen(Delay(fraction=0.4, seconds=1)).values()))
    assert same(result.params, go(tmp_path / "none").params)


def test_waiting_ends_when_the_delay_is_over() -> None:
    grid = FaultGrid(LocalGrid(toy_app(drift), 5), Delay(fraction=1, seconds=0.2), 0)
    began = time.monotonic()
    replies = list(exchange(grid, asked(range(2, 7)), 60.0))
    assert [r.metadata.src_node_id for r in replies] == [2, 3, 4, 5, 6]
    assert 0.2 <= time.monotonic() - began < 0.9  # together, not one after the other


# ---- all kinds together


def test_a_run_survives_all_of_them(tmp_path: Path) -> None:
    result = go(tmp_path / "run", *MIXED, "fault.duplicate=0.12")
    fault = result.experiment.fault
    kinds = {
        (t, c): fault.draw(0, str(t), c, "train")
        for t in range(1, ROUNDS + 1)
        for c in range(CLIENTS)
    }
    assert set(kinds.values()) == {None, "drop", "delay", "duplicate", "corrupt", "crash"}
    lost = {
        t: [c for c in range(CLIENTS) if kinds[t, c] not in (None, "duplicate")]
        for t in range(1, ROUNDS + 1)
    }
    assert same(result.params, without(tmp_path / "other", lost).params)
    assert [line["clients"] for line in result.metrics[1:]] == [
        CLIENTS - len(lost[t]) for t in lost
    ]


def test_whoever_trains_together_is_befallen_as_if_alone(tmp_path: Path) -> None:
    every = (*MIXED, "fault.duplicate=0.12")
    alone, together = (go(tmp_path / c, *every, f"engine.chunk={c}") for c in ("1", "4"))
    assert reasons(together) == reasons(alone)
    assert any(reasons(alone))
    counts = [[line["clients"] for line in run.metrics[1:]] for run in (together, alone)]
    assert counts[0] == counts[1]
    for name, value in alone.params.items():
        assert torch.allclose(together.params[name], value, atol=1e-5)


@pytest.mark.parametrize("overrides", [(), ("strategy=fed_sb", "adapter.rank=2")], ids=" ".join)
def test_without_a_share_nothing_changes(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    off = [f"fault.{kind}=0" for kind in ("drop", "delay", "duplicate", "corrupt", "crash")]
    result = go(tmp_path / "run", "fault=mixed", *off, *overrides)
    plain = go(tmp_path / "none", *overrides)
    assert same(result.params, plain.params)
    assert comparable(result.metrics) == comparable(plain.metrics)


def test_the_seed_decides_whom_they_befall(tmp_path: Path) -> None:
    first, again = (go(tmp_path / name, *MIXED) for name in ("a", "b"))
    assert comparable(first.metrics) == comparable(again.metrics)
    assert same(first.params, again.params)
    fault = first.experiment.fault
    assert befallen(fault, seed=0) != befallen(fault, seed=1)
    assert befallen(fault, kind="train") != befallen(fault, kind="evaluate")


class Stop(Silent):
    """Ends a run after its second round."""

    def round(self, record: dict[str, Any], rounds: int) -> None:
        if record["round"] == 2:
            raise KeyboardInterrupt


@pytest.mark.parametrize("late", [False, True])
def test_a_resumed_run_meets_the_same_faults(tmp_path: Path, late: bool) -> None:
    overrides = ["checkpoint.every=1", *MIXED, *([] if late else ["fault.delay=0"])]
    whole = go(tmp_path / "whole", *overrides)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "cut", *overrides, observer=Stop())
    resumed = resume(tmp_path / "cut")
    assert same(resumed.params, whole.params)
    if not late:  # what is a round late when a process ends is lost
        assert comparable(resumed.metrics) == comparable(whole.metrics)
    assert [m["clients"] for m in resumed.metrics] == [m["clients"] for m in whole.metrics]


def test_evaluation_at_the_clients_loses_replies_too(tmp_path: Path) -> None:
    result = go(tmp_path / "run", "evaluate.clients=true", "fault=drop", "fault.fraction=0.3")
    missed, silent = befallen(Drop(fraction=0.3)), befallen(Drop(fraction=0.3), kind="evaluate")
    for t, said in enumerate(reasons(result), 1):
        why = "no reply before the deadline"
        assert said == [f"client {c}: {why}" for c in missed[t]] + [
            f"evaluation: client {c}: {why}" for c in silent[t]
        ]


def test_a_run_that_hears_of_nobody_stops(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="every client failed in round 3; the first: client 0: no"):
        go(tmp_path / "run", "fault=drop", "fault.fraction=1")


def test_a_fault_ends_a_run_that_is_to_fail(tmp_path: Path) -> None:
    with pytest.raises(ClientFailure, match="has crashed"):
        go(tmp_path / "run", "fault=crash", "fault.fraction=0.5", "on_client_error=fail")


# ---- sums


@pytest.mark.parametrize("fault", ["drop", "crash", "corrupt", "delay", "duplicate"])
def test_secure_sums_are_of_those_who_are_left(tmp_path: Path, fault: str) -> None:
    weights = "strategy.weighting=uniform"
    share = "0.3" if fault == "duplicate" else "0.06"
    words = (weights, f"fault={fault}", f"fault.fraction={share}", "rounds=3")
    result = go(tmp_path / "run", *words, "secagg=true", "secagg.clipping_norm=100")
    summed = {line["round"]: line["clients"] for line in result.metrics[1:]}
    assert result.summary["failures"] > 0
    attended = dict(read_participation(tmp_path / "run"))
    assert {t: len(clients) for t, clients in attended.items()} == summed
    assert min(summed.values()) >= 6
    plain = federation_of(tmp_path / "plain", *FEDAVG, weights, "rounds=3")
    expected = play(attended_by(plain, Cohorts(attended))).params
    for name, value in result.params.items():
        assert torch.allclose(value, expected[name], atol=1e-4)
    if fault == "duplicate":
        assert set(summed.values()) == {CLIENTS}


def read_participation(folder: Path) -> Iterator[tuple[int, list[int]]]:
    for line in (folder / "participation.jsonl").read_text().splitlines():
        said = json.loads(line)
        yield said["round"], said["clients"]


# ---- how often


def test_shares_are_kept() -> None:
    fault = Mixed(drop=0.3, delay=0.2, duplicate=0.05, corrupt=0.1, crash=0.15, seconds=0)
    count = 20_000
    drawn = Counter(fault.draw(7, str(i // 100), i % 100, "train") for i in range(count))
    for kind, share in [*fault.shares.items(), (None, 0.2)]:
        deviation = math.sqrt(count * share * (1 - share))
        assert abs(drawn[kind] - count * share) < 5 * deviation
    assert {Drop(fraction=1.0).draw(0, "1", c, "train") for c in range(100)} == {"drop"}
    whole = Mixed(drop=0.1, delay=0.2, duplicate=0.3, corrupt=0.3, crash=0.1, seconds=0)
    assert None not in {whole.draw(0, "1", c, "train") for c in range(1000)}


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ({"fault": "drop", "fault.fraction": "1.5"}, "fault.fraction is a share .*, got 1.5"),
        ({"fault": "crash", "fault.fraction": "-0.1"}, r"in \[0, 1\], got -0.1"),
        ({"fault": "delay", "fault.seconds": "-1"}, "fault.seconds must be 0 or more, got -1"),
        ({"fault": "mixed", "fault.delay": "2"}, "fault.delay is a share of the replies"),
        ({"fault": "mixed", "fault.drop": "0.9"}, "fault: one reply has one fault at most"),
        ({"fault": "drop", "fault.seconds": "1"}, "no such key in fault=drop; .*have it"),
        ({"fault": "drop", "fault._target_": "fedsys.attacks.Scale"}, "cannot be used as fault"),
    ],
)
def test_what_cannot_be_is_refused(words: dict[str, str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        configure([*SMALL, *(f"{key}={value}" for key, value in words.items())])


# ---- over any grid


def asked(nodes: Iterable[int], round: int = 1, kind: str = "train") -> list[Message]:
    content = RecordDict({"arrays": arrays_of()})
    return [Message(content, node, kind, group_id=str(round)) for node in nodes]


def sources(replies: Iterable[Message]) -> list[int]:
    return [reply.metadata.src_node_id - FIRST_NODE for reply in replies]


class Listed(Grid):
    """A grid that returns lists, in an order of its own, and keeps what it has returned."""

    def __init__(self, grid: LocalGrid) -> None:
        self.inner, self.returned = grid, list[Message]()

    def send_and_receive(self, messages, *, timeout=None):
        self.returned = list(self.inner.send_and_receive(messages, timeout=timeout))[::-1]
        return self.returned

    def set_run(self, run):
        self.inner.set_run(run)

    @property
    def run(self):
        return self.inner.run

    def create_message(self, *words):
        return self.inner.create_message(*words)

    def get_node_ids(self):
        return self.inner.get_node_ids()

    def push_messages(self, messages):
        return self.inner.push_messages(messages)

    def pull_messages(self, message_ids):
        return self.inner.pull_messages(message_ids)


def test_a_grid_streams_with_faults_if_it_does_without() -> None:
    trained = []

    def answer(message: Message, context: Any) -> RecordDict:
        trained.append(message.metadata.dst_node_id - FIRST_NODE)
        return drift(message, context)

    inner, fault = LocalGrid(toy_app(answer), 9), Drop(fraction=0.5)
    grid = FaultGrid(inner, fault, 0)
    assert isinstance(grid, StreamingGrid)
    assert not isinstance(FaultGrid(Listed(inner), fault, 0), StreamingGrid)
    stream = iter(exchange(grid, asked(range(2, 11)), 1.0))
    assert trained == []
    first = next(stream)
    assert trained == list(range(first.metadata.src_node_id - FIRST_NODE + 1))
    assert len(trained) < 9


def test_the_rest_of_the_grid_is_as_it_was() -> None:
    inner = LocalGrid(toy_app(drift), 4)
    for grid in (
        FaultGrid(inner, Drop(fraction=1), 0),
        FaultGrid(Listed(inner), Drop(fraction=1), 0),
    ):
        assert list(grid.get_node_ids()) == [2, 3, 4, 5]
        assert [node.node_id for node in grid.get_nodes()] == [2, 3, 4, 5]
        grid.set_run(inner.run)
        assert grid.run is inner.run
        message = grid.create_message(RecordDict(), "train", 3, "g", ttl=5.0)
        assert (message.metadata.dst_node_id, message.metadata.ttl) == (3, 5.0)
        ids = list(grid.push_messages(asked([2, 3])))
        assert sources(grid.pull_messages(ids)) == [0, 1]
        assert list(grid.send_and_receive(asked([2, 3]))) == []


@pytest.mark.parametrize(
    "fault", [Drop(fraction=0.5), Crash(fraction=0.5), Duplicate(fraction=0.5)]
)
def test_faults_do_not_depend_on_order_engine_or_company(fault: Fault) -> None:
    def seen(grid: Grid, nodes: Iterable[int]) -> dict[int, tuple[int, int]]:
        replies = list(exchange(FaultGrid(grid, fault, 3), asked(nodes), 1.0))
        errors = sum(reply.has_error() for reply in replies)
        counts = Counter(sources(replies))
        assert errors == 0 or isinstance(fault, Crash)
        return {
            c: (counts[c], sum(r.has_error() for r in replies if sources([r]) == [c]))
            for c in counts
        }

    inner = LocalGrid(toy_app(drift), 20)
    whole = seen(inner, range(2, 22))
    assert seen(Listed(inner), range(2, 22)) == whole
    assert seen(Listed(inner), [*range(21, 1, -1)]) == whole
    for part in ([4, 9, 17], range(12, 22)):
        left = {c: n for c, n in whole.items() if c + FIRST_NODE in part}
        assert seen(inner, part) == left


def test_nodes_are_known_by_the_partition_they_name() -> None:
    fault, partitions = Drop(fraction=0.5), {1000 - 7 * n: n for n in range(20)}
    app = toy_app(drift)

    @app.query("whoami")
    def whoami(message: Message, context: Any) -> Message:
        record = messages.MetricRecord({"partition-id": int(context.node_config["partition-id"])})
        return Message(RecordDict({"metrics": record}), reply_to=message)

    grid = FaultGrid(Scattered(app, partitions), fault, 3)
    assert len(list(grid.send_and_receive(asked(partitions, 0, "query.whoami")))) == 20
    left = [r.metadata.src_node_id for r in exchange(grid, asked(partitions), 1.0)]
    plain = exchange(FaultGrid(LocalGrid(app, 20), fault, 3), asked(range(2, 22)), 1.0)
    assert sorted(partitions[node] for node in left) == sources(plain)


def test_delayed_replies_come_last_in_a_list() -> None:
    fault = Delay(fraction=0.4, seconds=0.001)
    inner = LocalGrid(toy_app(drift), 20)
    got = sources(
        FaultGrid(Listed(inner), fault, 0).send_and_receive(asked(range(2, 22)), timeout=1)
    )
    delayed = [c for c in range(19, -1, -1) if fault.draw(0, "1", c, "train")]
    assert got == [c for c in range(19, -1, -1) if c not in delayed] + delayed
    assert delayed


def test_a_wait_without_a_deadline_has_no_late_replies() -> None:
    fault = Delay(fraction=1, seconds=0.001)
    grid = FaultGrid(Listed(LocalGrid(toy_app(drift), 5)), fault, 0)
    assert len(list(grid.send_and_receive(asked(range(2, 7)), timeout=None))) == 5
    assert list(grid.send_and_receive(asked(range(2, 7), 2), timeout=0.001)) == []
    late = list(grid.send_and_receive(asked(range(2, 7), 3), timeout=0.001))
    assert [r.metadata.group_id for r in late] == ["2"] * 5


def test_late_replies_meet_messages_of_their_own_type() -> None:
    grid = FaultGrid(LocalGrid(toy_app(drift), 5), Delay(fraction=1, seconds=9), 0)
    assert list(exchange(grid, asked(range(2, 7), 1), 1.0)) == []
    assert list(exchange(grid, asked(range(2, 7), 1, "evaluate"), 1.0)) == []
    assert list(exchange(grid, [], 1.0)) == []
    assert {r.metadata.message_type for r in exchange(grid, asked([2], 2), 1.0)} == {"train"}
    kinds = [r.metadata.message_type for r in exchange(grid, asked([2], 2, "evaluate"), 1.0)]
    assert kinds == ["evaluate"] * 5


def test_errors_pass_as_they_are() -> None:
    def answer(message: Message, context: Any) -> RecordDict:
        raise ValueError("no data")

    grid = FaultGrid(LocalGrid(toy_app(answer), 5), Mixed(**{k: 0.2 for k in SHARES}, seconds=0), 0)
    replies = list(exchange(grid, asked(range(2, 7)), 1.0))
    assert [r.error.reason for r in replies] == ["ValueError: no data"] * 5


SHARES = ("drop", "delay", "duplicate", "corrupt", "crash")


@pytest.mark.parametrize("fault", [Corrupt(fraction=1), Crash(fraction=1)])
def test_what_the_grid_holds_is_left_alone(fault: Fault) -> None:
    inner = Listed(LocalGrid(toy_app(drift), 8))
    grid = FaultGrid(inner, fault, 0)
    spoiled = list(grid.send_and_receive(asked(range(2, 10)), timeout=1))
    fresh = LocalGrid(toy_app(drift), 8).send_and_receive(asked(range(2, 10)))
    for held, reply in zip(inner.returned, list(fresh)[::-1], strict=True):
        assert same(read_arrays_of(held), read_arrays_of(reply))
        assert held.content["metrics"] == reply.content["metrics"]
        assert list(held.content) == list(reply.content)
    for before, after in zip(inner.returned, spoiled, strict=True):
        assert before is not after
        assert before.metadata == after.metadata


def read_arrays_of(reply: Message) -> dict[str, torch.Tensor]:
    return messages.decode(reply.content["arrays"])


# ---- malformed in many ways


def test_whatever_is_garbled_is_refused() -> None:
    sent = messages.encode({"w": torch.zeros(3, 2), "b": torch.zeros(4), "n": torch.tensor(7)})
    metrics = messages.MetricRecord({"num-examples": 3, "train_loss": 0.5})
    content = RecordDict({"arrays": sent, "metrics": metrics})
    before = content.copy()
    why = Counter()
    for seed in range(400):
        (message,) = asked([2])
        reply = Message(garbled(content, np.random.default_rng(seed)), reply_to=message)
        with pytest.raises(ClientFailure) as caught:
            checks.read_update(reply, 0, sent)
        why[" ".join(caught.value.reason.split()[-2:])] += 1
    assert content == before
    assert same(
        messages.decode(sent), {"w": torch.zeros(3, 2), "b": torch.zeros(4), "n": torch.tensor(7)}
    )
    assert len(why) >= 6  # renamed, cut, retyped, scrambled, NaN, a negative count, ...


def test_content_without_arrays_or_examples_loses_a_record() -> None:
    content = RecordDict({"secagg": messages.ConfigRecord({"keys": b"x"})})
    assert list(garbled(content, np.random.default_rng(0))) == []
    assert list(content) == ["secagg"]
    assert list(garbled(RecordDict(), np.random.default_rng(0))) == []
