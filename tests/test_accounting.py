"""Epsilon: published figures, the exact Gaussian, and properties. Delta is 1e-5 where unsaid."""

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.special import log_ndtr

from fedsys.privacy import accounting, pld, renyi
from fedsys.privacy.accounting import (
    PRV_ERROR,
    AccountingError,
    Release,
    Statement,
    check,
    check_delta,
    epsilon,
    largest,
    merged,
    noise_multiplier,
    prv_epsilon,
    rdp_epsilon,
    upper_bound,
)

DELTA = 1e-5
GRID = 1.3e-3  # what the figure's grid adds at most, relative, above 0.01; 1e-5 absolute below


def exact_delta(epsilon, mu):
    """Return delta of two Gaussians mu standard deviations apart (Balle and Wang 2018)."""
    return math.exp(log_ndtr(mu / 2 - epsilon / mu)) - math.exp(
        epsilon + log_ndtr(-mu / 2 - epsilon / mu)
    )


def exact_epsilon(mu, delta):
    if exact_delta(0.0, mu) <= delta:
        return 0.0
    return brentq(lambda e: exact_delta(e, mu) - delta, 0, mu**2 + 20 * mu + 20, xtol=1e-12)


# ---- figures that are known

OPACUS = [  # z, q, steps, delta, RDP, PRV of Opacus 1.6.0
    (1.0, 0.01, 1000, 1e-5, 2.1014, 1.8384),
    (1.0, 0.01, 10_000, 1e-5, 6.7127, 6.198),
    (0.8, 0.02, 2000, 1e-5, 10.0828, 9.1532),
    (2.0, 1.0, 10, 1e-5, 8.0794, 7.5216),
    (1.0, 1.0, 1, 1e-5, 4.7285, 4.3874),
    (0.5, 0.004, 500, 1e-5, 7.0827, 5.7162),
    (1.0, 0.1, 100, 1e-3, 5.6405, 4.7949),
    (1.0, 0.04, 1000, 1e-4, 8.1993, 7.3869),
    (4.0, 1.0, 50, 1e-3, 7.1837, 6.463),
]


@pytest.mark.parametrize(("z", "q", "steps", "delta", "rdp", "prv"), OPACUS)
def test_figures_of_opacus_hold_and_confirm_ours(z, q, steps, delta, rdp, prv):
    figures = check([Release(z, q, steps)], delta)
    assert figures.rdp == pytest.approx(rdp, rel=1e-3)
    assert prv_epsilon([Release(z, q, steps)], delta) == pytest.approx(prv, rel=1e-3)
    # PRV adds its error on top of its estimate; what is left is the grids of the two.
    assert figures.pld == pytest.approx(prv - PRV_ERROR, rel=2e-3)
    assert figures.pld <= figures.prv <= figures.rdp


LIBRARIES = [  # z, q, steps, RDP of Opacus and of dp-accounting, PRV of Opacus, PLD
    (1.0, 0.01, 1000, 2.1014, 2.1014, 1.8384, 1.8289),
    (0.8, 0.05, 500, 13.3353, 13.4062, 12.0459, 12.0354),
    (2.0, 0.10, 300, 4.5643, 4.5643, 4.1936, 4.1834),
    (1.0, 0.128, 100, 10.1168, 10.1474, 9.0989, 9.0883),
    (0.6, 0.02, 200, 8.6040, 8.6163, 7.2708, 7.2602),
    (4.0, 1.00, 50, 9.2350, 9.2350, 8.6063, 8.5959),
]


@pytest.mark.parametrize(("z", "q", "steps", "rdp", "other_rdp", "prv", "shown"), LIBRARIES)
def test_figures_of_two_libraries_hold(z, q, steps, rdp, other_rdp, prv, shown):
    spent = [Release(z, q, steps)]
    assert epsilon(spent, DELTA) == pytest.approx(shown, rel=1e-3)
    assert rdp_epsilon(spent, DELTA) == pytest.approx(rdp, rel=1e-4)
    assert prv_epsilon(spent, DELTA) == pytest.approx(prv, rel=1e-4)
    # dp-accounting drops fractional orders whose series does not converge; ours needs no series.
    assert rdp * (1 - 1e-4) <= upper_bound(spent, DELTA) * (1 + 1e-3) <= other_rdp * (1 + 2e-3)


