"""Client-level privacy: the bound that it rests on, the noise, the quantile, and what it costs."""

import gc
import itertools
import math
import weakref
from collections.abc import Iterator
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given, settings
from torch import Tensor

from fedsys.params import Params, norm, subtract, weighted_mean
from fedsys.participation import Bernoulli, Cyclic, Markov, Uniform
from fedsys.privacy import client_level
from fedsys.privacy.accounting import epsilon
from fedsys.privacy.client_level import (
    ClientPrivacy,
    amplification,
    clipped_sum,
    expected_cohort,
)
from fedsys.privacy.noise import SecureStream, SeededStream, grid, noised
from fedsys.privacy.release import Release
from fedsys.trace import Trace
from fedsys.update import Update
from tests.by_hand import start

POISSON = Bernoulli(rate=0.1)
NUMBERS = st.floats(-1e3, 1e3, width=32)
VECTORS = st.lists(st.lists(NUMBERS, min_size=3, max_size=3), min_size=1, max_size=6)
MEMORY = "clipping_norm"


def privacy(**changed: object) -> ClientPrivacy:
    """Return privacy with noise of 1.0 C and C = 1, but for what is ``changed``."""
    settings = {
        "epsilon": None,
        "noise_multiplier": 1.0,
        "delta": None,
        "clipping_norm": 1.0,
        "rounds": None,
        "quantile": None,
        "quantile_lr": 0.2,
        "count_noise": None,
        "reproducible": False,
        "ledger": None,
    }
    return ClientPrivacy(**{**settings, **changed})


def seeded(round: int = 0) -> SeededStream:
    return SeededStream(0, "client level", round)


def of(vectors: list[list[float]]) -> list[Update]:
    """Return an update of each vector, in two tensors of two dtypes."""
    return [
        Update(
            n,
            {
                "w": torch.tensor(v[:1], dtype=torch.float64),
                "b": torch.tensor([v[1:]], dtype=torch.float32),
            },
            n + 1,
        )
        for n, v in enumerate(vectors)
    ]


ZEROS = {"w": torch.zeros(1, dtype=torch.float64), "b": torch.zeros(1, 2)}


def direction(
    how: ClientPrivacy,
    arriving: list[Update],
    params: Params = ZEROS,
    expected: float = 10.0,
    multiplier: float = 0.0,
    round: int = 0,
) -> Params:
    """Return what one round releases; without noise unless there is a ``multiplier``."""
    memory = how.start()
    return how.merge(iter(arriving), params, memory, expected, multiplier, seeded(round))[0]


# ---- the bound


@given(
    st.lists(NUMBERS, min_size=3, max_size=3),
    st.floats(1e-3, 1e3),
    st.sampled_from([0.0, 2.0**-27, 0.25]),
)
@settings(deadline=None)
def test_no_client_adds_more_than_the_clipping_norm(values, bound, cell):
    total, _ = clipped_sum(of([values]), ZEROS, bound, grid(bound) * 2.0**26 * cell)
    assert norm(total) <= bound * (1 + 1e-6)


@given(st.lists(NUMBERS, min_size=3, max_size=3), st.floats(1e-3, 1e3))
@settings(deadline=None)
def test_what_is_short_enough_stays_and_what_is_not_keeps_its_direction(values, bound):
    (update,) = of([values])
    total, surplus = clipped_sum([update], ZEROS, bound, 0.0)
    length = norm(update.delta)
    scale = min(1.0, bound / length) if length else 1.0
    assert surplus == (0.5 if length <= bound else -0.5)
    for name, value in update.delta.items():
        torch.testing.assert_close(total[name], scale * value.double(), rtol=1e-12, atol=0)


@given(VECTORS, st.floats(1e-3, 1e3), st.integers(0, 5), st.floats(0.5, 100), st.booleans())
@settings(deadline=None)
def test_a_client_more_or_less_changes_the_direction_by_at_most_its_share(
    vectors, bound, place, expected, noisy
):
    assume(place < len(vectors))
    every = of(vectors)
    others = [update for update in every if update.client != place]
    how = privacy(clipping_norm=bound)
    # With the same noise, what is left is the change of the sum on the grid of the noise.
    multiplier = 1.0 if noisy else 0.0
    with_it, without = (direction(how, u, ZEROS, expected, multiplier) for u in (every, others))
    assert norm(subtract(with_it, without)) <= bound / expected * (1 + 1e-6)


