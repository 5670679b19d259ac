import logging
import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, RecordDict
from flwr.serverapp.strategy.fedtrimmedavg import trim_mean
from flwr.serverapp.strategy.multikrum import select_multikrum
from hypothesis import assume, given, settings

from fedsys.attacks import Scale, SignFlip, corrupt
from fedsys.collusion import ALIE, MinMax
from fedsys.defences import Defence, Krum, Median, MultiKrum, NormClip, TrimmedMean
from fedsys.params import norm
from fedsys.seeds import generator
from fedsys.update import Update

NUMBERS = st.floats(-100, 100, width=32)
ALL = pytest.mark.parametrize(
    "defence",
    [NormClip(clipping_norm=1.0), Median(), TrimmedMean(), Krum(), Krum(selected=3), MultiKrum()],
    ids=repr,
)
ROBUST = pytest.mark.parametrize(
    "defence", [Median(), TrimmedMean(), Krum(), MultiKrum()], ids=repr
)


def updates_of(values, dtype=torch.float32):
    """Return an update of each of ``values``, of client 0, 1, ..., with 1, 2, ... examples."""
    return [Update(c, {"w": torch.tensor(v, dtype=dtype)}, c + 1) for c, v in enumerate(values)]


def merged(defence, values, malicious=0):
    """Return the one vector that a defence makes of ``values``."""
    (out,) = defence.defend(iter(updates_of(values)), malicious)
    return out.delta["w"]


def clients(defence, values, malicious=0):
    return [u.client for u in defence.defend(iter(updates_of(values)), malicious)]


@st.composite
def points(draw, least=1, most=9):
    size = draw(st.integers(1, 4))
    return draw(
        st.lists(st.lists(NUMBERS, min_size=size, max_size=size), min_size=least, max_size=most)
    )


# ---- all


@ALL
@given(points(), st.integers(0, 5), st.randoms())
@settings(deadline=None, max_examples=30)
def test_the_order_of_arrival_does_not_matter(defence, values, malicious, random):
    updates = updates_of(values)
    shuffled = random.sample(updates, len(updates))
    once, again = (list(defence.defend(u, malicious)) for u in (updates, shuffled))
    if not isinstance(defence, NormClip):  # it streams in the order of arrival
        assert [u.client for u in once] == [u.client for u in again]
    found = {u.client: u for u in again}
    for u in once:
        assert u.num_examples == found[u.client].num_examples
        assert torch.equal(u.delta["w"], found[u.client].delta["w"])


@ALL
@given(points(most=5), st.integers(0, 12))
@settings(deadline=None, max_examples=30)
def test_no_number_of_attackers_ends_a_run(defence, values, malicious):
    outs = list(defence.defend(updates_of(values), malicious))
    assert outs
    assert all(u.delta["w"].isfinite().all() for u in outs)
    assert [u.client for u in outs] == sorted(u.client for u in outs)


@ALL
def test_an_empty_round_stays_empty(defence):
    assert list(defence.defend(iter(()), 2)) == []


@ALL
def test_one_update_is_itself(defence):
    (out,) = defence.defend(updates_of([[0.25, -0.5]]), 0)
    assert torch.equal(out.delta["w"], torch.tensor([0.25, -0.5]))
    assert out.num_examples == 1


@ALL
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_dtypes_shapes_and_what_came_in_are_kept(defence, dtype):
    updates = [
        Update(c, {"a": torch.full((2, 3), c).to(dtype), "b": torch.tensor(c).to(dtype)}, 1)
        for c in range(6)
    ]
    for out in defence.defend(updates, 1):
        assert (out.delta["a"].dtype, out.delta["a"].shape) == (dtype, (2, 3))
        assert (out.delta["b"].dtype, out.delta["b"].shape) == (dtype, ())
    assert [int(u.delta["b"]) for u in updates] == list(range(6))


