"""Runs with secagg=true: the sum is that of a run without, whoever is lost, and what it costs."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from shutil import rmtree
from types import SimpleNamespace

import pytest
import torch
from flwr.app import ConfigRecord, Message
from scipy.stats import binom

from fedsys import messages
from fedsys.adapters import LoRASB
from fedsys.attacks import LabelFlip, SignFlip
from fedsys.collusion import ALIE
from fedsys.compression import TopK
from fedsys.config import configure
from fedsys.console import Silent
from fedsys.defences import Krum, NormClip
from fedsys.engines.local import FIRST_NODE, LocalGrid
from fedsys.errors import ClientFailure, ConfigError, RunError
from fedsys.experiment import run
from fedsys.federation import Federation
from fedsys.params import Params, norm, subtract
from fedsys.participation import Bernoulli, Markov, Uniform
from fedsys.privacy.entries import Entry
from fedsys.privacy.ledger import read
from fedsys.privacy.noise import SeededStream
from fedsys.privacy.verify import verify
from fedsys.protection import protected
from fedsys.secagg import SecureAggregation
from fedsys.secagg.conflicts import few, refusals
from fedsys.secagg.parts import SEEDS, put, take
from fedsys.secagg.rounds import SECAGG
from fedsys.trace import Trace
from strategies import (
    FRL,
    MIFA,
    AverageAll,
    EControl,
    FedAdam,
    FedAU,
    FedAvg,
    FedExLoRA,
    FedIT,
    FedSB,
    FedVARP,
    FLoRA,
    KnownProbability,
)
from tests.runs import (
    SMALL,
    Cohorts,
    Played,
    Tampering,
    app_of,
    attended_by,
    client_of,
    comparable,
    federation_of,
    play,
    round_of,
    same,
)
from tests.stock_app.toy import Batch
from tests.test_client_conflicts import ByClient, Mine, Signs
from tests.test_client_level import WIDE, misses
from tests.test_client_level import privacy as client_privacy
from tests.test_secagg_in_rounds import Serialising

FEDAVG = ("strategy=fedavg", "strategy.weighting=uniform")
WAYS = {
    "fed_sb": ("adapter.init=seeded_random", "adapter.rank=2"),
    "fedavg": FEDAVG,
    "fedprox": ("strategy=fedprox", "strategy.weighting=uniform"),
    "flipped": (*FEDAVG, "attack=label_flip"),
}
SUM = ("secagg=true", "secagg.clipping_norm=100")  # nothing is clipped
STEP = SecureAggregation(clipping_norm=100).quantiser.step
PHASES = ("train.secagg_keys", "train.secagg_shares", "train", "train.secagg_secrets")
EVERYONE = range(5)


def run_of(
    folder: Path,
    *overrides: str,
    attending: Cohorts | None = None,
    grid: Callable[[Federation], LocalGrid] | None = None,
    rounds: int = 1,
) -> Played:
    federation = federation_of(folder, *overrides)
    if attending is not None:
        federation = attended_by(federation, attending)
    return play(federation, grid(federation) if grid else None, rounds=rounds)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Callable[..., Params]:
    """Return what a run without secure aggregation comes to, given who takes part."""

    @cache
    def params(way: str, rounds: int = 1, *cohorts: tuple[int, ...]) -> Params:
        folder = tmp_path_factory.mktemp("plain")
        attending = Cohorts(dict(enumerate(cohorts, 1)), EVERYONE)
        return run_of(folder, *WAYS[way], attending=attending, rounds=rounds).params

    return params


def near(found: Params, wanted: Params, steps: float = 1.0) -> bool:
    """Whether two models differ by less than the rounding of a mean, and of float32."""
    gaps = [(found[n].double() - wanted[n].double()).abs().max().item() for n in wanted]
    return max(gaps) <= steps * STEP + 1e-6


# ---- the same as without


@pytest.mark.parametrize("way", WAYS)
def test_a_round_is_the_mean_of_the_updates_but_for_rounding(way: str, tmp_path, plain) -> None:
    played = run_of(tmp_path, *SUM, *WAYS[way])
    assert near(played.params, plain(way))
    assert not near(played.params, plain(way, 1, ()), 100)  # x_0
    assert not same(played.params, plain(way))  # rounded, so it went another way


@pytest.mark.parametrize(
    "grid",
    [
        lambda f: LocalGrid(app_of(f), 5, chunk=3),
        lambda f: Batch(app_of(f), 5, lambda replies: replies[::-1]),
        lambda f: Serialising(app_of(f), 5),
    ],
    ids=["chunks", "lists", "bytes"],
)
def test_engines_give_the_same(grid, tmp_path, plain) -> None:
    assert near(run_of(tmp_path, *SUM, *FEDAVG, grid=grid).params, plain("fedavg"))


def test_rounds_follow_each_other(tmp_path, plain) -> None:
    played = run_of(tmp_path, *SUM, *WAYS["fed_sb"], rounds=2)
    # The second round trains from where the first has led, a rounding away.
    assert near(played.params, plain("fed_sb", 2), 10)
    assert [line["clients"] for line in played.lines] == [5, 5]
    assert [line["train_loss"] for line in played.lines] == [None, None]
    assert [line["failures"] for line in played.lines] == [0, 0]
    assert played.participants == [[0, 1, 2, 3, 4]] * 2


def test_updates_that_are_too_long_are_scaled_down_as_is_told(tmp_path, plain, caplog) -> None:
    played = run_of(tmp_path, "secagg=true", "secagg.clipping_norm=0.01", *FEDAVG, rounds=2)
    moved = norm(subtract(played.params, plain("fedavg", 1, ())))
    assert 0 < moved <= 2 * 0.01 * (1 + 1e-3)  # two rounds of a mean of clipped updates
    told = [r.getMessage() for r in caplog.records if "clipping_norm" in r.getMessage()]
    assert len(told) == 1
    assert told[0].startswith("5 of 5 updates were longer than secagg.clipping_norm=0.01")


# ---- who is lost


def losing(kind: str, *clients: int, round: int = 1) -> Callable[[Federation], LocalGrid]:
    """Return a grid in which ``clients`` are gone when a message of ``kind`` comes."""

    def lost(message: Message) -> bool:
        gone = message.metadata.dst_node_id - FIRST_NODE in clients
        return gone and message.metadata.message_type == kind and round_of(message) == round

    return lambda federation: LocalGrid(app_of(federation), 5, lost=lost)


@pytest.mark.parametrize("kind", PHASES)
def test_the_mean_is_that_of_who_is_left(kind: str, tmp_path, plain) -> None:
    played = run_of(tmp_path, *SUM, *FEDAVG, grid=losing(kind, 1, 4))
    left = (0, 2, 3) if kind != PHASES[3] else (0, 1, 2, 3, 4)
    assert near(played.params, plain("fedavg", 1, left))
    (line,) = played.lines
    assert line["failures"] == 2
    assert line["reasons"] == [f"client {c}: no reply before the deadline" for c in (1, 4)]
    assert played.participants == [list(left)]


def dropping(kind: str, *clients: int) -> Callable[[Federation], LocalGrid]:
    """Return a grid in which the replies of ``clients``, who have done the work, never arrive."""

    def change(reply: Message):
        gone = client_of(reply) in clients and reply.metadata.message_type == kind
        return [] if gone else [reply]

    return lambda federation: Tampering(app_of(federation), 5, change)


@pytest.mark.parametrize("kind", PHASES)
def test_a_reply_that_is_lost_is_as_good_as_none(kind: str, tmp_path, plain) -> None:
    played = run_of(tmp_path, *SUM, *FEDAVG, grid=dropping(kind, 0, 2))
    left = (1, 3, 4) if kind != PHASES[3] else (0, 1, 2, 3, 4)
    assert near(played.params, plain("fedavg", 1, left))
    assert played.lines[0]["failures"] == 2


@pytest.mark.parametrize("kind", PHASES)
def test_below_the_threshold_a_round_moves_nothing_and_says_why(kind: str, tmp_path, plain) -> None:
    played = run_of(tmp_path, *SUM, *FEDAVG, grid=losing(kind, 0, 1, 4), rounds=2)
    assert near(played.params, plain("fedavg", 2, ()))
    first, second = played.lines
    assert (first["clients"], first["failures"]) == (0, 3)
    assert len(first["reasons"]) == 4
    assert "2" in first["reasons"][-1]
    assert (second["clients"], second["reasons"]) == (5, [])
    assert played.participants == [[], [0, 1, 2, 3, 4]]


def test_a_run_that_ends_without_a_sum_fails(tmp_path) -> None:
    with pytest.raises(RunError, match="every client failed in round 1; the first: client 0"):
        run_of(tmp_path, *SUM, *FEDAVG, grid=losing("train", 0, 1, 2))


def test_wrong_shares_give_no_sum_and_no_wrong_one(tmp_path, plain) -> None:
    def change(reply: Message):
        if reply.metadata.message_type == PHASES[3] and round_of(reply) == 1:
            record = reply.content[SECAGG]
            seeds = take(record, SEEDS)
            put(record, SEEDS, {c: bytes(len(share)) for c, share in seeds.items()})
        return [reply]

    grid = lambda f: Tampering(app_of(f), 5, change)  # noqa: E731
    played = run_of(tmp_path, *SUM, *FEDAVG, grid=grid, rounds=2)
    assert near(played.params, plain("fedavg", 2, ()))
    assert "client 0" in played.lines[0]["reasons"][0]
    assert played.lines[0]["clients"] == 0


def test_too_small_a_cohort_is_not_asked(tmp_path, plain) -> None:
    attending = Cohorts({1: (0, 3), 2: (), 3: (0, 1, 4)})
    played = run_of(tmp_path, *SUM, *FEDAVG, attending=attending, rounds=3)
    assert near(played.params, plain("fedavg", 3, (), (), (0, 1, 4)))
    small, empty, _ = played.lines
    assert (small["bytes_up"], small["bytes_down"], small["failures"]) == (0, 0, 0)
    assert small["reasons"] == ["a sum of 2 clients shows too much of each"]
    assert (empty["bytes_up"], empty["reasons"]) == (0, [])


def poisoned(federation: Federation, client: int) -> Federation:
    """Return ``federation`` with rows of ``client`` that no training survives."""
    site = federation.site
    x = site.examples.x.float()
    x[federation.shards.rows(client)] = torch.nan
    site.examples = replace(site.examples, x=x)
    return federation


def test_a_client_whose_training_diverges_is_left_out(tmp_path, plain) -> None:
    federation = poisoned(federation_of(tmp_path, *SUM, *FEDAVG), 2)
    played = play(federation, rounds=1)
    assert near(played.params, plain("fedavg", 1, (0, 1, 3, 4)))
    (reason,) = played.lines[0]["reasons"]
    assert "client 2" in reason
    assert "NaN or Inf" in reason


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda r: r.content.pop(messages.METRICS), "expected one MetricRecord"),
        (lambda r: r.content.pop(messages.ARRAYS), "no arrays called 'arrays'"),
        (
            lambda r: r.content.__setitem__("reply", ConfigRecord({"basis": "another"})),
            "other frozen factors",
        ),
        (
            lambda r: r.content.__setitem__("arrays", messages.encode({"masked": torch.ones(3)})),
            "its masked numbers are float32",
        ),
    ],
)
def test_a_reply_that_cannot_be_used_is_left_out(spoil, words: str, tmp_path, plain) -> None:
    def change(reply: Message):
        if client_of(reply) == 3 and reply.metadata.message_type == "train":
            spoil(reply)
        return [reply]

    grid = lambda f: Tampering(app_of(f), 5, change)  # noqa: E731
    played = run_of(tmp_path, *SUM, *FEDAVG, grid=grid)
    assert near(played.params, plain("fedavg", 1, (0, 1, 2, 4)))
    (reason,) = played.lines[0]["reasons"]
    assert words in reason


def test_on_client_error_fail_minds_who_is_lost_in_a_phase(tmp_path) -> None:
    grid = losing(PHASES[1], 2)
    with pytest.raises(ClientFailure, match="client 2: no reply"):
        run_of(tmp_path, *SUM, *FEDAVG, "on_client_error=fail", grid=grid)


# ---- clients that keep to sums


def test_a_client_that_sends_to_sums_answers_nothing_else(tmp_path) -> None:
    federation = federation_of(tmp_path, *SUM, *WAYS["fed_sb"])
    open_handed = replace(federation, strategy=replace(federation.strategy, secagg=None))
    with pytest.raises(RunError, match="sends its update to a sum only"):
        play(open_handed, rounds=1)
    asks = replace(open_handed.strategy, seeded_factors=None)
    with pytest.raises(RunError, match="no client sent a gradient"):
        play(replace(federation, strategy=asks), rounds=1)


def test_a_client_without_secagg_answers_no_phase_of_it(tmp_path) -> None:
    federation = federation_of(tmp_path, *SUM, *FEDAVG)
    federation.site.secagg = None
    with pytest.raises(RunError, match="it has no secagg=true"):
        play(federation, rounds=1)


def test_what_leaves_a_client_is_masked_and_without_a_loss(tmp_path) -> None:
    seen: list[Message] = []

    def change(reply: Message):
        seen.append(reply)
        return [reply]

    run_of(tmp_path, *SUM, *FEDAVG, grid=lambda f: Tampering(app_of(f), 5, change))
    trained = [reply for reply in seen if reply.metadata.message_type == "train"]
    assert len(trained) == 5
    for reply in trained:
        assert list(reply.content["arrays"]) == ["masked"]
        assert list(reply.content["metrics"]) == ["num-examples"]


# ---- bytes


def test_all_bytes_of_all_phases_are_counted(tmp_path) -> None:
    sent: Counter[str] = Counter()

    class Counting(LocalGrid):
        def stream(self, outgoing, timeout=0.0):
            outgoing = list(outgoing)
            for message in outgoing:
                sent["down"] += messages.wire_bytes(message.content)
            for reply in super().stream(outgoing, timeout):
                sent["up"] += messages.wire_bytes(reply.content)
                yield reply

    played = run_of(tmp_path, *SUM, *FEDAVG, grid=lambda f: Counting(app_of(f), 5))
    (line,) = played.lines
    assert (line["bytes_up"], line["bytes_down"]) == (sent["up"], sent["down"])
    size = played.session.strategy.layout.size
    masked = 5 * (size + 1) * SecureAggregation().quantiser.width(5)
    assert masked < line["bytes_up"] < masked + 5 * 3000


# ---- resume


def test_a_resumed_run_gives_the_same_bits_and_keeps_no_secrets(tmp_path) -> None:
    overrides = (*SUM, *WAYS["fed_sb"], "checkpoint.every=1")
    lossy = losing("train", 3, round=2)
    whole = run_of(tmp_path / "whole", *overrides, grid=lossy, rounds=3)
    first = federation_of(tmp_path / "parts", *overrides)
    grid = lossy(first)
    play(first, grid, rounds=2)
    assert any(SECAGG in state for state in grid.states.values())  # of the client that was lost
    (checkpoint,) = (tmp_path / "parts" / "checkpoints").glob("round_000002/checkpoint.json")
    kept = json.loads(checkpoint.read_text())["clients"]
    assert not any(SECAGG in records for records in kept.values())
    parts = run_of(tmp_path / "parts", *overrides, rounds=3)
    assert same(whole.params, parts.params)
    assert comparable(whole.lines) == comparable(parts.lines)


# ---- beneath it, rows that are protected

SAMPLE = (*FEDAVG, "privacy=sample", "privacy.noise_multiplier=1.5", "checkpoint.every=1")


def protected_run(folder: Path, *overrides: str, rounds: int = 1) -> tuple[Played, list[Entry]]:
    """Run, or go on with, what has a ledger, and return its entries as well."""
    federation = federation_of(folder, *overrides)
    with protected(federation, clients_here=True):
        played = play(federation, rounds=rounds)
    return played, read(folder / "ledger")


def test_a_reply_that_was_stored_is_masked_anew_and_paid_for_once(tmp_path) -> None:
    before, paid = protected_run(tmp_path, *SUM, *SAMPLE, rounds=2)
    assert Counter(entry.client for entry in paid) == {f"digits#{n}": 2 for n in EVERYONE}
    assert [line["train_loss"] for line in before.lines] == [None, None]
    rmtree(tmp_path / "checkpoints" / "round_000002")
    after, still = protected_run(tmp_path, *SUM, *SAMPLE, rounds=2)
    assert same(before.params, after.params)  # noise is secure: only what was stored gives that
    assert still == paid


def test_noise_of_rows_passes_through_the_sum(tmp_path) -> None:
    seeded = (*SAMPLE, "privacy.reproducible=true")
    (plain, paid), (summed, also) = (
        protected_run(tmp_path / name, *seeded, *ways)
        for name, ways in (("plain", ()), ("summed", SUM))
    )
    assert near(summed.params, plain.params)
    assert summed.lines[0]["epsilon"] == plain.lines[0]["epsilon"] > 0
    assert [e.reply for e in also] == [e.reply for e in paid]  # what is kept is in the clear


def test_nobody_pays_for_a_message_that_asks_for_no_sum(tmp_path) -> None:
    federation = federation_of(tmp_path, *SUM, *SAMPLE)
    open_handed = replace(federation, strategy=replace(federation.strategy, secagg=None))
    with (
        protected(federation, clients_here=True) as ledger,
        pytest.raises(RunError, match="sends its update to a sum only"),
    ):
        play(open_handed, rounds=1)
    assert ledger.head.length == 0


# ---- on top of it, clients that are protected

CLIENT = (
    *FEDAVG,
    "privacy=client",
    "privacy.clipping_norm=0.5",
    "privacy.noise_multiplier=0.8",
    "privacy.reproducible=true",
)
CLIENT_SUM = ("secagg=true", "secagg.clipping_norm=0.5")


def gap(left: Played, right: Played) -> float:
    return max((left.params[n] - right.params[n]).abs().max().item() for n in right.params)


def test_clients_are_as_private_as_without(tmp_path) -> None:
    plain, paid = protected_run(tmp_path / "plain", *CLIENT, rounds=2)
    summed, also = protected_run(tmp_path / "summed", *CLIENT, *CLIENT_SUM, rounds=2)
    assert gap(summed, plain) < 1e-5  # the same noise, but for the rounding that it covers
    assert [line["epsilon"] for line in summed.lines] == [line["epsilon"] for line in plain.lines]
    assert [(e.round, e.client, e.release) for e in also] == [
        (e.round, e.client, e.release) for e in paid
    ]
    assert [(e.round, e.client) for e in also] == [(t, f"{n}") for t in (1, 2) for n in EVERYONE]


@pytest.mark.slow
@pytest.mark.parametrize("ways", [(*CLIENT, *CLIENT_SUM), (*SAMPLE, *SUM)], ids=["client", "rows"])
def test_a_run_with_sums_is_verified(ways, tmp_path) -> None:
    out = tmp_path / "run"
    result = run([*SMALL, *ways, f"out={out}"])
    assert verify(out).problems == []
    assert result.summary["epsilon"] > 0
    lines = (out / "ledger" / "ledger.jsonl").read_text().splitlines()
    (out / "ledger" / "ledger.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    assert verify(out).problems


@pytest.mark.parametrize("bits", [4, 24])
def test_the_noise_is_that_of_the_rounded_sum(bits: int) -> None:
    quantiser = SecureAggregation(clipping_norm=2.0, bits=bits).quantiser
    size = 300_000
    bound = quantiser.longest(size)
    assert bound == pytest.approx(2.0 + 2.0 / (2 ** (bits - 1) - 2) * size**0.5, rel=1e-12)
    how = client_privacy(clipping_norm=2.0)
    released = how.release(WIDE, bound, 10.0, 0.7, SeededStream(0, "sum", bits))["w"]
    assert not misses(released, 0.7 * bound / 10)
    assert misses(released, 0.7 * 2.0 / 10) == (bits == 4)


def test_without_noise_a_release_is_the_sum_over_the_expected_cohort() -> None:
    total = {"w": torch.tensor([3.0, -1.5], dtype=torch.float64)}
    found = client_privacy().release(total, 1.0, 6.0, 0.0, SeededStream(0, "sum"))
    assert found["w"].tolist() == [0.5, -0.25]


def test_a_round_of_a_private_server_without_a_sum_is_noise_alone_and_counted(tmp_path) -> None:
    federation = federation_of(tmp_path, *CLIENT, *CLIENT_SUM, "secagg.bits=4")
    released: list[Params] = []

    class Watching(Silent):
        def round(self, record, total):
            released.append(federation.strategy._session.now.params)

    grid = losing("train", 0, 1, 2)(federation)
    with protected(federation, clients_here=True) as ledger:
        played = play(federation, grid, Watching())
        assert ledger.head.length == 10
    first, second = played.lines
    assert (first["clients"], second["clients"]) == (0, 5)
    assert 0 < first["epsilon"] < second["epsilon"]
    layout = federation.model.layout
    moved = norm(subtract(released[0], layout.unpack(federation.model.initial)))
    # In few bits, rounding makes updates much longer; the deviation of 460 numbers varies by 3 %.
    longest = federation.site.secagg.quantiser.longest(layout.size)
    assert longest > 4 * 0.5
    assert moved / layout.size**0.5 == pytest.approx(0.8 * longest / 5, rel=0.2)


def test_a_private_server_never_sees_that_a_training_diverged(tmp_path) -> None:
    def noised(folder: str, *overrides: str) -> Played:
        federation = poisoned(federation_of(tmp_path / folder, *CLIENT, *overrides), 2)
        with protected(federation, clients_here=True):
            return play(federation, rounds=1)

    plain, summed = noised("plain"), noised("summed", *CLIENT_SUM)
    assert gap(summed, plain) < 1e-5
    assert summed.lines[0]["reasons"] == []
    assert plain.lines[0]["failures"] == 1


# ---- settings


@pytest.mark.parametrize("text", ["true", "True", "'true'"])
def test_true_is_an_option(text: str) -> None:
    found = configure([f"secagg={text}", *FEDAVG, "out=/nowhere"])
    assert found.secagg == SecureAggregation()
    assert configure([f"secagg={text}", "secagg=none", "out=/nowhere"]).secagg is None


@pytest.mark.parametrize("text", ["false", "yes", "null"])
def test_other_words_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match=f"secagg={text}: no such option; secagg is none or true"):
        configure([f"secagg={text}", *FEDAVG, "out=/nowhere"])


def test_weights_of_a_sum_are_equal() -> None:
    with pytest.raises(ValueError, match="weighting must be 'uniform' with secagg"):
        FedAvg(secagg=SecureAggregation())


UNIFORM = {"weighting": "uniform"}


def reasons(**parts: object) -> list[str]:
    """Return why an experiment of ``parts`` is refused; without any it is not."""
    allowed = {
        "num_clients": 100,
        "rounds": 50,
        "privacy": None,
        "strategy": FedAvg(**UNIFORM),
        "adapter": None,
        "participation": Bernoulli(rate=0.1),
        "compression": None,
        "attack": None,
        "defence": None,
        "secagg": SecureAggregation(clipping_norm=1.0),
        "evaluate": SimpleNamespace(clients=True),
    }
    return refusals(SimpleNamespace(**{**allowed, **parts}), lambda group: f"{group}=typed")


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"strategy": FedAdam(**UNIFORM)},
        {"strategy": FedSB(), "adapter": LoRASB(rank=2, init="seeded_random")},
        {"strategy": FedSB(), "adapter": LoRASB(rank=2, init="private")},
        {"strategy": FedIT(**UNIFORM)},
        {"attack": LabelFlip(fraction=0.2)},
        {"participation": Uniform(3)},
        {"participation": Trace(path="a.csv")},
        {"participation": Uniform(10), "privacy": client_privacy()},
        {"participation": Bernoulli(rate=0.5), "privacy": client_privacy()},
        {"participation": Markov(rate=0.1), "privacy": client_privacy()},
        {"strategy": None, "participation": None, "num_clients": None, "evaluate": None},
    ],
    ids=str,
)
def test_what_a_sum_is_enough_for_is_allowed(parts) -> None:
    assert reasons(**parts) == []


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"strategy": FedAvg()}, ["strategy.weighting=examples", "strategy.weighting=uniform"]),
        ({"strategy": FedAU()}, ["weighs each client by itself", "strategy=fedavg"]),
        ({"strategy": Mine()}, ["weighs each client by itself", "strategy=fedavg"]),
        ({"strategy": KnownProbability()}, ["weighs each client by itself", "strategy=fedavg"]),
        ({"strategy": AverageAll()}, ["its divisor", "strategy=fedavg"]),
        ({"strategy": MIFA()}, ["each client's last update", "strategy=fedavg"]),
        ({"strategy": FedVARP()}, ["each client's last update", "strategy=fedavg"]),
        ({"strategy": FedExLoRA()}, ["the mean of the products", "fed_sb"]),
        ({"strategy": FLoRA()}, ["stacks the factors", "fed_sb"]),
        ({"strategy": FRL()}, ["rankings", "adapter=full"]),
        ({"strategy": EControl()}, ["the server's h", "strategy=fedavg"]),
        ({"strategy": Signs()}, ["its combine would see one update", "strategy=fedavg"]),
        ({"strategy": ByClient()}, ["its weight would see one update", "strategy=fedavg"]),
        ({"compression": TopK()}, ["compression=typed", "compression=none", "secagg.bits"]),
        ({"defence": NormClip(clipping_norm=1.0)}, ["defence=typed", "secagg.clipping_norm"]),
        ({"defence": Krum()}, ["defence=typed", "the sum only", "defence=none"]),
        ({"attack": SignFlip(fraction=0.2, factor=2.0)}, ["attack=typed", "attack=label_flip"]),
        ({"attack": ALIE(fraction=0.2, accomplices=4)}, ["attack=typed", "attack=label_flip"]),
        ({"adapter": LoRASB(rank=2, init="client_sum")}, ["in the clear", "seeded_random"]),
        ({"participation": Uniform(2)}, ["participation=typed", "2 clients", "fewer than 3"]),
        ({"num_clients": 2, "participation": Uniform()}, ["num_clients=2", "fewer than 3"]),
        ({"participation": Bernoulli(rate=0.02)}, ["2 clients are expected", "fewer than 3"]),
        (
            {"participation": Uniform(10), "privacy": client_privacy(quantile=0.5)},
            ["privacy.quantile=0.5", "privacy.quantile=null"],
        ),
        (
            {"participation": Uniform(10), "privacy": client_privacy(clipping_norm=2.0)},
            ["privacy.clipping_norm=2 ", "secagg.clipping_norm=1:", "set both"],
        ),
        (
            {"privacy": client_privacy()},
            ["shows in the model", "of 10 expected", "participation=uniform"],
        ),
    ],
    ids=str,
)
def test_what_needs_more_than_a_sum_is_refused_with_the_reason(parts, words) -> None:
    (reason,) = reasons(**parts)
    assert all(word in reason for word in words), reason


def test_refusals_reach_who_configures() -> None:
    with pytest.raises(ConfigError) as caught:
        configure(["secagg=true", "strategy=fedau", "defence=median", "out=/nowhere"])
    told = caught.value.problems
    assert any(text.startswith("strategy=fedau with secagg=true") for text in told)
    assert any(text.startswith("defence=median with secagg=true") for text in told)


@pytest.mark.parametrize(("clients", "rate"), [(0, 0.5), (2, 1.0), (9, 0.3), (100, 0.1)])
def test_how_likely_a_cohort_is_too_small(clients: int, rate: float) -> None:
    assert few(clients, rate) == pytest.approx(binom.cdf(2, clients, rate), rel=1e-9)
