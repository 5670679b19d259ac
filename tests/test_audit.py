import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from fedsys.cohort import CohortModel
from fedsys.data import Bootstrap, Dataset, TensorExamples, TokenExamples
from fedsys.data.shards import RowShards
from fedsys.privacy.audit import (
    Audit,
    Guess,
    audit,
    estimate,
    lower_bound,
    one_shot,
)
from fedsys.privacy.canaries import Canaries
from fedsys.privacy.gaussians import gaussians_epsilon
from fedsys.privacy.scores import Seen, clipped_gradients, scores, shares

# ---- The bound


@pytest.mark.parametrize(
    ("canaries", "guesses", "correct", "delta", "expected"),
    [
        (100, 100, 75, 0, 0.7022),
        (1000, 1000, 600, 0, 0.2975),
        (1000, 200, 190, 0, 2.3979),
        (1000, 200, 190, 1e-5, 2.3936),
        (1000, 100, 100, 1e-5, 3.4654),
        (100, 50, 50, 1e-5, 2.7819),
        (1000, 1000, 520, 1e-5, 0.0),
    ],
)
def test_worked_values(canaries, guesses, correct, delta, expected):
    assert lower_bound(canaries, guesses, correct, delta) == pytest.approx(expected, abs=1e-3)


@given(
    guesses=st.integers(1, 3000),
    share=st.floats(0.5, 1),
    confidence=st.sampled_from([0.9, 0.95, 0.99]),
)
@settings(max_examples=60, deadline=None)
def test_without_delta_it_is_the_clopper_pearson_bound_of_the_rate_of_success(
    guesses, share, confidence
):
    correct = math.ceil(share * guesses)
    rate = stats.beta.ppf(1 - confidence, correct, guesses - correct + 1)
    expected = max(0.0, math.log(rate / (1 - rate)))
    assert lower_bound(guesses, guesses, correct, 0, confidence) == pytest.approx(
        expected, abs=1e-5
    )


def right_hand_side(canaries, guesses, correct, delta, epsilon):
    right = stats.binom(guesses, 1 / (1 + math.exp(-epsilon)))
    i = np.arange(1, correct + 1)
    below = right.cdf(correct - 1) - right.cdf(correct - i - 1)
    return right.sf(correct - 1) + 2 * canaries * delta * (below / i).max()


@given(
    guesses=st.integers(20, 300),
    more=st.integers(0, 500),
    share=st.floats(0.6, 1),
    delta=st.sampled_from([1e-6, 1e-5, 1e-4]),
)
@settings(max_examples=40, deadline=None)
def test_it_is_where_the_inequality_turns(guesses, more, share, delta):
    correct = math.ceil(share * guesses)
    canaries = guesses + more
    found = lower_bound(canaries, guesses, correct, delta)
    assert right_hand_side(canaries, guesses, correct, delta, found + 1e-3) > 0.05
    if found > 0:
        assert right_hand_side(canaries, guesses, correct, delta, found - 1e-5) <= 0.05


def test_many_canaries_cost_no_accuracy():
    rate = stats.beta.ppf(0.05, 90_000, 10_001)
    found = lower_bound(100_000, 100_000, 90_000, 0)
    assert found == pytest.approx(math.log(rate / (1 - rate)), abs=1e-5)
    assert 0 < found - lower_bound(100_000, 100_000, 90_000, 1e-7) < 0.01


@given(st.integers(0, 99), st.sampled_from([0.0, 1e-5, 1e-3]))
@settings(max_examples=40, deadline=None)
def test_it_grows_with_right_guesses_and_shrinks_with_delta_and_confidence(correct, delta):
    found = lower_bound(200, 100, correct, delta)
    assert lower_bound(200, 100, correct + 1, delta) >= found
    assert lower_bound(200, 100, correct, delta + 1e-4) <= found
    assert lower_bound(200, 100, correct, delta, 0.99) <= found