@ROBUST
def test_a_minority_far_out_is_kept_out(defence):
    honest = [[1.0, 2.0], [1.1, 2.1], [0.9, 1.9], [1.0, 2.2], [1.2, 2.0], [1.1, 1.9], [0.8, 2.0]]
    values = [[1e30, -1e30], [-3e38, 3e38], *honest]
    outs = list(defence.defend(updates_of(values), 2))
    mean = torch.stack([u.delta["w"].double() for u in outs]).mean(0)
    for k in range(2):
        column = [value[k] for value in honest]
        assert min(column) - 1e-6 <= mean[k] <= max(column) + 1e-6


@ROBUST
def test_a_majority_that_agrees_has_its_way(defence):
    values = [[50.0, 50.0]] * 6 + [[1.0, 0.0], [1.1, 0.1], [0.9, 0.2]]
    outs = list(defence.defend(updates_of(values), 1))
    mean = torch.stack([u.delta["w"].double() for u in outs]).mean(0)
    assert mean.min() > 25


@pytest.mark.parametrize(
    "attack",
    [
        SignFlip(fraction=0.2, factor=5.0),
        Scale(fraction=0.2, factor=-1e4),
        ALIE(fraction=0.2),
        MinMax(fraction=0.2, perturbation="unit"),
    ],
    ids=lambda attack: type(attack).__name__,
)
@ROBUST
def test_every_attack_of_a_fifth_leaves_the_direction_of_the_honest(defence, attack):
    rng = generator(0, "test")
    truth = torch.randn(50, generator=rng)
    honest = [Update(c, {"w": truth + 0.5 * torch.randn(50, generator=rng)}, 1) for c in range(20)]
    sent = corrupt(honest, attack, 20, rng, frozenset(), 20)
    outs = list(defence.defend(sent, 4))
    mean = torch.stack([u.delta["w"] for u in outs]).mean(0)
    assert torch.cosine_similarity(mean, truth, 0) > 0.8


# ---- norm clipping


@given(points(), st.floats(1e-3, 1e3))
@settings(deadline=None)
def test_clipping_never_lengthens_and_leaves_what_is_short(values, clipping_norm):
    updates = updates_of(values)
    outs = list(NormClip(clipping_norm=clipping_norm).defend(updates, 0))
    assert len(outs) == len(updates)
    for given_, out in zip(updates, outs, strict=True):
        before = norm(given_.delta)
        assert norm(out.delta) <= before
        if before <= clipping_norm:
            assert out is given_
        else:
            assert norm(out.delta) == pytest.approx(clipping_norm, rel=1e-6)
            cosine = torch.dot(out.delta["w"].double(), given_.delta["w"].double())
            assert cosine == pytest.approx(before * clipping_norm, rel=1e-6)
        assert out.num_examples == given_.num_examples


def test_worked_clip_over_all_tensors_together():
    delta = {"a": torch.tensor([[3.0]]), "b": torch.tensor([0.0, 4.0])}
    (out,) = NormClip(clipping_norm=1.0).defend([Update(7, delta, 3)], 0)
    assert out.delta["a"].item() == pytest.approx(0.6)
    assert out.delta["b"].tolist() == pytest.approx([0.0, 0.8])
    assert (out.client, out.num_examples) == (7, 3)


def test_clipping_streams():
    def updates():
        yield from updates_of([[2.0]])
        raise AssertionError("too early")

    assert next(NormClip(clipping_norm=1.0).defend(updates(), 0)).delta["w"].item() == 1.0


# ---- median and trimmed mean


def test_worked_median_and_trimmed_mean():
    values = [[1.0, 50.0], [2.0, -1.0], [9.0, 0.0], [3.0, 7.0], [-90.0, 1.0]]
    assert merged(Median(), values).tolist() == [2.0, 1.0]
    assert merged(Median(), values[:4]).tolist() == [2.5, 3.5]
    assert merged(TrimmedMean(), values, 1).tolist() == [2.0, pytest.approx(8 / 3)]
    assert merged(TrimmedMean(), values, 0).tolist() == [-15.0, pytest.approx(11.4)]
    assert merged(TrimmedMean(), values, 2).tolist() == [2.0, 1.0]


