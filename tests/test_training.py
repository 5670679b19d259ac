"""Batches, step sizes and checks of local training."""

import dataclasses
import itertools
import math
import subprocess
import sys

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from clients.training import LocalTraining

ROWS = torch.arange(100, 120)


def epochs_of(training: LocalTraining, rows: torch.Tensor = ROWS, **name: int) -> torch.Tensor:
    return training.batches(rows, **({"seed": 0, "round": 1, "client": 2} | name))


@settings(deadline=None)
@given(
    count=st.integers(1, 40), size=st.integers(1, 17), epochs=st.integers(1, 3), seed=st.integers(0)
)
def test_an_epoch_holds_every_row_once(count: int, size: int, epochs: int, seed: int):
    training = LocalTraining(lr=1, batch_size=size, epochs=epochs)
    rows = torch.arange(7, 7 + count)
    batches = epochs_of(training, rows, seed=seed)
    each = math.ceil(count / size)
    assert batches.shape == (epochs * each, size)
    assert training.num_steps(count) == len(batches)
    for epoch in batches.split(each):
        kept = epoch[epoch >= 0]
        assert kept.sort().values.equal(rows)
        # Only the end of the last batch is empty.
        assert epoch.flatten()[:count].equal(kept)


@settings(deadline=None)
@given(count=st.integers(1, 30), size=st.integers(1, 10), steps=st.integers(1, 25))
def test_steps_go_on_with_the_next_epoch(count: int, size: int, steps: int):
    rows = torch.arange(count)
    by_steps = epochs_of(LocalTraining(lr=1, batch_size=size, steps=steps, epochs=9), rows)
    by_epochs = epochs_of(LocalTraining(lr=1, batch_size=size, epochs=25), rows)
    assert by_steps.equal(by_epochs[:steps])
    assert len(by_steps) == steps


def test_batches_depend_on_seed_round_and_client_only():
    training = LocalTraining(lr=1, batch_size=8)
    first = epochs_of(training)
    torch.rand(3)
    assert epochs_of(training).equal(first)
    for name in ("seed", "round", "client"):
        assert not epochs_of(training, **{name: 5}).equal(first)
    twice = epochs_of(LocalTraining(lr=1, batch_size=8, epochs=2))
    assert twice[:3].equal(first)
    assert not twice[3:].equal(first)


@settings(deadline=None)
@given(count=st.integers(1, 40), size=st.integers(1, 9), steps=st.integers(1, 20))
def test_batches_of_similar_length(count: int, size: int, steps: int):
    lengths = torch.randint(1, 60, (count,), generator=torch.Generator().manual_seed(count))
    grouped = LocalTraining(lr=1, batch_size=size, group_by_length=True)
    plan = grouped.batches(torch.arange(count), 0, 1, 2, lengths)
    assert plan[plan >= 0].sort().values.equal(torch.arange(count))
    assert len(plan) == grouped.num_steps(count)
    spans = sorted((lengths[own].min(), lengths[own].max()) for b in plan for own in [b[b >= 0]])
    assert all(longest <= shortest for (_, longest), (shortest, _) in itertools.pairwise(spans))
    by_steps = dataclasses.replace(grouped, steps=steps)
    assert len(by_steps.batches(torch.arange(count), 0, 1, 2, lengths)) == steps


def test_the_order_of_grouped_batches_is_the_rounds_own():
    # Clients of one size meet short batches together, and short ones do not always come first.
    grouped = LocalTraining(lr=1, batch_size=4, group_by_length=True)
    rows = torch.arange(40)

    def order(round: int, client: int) -> list[int]:
        return grouped.batches(rows, 0, round, client, rows)[:, 0].argsort().tolist()

    assert order(1, 0) == order(1, 7)
    assert order(1, 0) != order(2, 0)
    assert order(1, 0) != sorted(order(1, 0))


# ---- rows that come once


