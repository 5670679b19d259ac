"""Private runs from end to end: what is promised holds, whatever happens to a run."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from torch import Tensor

import clients.cohort
import clients.private
from clients import app
from clients.replies import DiskReplies
from fedsys.checkpoint import Checkpoints
from fedsys.config import Experiment
from fedsys.console import Record, Silent, Terminal
from fedsys.engines.local import LocalGrid
from fedsys.errors import ClientFailure, ConfigError, LedgerError, RunError
from fedsys.experiment import RunResult, resume, run_experiment
from fedsys.federation import Federation
from fedsys.main import main
from fedsys.models import CNN
from fedsys.params import Params, norm
from fedsys.privacy.accounting import epsilon, merged
from fedsys.privacy.entries import FILE, Entry
from fedsys.privacy.held_file import HeldFile
from fedsys.privacy.ledger import Ledger, read
from fedsys.privacy.release import Release
from fedsys.privacy.sample_level import SamplePrivacy
from fedsys.privacy.verify import verify
from fedsys.protection import protected
from fedsys.records import NoRecorder
from fedsys.report import write_report
from fedsys.seeds import numpy_generator
from tests.runs import (
    SMALL,
    Tampering,
    app_of,
    arrays_in,
    client_of,
    comparable,
    experiment_of,
    federation_of,
    play,
    same,
)

ALL = "data.public_fraction=0"  # the clients hold all rows
SAMPLE = ("privacy=sample", "strategy=fedavg", "adapter=full", "checkpoint.every=1", ALL)
CLIENT = (
    *("privacy=client", "strategy=fedavg", "strategy.weighting=uniform", "adapter=full"),
    *("checkpoint.every=1", "participation=bernoulli", "participation.rate=0.6", ALL),
)
Z = "privacy.noise_multiplier=1"
SEEDED = "privacy.reproducible=true"
SGD = ("client.optimizer=sgd", "client.lr=0.1")
FACTORS = ("adapter.rank=4", "adapter.init=seeded_random")


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what says nothing of privacy, and the two other accountants, which take seconds."""
    for name in ("_describe_partition", "_describe_participation", "_export"):
        monkeypatch.setattr(f"fedsys.experiment.{name}", lambda *_: None)
    monkeypatch.setattr(Federation, "accountants", lambda *_: {})
    monkeypatch.setattr("gc.collect", lambda: 0)


def experiment_in(folder: Path, *overrides: str) -> Experiment:
    experiment = experiment_of(*overrides)
    return replace(experiment, out=folder, resolved=experiment.resolved | {"out": str(folder)})


def go(folder: Path, *overrides: str, observer: Silent | None = None) -> RunResult:
    return run_experiment(experiment_in(folder, *overrides), observer)


def entries(folder: Path) -> list[Entry]:
    return read(folder / "ledger")


def by_client(found: Iterable[Entry]) -> dict[str, list[Entry]]:
    kept: dict[str, list[Entry]] = {}
    for entry in found:
        kept.setdefault(entry.client, []).append(entry)
    return kept


def figures(folder: Path) -> dict[str, float]:
    """Return the epsilon of every client, from the ledger."""
    return {
        name: epsilon(merged(e.release for e in own), own[0].delta)
        for name, own in by_client(entries(folder)).items()
    }


def times(folder: Path) -> set[int]:
    """Return how often a client's answer to a round was entered."""
    return set(Counter((e.client, e.round) for e in entries(folder)).values())


def in_order(folder: Path) -> None:
    assert verify(folder).problems == []


def reasons(result: RunResult) -> list[str]:
    return [reason for line in result.metrics for reason in line["reasons"]]


# ---- what a run shows


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    with pytest.MonkeyPatch.context() as patch:
        bare.__wrapped__(patch)  # type: ignore[attr-defined]
        sizes = ["partition=dirichlet_frl", "partition.alpha=2", "num_clients=4"]
        return go(tmp_path_factory.mktemp("private") / "run", *SAMPLE, *sizes, "privacy.epsilon=8")


def test_every_client_spends_its_budget_with_noise_of_its_own(whole: RunResult) -> None:
    found = by_client(entries(whole.folder))
    sizes = {name: own[0].num_examples for name, own in found.items()}
    assert len(set(sizes.values())) == len(sizes) == 4
    for name, own in found.items():
        assert [e.release.sample_rate for e in own] == [min(1, 16 / sizes[name])] * 2
        assert 0.99 * 8 <= figures(whole.folder)[name] <= 8
    assert len({own[0].release.noise_multiplier for own in found.values()}) == 4
    delta = 1 / (2 * max(sizes.values()))
    assert {e.delta for own in found.values() for e in own} == {delta}
    assert whole.summary["delta"] == delta