@pytest.mark.parametrize(("z", "q", "steps"), [LIBRARIES[k][:3] for k in (0, 2, 5)])
def test_halved_noise_shows(z, q, steps):
    """A positive control: the figures above could not hold with noise other than stated."""
    for figure in (epsilon, rdp_epsilon, prv_epsilon):
        assert figure([Release(z / 2, q, steps)], DELTA) > 2 * figure([Release(z, q, steps)], DELTA)


@pytest.mark.parametrize(
    ("mu", "value"), [(math.sqrt(10) / 2, 7.5113), (1.0, 4.3772)], ids=["ten steps", "one"]
)
def test_exact_gaussian_figures(mu, value):
    assert exact_epsilon(mu, DELTA) == pytest.approx(value, abs=1e-4)


@given(
    z=st.floats(0.3, 30),
    steps=st.integers(1, 3000),
    log_delta=st.floats(-9, -2),
)
@settings(max_examples=15, deadline=None)
def test_without_sampling_it_is_the_exact_gaussian(z, steps, log_delta):
    delta, mu = 10**log_delta, math.sqrt(steps) / z
    if mu > 30:
        return
    exact = exact_epsilon(mu, delta)
    found = epsilon([Release(z, 1.0, steps)], delta)
    assert exact * (1 - 1e-9) - 1e-9 <= found <= exact * (1 + GRID) + 1e-5


def test_gaussians_of_different_noise_compose_exactly():
    spent = [Release(2.0, 1.0, 3), Release(5.0, 1.0, 1), Release(10.0, 1.0, 20)]
    exact = exact_epsilon(math.sqrt(3 / 4 + 1 / 25 + 20 / 100), DELTA)
    assert exact <= epsilon(spent, DELTA) <= exact * (1 + GRID)


def test_rounds_compose_to_one_entry_and_do_not_add_up():
    rounds = [Release(1.1, 0.02, 50)] * 10
    whole = [Release(1.1, 0.02, 500)]
    assert merged(rounds) == tuple(whole)
    assert rdp_epsilon(rounds, DELTA) == pytest.approx(2.5757, abs=1e-4)
    assert rdp_epsilon(rounds[:4], DELTA) == pytest.approx(1.7862, abs=1e-4)
    # Adding up is a bound too, at a delta that adds up likewise; it is six times as large.
    assert 10 * rdp_epsilon(rounds[:1], DELTA / 10) == pytest.approx(15.56, abs=0.01)
    assert epsilon(rounds, DELTA) == epsilon(whole, DELTA) < 2.5757


@pytest.mark.parametrize(
    ("target", "by_rdp", "by_prv"), [(1, 2.0312, 1.8945), (3, 1.0229, 0.9668), (8, 0.6894, 0.6555)]
)
def test_noise_for_a_target(target, by_rdp, by_prv):
    def at(z):
        return [Release(z, 0.02, 500)]

    # Opacus, whose noise this is, stops within 0.01 below the target; z has 4 digits here.
    assert target - 0.011 <= rdp_epsilon(at(by_rdp), DELTA) <= target + 0.001
    assert target - 0.011 <= prv_epsilon(at(by_prv), DELTA) <= target + 0.001
    z = noise_multiplier(target, DELTA, 0.02, 500)
    # PRV reserves its error, so PLD allows what PRV does for a target higher by that.
    assert prv_epsilon(at(z), DELTA) == pytest.approx(target + PRV_ERROR, rel=2e-3)
    assert z < by_prv < by_rdp


