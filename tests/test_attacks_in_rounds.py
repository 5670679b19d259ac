"""Attacks and defences as a round carries them out: who is asked, what counts, what comes of it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Message
from torch import Tensor

from fedsys.attacks import LabelFlip
from fedsys.config import configure
from fedsys.engines.local import FIRST_NODE, LocalGrid
from fedsys.errors import ConfigError
from fedsys.federation import Federation, assemble
from fedsys.params import Params
from strategies.frl import Rankings, rank
from tests.runs import (
    Cohorts,
    Played,
    Tampering,
    app_of,
    arrays_in,
    attended_by,
    client_of,
    federation_of,
    play,
    round_of,
    same,
    with_arrays,
)

ONE = [
    *["rounds=1", "dtype=float64", "strategy=fedavg", "strategy.weighting=uniform"],
    *["client.optimizer=sgd", "client.lr=0.5"],  # Adam's first step has one length everywhere
]
Make = Callable[..., Federation]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Return federations, each with a folder of its own."""
    count = iter(range(99))
    return lambda *overrides: federation_of(tmp_path / str(next(count)), *overrides)


def moved(federation: Federation, participation: Cohorts | None = None) -> Tensor:
    """Return x_1 - x_0 (size,) of a run of one round."""
    if participation is not None:
        federation = attended_by(federation, participation)
    run = play(federation)
    assert run.lines[0]["failures"] == 0
    return federation.model.layout.pack(run.params) - federation.model.initial


def alone(make: Make, *overrides: str) -> list[Tensor]:
    """Return the honest updates of the clients, from rounds that each has for itself."""
    return [moved(make(*overrides), Cohorts(otherwise=[client])) for client in range(5)]


# ---- attacks


@pytest.mark.parametrize("factor", [100.0, -3.0, 0.0])
def test_scale_multiplies_the_update_of_the_malicious_alone(make: Make, factor: float) -> None:
    updates = alone(make, *ONE)
    honest = moved(make(*ONE))
    attack = ["attack=scale", f"attack.factor={factor}", "attack.fraction=0.4"]
    attacked = moved(make(*ONE, *attack))
    excess = (factor - 1) / 5 * (updates[0] + updates[1])
    assert (attacked - honest - excess).abs().max() < 1e-15 * max(1, abs(factor))
    assert (honest - sum(updates) / 5).abs().max() < 1e-15


def test_sign_flip_and_codecs_attack_what_the_server_reads(make: Make) -> None:
    """The adversary stands behind the codec: it alters C(g), and C(g) of who is honest stays."""
    packed = [*ONE, "compression=topk", "compression.feedback=none"]
    updates = alone(make, *packed)
    assert all((update != 0).sum() < 0.2 * len(update) for update in updates)
    flip = ["attack=sign_flip", "attack.factor=5", "attack.fraction=0.2"]
    expected = (sum(updates[1:]) - 5 * updates[0]) / 5
    assert (moved(make(*packed, *flip)) - expected).abs().max() < 1e-15


def test_label_flip_trains_on_the_other_end_of_the_classes(make: Make) -> None:
    attacked = play(make("strategy=fedavg", "attack=label_flip", "attack.fraction=0.59"))
    by_hand = make("strategy=fedavg")
    labels = by_hand.dataset.train.labels
    assert labels is not None
    for client in (0, 1):  # 0.59 of five, rounded down
        rows = by_hand.shards.rows(client)
        labels[rows] = 9 - labels[rows]
    expected = play(by_hand)
    assert same(attacked.params, expected.params)
    assert [line["train_loss"] for line in attacked.lines] == [
        line["train_loss"] for line in expected.lines
    ]
    assert not same(attacked.params, play(make("strategy=fedavg")).params)


def test_a_cohort_in_one_pass_flips_the_labels_of_the_malicious_alone(make: Make) -> None:
    overrides = [*ONE, "attack=label_flip", "attack.fraction=0.4"]
    federation = make(*overrides)
    together = play(federation, LocalGrid(app_of(federation), 5, chunk=5))
    apart = play(make(*overrides))
    for name, value in apart.params.items():
        assert torch.allclose(together.params[name], value, rtol=0, atol=1e-14)