def test_the_figure_shown_is_the_largest(whole: RunResult) -> None:
    largest = max(figures(whole.folder).values())
    assert whole.metrics[-1]["epsilon"] == pytest.approx(largest, rel=1e-6)
    assert whole.summary["epsilon"] == whole.metrics[-1]["epsilon"]
    assert [line["epsilon"] is None for line in whole.metrics] == [True, False, False]
    assert whole.metrics[1]["epsilon"] < whole.metrics[2]["epsilon"]
    in_order(whole.folder)


def test_nothing_is_shown_of_the_clients_own_rows(whole: RunResult) -> None:
    for line in whole.metrics:
        own = ("train_loss", "clients_accuracy", "clients_accuracy_worst_decile")
        assert [line[name] for name in own] == [None] * 3
        assert line["eval_loss"] is not None
    assert whole.summary["final"]["train_loss"] is None
    with pytest.raises(ConfigError, match="metrics on its own rows"):
        experiment_of(*SAMPLE, Z, "evaluate.clients=true")


def test_a_run_without_privacy_shows_no_epsilon(tmp_path: Path) -> None:
    result = go(tmp_path, "strategy=fedavg", "adapter=full")
    assert [line["epsilon"] for line in result.metrics] == [None] * 3
    assert (result.summary["epsilon"], result.summary["delta"]) == (None, None)
    assert "privacy" not in result.summary
    assert not (tmp_path / "ledger").exists()
    assert any("there is no ledger" in problem for problem in verify(tmp_path).problems)


def no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def test_an_epsilon_without_bound_is_written_as_text_and_read_by_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = go(tmp_path, *SAMPLE, "privacy.epsilon=inf")
    assert [line["epsilon"] for line in result.metrics] == [None, math.inf, math.inf]
    text = (tmp_path / "metrics.jsonl").read_text()
    lines = [json.loads(line, parse_constant=no_constant) for line in text.splitlines()]
    assert [line["epsilon"] for line in lines] == [None, "inf", "inf"]
    summary = (tmp_path / "summary.json").read_text()
    assert json.loads(summary, parse_constant=no_constant)["epsilon"] == "inf"
    in_order(tmp_path)
    shown = Terminal()
    shown.round(result.metrics[-1], 2)
    shown.finished(result)
    assert "epsilon          inf" in capsys.readouterr().out
    assert "inf" in write_report(tmp_path).read_text()
    assert resume(tmp_path).metrics == result.metrics


# ---- what leaves a client


class Spy(LocalGrid):
    """Notes every reply; asks everybody twice where ``twice`` is set."""

    def __init__(self, federation: Federation, twice: bool = False) -> None:
        super().__init__(app_of(federation), len(federation.shards))
        self.twice = twice
        self.replies: list[Message] = []

    def _run_one(self, message: Message) -> Message:
        reply = super()._run_one(message)
        self.replies.append(reply)
        if self.twice:
            again = super()._run_one(message)
            assert again is not reply
            self.replies.append(again)
        return reply


def test_a_reply_says_how_many_rows_there_are_and_what_was_spent(tmp_path: Path) -> None:
    federation = federation_of(tmp_path, *SAMPLE, Z)
    spy = Spy(federation)
    with protected(federation, clients_here=True):
        play(federation, spy)
    assert len(spy.replies) == 10
    for reply in spy.replies:
        content = reply.content
        assert set(content) == {"arrays", "metrics", "reply"}
        rows = federation.shards.size(client_of(reply))
        assert dict(content["metrics"]) == {"num-examples": rows}
        assert set(content["reply"]) == {"spent"}


def test_who_asks_again_gets_the_same_bits_for_nothing(tmp_path: Path) -> None:
    federation = federation_of(tmp_path, *SAMPLE, Z)
    spy = Spy(federation, twice=True)
    with protected(federation, clients_here=True):
        play(federation, spy)
    assert len(spy.replies) == 20
    for first, again in zip(spy.replies[::2], spy.replies[1::2], strict=True):
        assert same(arrays_in(first), arrays_in(again))
        assert dict(first.content["reply"]) == dict(again.content["reply"])
    assert times(tmp_path) == {1}


def test_without_a_ledger_nobody_trains(tmp_path: Path) -> None:
    federation = federation_of(tmp_path, *SAMPLE, Z)
    with pytest.raises(RunError, match="nobody keeps its ledger"):
        play(federation)