def test_it_is_zero_where_chance_explains_all():
    assert lower_bound(100, 100, 50, 0) == 0
    assert lower_bound(100, 0, 0, 0) == 0
    assert lower_bound(100, 4, 4, 0) == 0  # chance is right four times in one case of 16
    assert lower_bound(100, 100, 100, 0.5) == 0
    assert lower_bound(100, 5, 5, 0) > 0  # one case of 32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 11, 5, 0.0), "counts"),
        ((10, 5, 6, 0.0), "counts"),
        ((10, 5, -1, 0.0), "counts"),
        ((10, 5, 5, 1.0), "delta"),
        ((10, 5, 5, -0.1), "delta"),
        ((10, 5, 5, 0.0, 1.0), "confidence"),
    ],
)
def test_what_is_out_of_range_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        lower_bound(*arguments)


# ---- Guesses


def test_the_highest_are_in_and_the_lowest_out():
    guesses = Guess(inside=2, outside=1)(torch.tensor([0.3, -1.0, 5.0, 0.2, 4.0]))
    assert guesses.tolist() == [0, -1, 1, 0, 1]
    assert Guess(inside=0, outside=0)(torch.zeros(3)).tolist() == [0, 0, 0]
    assert Guess(inside=1, outside=2)(torch.zeros(3)).tolist() == [-1, -1, 1]
    assert Guess.quarters(203) == Guess(50, 50)


def test_equal_scores_are_told_apart_without_the_coins():
    """Scores without any information are right half of the time, ties or not."""
    draw = torch.Generator().manual_seed(0)
    right = [
        audit(
            torch.zeros(100), torch.rand(100, generator=draw) < 0.5, Guess(20, 20), 1.0, 0.0
        ).correct
        for _ in range(500)
    ]
    assert np.mean(right) == pytest.approx(20, abs=3 * math.sqrt(10 / 500))


def test_guesses_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="outside counts"):
        Guess(1, -1)
    with pytest.raises(ValueError, match="3 guesses need as many canaries, got 2"):
        Guess(2, 1)(torch.zeros(2))
    with pytest.raises(ValueError, match="not a number"):
        Guess(1, 1)(torch.tensor([0.0, math.nan]))


# ---- The audit


def test_scores_without_a_signal_prove_nothing():
    draw = torch.Generator().manual_seed(1)
    proven = 0
    for _ in range(200):
        coins = torch.rand(200, generator=draw) < 0.5
        found = audit(torch.randn(200, generator=draw), coins, Guess(50, 50), 1.0, 1e-5)
        proven += found.measured > 0
    assert proven <= 200 * 0.05 + 3 * math.sqrt(200 * 0.05 * 0.95)


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 3.0])
def test_randomised_response_is_bounded_from_below_and_closely(epsilon):
    draw = torch.Generator().manual_seed(round(10 * epsilon))
    count, repeats = 10_000, 100
    lie = 1 / (1 + math.exp(epsilon))
    found = []
    for _ in range(repeats):
        coins = torch.rand(count, generator=draw) < 0.5
        answers = coins ^ (torch.rand(count, generator=draw) < lie)
        # Every coin is guessed, as it is answered: that many are guessed in.
        guess = Guess(int(answers.sum()), int((~answers).sum()))
        found.append(audit(answers.double(), coins, guess, epsilon, 0.0))
    above = sum(each.contradicts for each in found)
    assert above <= repeats * 0.05 + 3 * math.sqrt(repeats * 0.05 * 0.95)
    assert all(each.measured > 0.7 * epsilon for each in found)


def test_an_audit_says_what_it_found():
    coins = torch.tensor([True] * 50 + [False] * 50)
    perfect = audit(coins.double(), coins, Guess(25, 25), 2.0, 1e-5)
    measured = lower_bound(100, 50, 50, 1e-5)
    assert perfect == Audit(2.0, measured, 1e-5, "one-run bound", 100, 50, 50, 0.95)
    assert perfect.contradicts
    assert not replace(perfect, claimed=math.inf).contradicts
    reversed_ = audit(-coins.double(), coins, Guess(25, 25), 2.0, 1e-5)
    assert (reversed_.correct, reversed_.measured) == (0, 0.0)


# ---- The one-shot estimate