@settings(deadline=None)
@given(
    count=st.integers(1, 12),
    size=st.integers(1, 15),
    steps=st.integers(1, 9),
    rounds=st.integers(1, 6),
)
def test_a_stream_goes_on_from_round_to_round(count: int, size: int, steps: int, rounds: int):
    training = LocalTraining(lr=1, batch_size=size, steps=steps, order="stream")
    rows = torch.arange(7, 7 + count)
    plans = [epochs_of(training, rows, round=round) for round in range(1, rounds + 1)]
    assert all(plan.shape == (steps, size) for plan in plans)
    batches = torch.cat(plans)
    seen = batches[batches >= 0]
    assert seen.equal(rows.repeat(rounds * steps)[: len(seen)])
    # A batch is short where the rows end, and only there.
    full = [len(batch[batch >= 0]) == size for batch in batches]
    each = math.ceil(count / size)
    assert full == [count % size == 0 or (n + 1) % each != 0 for n in range(len(full))]


@settings(deadline=None)
@given(count=st.integers(1, 12), size=st.integers(1, 15), epochs=st.integers(1, 3))
def test_epochs_of_a_stream_are_the_rows_as_they_stand(count: int, size: int, epochs: int):
    training = LocalTraining(lr=1, batch_size=size, epochs=epochs, order="stream")
    rows = torch.arange(7, 7 + count)
    shuffled = dataclasses.replace(training, order="shuffled")
    for round in (1, 2, 9):
        plan = epochs_of(training, rows, round=round)
        assert plan[plan >= 0].equal(rows.repeat(epochs))
        assert (plan < 0).equal(epochs_of(shuffled, rows) < 0)


def test_a_stream_depends_on_the_round_only():
    training = LocalTraining(lr=1, batch_size=3, steps=2, order="stream")
    assert epochs_of(training, seed=5, client=9).equal(epochs_of(training))
    far = epochs_of(training, round=10**15 + 1)  # after 2e15 batches of a cycle of 7
    assert far[0].equal(ROWS[2 * 10**15 % 7 * 3 :][:3])


# ---- step sizes


def test_linear_falls_evenly_to_the_last_step():
    training = LocalTraining(lr=1, schedule="linear")
    factors = [training.step_factors(t, torch.tensor([4, 2])).tolist() for t in range(2)]
    assert factors == [[1.0, 1.0], [0.75, 0.5]]


def test_cosine_passes_its_middle_halfway():
    training = LocalTraining(lr=1, schedule="cosine")
    found = torch.stack([training.step_factors(t, torch.tensor([4])) for t in range(4)]).flatten()
    expected = [(1 + math.cos(math.pi * t / 4)) / 2 for t in range(4)]
    assert found.tolist() == pytest.approx(expected)
    assert found[2].item() == pytest.approx(0.5)


def test_warmup_rises_evenly_and_meets_the_curve():
    training = LocalTraining(lr=1, schedule="linear", warmup=0.3)
    found = [training.step_factors(t, torch.tensor([10])).item() for t in range(10)]
    assert found == pytest.approx([1 / 4, 2 / 4, 3 / 4, *[1 - t / 7 for t in range(7)]])


def test_constant_lr_needs_no_factors():
    training = LocalTraining(lr=1)
    assert not training.varies_in_round
    assert training.step_factors(3, torch.tensor([4, 7])).tolist() == [1.0, 1.0]
    assert LocalTraining(lr=1, warmup=0.1).varies_in_round
    assert LocalTraining(lr=1, schedule="cosine").varies_in_round
    assert not LocalTraining(lr=1, round_schedule="cosine").varies_in_round