def test_a_reply_that_is_lost_is_counted_in_the_next(tmp_path: Path) -> None:
    federation = federation_of(tmp_path, *SAMPLE, Z)
    lost = [(1, 2)]

    def change(reply: Message) -> list[Message]:
        place = (int(reply.metadata.group_id), client_of(reply))
        return [] if place in lost else [reply]

    grid = Tampering(app_of(federation), 5, change)
    with protected(federation, clients_here=True):
        run = play(federation, grid)
    assert run.lines[0]["reasons"] == ["client 2: no reply before the deadline"]
    assert sum(r.steps for r in run.now.spent[2]) == 2
    assert run.now.spent[2] == run.now.spent[0]
    assert times(tmp_path) == {1}


def test_a_gradient_without_noise_is_not_sent_to_whoever_asks(tmp_path: Path) -> None:
    """A server that runs the phase of an initialisation that its clients were not told of."""
    public = ["privacy=sample", Z, "adapter.rank=4", "adapter.init=public"]
    federation = federation_of(tmp_path, *public, "data.public_fraction=0.2")
    strategy = replace(federation.strategy, public_gradients=None)  # type: ignore[call-arg]
    with (
        protected(federation, clients_here=True),
        pytest.raises(RunError, match="no client sent a gradient"),
    ):
        play(replace(federation, strategy=strategy))
    assert entries(tmp_path) == []


# ---- killed


class Killed(Silent):
    """Does to its own process, when ``round`` has been recorded, what kill -9 does."""

    def __init__(self, round: int) -> None:
        self.last = round

    def round(self, record: Record, total: int) -> None:
        if record["round"] == self.last:
            die()


def die(*_: object, **__: object) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def killed(work: Callable[[], object]) -> None:
    """Run ``work`` in a process that is killed by it."""
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL


def in_round(round: int, right: Callable[..., Any], wrong: Callable[..., Any]) -> Any:
    """Return ``right`` until the ledger holds the rounds before ``round``, then ``wrong``."""
    calls = Counter[str]()

    def call(*given: Any, **named: Any) -> Any:
        calls["all"] += 1
        # One call a client: the second of five in that round.
        late = calls["all"] > 5 * (round - 1) + 1
        return (wrong if late else right)(*given, **named)

    return call