CENTRAL, CLIENT = (5.825e-5, 51_504), (1.747e-4, 34_338)  # rate and steps of private SNLI runs
SNLI = [
    (CENTRAL, 5.82e-5, {1: 0.6543, 3: 0.4541, 5: 0.3935, 7.5: 0.3545, 10: 0.3304}),
    (CENTRAL, 1.82e-6, {1: 0.7880, 3: 0.5084, 5: 0.4321, 7.5: 0.3844, 10: 0.3551}),
    (CLIENT, 1.75e-4, {1: 0.6665, 3: 0.4782, 5: 0.4199, 7.5: 0.3816, 10: 0.3566}),
    (CLIENT, 5.46e-6, {1: 0.7886, 3: 0.5341, 5: 0.4596, 7.5: 0.4124, 10: 0.3834}),
]


@pytest.mark.parametrize(("run", "delta", "noise"), SNLI)
def test_implied_noise_of_private_snli(run, delta, noise):
    for target, z in noise.items():
        found = rdp_epsilon([Release(z, *run)], delta)
        # Opacus stops within 0.01 below the target; z has 4 digits, and epsilon falls as z^-6.
        assert target - 0.011 - 1e-3 * target <= found <= target * (1 + 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "z", "honest"), [(1, 0.5231, 2.05), (3, 0.4361, 4.79), (10, 0.3382, 13.9)]
)
def test_delta_of_the_number_of_batches_hides_half_of_epsilon(target, z, honest):
    spent = [Release(z, *CLIENT)]
    assert epsilon(spent, 1.75e-4) == pytest.approx(target - PRV_ERROR, rel=1e-2)
    assert epsilon(spent, 1 / 183_122) == pytest.approx(honest - PRV_ERROR, rel=1e-2)


# ---- properties of the figure

noises = st.floats(0.4, 6)
rates = st.floats(-4, 0).map(lambda power: 10**power)
counts = st.floats(0, 3.5).map(lambda power: int(10**power))
deltas = st.floats(-8, -3).map(lambda power: 10**power)


@given(z=noises, q=rates, steps=counts, delta=deltas, more=st.floats(1.05, 3))
@settings(max_examples=10, deadline=None)
def test_more_costs_more(z, q, steps, delta, more):
    base = epsilon([Release(z, q, steps)], delta)
    # The grid is the same.
    assert epsilon([Release(z, q, math.ceil(more * steps))], delta) >= base * (1 - 1e-5) - 1e-9
    for dearer, at in (
        (Release(z / more, q, steps), delta),
        (Release(z, min(1.0, q * more), steps), delta),
        (Release(z, q, steps), delta / more),
    ):
        assert epsilon([dearer], at) >= base * (1 - GRID) - 1e-5


@given(z=noises, q=rates, steps=counts, delta=deltas)
@settings(max_examples=10, deadline=None)
def test_bounds_are_in_order(z, q, steps, delta):
    spent = merged([Release(z, q, steps)])
    found = epsilon(spent, delta)
    assert found <= pld.on_grid(spent, delta, 8) * (1 + 1e-6) + 1e-9
    assert found <= upper_bound(spent, delta) * (1 + GRID) + 1e-5


@given(z=noises, q=rates, steps=counts, delta=deltas)
@settings(max_examples=10, deadline=None)
def test_parts_are_composed_as_if_they_were_one_kind(z, q, steps, delta):
    """A mechanism split in two that differ by nothing to speak of."""
    twin = z * (1 + 1e-9)
    split = [Release(z, q, steps), Release(twin, q, steps)]
    whole = epsilon([Release(z, q, 2 * steps)], delta)
    assert epsilon(split, delta) == pytest.approx(whole, rel=GRID, abs=1e-5)
    assert upper_bound(split, delta) == pytest.approx(
        upper_bound([Release(z, q, 2 * steps)], delta), rel=1e-6, abs=1e-9
    )


def test_composition_of_two_kinds_is_between_the_worse_and_the_sum():
    start, training = Release(5.0, 1.0, 1), Release(1.0, 0.01, 1000)
    both = check([start, training], DELTA)
    parts = [epsilon([part], DELTA) for part in (start, training)]
    assert max(parts) < both.pld < sum(parts)


