"""Sample-level privacy at a client: its settings, its noise, its budget, and what it refuses."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from clients.guard import Answer, Charge, Guard, Owner
from clients.replies import DiskReplies, MemoryReplies
from clients.training import LocalTraining
from fedsys.config import configure
from fedsys.data import Bootstrap
from fedsys.data.shards import RowShards
from fedsys.errors import ConfigError, LedgerError, PrivacyBudgetExceeded
from fedsys.privacy.accounting import Release, epsilon, merged
from fedsys.privacy.ledger import Ledger
from fedsys.privacy.sample_conflicts import refusals
from fedsys.privacy.sample_level import SamplePrivacy
from fedsys.protection import account_of
from tests.runs import experiment_of

DELTA = 1e-3
TRAINING = LocalTraining(lr=0.1, batch_size=16, steps=2)
SETTINGS: dict[str, Any] = {
    "epsilon": 8.0,
    "noise_multiplier": None,
    "delta": None,
    "clipping_norm": 1.0,
    "rounds": None,
    "initial_share": 0.2,
    "reproducible": False,
    "ledger": None,
    "allow_unprotected_initialisation": False,
}


def privacy(**changes: Any) -> SamplePrivacy:
    return SamplePrivacy(**(SETTINGS | changes))


# ---- settings


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"epsilon": None}, "epsilon or noise_multiplier must be given"),
        ({"epsilon": 0.0}, "epsilon must be positive"),
        ({"epsilon": -1.0}, "epsilon must be positive"),
        ({"epsilon": math.nan}, "epsilon must be positive"),
        ({"noise_multiplier": 0.0}, "epsilon=inf clips without noise"),
        ({"noise_multiplier": math.inf}, "noise_multiplier must be positive"),
        ({"noise_multiplier": math.nan}, "noise_multiplier must be positive"),
        ({"epsilon": math.inf, "noise_multiplier": 1.0}, "has no meaning"),
        ({"delta": 0.0}, "delta must be in"),
        ({"delta": 1.0}, "delta must be in"),
        ({"clipping_norm": 0.0}, "clipping_norm must be positive"),
        ({"clipping_norm": math.inf}, "clipping_norm must be positive"),
        ({"clipping_norm": math.nan}, "clipping_norm must be positive"),
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"initial_share": 0.0}, "initial_share must be in"),
        ({"initial_share": 1.0}, "initial_share must be in"),
        ({"canaries": 0}, "canaries must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        privacy(**changes)


def test_noise_given_outright_is_taken_and_none_is_none() -> None:
    given = privacy(epsilon=None, noise_multiplier=1.5)
    assert given.plan(0.1, 7, DELTA, ()) == Release(1.5, 0.1, 7)
    assert given.initial(0.3, DELTA) == Release(1.5, 0.3, 1)
    both = privacy(epsilon=2.0, noise_multiplier=1.5)  # a budget changes who takes part, not z
    assert both.plan(0.1, 7, DELTA, ()) == Release(1.5, 0.1, 7)
    clipped = privacy(epsilon=math.inf)
    assert clipped.plan(0.1, 7, DELTA, ()) == Release(0.0, 0.1, 7)
    assert clipped.initial(0.3, DELTA) == Release(0.0, 0.3, 1)


@pytest.mark.parametrize("rate", [0.02, 1.0])
def test_calibrated_noise_spends_the_budget_and_no_more(rate: float) -> None:
    plan = privacy().plan(rate, 12, DELTA, ())
    assert (plan.sample_rate, plan.steps) == (rate, 12)
    assert 0.99 * 8 <= epsilon([plan], DELTA) <= 8
    halved = replace(plan, noise_multiplier=plan.noise_multiplier / 2)
    assert epsilon([halved], DELTA) > 8


def test_an_initialisation_takes_its_share_and_the_rounds_the_rest() -> None:
    how = privacy()
    first = how.initial(0.5, DELTA)
    assert 0.99 * 1.6 <= epsilon([first], DELTA) <= 1.6
    rounds = how.plan(0.1, 12, DELTA, (first,))
    assert 0.99 * 8 <= epsilon([first, rounds], DELTA) <= 8
    alone = how.plan(0.1, 12, DELTA, ())
    assert rounds.noise_multiplier > alone.noise_multiplier


# ---- what it cannot be combined with


def refused(*overrides: str, **changes: Any) -> list[str]:
    experiment = experiment_of("privacy=sample", "privacy.epsilon=8", "adapter.init=seeded_random")
    return refusals(replace(experiment, **changes))


def test_a_private_experiment_is_accepted() -> None:
    assert refused() == []


def test_lots_that_are_not_poisson_are_refused() -> None:
    training = LocalTraining(lr=0.1, order="stream")
    assert "order=stream" in refused(client=training)[0]
    training = LocalTraining(lr=0.1, group_by_length=True)
    assert "group_by_length" in refused(client=training)[0]


def test_metrics_of_the_clients_own_rows_are_refused() -> None:
    (reason,) = refused(evaluate=SimpleNamespace(clients=True))
    assert "evaluate.clients=true" in reason


def test_records_that_several_clients_hold_are_refused() -> None:
    (reason,) = refused(partition=Bootstrap(examples=10))
    assert "partition=bootstrap" in reason


def test_an_initialisation_without_noise_needs_to_be_asked_for_by_name() -> None:
    adapter = SimpleNamespace(init="client_sum")
    (reason,) = refused(adapter=adapter)
    assert "adapter.init=private" in reason
    allowed = privacy(allow_unprotected_initialisation=True)
    assert refused(adapter=adapter, privacy=allowed) == []


def test_who_asks_for_privacy_alone_is_told_what_to_add() -> None:
    with pytest.raises(ConfigError, match=r"such as privacy\.epsilon=3"):
        configure(["privacy=sample", "out=/nowhere"])


# ---- the account


def account(*overrides: str, sizes: tuple[int, ...] = (40, 200, 90), init: str = "") -> Any:
    experiment = experiment_of("privacy=sample", "adapter.init=seeded_random", *overrides)
    if init:
        experiment = replace(experiment, adapter=replace(experiment.adapter, init=init))
    shards = RowShards(torch.arange(sum(sizes)), torch.tensor(sizes))
    return account_of(experiment, shards, experiment.participation)


def test_delta_is_half_of_what_the_largest_client_may_have() -> None:
    assert account("privacy.epsilon=8").delta == 1 / 400
    assert account("privacy.epsilon=8", "privacy.delta=0.004").delta == 0.004


def test_a_delta_that_would_publish_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match=r"below 1/n = 0\.005 for n = 200"):
        account("privacy.epsilon=8", "privacy.delta=0.005")


@pytest.mark.parametrize(
    ("init", "said"),
    [
        ("private", "included"),
        ("client_sum", "excluded"),
        ("public", "not private data"),
        ("seeded_random", "not private data"),
    ],
)
def test_what_is_said_of_the_initialisation(init: str, said: str) -> None:
    facts = account("privacy.epsilon=8", init=init).facts()
    assert facts["initialisation"] == said
    assert facts["noise"] == "secure"
    assert facts["protected"] == "one record: add or remove one"


def test_noise_from_the_seed_is_said_to_protect_nobody() -> None:
    said = account("privacy.epsilon=8", "privacy.reproducible=true").facts()["noise"]
    assert "protects nobody" in said


def test_the_figure_shown_is_that_of_whoever_has_spent_most() -> None:
    spent = {0: (Release(2.0, 0.1, 9),), 1: (Release(1.0, 0.1, 9),), 2: (Release(1.0, 0.1, 3),)}
    shown = account("privacy.epsilon=8")
    assert shown.epsilon(spent) == epsilon(spent[1], shown.delta)
    assert shown.epsilon({}) == 0


# ---- the guard


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "ledger") as opened:
        yield opened


def guard_of(ledger: Ledger, how: SamplePrivacy | None = None, **changes: Any) -> Guard:
    known: dict[str, Any] = {"run": "this", "delta": DELTA, "rounds": 3, "seed": 0}
    replies = changes.pop("replies", None) or MemoryReplies()
    return Guard(how or privacy(), ledger, replies, **(known | changes))


def owner(rows: int = 160, name: str = "digits#0") -> Owner:
    return Owner(name, "digits", lambda: "f", rows)


def ask(guard: Guard, round: int, who: Owner | None = None, start: str = "x") -> Charge:
    return guard.charge(0, who or owner(), TRAINING, round, (start, ""))


def give(guard: Guard, charge: Charge) -> Answer:
    arrays = {"w": torch.tensor([float(charge.round), 0.5])}
    answer = guard.answer(charge, arrays, {"num-examples": 160})
    guard.keep([charge], [answer])
    return answer


def test_clients_of_different_size_have_noise_and_rates_of_their_own(ledger: Ledger) -> None:
    guard = guard_of(ledger)
    found = {rows: ask(guard, 1, owner(rows, f"{rows}")).release for rows in (8, 160, 640)}
    assert [r.sample_rate for r in found.values()] == [1.0, 0.1, 0.025]
    assert len({r.noise_multiplier for r in found.values()}) == 3
    for release in found.values():
        whole = replace(release, steps=3 * 2)  # three rounds of two steps
        assert release.steps == 2
        assert 0.99 * 8 <= epsilon([whole], DELTA) <= 8
    training = guard.private(ask(guard, 1, owner(160)))
    assert training.expected_lot == pytest.approx(16)


def test_the_budget_is_over_all_rounds_that_are_planned_for(ledger: Ledger) -> None:
    guard = guard_of(ledger, privacy(rounds=2))
    for round in (1, 2):
        give(guard, ask(guard, round))
    with pytest.raises(PrivacyBudgetExceeded, match="above its target 8") as refused:
        ask(guard, 3)
    assert refused.value.epsilon > 8
    assert 0.99 * 8 <= epsilon(ledger.spent("digits#0"), DELTA) <= 8
    ask(guard, 3, owner(name="digits#1"))  # others have a budget of their own


def test_a_stored_answer_is_given_again_and_not_entered_again(ledger: Ledger) -> None:
    guard = guard_of(ledger)
    first = give(guard, ask(guard, 1))
    again = guard.known(ask(guard, 1))
    assert again is not None
    assert torch.equal(again.arrays["w"], first.arrays["w"])
    assert (again.spent, again.metrics, again.stream) == (first.spent, first.metrics, first.stream)
    assert ledger.head.length == 1


def test_another_question_is_a_second_release(ledger: Ledger) -> None:
    guard = guard_of(ledger)
    first = give(guard, ask(guard, 1))
    other = ask(guard, 1, start="another x")
    assert guard.known(other) is None
    second = give(guard, other)
    assert second.digest == first.digest  # other noise may lead to the same bits, as of few signs
    assert sum(r.steps for r in second.spent) == 4
    assert ledger.head.length == 2


def test_an_answer_made_again_from_the_seed_is_one_release(ledger: Ledger) -> None:
    guard = guard_of(ledger, privacy(reproducible=True))
    give(guard, ask(guard, 1))
    guard.replies.prune(0, 2)  # lost with the power
    give(guard, ask(guard, 1))
    assert ledger.head.length == 1
    other = ask(guard, 1, start="another x")
    with pytest.raises(LedgerError, match="was used before"):
        guard.keep([other], [guard.answer(other, {"w": torch.ones(2)}, {})])


def test_an_answer_that_was_stored_and_not_entered_is_entered_once(
    ledger: Ledger, tmp_path: Path
) -> None:
    guard = guard_of(ledger, replies=DiskReplies(tmp_path / "replies"))
    charge = ask(guard, 1)
    append, ledger.append = ledger.append, lambda entries: 1 / 0  # type: ignore
    with pytest.raises(ZeroDivisionError):
        give(guard, charge)
    ledger.append = append  # type: ignore[method-assign]
    assert ledger.head.length == 0
    later = guard_of(ledger, replies=DiskReplies(tmp_path / "replies"))
    for _ in range(2):
        found = later.known(ask(later, 1))
        assert found is not None
        assert found.spent == merged([charge.release])
    assert ledger.head.length == 1


def test_an_answer_that_was_not_entered_is_not_sent_once_the_budget_is_gone(
    ledger: Ledger, tmp_path: Path
) -> None:
    guard = guard_of(ledger, replies=DiskReplies(tmp_path / "replies"))
    charge = ask(guard, 1)
    arrays = {"w": torch.zeros(2)}
    answer = guard.answer(charge, arrays, {})
    said = {"metrics": {}, "stream": answer.stream, "spent": []}
    guard.replies.put(0, 1, charge.key, arrays, said)  # and killed before it was entered
    other = guard_of(ledger, run="another")
    for round in (1, 2, 3):
        give(other, ask(other, round))
    with pytest.raises(PrivacyBudgetExceeded):
        ask(guard, 1)
    assert ledger.head.length == 3


def test_what_another_run_has_spent_is_said_with_an_answer_that_is_entered_late(
    ledger: Ledger, tmp_path: Path
) -> None:
    how = privacy(epsilon=None, noise_multiplier=1.0)
    guard = guard_of(ledger, how, replies=DiskReplies(tmp_path / "replies"))
    charge = ask(guard, 1)
    answer = guard.answer(charge, {"w": torch.zeros(2)}, {})
    said = {"metrics": {}, "stream": answer.stream, "spent": [(1.0, 0.1, 2)]}
    guard.replies.put(0, 1, charge.key, answer.arrays, said)
    give(other := guard_of(ledger, how, run="another"), ask(other, 1))
    found = guard.known(ask(guard, 1))
    assert found is not None
    assert found.spent == (Release(1.0, 0.1, 4),)


def test_gradients_without_noise_leave_only_where_that_was_asked_for(ledger: Ledger) -> None:
    with pytest.raises(ValueError, match="sends no gradients without noise"):
        guard_of(ledger).spent(owner())
    allowed = privacy(allow_unprotected_initialisation=True)
    assert guard_of(ledger, allowed).spent(owner()) == ()


@pytest.mark.parametrize(
    ("checkpoints", "kept"),
    [([], {3}), ([0, 0], {0, 1, 2, 3}), ([0, 1], {0, 1, 2, 3}), ([1, 2], {2, 3})],
)
def test_replies_are_kept_as_long_as_a_server_may_ask_for_them(
    ledger: Ledger, checkpoints: list[int], kept: set[int]
) -> None:
    guard = guard_of(ledger, initial_rows=None)
    charges = {0: guard.initial_charge(0, owner(), ("x", ""))}
    give(guard, charges[0])
    for round in (1, 2, 3):
        give(guard, ask(guard, round))
        charges[round] = ask(guard, round)
    guard.prune(checkpoints)
    assert {round for round, charge in charges.items() if guard.known(charge)} == kept


def test_an_initialisation_and_all_rounds_stay_within_the_budget(ledger: Ledger) -> None:
    guard = guard_of(ledger, initial_rows=40)
    charge = guard.initial_charge(0, owner(), ("x", ""))
    assert (charge.release.sample_rate, charge.release.steps) == (0.25, 1)
    assert guard.private(charge).expected_lot == 40
    give(guard, charge)
    for round in (1, 2, 3):
        give(guard, ask(guard, round))
    assert 0.99 * 8 <= epsilon(ledger.spent("digits#0"), DELTA) <= 8
    with pytest.raises(PrivacyBudgetExceeded):
        ask(guard, 4)


def test_the_noise_of_a_charge_is_never_that_of_another(ledger: Ledger) -> None:
    guard = guard_of(ledger)
    assert ask(guard, 1).stream.id != ask(guard, 1).stream.id
    seeded = guard_of(ledger, privacy(reproducible=True))
    assert ask(seeded, 1).stream.id == ask(seeded, 1).stream.id != ask(seeded, 2).stream.id