@given(points())
@settings(deadline=None)
def test_the_median_is_that_of_numpy(values):
    expected = np.median(np.array(values, dtype=np.float64), axis=0)
    np.testing.assert_allclose(merged(Median(), values).double(), expected, rtol=1e-6, atol=1e-40)


@given(points(), st.data())
@settings(deadline=None)
def test_the_trimmed_mean_is_that_of_flower(values, data):
    dropped = data.draw(st.integers(0, (len(values) - 1) // 2))
    array = np.array(values, dtype=np.float64)
    expected = trim_mean(array, (dropped + 0.25) / len(values))
    found = merged(TrimmedMean(), values, dropped).double()
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-5)


@given(points(), points(), st.randoms())
@settings(deadline=None)
def test_a_minority_cannot_leave_the_range_of_the_honest(honest, forged, random):
    size = len(honest[0])
    forged = [(value * size)[:size] for value in forged][: (len(honest) - 1)]
    values = random.sample(honest + forged, len(honest) + len(forged))
    columns = torch.tensor(honest)
    for defence in (Median(), TrimmedMean()):
        found = merged(defence, values, len(forged))
        assert (found >= columns.amin(0) - 1e-5).all()
        assert (found <= columns.amax(0) + 1e-5).all()


def test_a_trimmed_mean_of_a_small_round_drops_fewer_and_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        assert merged(TrimmedMean(), [[1.0], [2.0], [6.0], [40.0]], 2).tolist() == [4.0]
    assert caplog.messages == [
        "TrimmedMean assumes 2 of 4 updates to be malicious, but stands 1; goes on with that"
    ]


def test_what_is_assumed_goes_before_what_is_true(caplog):
    values = [[0.0], [1.0], [2.0], [3.0], [100.0]]
    assert merged(TrimmedMean(malicious=1), values, 0).tolist() == [2.0]
    assert merged(TrimmedMean(malicious=0), values, 2).tolist() == [pytest.approx(21.2)]
    assert not caplog.messages


@pytest.mark.parametrize("defence", [Median(), TrimmedMean()])
def test_one_update_stands_for_all(defence):
    (out,) = defence.defend(updates_of([[1.0], [2.0], [3.0]]), 1)
    assert (out.client, out.num_examples, out.metrics) == (-1, 6, {})


# ---- Krum

GROUP = [[0.0], [1.0], [2.0], [10.0], [-20.0], [2.5], [30.0]]


def test_worked_krum():
    # 7 updates, 2 of them malicious: 3 nearest others. Squared distances of 2.0 to 2.5, 1.0 and 0.0
    # are 0.25 + 1 + 4 = 5.25; of 1.0 they are 1 + 1 + 2.25 = 4.25; of 2.5, 0.25 + 2.25 + 6.25.
    assert clients(Krum(), GROUP, 2) == [1]
    assert clients(Krum(selected=2), GROUP, 2) == [1, 2]
    assert clients(Krum(selected=4), GROUP, 2) == [0, 1, 2, 5]
    assert clients(Krum(selected=99), GROUP, 2) == list(range(7))


@given(points(least=3), st.data())
@settings(deadline=None)
def test_krum_selects_what_flower_selects(values, data):
    count = len(values)
    malicious = data.draw(st.integers(0, (count - 3) // 2))
    selected = data.draw(st.integers(1, count))
    array = np.round(np.array(values, dtype=np.float64))  # small whole numbers: sums are exact
    apart = ((array[:, None] - array[None]) ** 2).sum(-1)
    nearest = count - malicious - 2
    scores = np.sort(apart, 1)[:, 1 : nearest + 1].sum(1)
    assume(len(set(scores.tolist())) == count)  # Flower breaks ties as its sort happens to
    contents = [
        RecordDict({"arrays": ArrayRecord([row]), str(c): ArrayRecord([row])})
        for c, row in enumerate(array)
    ]
    oracle = select_multikrum(contents, malicious, selected)
    expected = sorted(next(c for c in range(count) if str(c) in content) for content in oracle)
    assert clients(Krum(selected=selected), array.tolist(), malicious) == expected


@given(points(least=1, most=3), st.integers(0, 2**31))
@settings(deadline=None)
def test_krum_takes_an_honest_one_where_attackers_are_far_out(far, seed):
    malicious = len(far)
    rng = generator(seed, "test")
    honest = torch.rand(2 * malicious + 3 - malicious, len(far[0]), generator=rng).tolist()
    values = [[1e4 + 1e3 * x + 1e4 * c for x in value] for c, value in enumerate(far)] + honest
    for defence in (Krum(), MultiKrum()):
        assert all(client >= malicious for client in clients(defence, values, malicious))


def test_equal_scores_go_to_the_first_client():
    assert clients(Krum(), [[1.0]] * 5, 1) == [0]
    assert clients(Krum(), [[0.0], [1.0]], 0) == [0]


def test_krum_yields_the_update_itself():
    updates = updates_of(GROUP)
    (out,) = Krum().defend(updates, 2)
    assert out is updates[1]


# ---- Multi-Krum, one by one


def plain_multi_krum(values, malicious):
    """Return the clients taken out, written as the paper's code is."""
    left, taken = list(enumerate(values)), []
    while len(left) > 2 * malicious + 2:
        count = len(left) - 2 - malicious
        scores = [
            sum(sorted(math.dist(one, other) ** 2 for _, other in left)[:count]) for _, one in left
        ]
        taken.append(left.pop(scores.index(min(scores)))[0])
    return sorted(taken)


def test_worked_multi_krum():
    # 7 updates, 1 malicious. Nearest 4 with itself: 1.0 has 1 + 1 + 2.25 and is out.
    # Then 3 of 6: 2.0 has 0.25 + 4 and 2.5 has 0.25 + 6.25: 2.0 is out.
    # Then 2 of 5: 2.5 and 0.0 have 6.25, the first of them is out; 4 are left.
    assert clients(MultiKrum(), GROUP, 1) == [0, 1, 2]


@given(points(least=5), st.data())
@settings(deadline=None)
def test_multi_krum_is_the_loop_of_the_paper(values, data):
    malicious = data.draw(st.integers(1, (len(values) - 3) // 2))
    whole = [[float(round(x)) for x in value] for value in values]  # exact sums, so ties are ties
    assert clients(MultiKrum(), whole, malicious) == plain_multi_krum(whole, malicious)


@pytest.mark.parametrize("count", range(1, 9))
def test_multi_krum_leaves_two_and_twice_the_attackers(count):
    values = [[float(2**c)] for c in range(count)]
    malicious = 1 if count >= 5 else 0
    assert len(clients(MultiKrum(), values, malicious)) == max(1, count - 2 * malicious - 2)


@pytest.mark.parametrize("defence", [Krum(), MultiKrum()])
def test_a_krum_of_a_small_round_assumes_fewer_and_says_so(defence, caplog):
    with caplog.at_level(logging.WARNING):
        assert 0 not in clients(defence, [[900.0], [1.0], [1.5], [2.0], [1.25]], 2)
    (message,) = caplog.messages
    assert message.endswith(
        "assumes 2 of 5 updates to be malicious, but stands 1; goes on with that"
    )


# ---- ranges


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: NormClip(clipping_norm=0.0), "clipping_norm must be positive, got 0.0"),
        (lambda: NormClip(clipping_norm=math.inf), "clipping_norm must be positive, got inf"),
        (lambda: NormClip(clipping_norm=math.nan), "clipping_norm must be positive, got nan"),
        (lambda: TrimmedMean(malicious=-1), "malicious counts updates, got -1"),
        (lambda: MultiKrum(malicious=-1), "malicious counts updates, got -1"),
        (lambda: Krum(malicious=-1), "malicious counts updates, got -1"),
        (lambda: Krum(selected=0), "selected counts updates and is at least 1, got 0"),
    ],
)
def test_ranges(make, reason):
    with pytest.raises(ValueError, match=f"^{reason}"):
        make()


def test_a_defence_says_what_it_does():
    with pytest.raises(NotImplementedError):
        Defence().defend([], 0)