def half_a_line(file: HeldFile, data: bytes) -> None:
    os.write(file._handle, data[: len(data) // 2])
    die()


POINTS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "before the reply is stored": (DiskReplies, "put", die),
    "before it is entered": (Ledger, "append", die),
    "while it is entered": (HeldFile, "add", half_a_line),
    "before it is sent": (app, "_answer", die),
    "before the checkpoint": (Checkpoints, "save", die),
}


def kill_at(point: str, out: Path, *overrides: str) -> None:
    owner, name, wrong = POINTS[point]
    right = getattr(owner, name)
    with pytest.MonkeyPatch.context() as patch:
        if owner is Checkpoints:  # one call a round
            patch.setattr(owner, name, lambda s, n, c: die() if n.round == 2 else right(s, n, c))
        else:
            patch.setattr(owner, name, in_round(2, right, wrong))
        killed(lambda: go(out, *overrides))


@pytest.mark.parametrize("point", POINTS)
def test_a_run_killed_anywhere_spends_once_what_is_sent_once(point: str, tmp_path: Path) -> None:
    overrides = [*SAMPLE, Z, "rounds=3"]
    kill_at(point, tmp_path, *overrides)
    before = (tmp_path / "ledger" / FILE).read_bytes()
    stored = {p.name: p.read_bytes() for p in (tmp_path / "replies" / "2").glob("*.safetensors")}
    assert len(before.splitlines()) in (6, 7, 10)
    assert len(stored) in (1, 2, 5)
    result = resume(tmp_path)
    after = (tmp_path / "ledger" / FILE).read_bytes()
    assert after.startswith(before[: before.rfind(b"\n") + 1])
    assert len(entries(tmp_path)) == 15
    assert times(tmp_path) == {1}
    for name, content in stored.items():  # sent again, not made again
        assert (tmp_path / "replies" / "2" / name).read_bytes() == content
    assert [line["clients"] for line in result.metrics] == [0, 5, 5, 5]
    in_order(tmp_path)


@pytest.mark.parametrize("point", ["before the reply is stored", "before it is sent"])
def test_with_noise_from_the_seed_a_killed_run_ends_as_if_it_had_not_been(
    point: str, tmp_path: Path
) -> None:
    overrides = [*SAMPLE, Z, SEEDED, "rounds=3"]
    undisturbed = go(tmp_path / "undisturbed", *overrides)
    kill_at(point, tmp_path / "killed", *overrides)
    resumed = resume(tmp_path / "killed")
    assert same(resumed.params, undisturbed.params)
    assert comparable(resumed.metrics) == comparable(undisturbed.metrics)
    assert times(tmp_path / "killed") == {1}


def test_a_stored_reply_that_was_damaged_is_made_again_and_paid_for_again(tmp_path: Path) -> None:
    kill_at("before the checkpoint", tmp_path, *SAMPLE, Z, "rounds=3")
    reply = tmp_path / "replies" / "2" / "1.safetensors"
    reply.write_bytes(reply.read_bytes()[:-1] + b"?")
    result = resume(tmp_path)
    twice = [k for k, n in Counter((e.client, e.round) for e in entries(tmp_path)).items() if n > 1]
    assert twice == [("digits#1", 2)]
    expected = epsilon([Release(1.0, 0.5, 4)], result.summary["delta"])
    assert result.summary["epsilon"] == pytest.approx(expected)
    in_order(tmp_path)


def test_a_round_of_a_private_server_that_is_done_again_is_paid_for_again(tmp_path: Path) -> None:
    killed(lambda: go(tmp_path, *CLIENT, Z, "rounds=3", observer=Killed(2)))
    assert [e.round for e in entries(tmp_path)] == [1, 2]
    result = resume(tmp_path)
    assert [e.round for e in entries(tmp_path)] == [1, 2, 2, 3]
    expected = epsilon([Release(1.0, 0.6, 4)], result.summary["delta"])
    assert result.summary["epsilon"] == pytest.approx(expected)
    in_order(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [SAMPLE, CLIENT], ids=["sample", "client"])
def test_a_run_killed_at_any_moment_forgets_nothing(
    overrides: Sequence[str], tmp_path: Path
) -> None:
    out, words = tmp_path / "run", [sys.executable, "-m", "fedsys"]
    rounds = ["rounds=60", "checkpoint.every=2", f"out={out}"]
    begin = [*words, "run", *SMALL, *overrides, Z, *rounds]
    rng, kills, before = numpy_generator(0, "kills"), 0, b""
    path = out / "ledger" / FILE
    for _ in range(8):
        going = subprocess.Popen(
            [*words, "resume", str(out)] if before else begin,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while going.poll() is None and (not path.exists() or path.stat().st_size <= len(before)):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.5))
        going.kill()
        kills += going.wait() == -signal.SIGKILL
        now = path.read_bytes()
        assert now.startswith(before[: before.rfind(b"\n") + 1])
        assert read(out / "ledger")
        before = now
    assert kills >= 3
    assert main(["resume", str(out)]) == 0
    in_order(out)
    assert times(out) == {1} if overrides is SAMPLE else 1 in times(out)
    assert {e.round for e in entries(out)} == set(range(1, 61))
    assert path.read_bytes().startswith(before[: before.rfind(b"\n") + 1])


# ---- a ledger that is not what it was


def cut(path: Path) -> None:
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:3]))


def alter(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"steps":1', b'"steps":0', 1))


def forge(path: Path) -> None:
    """Put a ledger in its place that is whole, as long, and another one."""
    found = read(path.parent)
    path.unlink()
    with Ledger(path.parent) as ledger:
        ledger.append([replace(e, release=replace(e.release, noise_multiplier=9.0)) for e in found])


DAMAGE: dict[str, Callable[[Path], None]] = {
    "its end is missing": cut,
    "cannot be believed": alter,
    "another ledger": forge,
    "once had": Path.unlink,
}


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed in its third round."""
    out = tmp_path_factory.mktemp("interrupted") / "run"
    with pytest.MonkeyPatch.context() as patch:
        bare.__wrapped__(patch)  # type: ignore[attr-defined]
        killed(lambda: go(out, *SAMPLE, Z, "rounds=4", observer=Killed(3)))
    return out


@pytest.mark.parametrize("reason", DAMAGE)
@pytest.mark.parametrize("ended", [False, True])
def test_a_ledger_that_was_changed_is_refused(
    reason: str, ended: bool, interrupted: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(interrupted, out)
    if ended:
        resume(out)
        in_order(out)
    DAMAGE[reason](out / "ledger" / FILE)
    assert verify(out).problems
    with pytest.raises(LedgerError, match=reason):
        resume(out)
    assert main(["verify", str(out)]) == 1


class Deletes(Silent):
    """Loses the ledger after the first round."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def round(self, record: Record, total: int) -> None:
        if record["round"] == 1:
            shutil.rmtree(self.folder / "ledger")


def test_a_ledger_that_goes_while_a_run_is_under_way_stops_it(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="has gone"):
        go(tmp_path, *SAMPLE, Z, "rounds=3", observer=Deletes(tmp_path))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["clients"] for line in lines[1:]] in ([5], [5, 0])


