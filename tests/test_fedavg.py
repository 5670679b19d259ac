"""FedAvg, and with it the base that all strategies share, by the tests of its specification."""

import copy
import math

import pytest
import torch
from flwr.serverapp.strategy import Strategy as FlowerStrategy
from torch import Tensor, nn

from clients.training import LocalTraining
from fedsys.data import TensorExamples
from fedsys.losses import IGNORE
from fedsys.params import Params
from fedsys.update import Update
from strategies import FedAvg
from tests.cohorts import Federation, Plain, network, trainable, vectors


def sgd(lr: float):
    return lambda params: torch.optim.SGD(params, lr=lr)


def units(found: Tensor, expected: Tensor, scale: Tensor) -> float:
    """Return the largest difference in units in the last place of ``scale``."""
    ulp = torch.nextafter(scale.abs(), torch.tensor(torch.inf, dtype=scale.dtype)) - scale.abs()
    return float(((found - expected).abs() / ulp).max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_client_is_central_training(dtype: torch.dtype):
    # T1. A client's y comes back as y - x, rounded to the dtype: x + (y - x) is off by half a unit
    # of y - x at most. y - x is exact where x and y lie within a factor of 2 (Sterbenz), and in
    # float32 the rest of the way is exact too, for it is float64's: there the bits are those of y.
    model, examples = network("mlp").to(dtype), vectors(20, dtype)
    training = LocalTraining(lr=0.1, momentum=0.9, batch_size=8, epochs=3)
    federation = Federation(FedAvg(), model, examples, training, [torch.arange(20)])
    (after,) = federation.run()
    (update,) = federation.updates(trainable(model))
    plain = Plain(model, examples, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
    expected, _ = plain.train(training.batches(torch.arange(20), 0, 1, 0))
    same = total = 0
    for name, x in trainable(model).items():
        y = x.double() + update.delta[name].double()  # what the client had, but for rounding
        largest = torch.maximum(torch.maximum(x.abs(), y.to(dtype).abs()), update.delta[name].abs())
        assert units(after[name], y.to(dtype), largest) <= 1
        torch.testing.assert_close(after[name], expected[name], rtol=0, atol=1e-6)
        ratio = y / x.double()
        near = (ratio >= 0.5) & (ratio <= 2)
        same += int((after[name] == y.to(dtype))[near].sum())
        total += int(near.sum())
    assert total > 500
    if dtype == torch.float32:
        assert same == total


def test_a_factor_of_two_gives_the_bits_of_the_client():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(10_000, generator=draw)
    y = x * (0.5 + 1.5 * torch.rand(10_000, generator=draw))
    strategy = FedAvg()
    for num_examples in (1, 3, 7, 49):
        update = Update(0, {"w": y - x}, num_examples)
        direction, _ = strategy.combine(iter([update]), ())
        params, _ = strategy.step({"w": x}, direction, ())
        assert torch.equal(params["w"], y)


def test_clients_with_the_same_data_agree_with_their_mean():
    # T2
    model, examples = network("mlp"), vectors(9, torch.float64)
    training = LocalTraining(lr=0.3, batch_size=9, steps=4)
    shards = [torch.arange(9)] * 4
    (after,) = Federation(FedAvg(), model, examples, training, shards).run()
    (alone,) = Federation(FedAvg(), model, examples, training, shards[:1]).run()
    for name in after:
        torch.testing.assert_close(after[name], alone[name], rtol=0, atol=1e-14)


@pytest.mark.parametrize("server_lr", [1.0, 0.5])
def test_one_full_step_is_gradient_descent_on_the_union(server_lr: float):
    # T3
    model, examples = network("mlp"), vectors(40, torch.float64)
    training = LocalTraining(lr=0.4, batch_size=40)
    shards = list(torch.arange(40).split([3, 25, 12]))
    strategy = FedAvg(server_lr=server_lr)
    (after,) = Federation(strategy, model, examples, training, shards).run()
    plain = Plain(model, examples, sgd(0.4 * server_lr))
    expected, _ = plain.train(torch.arange(40)[None])
    for name in expected:
        torch.testing.assert_close(after[name], expected[name], rtol=0, atol=1e-12)


# ---- quadratics, which are solved by hand: the model is a number w, a label names a row (x, y)


class Scalar(nn.Module):
    """Returns w for every row."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.w.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.w(x)


class Ones(TensorExamples):
    """Rows of a single one, in float64."""

    def batch(self, rows: Tensor) -> dict[str, Tensor]:
        return {"x": torch.ones(len(rows), 1, dtype=torch.float64), "labels": rows.clone()}


def quadratic(
    monkeypatch: pytest.MonkeyPatch,
    rows: list[tuple[float, float]],
    training: LocalTraining,
    strategy: FedAvg,
    shards: list[list[int]],
    rounds: int,
) -> list[float]:
    """Return w after each round of clients whose loss is the mean of (w x - y)^2 / 2."""
    x, y = torch.tensor(rows, dtype=torch.float64).unbind(1)

    def losses(w: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
        real = labels != IGNORE
        own = labels.clamp(min=0)
        squares = torch.where(real, (w[:, 0] * x[own] - y[own]).square() / 2, 0)
        return squares.view(len(targets), -1).sum(1) / targets

    monkeypatch.setattr("clients.cohort.client_losses", losses)
    examples = Ones(torch.ones(len(rows)), torch.arange(len(rows)))
    federation = Federation(
        strategy, Scalar().double(), examples, training, list(map(torch.tensor, shards))
    )
    return [params["w.weight"].item() for params in federation.run(rounds)]


def test_worked_rounds(monkeypatch: pytest.MonkeyPatch):
    # T5
    rows, shards = [(1, 1), (2, 3), (3, 2)], [[0, 1], [2]]
    training = LocalTraining(lr=0.1, batch_size=2, epochs=2)

    def run(strategy: FedAvg, shards: list[list[int]], rounds: int) -> list[float]:
        found = quadratic(monkeypatch, rows, training, strategy, shards, rounds)
        return [pytest.approx(w, abs=5e-7) for w in found]

    assert run(FedAvg(), shards[:1], 1) == [0.6125]
    assert run(FedAvg(), shards[1:], 1) == [0.66]
    assert run(FedAvg(), shards, 3) == [0.628333, 0.866053, 0.955990]
    assert run(FedAvg(weighting="uniform"), shards, 1) == [0.63625]


@pytest.mark.parametrize(("steps", "fixed"), [(1, 1.5), (2, 1.48), (10, 1.333665), (50, 1.039864)])
def test_clients_drift_to_a_known_point(steps: int, fixed: float, monkeypatch: pytest.MonkeyPatch):
    # T6: a_n / 2 (w - c_n)^2 with a = (1, 3), c = (0, 2).
    rows = [(1.0, 0.0), (math.sqrt(3), 2 * math.sqrt(3))]
    training = LocalTraining(lr=0.05, batch_size=1, steps=steps)
    strategy = FedAvg(weighting="uniform")
    rounds = quadratic(monkeypatch, rows, training, strategy, [[0], [1]], 400 // steps + 20)
    assert rounds[-1] == pytest.approx(fixed, abs=1e-6)


# ---- the hooks


def updates(*terms: tuple[int, float]) -> list[Update]:
    return [
        Update(client, {"w": torch.tensor([value])}, count)
        for client, (count, value) in enumerate(terms)
    ]


def test_weights_are_examples_or_equal():
    given = updates((1, 4.0), (3, 8.0))
    by_examples, state = FedAvg().combine(iter(given), ())
    uniform, _ = FedAvg(weighting="uniform").combine(iter(given), ())
    assert (by_examples["w"].item(), uniform["w"].item(), state) == (7.0, 6.0, ())


def test_nobody_took_part():
    assert FedAvg().combine(iter([]), ()) == ({}, ())


def test_server_lr_scales_the_direction():
    params: Params = {"w": torch.tensor([1.0])}
    before = copy.deepcopy(params)
    moved, _ = FedAvg(server_lr=0.5).step(params, {"w": torch.tensor([4.0])}, ())
    assert moved["w"].item() == 3.0
    assert params == before


def test_it_is_a_strategy_of_flower_with_nothing_to_set():
    assert isinstance(FedAvg(), FlowerStrategy)
    assert FedAvg().local_gradient({}, {}) == {}
    assert FedAvg().train_config() == {}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"server_lr": 0.0}, "server_lr must be positive, got 0.0"),
        ({"weighting": "size"}, "weighting is 'examples' or 'uniform', got 'size'"),
    ],
)
def test_values_out_of_range_are_refused(words: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        FedAvg(**words)