def test_the_bound_is_met_by_a_client_that_sends_too_much():
    with_it, without = (direction(privacy(), of([[3.0, 0.0, 4.0]] * k)) for k in (1, 0))
    assert norm(subtract(with_it, without)) == pytest.approx(1 / 10, rel=1e-12)


@given(VECTORS, st.randoms())
@settings(deadline=None, max_examples=50)
def test_with_noise_the_order_of_arrival_does_not_matter_to_the_bit(vectors, random):
    every = of(vectors)
    shuffled = random.sample(every, len(every))
    once, again = (direction(privacy(), u, multiplier=1.0) for u in (every, shuffled))
    assert all(torch.equal(once[name], again[name]) for name in ZEROS)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300])
def test_a_delta_without_a_norm_adds_nothing(value):
    usable = of([[0.1, 0.2, 0.3]])
    broken = Update(1, {**usable[0].delta, "w": torch.tensor([value], dtype=torch.float64)}, 1)
    alone, both = (direction(privacy(), u, multiplier=1.0) for u in (usable, [*usable, broken]))
    assert all(torch.equal(alone[name], both[name]) for name in ZEROS)


# ---- the divisor


@given(st.integers(0, 12))
@settings(deadline=None, max_examples=13)
def test_the_realised_cohort_never_divides(count):
    moved = direction(privacy(), of([[0.3, 0.0, 0.0]] * count))
    assert moved["w"].item() == pytest.approx(count * 0.3 / 10, rel=1e-12)


@given(VECTORS, st.floats(0.5, 100))
@settings(deadline=None, max_examples=50)
def test_without_noise_and_bound_it_is_the_uniform_mean_by_realised_over_expected(
    vectors, expected
):
    how = privacy(epsilon=math.inf, noise_multiplier=None, clipping_norm=math.inf)
    found = direction(how, of(vectors), ZEROS, expected)
    mean = weighted_mean((1.0, update.delta) for update in of(vectors))
    for name, value in mean.items():
        wanted = value * (len(vectors) / expected)
        torch.testing.assert_close(found[name], wanted, rtol=1e-12, atol=1e-10)


def test_one_update_is_held_at_a_time():
    alive: set[int] = set()
    most = 0

    def arriving() -> Iterator[Update]:
        nonlocal most
        for client in range(20):
            delta = torch.ones(1)
            alive.add(client)
            weakref.finalize(delta, alive.discard, client)
            most = max(most, len(alive))
            update = Update(client, {"w": delta}, 1)
            del delta
            yield update
            del update

    gc.collect()
    how = privacy(quantile=0.5)
    how.merge(arriving(), {"w": torch.zeros(1)}, how.start(), 20.0, 1.0, seeded())
    assert most <= 2


# ---- the noise

WIDE = {"w": torch.zeros(300_000)}  # the standard deviation is known to 0.13 %


def misses(released: Tensor, std: float) -> bool:
    """Whether the standard deviation is off by 1 %, 7.7 of its own, or the mean by 5 of its own."""
    count = released.numel()
    off = abs(released.mean().item()) > 5 * std / math.sqrt(count)
    return off or abs(released.std().item() / std - 1) > 0.01


@pytest.mark.parametrize(("z", "bound", "expected"), [(1.0, 1.0, 10.0), (0.3, 5.0, 64.0)])
def test_the_noise_of_the_direction_is_z_c_over_the_expected_cohort(z, bound, expected):
    released = direction(privacy(clipping_norm=bound), [], WIDE, expected, z)["w"]
    assert not misses(released, z * bound / expected)


def test_half_the_noise_is_noticed(monkeypatch):
    monkeypatch.setattr(client_level, "noised", lambda v, std, s: noised(v, std / 2, s))
    assert misses(direction(privacy(), [], WIDE, 10.0, 1.0)["w"], 0.1)