# ---- the budget


def test_who_has_spent_its_budget_drops_out_and_the_run_goes_on(tmp_path: Path) -> None:
    some = ["participation=bernoulli", "participation.rate=0.5", "privacy.rounds=2"]
    result = go(tmp_path, *SAMPLE, *some, "privacy.epsilon=8", "rounds=5")
    refused = reasons(result)
    assert refused
    assert all("PrivacyBudgetExceeded" in reason for reason in refused)
    both = [line for line in result.metrics if line["clients"] and line["failures"]]
    assert both, "some trained beside others that could not"
    assert max(len(own) for own in by_client(entries(tmp_path)).values()) == 2
    found = figures(tmp_path).values()
    assert max(found) <= 8
    assert max(found) >= 0.99 * 8
    in_order(tmp_path)


def test_noise_and_a_budget_together_limit_how_often_a_client_trains(tmp_path: Path) -> None:
    result = go(tmp_path, *SAMPLE, Z, "privacy.epsilon=2", "rounds=5")
    assert result.summary["status"] == "completed"
    assert not result.metrics[-1]["clients"]
    assert all("above its target 2" in reason for reason in result.metrics[-1]["reasons"])
    found = by_client(entries(tmp_path))
    counts = {len(own) for own in found.values()}
    assert len(counts) == 1
    (own, *_) = found.values()
    one_more = merged([*(e.release for e in own), own[0].release])
    assert max(figures(tmp_path).values()) <= 2 < epsilon(one_more, own[0].delta)
    in_order(tmp_path)


@pytest.mark.parametrize("overrides", [SAMPLE, CLIENT], ids=["sample", "client"])
def test_runs_on_one_ledger_add_up(overrides: Sequence[str], tmp_path: Path) -> None:
    shared = [*overrides, Z, f"privacy.ledger={tmp_path / 'shared'}"]
    first, second = (go(tmp_path / name, *shared) for name in "ab")
    in_order(tmp_path / "a")
    in_order(tmp_path / "b")
    runs = Counter(e.run for e in read(tmp_path / "shared"))
    assert len(runs) == 2
    steps = 4 * first.experiment.client.steps
    rate = 0.5 if overrides is SAMPLE else 0.6
    expected = epsilon([Release(1.0, rate, steps)], second.summary["delta"])
    assert second.summary["epsilon"] == pytest.approx(expected)
    assert first.summary["epsilon"] < second.metrics[1]["epsilon"] < expected
    budget = 1.01 * expected
    with pytest.raises(RunError, match=r"above its target|is spent"):
        go(tmp_path / "c", *shared, f"privacy.epsilon={budget}", "rounds=4")
    spent = read(tmp_path / "shared")
    found = merged(e.release for e in spent if e.client == spent[0].client)
    assert epsilon(found, spent[0].delta) <= budget


def test_a_private_server_spends_its_budget(tmp_path: Path) -> None:
    result = go(tmp_path, *CLIENT, "privacy.epsilon=8", "rounds=3")
    assert 0.99 * 8 <= result.summary["epsilon"] <= 8
    assert result.summary["privacy"]["amplification"] == "Poisson sampling"
    in_order(tmp_path)