@pytest.mark.parametrize(
    ("z", "q", "step"), [(1.0, 0.01, 1e-3), (0.3, 1e-4, 1e-3), (5.0, 0.3, 1e-4), (1.5, 1.0, 1e-3)]
)
def test_grid_is_the_one_of_the_library(z, q, step):
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

    theirs = from_gaussian_mechanism(
        z, value_discretization_interval=step, sampling_prob=q, log_mass_truncation_bound=-40
    )
    ours = pld._one_step(z, q, step, -40.0)
    for at in np.linspace(0, 4, 9).tolist():
        wanted = theirs.get_delta_for_epsilon(at)
        assert ours.get_delta_for_epsilon(at) == pytest.approx(wanted, rel=1e-9, abs=1e-18)
    wanted = theirs.self_compose(100).get_epsilon_for_delta(DELTA)
    assert ours.self_compose(100).get_epsilon_for_delta(DELTA) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize(("z", "q"), [(1.0, 0.01), (0.35, 1e-4), (4.0, 0.3), (0.8, 0.6)])
def test_moments_are_those_of_opacus(z, q):
    from opacus.accountants.analysis.rdp import compute_rdp

    chosen = [k for k, order in enumerate(renyi._ORDERS.tolist()) if order < 64]
    orders = renyi._ORDERS[chosen]
    theirs = compute_rdp(q=q, noise_multiplier=z, steps=1, orders=orders.tolist())
    assert renyi.log_moments(z, q)[chosen] == pytest.approx(theirs * (orders - 1), rel=1e-6)


# ---- edges


def test_nothing_released_costs_nothing():
    for spent in ([], [Release(1.0, 0.1, 0)], [Release(math.inf, 0.5, 10)]):
        assert check(spent, DELTA) == accounting.Figures(0.0, 0.0, 0.0)
        assert upper_bound(spent, DELTA) == 0.0


def test_no_noise_is_no_privacy():
    for spent in ([Release(0.0, 0.01, 1)], [Release(1.0, 0.01, 9), Release(0.04, 1.0, 1)]):
        assert check(spent, DELTA) == accounting.Figures(math.inf, math.inf, None)
        assert prv_epsilon(spent, DELTA) == upper_bound(spent, DELTA) == math.inf


def test_epsilon_is_never_negative():
    spent = [Release(1.0, 0.01, 1000)]
    assert check(spent, 0.9) == accounting.Figures(0.0, 0.0, 0.0)
    assert epsilon([Release(1e300, 1.0, 1)], DELTA) == 0.0


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, 2.0, math.nan])
def test_delta_is_a_probability(delta):
    for figure in (epsilon, rdp_epsilon, prv_epsilon, upper_bound, check):
        with pytest.raises(ValueError, match=r"delta is a probability in \(0, 1\)"):
            figure([Release(1.0, 0.1, 1)], delta)
    with pytest.raises(ValueError, match="delta is a probability"):
        largest({}, delta)
    with pytest.raises(ValueError, match="delta is a probability"):
        noise_multiplier(1.0, delta, 0.1, 1)


@pytest.mark.parametrize(
    ("spent", "delta"),
    [(Release(1.0, 0.01, 1000), 1e-14), (Release(0.06, 0.5, 10_000), DELTA)],
    ids=["a delta lost in roundings", "an epsilon of 800,000"],
)
def test_where_floats_end_the_bound_stands_in(spent, delta):
    figures = check([spent], delta)
    assert figures.pld == upper_bound([spent], delta)
    assert math.isfinite(figures.pld)
    assert figures.prv is None


def test_prv_gives_up_in_silence():
    assert prv_epsilon([Release(1.0, 0.01, 1000)], 1e-17) is None


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ((-1.0, 0.1, 1), "noise_multiplier is 0 or more, got -1.0"),
        ((math.nan, 0.1, 1), "noise_multiplier is 0 or more, got nan"),
        ((1.0, 0.0, 1), r"sample_rate is a probability in \(0, 1\], got 0.0"),
        ((1.0, 1.5, 1), r"sample_rate is a probability in \(0, 1\], got 1.5"),
        ((1.0, 0.1, -1), "steps is a count of at least 0, got -1"),
    ],
)
def test_releases_that_cannot_be(values, reason):
    with pytest.raises(ValueError, match=reason):
        Release(*values)