def test_the_noise_does_not_depend_on_what_is_sent():
    sent = [Update(0, {"w": torch.full((300_000,), 7.0)}, 1)]
    released = direction(privacy(), sent, WIDE, 10.0, 1.0)["w"]
    assert not misses(released - 0.1 / math.sqrt(300_000), 0.1)


def test_an_empty_round_releases_noise_of_every_shape():
    params = {**start(), "steps": torch.zeros((), dtype=torch.int64)}
    released = direction(privacy(), [], params, multiplier=1.0)
    assert {n: v.shape for n, v in released.items()} == {n: p.shape for n, p in params.items()}
    assert all((value != 0).all() and value.dtype == torch.float64 for value in released.values())


def test_rounds_have_independent_noise():
    first, second = (direction(privacy(), [], WIDE, 10.0, 1.0, t)["w"] for t in (1, 2))
    cosine = (first @ second) / (first.norm() * second.norm())
    assert abs(cosine.item()) < 5 / math.sqrt(300_000)


def test_secure_noise_is_never_the_same():
    once, again = (
        privacy().merge([], WIDE, {}, 10.0, 1.0, SecureStream())[0]["w"] for _ in range(2)
    )
    assert not misses(once, 0.1)
    assert not misses(once - again, 0.1 * math.sqrt(2))


# ---- the quantile


@given(st.floats(0.05, 20), st.floats(1.001, 100))
@settings(deadline=None)
def test_the_two_noises_cost_what_one_does(z, times):
    vector, count = privacy(quantile=0.5, count_noise=z / 2 * times).split(z, 100.0)
    assert (vector**-2 + (2 * count) ** -2) ** -0.5 == pytest.approx(z, rel=1e-9)
    assert vector > z


def test_the_count_has_a_twentieth_of_the_cohort_as_noise_unless_told():
    assert privacy(quantile=0.5).split(1.0, 100.0)[1] == 5.0
    assert privacy().split(1.0, 100.0) == (1.0, 0.0)
    assert privacy(quantile=0.5).split(0.0, 100.0) == (0.0, 0.0)


@pytest.mark.parametrize("count_noise", [None, 0.5])
def test_a_count_that_would_spend_the_budget_alone_is_refused(count_noise):
    how = privacy(quantile=0.5, count_noise=count_noise)
    with pytest.raises(ValueError, match=r"privacy.count_noise=0.5 .*above half of the noise"):
        how.merge([], ZEROS, how.start(), 10.0, 1.0, seeded())
    assert how.merge([], ZEROS, how.start(), 10.0, 0.99, seeded())[1][MEMORY].isfinite()


def next_bound(
    how: ClientPrivacy, norms: list[float], m: float, z: float = 0.0, round: int = 0
) -> float:
    arriving = of([[value, 0.0, 0.0] for value in norms])
    return how.merge(arriving, ZEROS, how.start(), m, z, seeded(round))[1][MEMORY].item()


def test_the_bound_moves_as_in_the_paper_when_the_whole_cohort_answers():
    # 3 of 4 norms are at most C = 1, so b = 3/4 and C exp(-0.2 (3/4 - 1/2)).
    found = next_bound(privacy(quantile=0.5), [0.5, 1.0, 0.0, 2.0], 4.0)
    assert found == pytest.approx(math.exp(-0.05), rel=1e-12)


@given(st.lists(st.floats(0, 3), min_size=1, max_size=8), st.floats(0.5, 50))
@settings(deadline=None, max_examples=50)
def test_a_client_moves_the_share_by_half_a_client_at_most(norms, expected):
    how = privacy(quantile=0.3)
    with_it, without = (next_bound(how, n, expected) for n in (norms, norms[1:]))
    change = abs(math.log(with_it / without)) / how.quantile_lr
    assert change == pytest.approx(0.5 / expected, rel=1e-6)


def test_without_replies_the_share_is_a_half():
    assert next_bound(privacy(quantile=0.5), [], 10.0) == 1.0
    assert next_bound(privacy(quantile=0.7), [], 10.0) == pytest.approx(math.exp(0.2 * 0.2))