# ---- initialisations


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["adapter.init=private", "privacy.epsilon=8"], "included"),
        (["adapter.init=public", "data.public_fraction=0.2", Z], "not private data"),
        (["adapter.init=seeded_random", Z], "not private data"),
        (
            ["adapter.init=client_sum", "privacy.allow_unprotected_initialisation=true", Z],
            "excluded",
        ),
    ],
)
def test_what_the_initialisation_cost_is_said(
    overrides: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = go(tmp_path, "privacy=sample", "checkpoint.every=1", "adapter.rank=4", *overrides)
    assert result.summary["privacy"]["initialisation"] == said
    report = verify(tmp_path)
    assert report.problems == []
    assert dict(report.rows())["initialisation, as said"] == said
    Terminal().finished(result)
    assert f"initialisation   {said}" in capsys.readouterr().out
    first = [e for e in entries(tmp_path) if e.mechanism == "initialisation"]
    assert len(first) == (5 if said == "included" else 0)
    assert {e.round for e in first} <= {0}
    if said == "included":
        assert all(0.99 * 8 <= figure <= 8 for figure in figures(tmp_path).values())


def test_gradients_of_the_initialisation_are_clipped_noised_and_of_a_lot(tmp_path: Path) -> None:
    federation = federation_of(
        tmp_path, "privacy=sample", Z, "adapter.rank=4", "adapter.init=private"
    )
    site = federation.site
    rows = site.shards.rows(0)
    site.model.bind(site.model.layout.unpack(site.model.initial[None]))
    private = _stub(rate=0.5, z=0.0, clip=1e-3)
    lot = _stub(rate=0.5, z=0.0, clip=1e-3).lots(rows, 1)
    drawn = int((lot >= 0).sum())
    assert 0 < drawn < len(rows)
    clean = site.noised_gradients(rows, private)
    assert 0 < norm(clean) <= drawn * 1e-3 * (1 + 1e-5)
    noisy = site.noised_gradients(rows, replace(_stub(rate=0.5, clip=1e-3), noise_multiplier=50.0))
    numbers = torch.cat([(noisy[n] - clean[n]).flatten() for n in clean])
    assert len(numbers) > 300
    assert numbers.std().item() == pytest.approx(50 * 1e-3, rel=5 / math.sqrt(2 * len(numbers)))


def _stub(rate: float, z: float = 1.0, clip: float = 1.0) -> clients.private.Private:
    from fedsys.privacy.noise import SeededStream

    return clients.private.Private(clip, z, rate, 8.0, SeededStream(0, "test"))


# ---- whatever trains, trains privately

METHODS = {
    "fedavg": ["strategy=fedavg", "adapter=full"],
    "fedprox": ["strategy=fedprox", "strategy.mu=0.5", "adapter=full"],
    "cnn": ["strategy=fedavg", "adapter=full", "num_clients=2", "data.limit=60"],
    "fedit": ["strategy=fedit", "adapter.rank=2"],
    "ffa": ["strategy=ffa_lora", "adapter.rank=2"],
    "fedex": ["strategy=fedex_lora", "adapter.rank=2"],
    "fed_sb": ["strategy=fed_sb", *FACTORS],
    "topk": ["strategy=fedavg", "adapter=full", "compression=topk"],
    "econtrol": ["strategy=econtrol", "compression=topk_econtrol"],
    "adamw": ["strategy=fedavg", "adapter=full", "client.optimizer=adamw", "client.lr=0.01"],
}


EXACT = "dtype=float64"


def protect(plain: Experiment, out: Path, **changes: Any) -> Experiment:
    """Return an experiment with sample-level privacy that clips nothing of these data."""
    unset = dict.fromkeys(["epsilon", "noise_multiplier", "delta", "rounds", "ledger"])
    unset |= {"reproducible": False, "allow_unprotected_initialisation": False}
    bound = {"clipping_norm": 1e9, "initial_share": 0.2}
    return replace(plain, out=out, privacy=SamplePrivacy(**(unset | bound | changes)))


@pytest.mark.parametrize("method", METHODS)
def test_without_noise_and_clipping_private_training_is_training(
    method: str, tmp_path: Path
) -> None:
    """Lots of everyone are the batches of either, so that both make the same steps."""
    plain = experiment_of(*METHODS[method], "client.batch_size=100", "client.steps=2", EXACT)
    if method == "cnn":
        plain = replace(plain, model=CNN(width=8, pretrained=False))
    known = run_experiment(replace(plain, out=tmp_path / "plain"))
    private = run_experiment(protect(plain, tmp_path / "private", epsilon=math.inf))
    noisy = run_experiment(
        protect(plain, tmp_path / "noisy", noise_multiplier=1.0, clipping_norm=1.0)
    )
    assert {e.release.sample_rate for e in entries(tmp_path / "private")} == {1.0}
    for name, value in known.params.items():
        torch.testing.assert_close(private.params[name], value, rtol=1e-7, atol=1e-9)
    assert not same(noisy.params, private.params)
    assert all(value.isfinite().all() for value in noisy.params.values())
    assert noisy.summary["failures"] == 0
    in_order(tmp_path / "noisy")


def test_the_pull_of_fedprox_is_felt_through_the_noise(tmp_path: Path) -> None:
    def moved(mu: int) -> Params:
        prox = ["strategy=fedprox", f"strategy.mu={mu}", "client.steps=4", *SGD]
        out = tmp_path / f"{mu}"
        return go(out, *SAMPLE, *prox, Z, SEEDED, "rounds=1").params

    free, pulled = moved(0), moved(8)
    start = federation_of(tmp_path / "start", *SAMPLE, Z).model
    origin = start.layout.unpack(start.initial)
    far, near = (norm({n: p[n] - origin[n] for n in p}) for p in (free, pulled))
    assert near < 0.8 * far


def test_lots_without_a_row_are_steps_all_the_same(tmp_path: Path) -> None:
    sizes: list[int] = []
    right = clients.cohort.private_gradients

    def note(model: Any, params: Tensor, batches: Any, guards: Any) -> Tensor:
        sizes.append(sum(len(owner) for _, owner in batches))
        return right(model, params, batches, guards)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clients.cohort, "private_gradients", note)
        one = ["client.batch_size=1", "client.steps=12", "rounds=1"]
        go(tmp_path, *SAMPLE, Z, *one)
    # Of 60 lots of Binomial(32, 1/32), (31/32)^32 = 36 % are empty.
    assert 6 <= sizes.count(0) <= 38
    assert {e.release for e in entries(tmp_path)} == {Release(1.0, 1 / 32, 12)}
    in_order(tmp_path)