def test_labels_that_are_no_classes_are_refused_before_the_run() -> None:
    """As data of the user's may have them; of our own, the configuration knows."""
    data = ["data=least_squares", "data.clients=5", "model=point", "strategy=fedavg"]
    experiment = configure([*data, "num_clients=5", "partition=contiguous", "out=/nowhere"])
    with pytest.raises(ConfigError, match="attack: the data have no classes"):
        assemble(replace(experiment, attack=LabelFlip(fraction=0.2)))
    assemble(experiment)


# ---- accomplices

REVERSE = [
    *["strategy=frl", "num_clients=10", "attack=reverse_rank", "attack.fraction=0.4"],
    "attack.honest_majority=false",
]
WITH = [*REVERSE, "attack.accomplices=4"]
COHORT = Cohorts({1: [1, 5, 6, 8], 2: [4, 7, 9]})  # the malicious are 0 to 3


class Recorded:
    """A federation whose messages are kept."""

    def __init__(self, federation: Federation, cohorts: Cohorts = COHORT) -> None:
        self.federation = attended_by(federation, cohorts)
        self.asked: dict[int, list[int]] = {}
        self.sent: dict[tuple[int, int], Params] = {}
        self.lost: set[int] = set()  # clients whose requests are lost
        self.change: Callable[[Message], Message] = lambda reply: reply

    def play(self, chunk: int = 1) -> Played:
        def lost(message: Message) -> bool:
            client = message.metadata.dst_node_id - FIRST_NODE
            self.asked.setdefault(round_of(message), []).append(client)
            return client in self.lost

        def watch(reply: Message) -> list[Message]:
            reply = self.change(reply)
            self.sent[round_of(reply), client_of(reply)] = arrays_in(reply)
            return [reply]

        app = app_of(self.federation)
        return play(self.federation, Tampering(app, 10, watch, lost=lost, chunk=chunk))


def test_accomplices_train_and_do_not_count(make: Make) -> None:
    recorded = Recorded(make(*WITH))
    run = recorded.play()
    plain = Recorded(make("strategy=frl", "num_clients=10"))
    honest = plain.play()
    assert recorded.asked[1] == [0, 1, 2, 3, 5, 6, 8], "in order of clients"
    assert recorded.asked[2] == [4, 7, 9], "where nobody is malicious, there is nobody to help"
    assert plain.asked[1] == [1, 5, 6, 8]
    assert run.participants == honest.participants == [[1, 5, 6, 8], [4, 7, 9]]
    first, other = run.lines[0], honest.lines[0]
    for name in ("clients", "failures", "train_loss", "bytes_up", "bytes_down", "bytes_init"):
        assert first[name] == other[name], name
    assert first["clients"] == 4
    assert not same(run.params, honest.params)


def test_the_vote_is_that_of_the_honest_and_the_reverse_of_the_colluders(make: Make) -> None:
    recorded = Recorded(make(*WITH, "rounds=1"), Cohorts({1: [0, 2, 6, 7, 8]}))
    run = recorded.play()
    codec = recorded.federation.site.codec
    assert isinstance(codec, Rankings)
    assert recorded.asked[1] == [0, 1, 2, 3, 6, 7, 8]
    rankings = {c: codec._split(arrays, 1.0) for (_, c), arrays in recorded.sent.items()}
    for name, shape in codec.shapes.items():
        n = shape.numel()
        places = {c: np.argsort(own[name].numpy()) for c, own in rankings.items()}
        colluding = sum(places[client] for client in range(4))
        reverse = np.argsort(np.argsort(-colluding, kind="stable"))
        votes = 2 * reverse + sum(places[client] for client in (6, 7, 8))
        order = np.argsort(votes, kind="stable")
        assert rank(run.params[name]).tolist() == order.tolist()
        assert sorted(reverse) == list(range(n))


def test_without_accomplices_the_colluders_are_those_of_the_cohort(make: Make) -> None:
    recorded = Recorded(make(*REVERSE, "attack.accomplices=0", "rounds=1"))
    recorded.play()
    assert recorded.asked[1] == [1, 5, 6, 8]