@given(
    st.lists(
        st.builds(
            Release,
            st.sampled_from([0.5, 1.0]),
            st.sampled_from([0.1, 1.0]),
            st.integers(0, 3),
        )
    )
)
def test_merging_keeps_every_step_once_per_kind(releases):
    spent = merged(releases)
    assert spent == merged(reversed(releases)) == merged(spent) == tuple(sorted(spent))
    assert len({(r.noise_multiplier, r.sample_rate) for r in spent}) == len(spent)
    assert sum(r.steps for r in spent) == sum(r.steps for r in releases)
    assert all(r.steps for r in spent)


def test_delta_must_mean_less_than_publishing_somebody():
    check_delta(0.9e-3, 1000)
    with pytest.raises(ValueError, match=r"below 1/n = 0.001 for n = 1000 units, got 0.001"):
        check_delta(1e-3, 1000)
    with pytest.raises(ValueError, match=r"delta is a probability in \(0, 1\)"):
        check_delta(0.0, 1000)
    with pytest.raises(ValueError, match="num_units counts records or clients"):
        check_delta(1e-3, 0)


def test_statement_says_what_epsilon_is_of():
    said = str(Statement("record", DELTA, "excluded"))
    for word in ("1e-05", "record", "add or remove one", "Poisson", "PLD", "EXCLUDED"):
        assert word in said
    facts = Statement("client", 1e-3, "included", sampling="none claimed").facts()
    assert (facts["unit"], facts["delta"], facts["sampling"]) == ("client", "0.001", "none claimed")
    for wrong in (("row", DELTA, "included"), ("record", DELTA, "?"), ("record", 1.0, "included")):
        with pytest.raises(ValueError, match=r"is one of|is a probability"):
            Statement(*wrong)


# ---- the cross-check


@pytest.mark.parametrize("factor", [0.5, 0.95, 1.05, 2.0])
@pytest.mark.parametrize("name", ["epsilon", "prv_epsilon"])
def test_a_wrong_figure_is_refused(monkeypatch, name, factor):
    right = getattr(accounting, name)
    monkeypatch.setattr(accounting, name, lambda *given: factor * right(*given))
    with pytest.raises(AccountingError, match="PLD"):
        check([Release(0.6, 0.02, 200)], DELTA)


def test_rdp_below_the_figure_is_refused(monkeypatch):
    right = accounting.rdp_epsilon
    monkeypatch.setattr(accounting, "rdp_epsilon", lambda *given: 0.8 * right(*given))
    with pytest.raises(AccountingError, match="above its bound by RDP"):
        check([Release(0.6, 0.02, 200)], DELTA)


@given(z=st.floats(0.3, 6), q=rates, steps=counts, delta=deltas)
@settings(max_examples=6, deadline=None)
def test_accountants_agree(z, q, steps, delta):
    check([Release(z, q, steps)], delta)


# ---- calibration


@given(
    target=st.floats(-0.7, 1.2).map(lambda power: 10**power),
    delta=deltas,
    q=rates,
    steps=counts,
)
@settings(max_examples=15, deadline=None)
def test_calibrated_noise_costs_the_target_and_not_more(target, delta, q, steps):
    z = noise_multiplier(target, delta, q, steps)
    spent = epsilon([Release(z, q, steps)], delta)
    assert spent <= target
    assert spent >= 0.99 * target or z == pytest.approx(0.05)


def test_calibration_counts_what_was_spent_before():
    before = (Release(5.0, 1.0, 1), Release(1.2, 0.02, 100))
    z = noise_multiplier(5.0, DELTA, 0.01, 1000, before)
    assert 0.99 * 5 <= epsilon((*before, Release(z, 0.01, 1000)), DELTA) <= 5
    assert z > noise_multiplier(5.0, DELTA, 0.01, 1000)
    with pytest.raises(ValueError, match=r"of 0.8 is spent already: nothing is left for 10 steps"):
        noise_multiplier(0.8, DELTA, 0.01, 10, before)