# ---- noise from the seed


def test_the_same_seed_gives_the_same_bits_where_that_is_asked_for(tmp_path: Path) -> None:
    run = go(tmp_path / "a", *SAMPLE, Z, SEEDED)
    assert same(go(tmp_path / "b", *SAMPLE, Z, SEEDED).params, run.params)
    assert not same(go(tmp_path / "c", *SAMPLE, Z, SEEDED, "seed=1").params, run.params)
    secure = [go(tmp_path / name, *SAMPLE, Z).params for name in "de"]
    assert not same(*secure)
    together = go(tmp_path / "f", *SAMPLE, Z, SEEDED, "engine.chunk=3").params
    for name, value in run.params.items():
        assert (together[name] - value).norm() <= 1e-5 * value.norm()
    said = run.summary["privacy"]["noise"]
    assert "protects nobody" in said
    assert dict(verify(tmp_path / "a").rows())["noise, as said"] == said
    assert "protects nobody" in write_report(tmp_path / "a").read_text()


def test_a_private_server_repeats_itself_where_that_is_asked_for(tmp_path: Path) -> None:
    one, other = (go(tmp_path / name, *CLIENT, Z, SEEDED).params for name in "ab")
    assert same(one, other)
    secure = [go(tmp_path / name, *CLIENT, Z).params for name in "cd"]
    assert not same(*secure)


def test_the_same_noise_on_two_models_is_refused(tmp_path: Path) -> None:
    shared = [*SAMPLE, Z, SEEDED, f"privacy.ledger={tmp_path / 'shared'}"]
    go(tmp_path / "a", *shared)
    with pytest.raises(RunError, match="was used before"):
        go(tmp_path / "b", *shared, "client.lr=0.05")
    assert len(read(tmp_path / "shared")) == 10


# ---- positive controls: what is wrong on purpose is seen

# One step of a lot of all rows.
EVERYONE = ("client.batch_size=100", "rounds=1", *SGD)


def replies_of(folder: Path, *overrides: str) -> tuple[Tensor, Tensor]:
    """Return x_n - x_t (5, size) of one round, and the rows of each client."""
    federation = federation_of(folder, *SAMPLE, *EVERYONE, *overrides)
    spy = Spy(federation)
    with protected(federation, clients_here=True):
        play(federation, spy)
    found = [arrays_in(reply)["packed"] - federation.model.initial for reply in spy.replies]
    return torch.stack(found), federation.shards.sizes()


def noise_in(folder: Path) -> float:
    """Return z as it shows in the replies: their std over lr C / lot, beside one without noise."""
    noisy, rows = replies_of(folder / "noisy", Z)
    clean, _ = replies_of(folder / "clean", "privacy.epsilon=inf")
    scaled = (noisy - clean) * rows[:, None] / 0.1
    assert scaled.numel() > 2000
    return scaled.std().item()