def test_an_accomplice_that_fails_is_no_failure_of_the_round(make: Make) -> None:
    """A server that is under attack does not know of it; the colluders know less."""
    recorded = Recorded(make(*WITH, "rounds=1", "on_client_error=fail"))
    recorded.lost = {0}

    def spoil(reply: Message) -> Message:
        return with_arrays(reply, {}) if client_of(reply) == 2 else reply

    recorded.change = spoil
    run = recorded.play()
    assert recorded.asked[1] == [0, 1, 2, 3, 5, 6, 8]
    assert (run.lines[0]["clients"], run.lines[0]["failures"]) == (4, 0)
    assert run.lines[0]["reasons"] == []
    fewer = attended_by(make(*WITH, "rounds=1"), COHORT)
    apart = play(fewer)
    assert not same(run.params, apart.params)


def test_a_malicious_client_that_fails_is_a_failure_and_its_reverse_does_not_count(
    make: Make,
) -> None:
    recorded = Recorded(make(*WITH, "rounds=1"))
    recorded.lost = {1}
    run = recorded.play()
    assert run.lines[0]["reasons"] == ["client 1: no reply before the deadline"]
    honest = play(
        attended_by(make("strategy=frl", "num_clients=10"), Cohorts({1: [5, 6, 8]})), rounds=1
    )
    assert same(run.params, honest.params)


def test_memory_of_accomplices_does_not_move_on(make: Make) -> None:
    """What they train for the adversary's knowledge alone was never sent."""
    overrides = ["strategy=fedavg", "compression=topk", "num_clients=10"]
    attack = ["attack=alie", "attack.fraction=0.4", "attack.accomplices=4", "attack.z=1.0"]
    recorded = Recorded(make(*overrides, *attack))
    run = recorded.play()
    assert recorded.asked == {1: [0, 1, 2, 3, 5, 6, 8], 2: [4, 7, 9]}
    assert run.now.accepted == {1: 1, 5: 1, 6: 1, 8: 1, 4: 2, 7: 2, 9: 2}
    store = recorded.federation.site.store
    assert store.load(0, run.now.accepted.get(0, 0), [2]) == {}


@pytest.mark.parametrize("chunk", [1, 4])
def test_all_colluders_of_a_round_send_the_same(make: Make, chunk: int) -> None:
    attack = ["attack=min_max", "attack.fraction=0.6", "attack.perturbation=unit"]
    federation = make(*ONE, *attack)
    run = play(federation, LocalGrid(app_of(federation), 5, chunk=chunk))
    updates = alone(make, *ONE)
    colluding = torch.stack(updates[:3])
    mean = colluding.mean(0)
    apart = max(float((a - b).norm()) for a in colluding for b in colluding)
    found = federation.model.layout.pack(run.params) - federation.model.initial
    sent = (5 * found - updates[3] - updates[4]) / 3
    push = sent - mean
    assert torch.nn.functional.cosine_similarity(push, -mean, dim=0) == pytest.approx(1, abs=1e-9)
    farthest = max(float((sent - update).norm()) for update in colluding)
    assert farthest == pytest.approx(apart, rel=1e-9)


# ---- an honest majority


def test_cohorts_are_drawn_until_the_honest_have_the_majority(make: Make) -> None:
    overrides = ["strategy=frl", "num_clients=10", "rounds=9", "participation.cohort=4"]
    attack = ["attack=reverse_rank", "attack.fraction=0.4", "attack.accomplices=0"]
    counts = []
    for wish in ("true", "false"):
        federation = make(*overrides, *attack, f"attack.honest_majority={wish}")
        run = play(federation)
        counts.append([sum(client < 4 for client in cohort) for cohort in run.participants])
        assert all(len(cohort) == 4 for cohort in run.participants)
        assert [line["failures"] for line in run.lines] == [0] * 9
    assert max(counts[0]) == 1
    assert max(counts[1]) >= 2
    kept = [pair for pair in zip(*counts, strict=True) if pair[1] < 2]
    assert kept
    assert all(mine == other for mine, other in kept), "the first draw stands where it may"


