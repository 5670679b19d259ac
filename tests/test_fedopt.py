"""FedAdam, FedYogi and FedAdagrad against a loop over single numbers, as the paper has it."""

import math

import pytest
import torch

from fedsys.update import Update
from strategies import FedAdagrad, FedAdam, FedYogi

BETA1, BETA2, TAU, LR = 0.8, 0.9, 0.05, 0.3


def by_hand(kind: str, x: float, directions: list[float], beta1: float) -> list[float]:
    """Return x after each round of Algorithm 2 for one coordinate."""
    m, v, path = 0.0, TAU**2, []
    for d in directions:
        m = beta1 * m + (1 - beta1) * d
        if kind == "FedAdagrad":
            v = v + d * d
        elif kind == "FedYogi":
            difference = v - d * d
            sign = (difference > 0) - (difference < 0)
            v = v - (1 - BETA2) * d * d * sign
        else:
            v = BETA2 * v + (1 - BETA2) * d * d
        x = x + LR * m / (math.sqrt(v) + TAU)
        path.append(x)
    return path


STRATEGIES = {
    "FedAdam": FedAdam(server_lr=LR, beta1=BETA1, beta2=BETA2, tau=TAU),
    "FedYogi": FedYogi(server_lr=LR, beta1=BETA1, beta2=BETA2, tau=TAU),
    "FedAdagrad": FedAdagrad(server_lr=LR, tau=TAU),
}
# Coordinate by coordinate: growing, alternating, never moved, moved once and then not, tiny.
DIRECTIONS = [
    [0.1, 0.5, 2.0, 4.0],
    [1.0, -1.0, 1.0, -1.0],
    [0.0, 0.0, 0.0, 0.0],
    [3.0, 0.0, 0.0, 0.0],
    [1e-9, 1e-9, -1e-9, 1e-3],
]


@pytest.mark.parametrize("name", STRATEGIES)
def test_rounds_are_those_of_the_paper(name: str):
    strategy = STRATEGIES[name]
    params = {"w": torch.ones(4, dtype=torch.float64), "b": torch.tensor(1.0).double()}
    state = strategy.init(params, 10)
    paths = [by_hand(name, 1.0, row, strategy.beta1) for row in DIRECTIONS]
    for step in range(4):
        now = torch.tensor([row[step] for row in DIRECTIONS], dtype=torch.float64)
        params, state = strategy.step(params, {"w": now[:4], "b": now[4]}, state)
        found = [*params["w"].tolist(), params["b"].item()]
        assert found == pytest.approx([path[step] for path in paths], rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_round_without_movement_only_coasts(name: str):
    strategy = STRATEGIES[name]
    params = {"w": torch.tensor([5.0])}
    zero = {"w": torch.zeros(1, dtype=torch.float64)}
    still, state = strategy.step(params, zero, strategy.init(params, 1))
    assert still["w"].item() == 5.0
    _, state = strategy.step(params, {"w": torch.ones(1).double()}, state)
    coasting, _ = strategy.step(params, zero, state)
    assert (coasting["w"].item() > 5.0) == (strategy.beta1 > 0)


@pytest.mark.parametrize("name", STRATEGIES)
def test_params_keep_their_dtype_and_state_is_float64(name: str):
    strategy = STRATEGIES[name]
    params = {"w": torch.ones(2), "h": torch.ones(2, dtype=torch.bfloat16)}
    update = Update(0, {n: torch.full_like(p, 0.5) for n, p in params.items()}, 3)
    state = strategy.init(params, 1)
    direction, state = strategy.combine(iter([update]), state)
    moved, state = strategy.step(params, direction, state)
    assert [moved[n].dtype for n in params] == [torch.float32, torch.bfloat16]
    assert {t.dtype for part in state for t in part.values()} == {torch.float64}
    assert params["w"].eq(1).all()
    assert moved["w"].gt(1).all()


def test_adagrad_of_the_paper_has_no_momentum():
    assert FedAdagrad().beta1 == 0


@pytest.mark.parametrize(
    ("kind", "words", "message"),
    [
        (FedAdam, {"beta1": 1.0}, r"beta1 must be in \[0, 1\), got 1.0"),
        (FedAdam, {"beta2": 1.5}, r"beta2 must be in \[0, 1\), got 1.5"),
        (FedYogi, {"beta2": -0.1}, "beta2 must be in"),
        (FedAdagrad, {"tau": 0.0}, "tau must be positive, got 0.0"),
        (FedYogi, {"server_lr": -1.0}, "server_lr must be positive"),
    ],
)
def test_values_out_of_range_are_refused(kind: type, words: dict[str, float], message: str):
    with pytest.raises(ValueError, match=message):
        kind(**words)