def test_replies_hold_the_noise_that_is_paid_for(tmp_path: Path) -> None:
    # 2,000 numbers and more: the standard error of their std is below 1.6 %.
    assert noise_in(tmp_path) == pytest.approx(1.0, rel=0.08)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_noise_left_out_or_halved_shows_in_the_replies(
    share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = clients.private.noised_rows
    monkeypatch.setattr(
        clients.private,
        "noised_rows",
        lambda sums, stds, streams: right(sums, [share * std for std in stds], streams),
    )
    assert noise_in(tmp_path) != pytest.approx(1.0, rel=0.08)


def longest(folder: Path) -> float:
    """Return the longest step of a client in one round, in units of lr C, of data far too large."""
    moved, _ = replies_of(folder, "privacy.epsilon=inf", "data.shift=-1000")
    return (moved.norm(dim=1).max() / 0.1).item()


def test_no_client_moves_by_more_than_its_clipped_rows_can(tmp_path: Path) -> None:
    assert 0 < longest(tmp_path) <= 1 + 1e-5


def test_rows_that_are_not_clipped_are_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = clients.private.clipped_sums
    monkeypatch.setattr(
        clients.private,
        "clipped_sums",
        lambda model, params, batches, norms, cells: right(
            model, params, batches, torch.full_like(norms, 1e9), cells
        ),
    )
    assert longest(tmp_path) > 10


def lot_sizes(folder: Path) -> Tensor:
    """Return how many rows were in each lot of a run, 16 of 32 on average."""
    sizes: list[int] = []
    right = clients.cohort.private_gradients

    def note(model: Any, params: Tensor, batches: Any, guards: Any) -> Tensor:
        sizes.append(sum(len(owner) for _, owner in batches))
        return right(model, params, batches, guards)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clients.cohort, "private_gradients", note)
        go(folder, *SAMPLE, Z, "client.steps=20", "rounds=1")
    return torch.tensor(sizes, dtype=torch.float64)


def test_lots_are_of_any_size(tmp_path: Path) -> None:
    sizes = lot_sizes(tmp_path)
    assert len(sizes) == 100
    # Binomial(32, 1/2): variance 8, and five standard errors of 100 lots
    assert sizes.mean().item() == pytest.approx(16, abs=5 * math.sqrt(8 / 100))
    assert 8 * (1 - 5 * math.sqrt(2 / 99)) < sizes.var().item() < 8 * (1 + 5 * math.sqrt(2 / 99))


def test_batches_of_a_fixed_size_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fixed(private: Any, rows: Tensor, steps: int) -> Tensor:
        return torch.stack([rows[torch.randperm(len(rows))[:16]] for _ in range(steps)])

    monkeypatch.setattr(clients.private.Private, "lots", fixed)
    assert lot_sizes(tmp_path).var().item() < 8 * (1 - 5 * math.sqrt(2 / 99))


class Reasons(NoRecorder):
    """Hears why replies were left out."""

    def __init__(self) -> None:
        self.reasons: list[str] = []

    def failed(self, failure: ClientFailure) -> None:
        self.reasons.append(failure.reason)


@pytest.mark.parametrize(
    ("overrides", "mechanism"),
    [
        (["strategy=fedavg", "adapter=full"], "dp-sgd"),
        (["adapter.init=private", "adapter.rank=4"], "initialisation"),
    ],
    ids=["training", "initialisation"],
)
def test_why_a_private_client_failed_stays_with_it_and_is_paid_for(
    overrides: Sequence[str], mechanism: str, tmp_path: Path
) -> None:
    federation = federation_of(tmp_path, "privacy=sample", Z, ALL, "checkpoint.every=1", *overrides)
    federation.dataset.train.labels[:] = 77  # of ten classes
    with protected(federation, clients_here=True):
        said = Reasons()
        with pytest.raises(RunError):
            federation.strategy.start(
                LocalGrid(app_of(federation), 5), federation.initial, 1, recorder=said
            )
        entered = read(tmp_path / "ledger")
    assert set(said.reasons) == {"RuntimeError: the client failed, and does not say why"}
    assert {entry.mechanism for entry in entered} == {mechanism}
    assert len(entered) == 5


class AsksOneLater(LocalGrid):
    """Asks all but the first client in one pass, and then all of them in another."""

    federation: Federation

    def stream(self, messages: Iterable[Message], timeout: float = 0.0) -> Iterator[Message]:
        asked = list(messages)
        list(super().stream(asked[1:]))
        rows = self.federation.shards.rows(0)
        self.federation.dataset.train.labels[rows] = 77  # of ten classes
        return super().stream(asked)


def test_who_fails_in_a_pass_with_stored_replies_pays_once(tmp_path: Path) -> None:
    federation = federation_of(tmp_path, *SAMPLE, Z)
    with protected(federation, clients_here=True):
        grid = AsksOneLater(app_of(federation), 5, chunk=5)
        grid.federation = federation
        federation.strategy.start(grid, federation.initial, 1)
        entered = by_client(read(tmp_path / "ledger"))
    assert len(entered) == 5
    assert {len(own) for own in entered.values()} == {1}


def test_a_count_that_would_spend_the_budget_is_refused_before_the_first_round(
    tmp_path: Path,
) -> None:
    adaptive = ["privacy.quantile=0.5", "privacy.count_noise=0.1", "privacy.epsilon=1"]
    with pytest.raises(ConfigError, match=r"privacy\.count_noise"):
        federation_of(tmp_path, *CLIENT, *adaptive)
