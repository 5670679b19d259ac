import tracemalloc

import numpy as np
import pytest

from fedsys.participation import Bernoulli, Uniform
from fedsys.seeds import numpy_generator


def draw(participation, round, num_clients, seed=0):
    rng = numpy_generator(seed, "participation", round)
    clients, state = participation.draw(round, num_clients, participation.init(num_clients), rng)
    assert state == ()
    return clients


ALL = pytest.mark.parametrize("participation", [Uniform(5), Uniform(), Bernoulli(rate=0.3)])


@ALL
def test_cohorts_follow_from_seed_and_round_alone(participation):
    forwards = [draw(participation, t, 40) for t in range(1, 20)]
    backwards = [draw(participation, t, 40) for t in range(19, 0, -1)]
    assert forwards == backwards[::-1]
    if participation != Uniform():
        assert forwards != [draw(participation, t, 40, seed=1) for t in range(1, 20)]
        assert len({tuple(c) for c in forwards}) > 15


@ALL
def test_cohorts_are_rising_clients_as_plain_ints(participation):
    for t in range(50):
        clients = draw(participation, t, 13)
        assert clients == sorted(set(clients))
        assert all(type(c) is int and 0 <= c < 13 for c in clients)


def test_uniform_cohorts_have_their_size():
    assert all(len(draw(Uniform(7), t, 30)) == 7 for t in range(50))


@pytest.mark.parametrize("cohort", [None, 6, 7, 1000])
def test_a_cohort_as_large_as_everyone_is_everyone(cohort):
    assert draw(Uniform(cohort), 1, 6) == list(range(6))


def test_every_client_and_every_pair_is_as_likely():
    rounds, clients, cohort = 6000, 8, 3
    together = np.zeros((clients, clients))
    for t in range(rounds):
        drawn = draw(Uniform(cohort), t, clients)
        together[np.ix_(drawn, drawn)] += 1
    single = cohort / clients
    pair = single * (cohort - 1) / (clients - 1)
    off = together[~np.eye(clients, dtype=bool)]
    for counts, p in ((np.diag(together), single), (off, pair)):
        assert np.abs(counts / rounds - p).max() < 4.5 * np.sqrt(p * (1 - p) / rounds)


def test_bernoulli_sizes_have_the_mean_and_variance_of_a_binomial():
    rounds, clients, rate = 4000, 20, 0.15
    drawn = [draw(Bernoulli(rate=rate), t, clients) for t in range(rounds)]
    sizes = np.array([len(c) for c in drawn])
    variance = clients * rate * (1 - rate)
    assert sizes.mean() == pytest.approx(clients * rate, abs=4 * np.sqrt(variance / rounds))
    assert sizes.var() == pytest.approx(variance, rel=0.12)
    assert 0 in sizes
    often = np.bincount(np.concatenate([np.array(c, int) for c in drawn]), minlength=clients)
    assert np.abs(often / rounds - rate).max() < 4.5 * np.sqrt(rate * (1 - rate) / rounds)


def test_bernoulli_clients_are_independent_of_each_other():
    rounds, rate = 6000, 0.4
    present = np.zeros((rounds, 4))
    for t in range(rounds):
        present[t, draw(Bernoulli(rate=rate), t, 4)] = 1
    correlations = np.corrcoef(present.T)[~np.eye(4, dtype=bool)]
    assert np.abs(correlations).max() < 4.5 / np.sqrt(rounds)


def test_rate_one_is_everyone():
    assert draw(Bernoulli(rate=1.0), 1, 9) == list(range(9))


@pytest.mark.parametrize("participation", [Uniform(100), Bernoulli(rate=1e-4)])
def test_a_million_clients_cost_their_cohort(participation):
    draw(participation, 0, 1_000_000)
    tracemalloc.start()
    for t in range(20):
        assert len(draw(participation, t, 1_000_000)) < 200
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000


@pytest.mark.parametrize("cohort", [0, -1])
def test_a_cohort_counts_clients(cohort):
    with pytest.raises(ValueError, match=f"cohort .* at least 1, got {cohort}"):
        Uniform(cohort)


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.01, float("nan")])
def test_a_rate_is_a_probability(rate):
    with pytest.raises(ValueError, match="rate is a probability"):
        Bernoulli(rate=rate)