def test_calibration_of_ends():
    assert noise_multiplier(math.inf, DELTA, 0.01, 10) == 0.0
    # Ten steps that hold a record with probability 1e-6 in all never come near delta.
    assert noise_multiplier(1.0, DELTA, 1e-7, 10) == pytest.approx(0.05)
    for target in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="target_epsilon must be positive"):
            noise_multiplier(target, DELTA, 0.01, 10)
    with pytest.raises(ValueError, match="steps counts planned steps"):
        noise_multiplier(1.0, DELTA, 0.01, 0)


def test_calibration_asks_for_few_figures(monkeypatch):
    asked = []
    right = pld.epsilon
    monkeypatch.setattr(pld, "epsilon", lambda *given: asked.append(given) or right(*given))
    noise_multiplier(2.7, 3e-6, 0.013, 777)
    assert len(asked) <= 6


@pytest.mark.slow
@pytest.mark.timeout(1200)
@given(
    z=st.floats(0.3, 8),
    target=st.floats(-1.5, 2).map(lambda power: 10**power),
    delta=st.floats(-10, -2).map(lambda power: 10**power),
    q=st.floats(-5, 0).map(lambda power: 10**power),
    steps=st.floats(0, 4).map(lambda power: int(10**power)),
)
@settings(max_examples=15, deadline=None)
def test_accountants_agree_and_noise_fits_over_a_wide_range(z, target, delta, q, steps):
    figures = check([Release(z, q, steps)], delta)
    assert figures.pld <= upper_bound([Release(z, q, steps)], delta) * (1 + GRID) + 1e-5
    noise = noise_multiplier(target, delta, q, steps)
    spent = epsilon([Release(noise, q, steps)], delta)
    assert spent <= target
    assert spent >= 0.99 * target or noise == pytest.approx(0.05)


# ---- the largest of many clients

clients = st.dictionaries(
    st.integers(0, 30),
    st.lists(
        st.builds(
            Release,
            st.sampled_from([0.7, 0.9, 1.3]),
            st.sampled_from([0.01, 0.02, 0.05, 1.0]),
            st.sampled_from([0, 1, 20, 21, 300]),
        ),
        max_size=2,
    ).map(tuple),
    max_size=12,
)


@given(clients)
@settings(max_examples=15, deadline=None)
def test_largest_is_the_maximum_of_all(spent):
    figures = {client: epsilon(releases, DELTA) for client, releases in spent.items()}
    found, client = largest(spent, DELTA)
    assert found == max(figures.values(), default=0.0)
    if spent:
        assert figures[client] == found
    else:
        assert client is None


def test_largest_names_the_first_of_equals_and_whoever_has_no_noise():
    spent = {7: (Release(1.0, 0.1, 5),), 3: (Release(1.0, 0.1, 5),), 9: ()}
    assert largest(spent, DELTA) == (epsilon(spent[3], DELTA), 3)
    spent |= {5: (Release(0.0, 0.1, 1),), 8: (Release(0.01, 1.0, 1),)}
    assert largest(spent, DELTA) == (math.inf, 5)
    assert largest({4: (), 2: ()}, DELTA) == (0.0, 2)


@pytest.mark.parametrize(
    ("one", "most"),
    [
        (lambda n: Release(1.0, 0.02, 50 + n), 1),
        (lambda n: Release(1.0, 32 / (2000 + 60 * n), 100 + 21 * n), 5),
    ],
    ids=["as large, as often as they came", "of any size"],
)
def test_a_cohort_takes_a_few_figures(monkeypatch, one, most):
    spent = {n: (one(n),) for n in range(33)}
    asked = []
    right = pld.on_grid
    monkeypatch.setattr(pld, "on_grid", lambda *given: asked.append(given[2]) or right(*given))
    found, client = largest(spent, DELTA)
    assert asked.count(1) <= most
    monkeypatch.undo()
    assert found == epsilon(spent[client], DELTA)
    assert found >= max(epsilon(spent[n], DELTA) for n in range(0, 33, 5))


def test_who_computes_no_epsilon_does_not_wait_for_accountants():
    code = (
        "import sys, fedsys.privacy.accounting;"
        "print([m for m in ('opacus', 'dp_accounting', 'scipy', 'torch') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