def cosines(shift, width, dimension, count=1000):
    """Return numbers whose mean and deviation are exactly those asked for, in units of chance."""
    unit = torch.linspace(-1, 1, count, dtype=torch.float64)
    return (shift + width * unit / unit.std()) / math.sqrt(dimension)


@pytest.mark.parametrize(
    ("sigma", "delta", "expected"), [(1.0, 1e-5, 4.3772), (2 / math.sqrt(10), 1e-5, 7.5113)]
)
def test_equally_wide_gaussians_are_the_gaussian_mechanism(sigma, delta, expected):
    found = one_shot(cosines(1 / sigma, 1.0, 512), 512, delta)
    assert found == pytest.approx(expected, abs=1e-4)


def test_drawn_cosines_give_about_the_epsilon_of_their_distribution():
    draw = torch.Generator().manual_seed(3)
    drawn = (1.0 + torch.randn(20_000, generator=draw)) / math.sqrt(2000)
    found = estimate(drawn, 2000, 4.0, 1e-5)
    assert found.measured == pytest.approx(4.3772, rel=0.03)
    assert (found.method, found.canaries, found.correct) == ("one-shot estimate", 20_000, None)
    assert found.measured > found.claimed
    assert not found.contradicts


@given(shift=st.floats(-6, 6), width=st.floats(0.3, 3), delta=st.sampled_from([1e-6, 1e-4, 1e-2]))
@settings(max_examples=30, deadline=None)
def test_unequal_gaussians_differ_by_delta_at_epsilon(shift, width, delta):
    epsilon = gaussians_epsilon(shift, width, delta)
    x = np.linspace(-30, 30, 60_001)
    p, q = stats.norm.pdf(x), stats.norm.pdf(x, shift, width)
    with np.errstate(over="ignore"):
        excess = max(
            np.trapezoid(np.maximum(a - np.exp(epsilon) * b, 0), x) for a, b in ((p, q), (q, p))
        )
    if epsilon > 0:
        assert excess == pytest.approx(delta, rel=1e-3, abs=1e-9)
    else:
        assert excess <= delta


def test_canaries_that_left_no_trace_suggest_nothing():
    assert one_shot(cosines(0.0, 1.0, 100), 100, 1e-5) == 0
    assert one_shot(cosines(3.0, 1.0, 100), 100, 1e-5) > one_shot(cosines(1.0, 1.0, 100), 100, 1e-5)
    assert one_shot(torch.full((3,), 0.5), 100, 1e-5) == math.inf


@pytest.mark.parametrize(
    ("found", "dimension", "message"),
    [(torch.zeros(1), 10, "at least 2"), (torch.zeros(5), 0, "dimension")],
)
def test_cosines_that_say_nothing_are_refused(found, dimension, message):
    with pytest.raises(ValueError, match=message):
        one_shot(found, dimension, 1e-5)


# ---- Canaries


def images(rows, classes=10, seed=0):
    draw = torch.Generator().manual_seed(seed)
    x = torch.rand(rows, 1, 8, 8, generator=draw)
    examples = TensorExamples(x, torch.randint(classes, (rows,), generator=draw))
    return Dataset(examples, examples, num_classes=classes, input_shape=(1, 8, 8))


def texts(rows, labelled):
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 12, (rows,), generator=draw)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    tokens = torch.randint(3, 900, (int(offsets[-1]),), generator=draw, dtype=torch.int32)
    tokens[offsets[:-1]], tokens[offsets[1:] - 1] = 1, 2
    labels = torch.randint(2, (rows,), generator=draw) if labelled else None
    examples = TokenExamples(tokens, offsets, pad_id=0, labels=labels)
    return Dataset(examples, examples, num_classes=2 if labelled else None)


def even(rows, clients):
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(9))
    ends = torch.arange(clients + 1) * rows // clients
    return RowShards(order, ends.diff(), [f"client {n}" for n in range(clients)])


def held(shards):
    return [shards.rows(client).tolist() for client in range(len(shards))]