def test_a_participation_that_leaves_no_choice_goes_on_with_a_warning(
    make: Make, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsys.invitations.ATTEMPTS", 3)
    attack = ["attack=sign_flip", "attack.fraction=0.4", "attack.honest_majority=true"]
    federation = attended_by(make("strategy=fedavg", *attack), Cohorts({1: [0, 1, 4], 2: [3]}))
    run = play(federation)
    assert run.participants == [[0, 1, 4], [3]]
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == ["round 1: no cohort has an honest majority"]


# ---- defences


def by_coordinate(updates: list[Tensor], rule: Callable[[np.ndarray], float]) -> Tensor:
    columns = torch.stack(updates).numpy().T
    return torch.tensor([rule(np.sort(column)) for column in columns], dtype=torch.float64)


SCALE = ["attack=scale", "attack.factor=-50", "attack.fraction=0.2"]


@pytest.fixture
def received(make: Make) -> list[Tensor]:
    """What the server receives with one attacker that sends -50 times its update."""
    updates = alone(make, *ONE)
    return [-50 * updates[0], *updates[1:]]


def test_a_round_of_the_median_by_hand(make: Make, received: list[Tensor]) -> None:
    found = moved(make(*ONE, *SCALE, "defence=median"))
    expected = by_coordinate(received, lambda column: column[2])
    assert (found - expected).abs().max() < 1e-15
    undefended = sum(received) / 5
    assert undefended.norm() > 5 * found.norm()


def test_the_median_of_an_even_cohort_is_between_the_middle_two(
    make: Make, received: list[Tensor]
) -> None:
    found = moved(make(*ONE, *SCALE, "defence=median"), Cohorts({1: [0, 1, 2, 4]}))
    four = [received[client] for client in (0, 1, 2, 4)]
    expected = by_coordinate(four, lambda column: (column[1] + column[2]) / 2)
    assert (found - expected).abs().max() < 1e-15


def test_a_round_of_the_trimmed_mean_knows_how_many_are_malicious(
    make: Make, received: list[Tensor]
) -> None:
    found = moved(make(*ONE, *SCALE, "defence=trimmed_mean"))
    expected = by_coordinate(received, lambda column: float(column[1:4].mean()))
    assert (found - expected).abs().max() < 1e-15
    # In a cohort without an attacker nothing is cut off.
    found = moved(make(*ONE, *SCALE, "defence=trimmed_mean"), Cohorts({1: [1, 2, 3]}))
    assert (found - sum(received[1:4]) / 3).abs().max() < 1e-15


def test_a_round_of_norm_clip_by_hand(make: Make, received: list[Tensor]) -> None:
    bound = float(received[1].norm()) * 0.9
    found = moved(make(*ONE, *SCALE, "defence=norm_clip", f"defence.clipping_norm={bound}"))
    clipped = [min(1.0, bound / float(update.norm())) * update for update in received]
    assert (found - sum(clipped) / 5).abs().max() < 1e-15
    assert found.norm() <= bound


@pytest.mark.parametrize("defence", ["krum", "multi_krum"])
def test_krum_takes_updates_as_they_were_sent_and_not_the_attackers(
    make: Make, received: list[Tensor], defence: str
) -> None:
    found = moved(make(*ONE, *SCALE, f"defence={defence}"))
    apart = torch.cdist(torch.stack(received), torch.stack(received)).square()
    if defence == "krum":  # n - a - 2 = 2 nearest others
        scores = apart.sort(1).values[:, 1:3].sum(1)
        expected = received[int(scores.argmin())]
    else:  # one by one until 2 a + 2 = 4 are left; n - a - 2 nearest, each being its own nearest
        scores = apart.sort(1).values[:, :2].sum(1)
        expected = received[int(scores.argmin())]
    assert (found - expected).abs().max() < 1e-15


def test_what_a_defence_leaves_out_is_counted_as_received(make: Make) -> None:
    federation = make(*ONE, *SCALE, "defence=krum")
    run = play(federation)
    assert (run.lines[0]["clients"], run.lines[0]["failures"]) == (5, 0)
    assert run.participants == [[0, 1, 2, 3, 4]]
    plain = play(make(*ONE))
    for name in ("train_loss", "bytes_up", "bytes_down"):
        assert run.lines[0][name] == plain.lines[0][name]


def test_a_round_without_updates_needs_no_defence(make: Make) -> None:
    for defence in ("median", "trimmed_mean", "krum", "multi_krum", "norm_clip"):
        federation = make("strategy=fedavg", *SCALE, f"defence={defence}")
        run = play(attended_by(federation, Cohorts({1: [], 2: [0, 3]})))
        assert [line["clients"] for line in run.lines] == [0, 2]
        assert all(value.isfinite().all() for value in run.params.values())