def test_lr_over_the_rounds():
    def lrs(**words: object) -> list[float]:
        training = LocalTraining(lr=0.4, **words)
        return [training.round_lr(round, 4) for round in (1, 2, 3, 4)]

    assert lrs() == [0.4] * 4
    assert lrs(round_schedule="linear") == pytest.approx([0.4, 0.3, 0.2, 0.1])
    cosine = [0.2 * (1 + math.cos(math.pi * t / 4)) for t in range(4)]
    assert lrs(round_schedule="cosine") == pytest.approx(cosine)
    assert lrs(round_decay=0.5) == pytest.approx([0.4, 0.2, 0.1, 0.05])
    both = lrs(round_schedule="linear", round_decay=0.5)
    assert both == pytest.approx([0.4, 0.15, 0.05, 0.0125])


# ---- optimizers


ADAM = {"beta1": 0.7, "beta2": 0.8, "eps": 1e-3, "weight_decay": 0.2}


@pytest.mark.parametrize(
    ("name", "words", "torchs", "settings"),
    [
        ("sgd", {}, torch.optim.SGD, {}),
        ("sgd", {"weight_decay": 0.2}, torch.optim.SGD, {"weight_decay": 0.2}),
        ("sgd", {"momentum": 0.6}, torch.optim.SGD, {"momentum": 0.6}),
        (
            "sgd",
            {"momentum": 0.6, "nesterov": True, "weight_decay": 0.2},
            torch.optim.SGD,
            {"momentum": 0.6, "nesterov": True, "weight_decay": 0.2},
        ),
        ("adam", ADAM, torch.optim.Adam, {"betas": (0.7, 0.8), "eps": 1e-3, "weight_decay": 0.2}),
        ("adamw", ADAM, torch.optim.AdamW, {"betas": (0.7, 0.8), "eps": 1e-3, "weight_decay": 0.2}),
    ],
)
def test_optimizers_step_to_the_bits_of_torchs(name, words, torchs, settings):
    draw = torch.Generator().manual_seed(3)
    start, gradients = torch.randn(4, 5, generator=draw), torch.randn(6, 4, 5, generator=draw)
    own, theirs = start.clone(), nn.Parameter(start.clone())
    ours = LocalTraining(lr=9, optimizer=name, **words).make_optimizer(0.05)
    reference = torchs([theirs], lr=0.05, **settings)
    for gradient in gradients[:3]:
        ours.step(own, gradient)
        theirs.grad = gradient.clone()
        reference.step()
        assert torch.equal(own, theirs)
    # The first rows go on as if the others had never been.
    ours, own = ours.first(2), own[:2].clone()
    for gradient in gradients[3:]:
        ours.step(own, gradient[:2])
        theirs.grad = gradient.clone()
        reference.step()
        assert torch.equal(own, theirs[:2])


def test_training_does_not_load_torchs_compiler():
    code = """
import sys, torch
from clients.training import LocalTraining
for name in ("sgd", "adam", "adamw"):
    param = torch.zeros(2, 3)
    LocalTraining(lr=1, optimizer=name).make_optimizer(0.1).step(param, torch.ones(2, 3))
    assert param.any()
print("torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"lr": 0}, "lr must be positive, got 0"),
        ({"eps": 0}, "eps must be positive"),
        ({"round_decay": -1}, "round_decay must be positive"),
        ({"momentum": 1}, r"momentum must be in \[0, 1\), got 1"),
        ({"beta1": -0.1}, "beta1 must be in"),
        ({"beta2": 1.0}, "beta2 must be in"),
        ({"warmup": 1.0}, "warmup must be in"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"weight_decay": -1}, "weight_decay must not be negative"),
        ({"nesterov": True}, "nesterov needs a momentum above 0"),
        ({"optimizer": "lion"}, "optimizer is one of sgd, adam, adamw, got 'lion'"),
        ({"schedule": "step"}, "schedule is one of constant, linear, cosine, got 'step'"),
        ({"round_schedule": "x"}, "round_schedule is one of"),
        ({"order": "sorted"}, "order is one of shuffled, stream, got 'sorted'"),
        ({"order": "stream", "group_by_length": True}, "group_by_length changes the order"),
    ],
)
def test_values_out_of_range_are_refused(words: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        LocalTraining(**({"lr": 0.1} | words))