@given(rows=st.integers(40, 120), clients=st.integers(1, 20), count=st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_canaries_are_rows_of_clients_and_in_by_their_coins(rows, clients, count):
    dataset, shards = images(rows), even(rows, clients)
    planted = Canaries(count=count).plant(dataset, shards, 5)
    assert len(set(planted.rows.tolist())) == count
    for row, owner in zip(planted.rows.tolist(), planted.owners.tolist(), strict=True):
        assert row in shards.rows(owner).tolist()
    out = set(planted.rows[~planted.coins].tolist())
    assert held(planted.shards) == [[r for r in part if r not in out] for part in held(shards)]
    assert planted.shards.sizes().tolist() == [len(part) for part in held(planted.shards)]
    assert planted.shards.name(0) == "client 0"


@given(clients=st.integers(1, 20), count=st.integers(1, 60))
@settings(max_examples=40, deadline=None)
def test_canaries_are_spread_and_leave_every_client_a_row(clients, count):
    planted = Canaries(count=count).plant(images(100), even(100, clients), 5)
    each = planted.owners.bincount(minlength=clients)
    assert each.max() - each.min() <= 1
    assert (planted.shards.sizes() > 0).all()


def test_a_client_with_few_rows_gives_few_canaries():
    shards = RowShards(torch.arange(23), torch.tensor([1, 2, 20]))
    planted = Canaries(count=10).plant(images(23), shards, 0)
    assert planted.owners.bincount(minlength=3).tolist() == [0, 1, 9]


def test_rows_that_several_clients_hold_are_no_canaries():
    dataset = images(200)
    shards = Bootstrap(examples=40).split(dataset, 5, 0)
    counts = torch.cat([shards.rows(n) for n in range(5)]).bincount(minlength=200)
    planted = Canaries(count=30).plant(dataset, shards, 0)
    assert (counts[planted.rows] == 1).all()
    with pytest.raises(ValueError, match=r"canaries=1 is too many: 0 rows"):
        Canaries(count=1).plant(dataset, RowShards(torch.zeros(9).long(), torch.tensor([9])), 0)


@pytest.mark.parametrize("kind", ["images", "bytes", "texts"])
def test_only_canaries_change_and_their_labels_are_wrong(kind):
    dataset = texts(300, True) if kind == "texts" else images(300)
    if kind == "bytes":
        x = (dataset.train.x * 255).byte()
        dataset = replace(dataset, train=replace(dataset.train, x=x, scale=torch.tensor(1 / 255)))
    planted = Canaries(count=100).plant(dataset, even(300, 7), 0)
    others = torch.tensor([r for r in range(300) if r not in set(planted.rows.tolist())])
    before, after = dataset.train, planted.dataset.train
    for name, value in before.batch(others).items():
        assert torch.equal(value, after.batch(others)[name])
    assert (before.labels[planted.rows] != after.labels[planted.rows]).all()
    assert set(after.labels.tolist()) <= set(range(dataset.num_classes))
    if kind != "texts":
        pairs = zip(before.x[planted.rows], after.x[planted.rows], strict=True)
        assert not any(torch.equal(old, new) for old, new in pairs)
    assert before.fingerprint() != after.fingerprint()
    assert planted.dataset.evaluation is dataset.evaluation


def test_images_are_sparse_and_nearly_orthogonal():
    dataset = images(2000)
    planted = Canaries(count=500).plant(dataset, even(2000, 4), 0)
    x = planted.dataset.train.x[planted.rows].flatten(1)
    low, high = dataset.train.x.min(), dataset.train.x.max()
    assert set(x.unique().tolist()) == {low.item(), high.item()}
    assert (x == high).double().mean().item() == pytest.approx(0.1, abs=0.01)
    unit = nn.functional.normalize(x)
    assert (unit @ unit.T).fill_diagonal_(0).mean() < 0.2


@pytest.mark.parametrize("labelled", [True, False])
def test_texts_keep_their_length_and_ends(labelled):
    dataset = texts(300, labelled)
    planted = Canaries(count=100).plant(dataset, even(300, 4), 0)
    before, after = (d.train.batch(planted.rows) for d in (dataset, planted.dataset))
    assert torch.equal(before["attention_mask"], after["attention_mask"])
    last = before["attention_mask"].sum(1) - 1
    place = torch.arange(100)
    assert (after["input_ids"][:, 0] == 1).all()
    assert (after["input_ids"][place, last] == 2).all()
    inner = before["attention_mask"].bool()
    inner[place, last] = False
    inner[:, 0] = False
    same = (before["input_ids"] == after["input_ids"])[inner].double().mean()
    assert same < 0.05  # of 900 tokens
    assert torch.isin(after["input_ids"], dataset.train.tokens.unique()).sum() >= inner.sum()
    assert (planted.dataset.train.labels is None) == (not labelled)


def test_wrong_labels_are_equally_likely():
    dataset = images(12_000, classes=4)
    planted = Canaries(count=9000).plant(dataset, even(12_000, 3), 0)
    step = (planted.dataset.train.labels - dataset.train.labels)[planted.rows] % 4
    counts = step.bincount(minlength=4).tolist()
    assert counts[0] == 0
    assert stats.chisquare(counts[1:]).pvalue > 1e-3


def test_coins_are_fair_and_independent_of_the_rest():
    dataset, shards = images(400), even(400, 8)
    plants = [Canaries(count=200, seed=s).plant(dataset, shards, 0) for s in range(100)]
    coins = torch.stack([each.coins for each in plants]).double()
    assert coins.mean().item() == pytest.approx(0.5, abs=3 * 0.5 / math.sqrt(20_000))
    rows = torch.stack([each.rows for each in plants]).double()
    labels = torch.stack([each.dataset.train.labels[each.rows] for each in plants]).double()
    for other in (rows, labels):
        r = np.corrcoef(coins.flatten(), other.flatten())[0, 1]
        assert abs(r) < 4 / math.sqrt(20_000)


def test_the_same_seeds_plant_the_same():
    dataset, shards = images(100), even(100, 4)

    def plant(seed, run):
        return Canaries(count=30, seed=seed).plant(dataset, shards, run)

    first, again = plant(1, 2), plant(1, 2)
    assert torch.equal(first.coins, again.coins)
    assert held(first.shards) == held(again.shards)
    assert first.dataset.fingerprint() == again.dataset.fingerprint()
    for other in (plant(2, 2), plant(1, 3)):
        assert not torch.equal(first.coins, other.coins)
        assert not torch.equal(first.rows, other.rows)


def test_what_cannot_be_planted_is_refused():
    with pytest.raises(ValueError, match="count must be at least 1"):
        Canaries(count=0)
    with pytest.raises(ValueError, match=r"canaries=97 is too many: 96 rows"):
        Canaries(count=97).plant(images(100), even(100, 4), 0)
    vectors = TensorExamples(torch.zeros(9, 2), torch.zeros(9, 1))
    with pytest.raises(ValueError, match="at least 2 classes"):
        Canaries(count=1).plant(Dataset(vectors, vectors), even(9, 1), 0)


# ---- Scores


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        return self.head(self.fc(x.flatten(1)).relu())


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net()


def test_gradients_are_those_of_single_rows_clipped():
    data, net, rows = images(20).train, network(), torch.tensor([3, 3, 17, 0])
    model = CohortModel(network())
    start = model.initial + 0.1
    expected = []
    model_params = model.layout.unpack(start)
    net.load_state_dict(model_params)
    for row in rows.tolist():
        batch = data.batch(torch.tensor([row]))
        net.zero_grad()
        nn.functional.cross_entropy(net(batch["x"]), batch["labels"]).backward()
        expected.append(model.layout.pack({n: p.grad for n, p in net.named_parameters()}))
    whole = torch.stack(expected)
    found = clipped_gradients(model, data, rows, start, math.inf)
    assert torch.allclose(found, whole, rtol=1e-4, atol=1e-6)
    norms = whole.norm(dim=1)
    limit = norms.median().item()
    found = clipped_gradients(model, data, rows, start, limit)
    assert torch.allclose(found.norm(dim=1), norms.clamp(max=limit), rtol=1e-4)
    assert clipped_gradients(model, data, rows[:0], start, 1.0).shape == (0, model.layout.size)


def test_a_gradient_that_is_not_finite_counts_as_zero():
    data = images(5).train
    x = data.x.clone()
    x[2] = math.inf
    model = CohortModel(network())
    found = clipped_gradients(model, replace(data, x=x), torch.arange(5), model.initial, 1.0)
    assert found.isfinite().all()
    assert found.norm(dim=1).tolist() == pytest.approx([1, 1, 0, 1, 1], abs=1e-5)


def test_shares_solve_the_ridge_regression_of_each_client():
    draw = torch.Generator().manual_seed(0)
    canaries, others, moves = (
        torch.randn(n, 40, generator=draw, dtype=torch.float64) for n in (6, 9, 2)
    )
    owners = torch.tensor([4, 7, 4, 4, 7, 4])
    penalty = 0.1 * others.square().sum(1).mean()
    found = shares(canaries, others, owners, {4: moves[0], 7: moves[1]})
    for client, move in ((4, moves[0]), (7, moves[1])):
        rows = torch.cat([canaries[owners == client], others])
        system = rows @ rows.T + penalty * torch.eye(len(rows))
        expected = torch.linalg.solve(system, -(rows @ move))
        assert torch.allclose(found[owners == client], expected[: int((owners == client).sum())])


def train(planted, rounds, noise_multiplier, rate=0.2, steps=4, lr=0.5, clipping_norm=1.0):
    """Yield what a server sees of FedAvg with DP-SGD at the clients."""
    draw = torch.Generator().manual_seed(4)
    model = CohortModel(network())
    x, parts = model.initial, planted.shards
    for _ in range(rounds):
        moves = {}
        for client in range(len(parts)):
            rows, w = parts.rows(client), x.clone()
            for _ in range(steps):
                lot = rows[torch.rand(len(rows), generator=draw) < rate]
                train = planted.dataset.train
                total = clipped_gradients(model, train, lot, w, clipping_norm).sum(0)
                total += noise_multiplier * clipping_norm * torch.randn(len(w), generator=draw)
                w -= lr * total / (rate * len(rows))
            moves[client] = w - x
        yield Seen(x, moves)
        x = x + torch.stack(list(moves.values())).mean(0)


def audited(noise_multiplier, claimed, rounds, **settings):
    dataset = images(1000)
    planted = Canaries(count=200).plant(dataset, even(1000, 5), 0)
    reference = images(200, seed=1).train
    seen = train(planted, rounds, noise_multiplier, **settings)
    found = scores(CohortModel(network()), planted, reference, seen, 1.0)
    return audit(found, planted.coins, Guess.quarters(200), claimed, 1e-5)


def test_without_noise_the_canaries_are_found():
    assert audited(0.0, math.inf, 4).measured > 2


def test_with_noise_the_bound_stays_below_the_epsilon_of_the_gaussian_mechanism():
    # Four full batches with noise 4 are one of noise 2, and the two Gaussians are known exactly.
    claimed = gaussians_epsilon(0.5, 1.0, 1e-5)
    assert claimed < 2 < audited(0.0, claimed, 4, rate=1.0, steps=1).measured
    found = audited(4.0, claimed, 4, rate=1.0, steps=1)
    assert found.measured <= claimed
    assert not found.contradicts


def test_rounds_that_a_client_missed_leave_its_scores_alone():
    planted = Canaries(count=40).plant(images(200), even(200, 5), 0)
    model, reference = CohortModel(network()), images(50, seed=1).train
    (seen,) = train(planted, 1, 0.0)
    whole = scores(model, planted, reference, [seen], 1.0)
    some = replace(seen, moves={n: move for n, move in seen.moves.items() if n in (1, 3)})
    part = scores(model, planted, reference, [some], 1.0)
    present = (planted.owners == 1) | (planted.owners == 3)
    assert torch.allclose(part[present], whole[present])
    assert (part[~present] == 0).all()
    assert (whole != 0).all()
    assert torch.allclose(scores(model, planted, reference, [seen, some], 1.0), whole + part)