def test_both_noises_have_their_size_in_a_merge(monkeypatch):
    sizes: list[tuple[int, float]] = []

    def spy(value: Tensor, std: float, stream: SeededStream) -> Tensor:
        sizes.append((value.numel(), std))
        return noised(value, std, stream)

    monkeypatch.setattr(client_level, "noised", spy)
    how = privacy(quantile=0.5, count_noise=0.8, clipping_norm=2.0)
    released = direction(how, [], WIDE, 10.0, 1.0)["w"]
    vector = (1 - 1.6**-2) ** -0.5  # z_Delta for z = 1
    assert sizes == [(300_000, pytest.approx(2.0 * vector)), (1, 0.8)]
    assert not misses(released, 2.0 * vector / 10)


@pytest.mark.parametrize("quantile", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("first", [1e-2, 1e2])
def test_the_bound_finds_the_quantile_without_noise(quantile, first):
    norms = torch.linspace(-2, 2, 21).exp().tolist()
    how = privacy(quantile=quantile, clipping_norm=first, quantile_lr=1.0)
    bound = follow(how, norms, [0.0] * 80)[-1]
    at = round(20 * quantile)
    assert norms[at - 1] <= bound <= norms[at + 1]


def test_the_bound_stays_near_the_quantile_with_noise():
    norms = torch.linspace(-1, 1, 21).exp().tolist()
    bounds = follow(privacy(quantile=0.5), norms, [1.0] * 100)
    # Noise of 0.05 in b, a step of 0.2 and a density of 1/2 in log C: a spread of about 0.02.
    assert torch.tensor(bounds[50:]).log().abs().max() < 0.2
    assert len(set(bounds)) == len(bounds)


def follow(how: ClientPrivacy, norms: list[float], multipliers: list[float]) -> list[float]:
    """Return C after each round in which clients of these norms all answer."""
    arriving = of([[value, 0.0, 0.0] for value in norms])
    memory, bounds = how.start(), []
    for t, z in enumerate(multipliers):
        _, memory = how.merge(arriving, ZEROS, memory, float(len(norms)), z, seeded(t))
        bounds.append(memory[MEMORY].item())
    return bounds


def test_clipping_uses_the_bound_of_the_memory():
    how = privacy(quantile=0.5)
    memory = {MEMORY: torch.tensor(0.25, dtype=torch.float64)}
    moved, _ = how.merge(of([[8.0, 0.0, 0.0]]), ZEROS, memory, 1.0, 0.0, seeded())
    assert norm(moved) == pytest.approx(0.25, rel=1e-12)
    assert memory[MEMORY] == 0.25  # the hook is pure


# ---- participation


class Again(Bernoulli):
    """Somebody's own, which may draw as it likes."""


@pytest.mark.parametrize(
    ("participation", "rate", "expected"),
    [
        (Bernoulli(rate=0.3), 0.3, 12.0),
        (Bernoulli(rate=1.0), 1.0, 40.0),
        (Bernoulli(rates=[0.5] * 30 + [0.1] * 10), None, 16.0),
        (Again(rate=0.3), None, 12.0),
        (Uniform(), None, 40.0),
        (Uniform(7), None, 7.0),
        (Uniform(70), None, 40.0),
        (Markov(rate=0.25), None, 10.0),
        (Cyclic(rate=0.25, period=20), None, 10.0),
    ],
    ids=repr,
)
def test_only_equal_coins_amplify(participation, rate, expected):
    assert amplification(participation) == rate
    assert expected_cohort(participation, 40) == pytest.approx(expected, rel=1e-12)
    assert privacy().plan(participation, 9, 1e-3) == Release(1.0, rate or 1.0, 9)


def test_a_cohort_that_is_not_known_beforehand_is_refused():
    with pytest.raises(ValueError, match="Trace does not say how many clients to expect"):
        expected_cohort(Trace(path="a.csv"), 10)
    with pytest.raises(ValueError, match=r"participation.alpha=0.5 draws rates from the clients'"):
        expected_cohort(Bernoulli(alpha=0.5), 10)


# ---- the cost


@pytest.mark.parametrize(
    ("z", "rate", "rounds", "delta", "wanted"),
    [(1.0, 0.1, 100, 1e-3, 4.7949), (1.0, 0.04, 1000, 1e-4, 7.3869), (4.0, 1.0, 50, 1e-3, 6.463)],
)
def test_the_reference_figures_of_client_level(z, rate, rounds, delta, wanted):
    # The reference is of the PRV accountant, whose own error bound is 0.01.
    release = privacy(noise_multiplier=z).plan(Bernoulli(rate=rate), rounds, delta)
    assert release == Release(z, rate, rounds)
    assert epsilon((release,), delta) == pytest.approx(wanted, abs=0.02)


@pytest.mark.parametrize("target", [1.0, 8.0])
@pytest.mark.parametrize("participation", [POISSON, Uniform(5)], ids=repr)
def test_a_plan_stays_within_its_budget_and_wastes_little(target, participation):
    how = privacy(epsilon=target, noise_multiplier=None)
    release = how.plan(participation, 60, 1e-3)
    assert release.steps == 60
    assert 0.99 * target <= epsilon((release,), 1e-3) <= target


def test_a_plan_goes_on_from_what_was_spent():
    how, before = privacy(epsilon=3.0, noise_multiplier=None), (Release(2.0, 0.1, 100),)
    fresh, later = (how.plan(POISSON, 60, 1e-3, spent) for spent in ((), before))
    assert later.noise_multiplier > fresh.noise_multiplier
    assert 0.99 * 3 <= epsilon((*before, later), 1e-3) <= 3


def test_hidden_coins_take_less_noise_than_a_cohort_that_is_known():
    how = privacy(epsilon=2.0, noise_multiplier=None)
    hidden, known = (how.plan(p, 50, 1e-3).noise_multiplier for p in (POISSON, Uniform(10)))
    assert hidden < known / 2


def test_rounds_limits_whom_nothing_hides():
    how = privacy(rounds=4)
    assert how.plan(Uniform(5), 60, 1e-3) == Release(1.0, 1.0, 4)
    assert how.plan(Uniform(5), 3, 1e-3) == Release(1.0, 1.0, 3)
    assert how.plan(POISSON, 60, 1e-3) == Release(1.0, 0.1, 60)


def test_a_client_can_afford_the_rounds_that_were_planned():
    how = privacy(epsilon=2.0, noise_multiplier=None, rounds=4)
    planned = how.plan(Uniform(5), 60, 1e-3)
    one = replace(planned, steps=1)
    taken = itertools.takewhile(
        lambda t: how.affords((replace(one, steps=t),), one, 1e-3), itertools.count()
    )
    assert len(list(taken)) == 4


def test_without_a_budget_or_without_noise_everything_can_be_afforded():
    spent, one = (Release(0.1, 1.0, 10**6),), Release(0.1, 1.0, 1)
    assert privacy().affords(spent, one, 1e-3)
    assert privacy(epsilon=math.inf, noise_multiplier=None).affords(spent, one, 1e-3)


def test_without_noise_epsilon_is_infinite():
    release = privacy(epsilon=math.inf, noise_multiplier=None).plan(POISSON, 10, 1e-3)
    assert release.noise_multiplier == 0
    assert epsilon((release,), 1e-3) == math.inf


def test_delta_is_half_of_one_client_unless_told():
    assert privacy().delta_of(50) == 0.01
    assert privacy(delta=1e-6).delta_of(50) == 1e-6


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"noise_multiplier": None}, "epsilon or noise_multiplier must be given"),
        ({"epsilon": 0.0}, "epsilon must be positive, or inf for no noise, got 0.0"),
        ({"noise_multiplier": 0.0}, "noise_multiplier must be positive, got 0.0"),
        ({"epsilon": math.inf}, "noise_multiplier has no meaning"),
        ({"delta": 1.0}, r"delta must be in \(0, 1\), got 1.0"),
        ({"clipping_norm": 0.0}, "clipping_norm must be positive, got 0.0"),
        ({"clipping_norm": math.nan}, "clipping_norm must be positive, got nan"),
        ({"clipping_norm": math.inf}, "clipping_norm=inf bounds nothing"),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"quantile": 1.0}, r"quantile is a share in \(0, 1\), got 1.0"),
        ({"quantile_lr": 0.0}, "quantile_lr must be positive, got 0.0"),
        ({"count_noise": -1.0}, "count_noise must be positive, got -1.0"),
    ],
)
def test_values_out_of_range_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        privacy(**changed)
