"""Noise and Poisson samples against their distributions, with fixed keys.

A test of a distribution refuses what a right sampler would give once in 1,000 times or less; keys
are fixed, so that the draw is one and the same for ever.
"""

import copy
import math
import os
import pickle
import random

import mpmath
import numpy as np
import pytest
import torch
from scipy import stats

from fedsys.privacy import noise
from fedsys.privacy.noise import (
    BLOCK,
    SecureStream,
    SeededStream,
    Stream,
    grid,
    noised,
    noised_rows,
    normals,
    rounding,
    stream,
)

DRAWS = 1_000_000
STD = 1.7
UNLIKELY = 1e-3
# RFC 8439, A.1: vectors 1 and 2 (key 0, blocks 0 and 1), and 3 (key 1, block 1).
ZERO_KEY = (
    "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
    "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
    "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
    "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f"
)
ONE_KEY = (
    "3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a"
    "8eca00bbb4a73bdad192b5c42f73f2fd4e273644c8b36125a64addeb006c13a0"
)


def keystream(source, count):
    words = np.empty(count // 8, np.uint64)
    source.fill(words)
    return words.tobytes()


def draws(purpose="distribution", std=STD, count=DRAWS):
    return SeededStream(0, purpose).normal((count,), std).numpy()


def ks(values, std):
    return stats.kstest(values / std, "norm").pvalue


def chi_square(values, std, bins=200):
    """Test the counts of ``bins`` equally likely intervals."""
    found = np.floor(stats.norm.cdf(values / std) * bins).astype(int)
    return stats.chisquare(np.bincount(found, minlength=bins)).pvalue


def low_bits(values, step, bits=8):
    """Test that the last bits of the grid coordinates are uniform."""
    found = np.mod(np.rint(values / step), 2**bits).astype(int)
    return stats.chisquare(np.bincount(found, minlength=2**bits)).pvalue


def correlations(rows):
    """Return the correlations of all pairs of rows, in standard deviations of independent ones."""
    table = np.corrcoef(rows) * math.sqrt(rows.shape[1])
    return table[np.triu_indices(len(rows), 1)]


# The keystream


def test_the_keystream_is_that_of_rfc_8439():
    assert keystream(Stream(bytes(32), "test"), 128).hex() == ZERO_KEY
    assert keystream(Stream(bytes(31) + b"\1", "test"), 128)[64:].hex() == ONE_KEY


def test_the_keystream_in_pieces_is_the_whole():
    whole = keystream(SeededStream(0, "pieces"), 200_000)
    source = SeededStream(0, "pieces")
    assert b"".join(keystream(source, count) for count in (8, 65_536, 64, 134_392)) == whole
    assert source.given == 200_000
    assert len({whole[i : i + 64] for i in range(0, 200_000, 64)}) == 3125  # no block twice


def test_further_bytes_of_a_number_occur_nowhere_in_the_keystream():
    source = SeededStream(0, "more")
    further = [source.more(position) for position in (0, 8, 64, 2**38 - 8)]
    whole = keystream(source, 2**16)
    assert len(set(further)) == 4
    assert not any(part[i : i + 8] in whole for part in further for i in range(0, 64, 8))
    assert source.more(8) == further[1]


# Distribution


def test_a_million_draws_are_normal():
    values = draws()
    assert ks(values, STD) > UNLIKELY
    assert chi_square(values, STD) > UNLIKELY
    assert values.std() == pytest.approx(STD, rel=0.005)
    assert abs(values.mean()) < 4 * STD / math.sqrt(DRAWS)
    tail = (np.abs(values) > 4 * STD).sum()
    expected = DRAWS * 2 * stats.norm.sf(4)
    assert tail == pytest.approx(expected, abs=4 * math.sqrt(expected))


def test_halved_noise_and_a_wrong_shape_are_caught():
    for wrong in (draws(std=STD / 2), np.random.default_rng(0).laplace(0, STD / 2**0.5, DRAWS)):
        assert ks(wrong, STD) < UNLIKELY
        assert chi_square(wrong, STD) < UNLIKELY
    assert draws(std=STD / 2).std() != pytest.approx(STD, rel=0.005)


def test_a_difference_in_std_of_one_percent_is_caught():
    assert chi_square(draws(std=STD * 1.01), STD) < UNLIKELY
    assert draws(std=STD * 1.01).std() != pytest.approx(STD, rel=0.005)


@pytest.mark.parametrize("std", [1e-200, 3e-9, 1.0, math.nextafter(2.0, 0), 7e11, 1e200])
def test_the_scale_does_not_change_the_shape(std):
    values = draws(std=std, count=100_000)
    assert ks(values, std) > UNLIKELY
    assert std * 2.0**-27 < grid(std) <= std * 2.0**-26


def test_the_last_bits_are_uniform_and_those_of_float32_noise_are_not():
    step = grid(STD)
    assert low_bits(draws(), step) > UNLIKELY
    single = torch.randn(DRAWS, generator=torch.Generator().manual_seed(0)) * STD
    assert low_bits(single.double().numpy(), step) < UNLIKELY


def test_the_two_numbers_of_a_pair_are_independent_in_value_and_in_size():
    values = np.concatenate([draws(f"pairs {i}", count=2 * BLOCK) for i in range(20)])
    first, second = values.reshape(20, 2, BLOCK).transpose(1, 0, 2).reshape(2, -1)
    for pair in ((first, second), (first**2, second**2), (np.abs(first), second)):
        assert abs(correlations(np.stack(pair))[0]) < stats.norm.isf(UNLIKELY / 2)


# Exact rounding


def by_hand(words, more, scale):
    """Round the Box-Muller pair of two uniforms of 256 bits with 200 decimal places."""
    bits = [int(word) << 192 for word in words]
    bits[0] += int.from_bytes(more[:24], "little")
    bits[1] += int.from_bytes(more[24:48], "little")
    with mpmath.workdps(200):
        radius = mpmath.sqrt(-2 * mpmath.log(mpmath.mpf(bits[0]) / 2**256)) * scale
        angle = 2 * mpmath.pi * bits[1] / 2**256
        return [
            int(mpmath.nint(radius * mpmath.cos(angle))),
            int(mpmath.nint(radius * mpmath.sin(angle))),
        ]


def test_a_number_is_the_rounding_of_the_real_box_muller_value():
    pairs = 400
    words = np.empty((2, pairs), np.uint64)
    source = SeededStream(0, "exact")
    source.fill(words)
    values = SeededStream(0, "exact").normal((2, pairs), STD).numpy() / grid(STD)
    scale = mpmath.mpf(STD) / grid(STD)
    for pair in range(pairs):
        assert values[:, pair].tolist() == by_hand(words[:, pair], source.more(8 * pair), scale)


def test_all_bits_of_every_pair_give_what_float64_gave(monkeypatch):
    fast = draws("slow", count=10_001)
    monkeypatch.setattr(noise, "NEAR", math.inf)  # everything is in doubt
    assert np.array_equal(draws("slow", count=10_001), fast)


def close_to_a_boundary(u, cell, scale):
    """Return v such that the cosine of words (u, v) and (u, v + 1) rounds differently."""
    with mpmath.workdps(100):
        radius = mpmath.sqrt(-2 * mpmath.log(mpmath.mpf(2 * u + 1) / 2**65)) * scale
        return int(mpmath.acos((cell + 0.5) / radius) / (2 * mpmath.pi) * 2**64)


@pytest.mark.parametrize("cell", [-(10**8), -12_345, 0, 1, 77, 3 * 10**7])
@pytest.mark.parametrize("u", [2**50, 2**62 + 987_654_321, 2**63])
def test_what_float64_cannot_decide_is_decided_by_further_bits(u, cell):
    scale = float(2**27 - 1)
    v = close_to_a_boundary(u, cell, scale)
    words = np.array([[[u], [v]]], np.uint64)
    _, doubtful = noise._fast(words, np.array([[scale]]))
    assert doubtful.all()
    middle = bytes(23) + b"\x80"
    low = noise._exact(u, v - 1, middle + bytes(40), scale)[0]
    high = noise._exact(u, v + 1, middle + bytes(40), scale)[0]
    assert {low, high} == {cell, cell + 1}


@pytest.mark.parametrize("words", [(0, 0), (1, 2**63), (2**63 + 5, 12345), (2**64 - 1, 2**62)])
def test_the_further_bits_continue_both_words(words):
    # A grid of 2^-100 std shows bits that float64 does not have.
    more = SeededStream(0, "continue").more(0)
    assert noise._exact(*words, more, 2.0**100) == by_hand(words, more, 2**100)


def test_a_uniform_whose_first_bits_are_all_equal_is_in_doubt():
    words = np.array([[[0, 2**64 - 1], [0, 2**64 - 1]]], np.uint64)
    _, doubtful = noise._fast(words, np.array([[2.0**27]]))
    assert doubtful.all()


def test_further_bits_are_asked_for_once_a_pair(monkeypatch):
    asked = []

    class Asked(SeededStream):
        def more(self, position):
            asked.append(position)
            return super().more(position)

    monkeypatch.setattr(noise, "NEAR", math.inf)  # everything is in doubt
    source = Asked(0, "asked")
    for count in (5, 2, 33):
        normals([source, source], count, [1.0, 2.0])
    assert len(asked) == len(set(asked)) == 2 * (3 + 1 + 17)
    assert max(asked) < source.given


def test_few_numbers_are_in_doubt_and_float64_errs_by_half_of_doubt_at_most():
    words = np.empty((1, 2, 20_000), np.uint64)
    SeededStream(0, "doubt").fill(words)
    # The hardest: radii as near and as far as float64 is trusted with, and angles near pi.
    words[0, 0, :1000] = 2**64 - 2**49 - np.arange(1000, dtype=np.uint64)
    words[0, 0, 1000:2000] = 2**44 + 1 + np.arange(1000, dtype=np.uint64)
    words[0, 1, :2000:2] = 2**63 + np.arange(1000, dtype=np.uint64)
    _, doubtful = noise._fast(words, np.array([[2.0**27]]))
    assert doubtful.sum() < 20
    fine = 2.0**50
    counts, _ = noise._fast(words, np.array([[fine]]))
    allowed = 1 + fine * noise.DOUBT / 2
    middle = bytes(23) + b"\x80" + bytes(40)
    for pair in range(0, 20_000, 7):
        if not doubtful[0, pair]:
            u, v = (int(word) for word in words[0, :, pair])
            assert np.abs(counts[0, :, pair] - noise._exact(u, v, middle, fine)).max() <= allowed


def test_the_largest_value_is_19_standard_deviations():
    largest = noise._exact(0, 0, bytes(64), 2.0**27)[0] / 2**27
    assert largest == pytest.approx(math.sqrt(2 * 257 * math.log(2)))
    assert 18.8 < largest < 19


# What is released


def totals_near(step):
    return torch.tensor([0.0, 1e-12, -3.3, 1 / 3, 1e4, -(2.0**20)], dtype=torch.float64) + step / 3


@pytest.mark.parametrize("std", [0.01, 0.7, 1.0, 123.456])
def test_every_released_number_is_on_the_grid(std):
    step = grid(std)
    totals = torch.linspace(-10 * std, 10 * std, 30_001, dtype=torch.float64)
    released = noised(totals, std, SeededStream(0, "grid"))
    assert released.dtype == torch.float64
    assert torch.equal(released, (released / step).round() * step)
    alone = SeededStream(0, "grid").normal((30_001,), std)
    assert torch.equal(alone, (alone / step).round() * step)
    # Noise in floating point added to the same totals is not: its last bits tell of them.
    plain = totals + torch.randn(30_001, dtype=torch.float64) * std
    assert not torch.equal(plain, (plain / step).round() * step)


def test_a_total_matters_only_through_its_cell():
    totals = totals_near(grid(STD))
    cell = (totals / grid(STD)).round() * grid(STD)
    released = [noised(t, STD, SeededStream(0, "cell")) for t in (totals, cell)]
    assert torch.equal(released[0], released[1])
    assert torch.equal(released[0] - cell, SeededStream(0, "cell").normal((6,), STD))
    moved = noised(cell + 5 * grid(STD), STD, SeededStream(0, "cell"))
    assert torch.equal(moved - released[0], torch.full((6,), 5 * grid(STD), dtype=torch.float64))


def test_rounding_bounds_what_the_grid_adds_to_a_distance():
    step = grid(0.25)
    ends = torch.full((100,), 0.4999 * step, dtype=torch.float64)
    zero = [noised(t, 0.25, SeededStream(0, "x")) for t in (-ends, ends)]
    assert torch.equal(zero[0], zero[1])
    ends *= 1.001
    apart = noised(ends, 0.25, SeededStream(0, "x")) - noised(-ends, 0.25, SeededStream(0, "x"))
    assert rounding(100, 0.25) < apart.norm().item() <= rounding(100, 0.25) + 2 * ends.norm().item()
    assert rounding(100, 0.25) == 10 * step == 10 * 2.0**-28


def test_zeros_have_no_sign():
    counts = noise._block([SeededStream(0, "zero")], 1000, np.array([[0.01]]))
    assert (counts == 0).all()
    assert not np.signbit(counts).any()


def test_noised_keeps_the_shape_and_leaves_the_total_alone():
    total = torch.randn(3, 5, 2)
    before = total.clone()
    released = noised(total, STD, SeededStream(0, "shape"))
    assert released.shape == total.shape
    assert torch.equal(total, before)
    assert noised(torch.zeros(()), STD, SeededStream(0, "shape")).shape == ()
    assert SeededStream(0, "shape").normal((0, 4), STD).shape == (0, 4)


def test_without_noise_a_total_passes_and_noise_is_zero():
    total = torch.tensor([[0.1, 1e30], [0.1, 1.0]])
    streams = [SeededStream(0, "none", n) for n in range(2)]
    released = noised_rows(total, [0.0, 1.0], streams)
    assert torch.equal(released[0], total[0].double())
    assert not torch.equal(released[1], total[1].double())
    assert SeededStream(0, "none").normal((7,), 0.0).tolist() == [0.0] * 7


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e9, 1e300])
def test_a_total_that_was_not_clipped_is_refused(bad):
    if not math.isfinite(bad):
        with pytest.raises(ValueError, match="not finite"):
            noised(torch.tensor([bad]), 0.0, SecureStream())
    with pytest.raises(ValueError, match="not finite or above"):
        noised(torch.tensor([0.0, bad], dtype=torch.float64), 1.0, SecureStream())


@pytest.mark.parametrize("std", [-1.0, math.nan, math.inf, 1e-300, 1e300])
def test_an_impossible_std_is_refused(std):
    with pytest.raises(ValueError, match="std is 0 or between"):
        SecureStream().normal((2,), std)


# Cohorts


@pytest.mark.parametrize(("clients", "size"), [(3, 1), (2, 7), (300, 64), (2, 5 * BLOCK + 3)])
def test_a_cohort_gets_what_each_client_alone_gets(clients, size):
    std = torch.linspace(0.1, 40, clients, dtype=torch.float64)
    totals = torch.randn(clients, size, generator=torch.Generator().manual_seed(0))
    together = [SeededStream(0, "cohort", n) for n in range(clients)]
    alone = [SeededStream(0, "cohort", n) for n in range(clients)]
    for _ in range(2):
        rows = normals(together, size, std)
        for row, one, s in zip(rows, alone, std.tolist(), strict=True):
            assert torch.equal(row, one.normal((size,), s))
        released = noised_rows(totals, std, together)
        for row, total, one, s in zip(released, totals, alone, std.tolist(), strict=True):
            assert torch.equal(row, noised(total, s, one))
    assert [one.given for one in together] == [one.given for one in alone]


def test_rows_that_would_share_noise_are_refused():
    with pytest.raises(ValueError, match="every row needs its stream: 2 rows, 1 streams"):
        noised_rows(torch.zeros(2, 3), [1.0], [SecureStream()])
    with pytest.raises(ValueError, match="every stream needs its std: 2 streams, 1 stds"):
        normals([SecureStream(), SecureStream()], 3, [1.0])


# Streams


NAMES = [
    (seed, purpose, path)
    for seed in (0, 1)
    for purpose in ("dp-sgd", "sample")
    for path in ((), (1,), (1, 1), (11,), (2, 1), (1, 2))
]


def test_different_names_rounds_and_clients_give_uncorrelated_noise():
    streams = [SeededStream(seed, purpose, *path) for seed, purpose, path in NAMES]
    streams += [SecureStream() for _ in range(4)]
    rows = [normals(streams, 20_000, [1.0] * len(streams)).numpy() for _ in range(2)]  # two steps
    limit = stats.norm.isf(1e-9)  # 1,540 pairs, and four keys that are new each time
    assert np.abs(correlations(np.concatenate(rows))).max() < limit
    assert np.abs(correlations(np.concatenate(rows) ** 2)).max() < limit
    again = SeededStream(0, "dp-sgd").normal((20_000,), 1.0).numpy()
    assert correlations(np.stack([rows[0][0], again]))[0] > limit
    assert len({one.id for one in streams}) == len(streams)


def test_a_name_gives_the_same_bits_and_the_same_id():
    first, second = SeededStream(3, "dp-sgd", 2, 7), stream(3, "dp-sgd", 2, 7)
    assert first.id == second.id
    assert first.id.startswith("seeded-")
    assert torch.equal(first.normal((50,), 1.0), second.normal((50,), 1.0))
    assert torch.equal(first.bernoulli(50, 0.5), second.bernoulli(50, 0.5))


def test_no_seed_moves_a_secure_stream():
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        one = stream(None, "dp-sgd", 2, 7)
        found.append((one.id, tuple(one.normal((4,), 1.0).tolist())))
    assert found[0][0] != found[1][0]
    assert not set(found[0][1]) & set(found[1][1])
    assert all(name.startswith("secure-") for name, _ in found)


def test_a_key_used_twice_shows_in_the_id(monkeypatch):
    monkeypatch.setattr(os, "urandom", lambda count: bytes(range(count)))
    first, second = SecureStream(), SecureStream()
    assert first.id == second.id
    assert torch.equal(first.normal((9,), 1.0), second.normal((9,), 1.0))


def test_the_id_and_the_representation_do_not_hold_the_key(monkeypatch):
    key = bytes(range(100, 132))
    one = Stream(key, "secure")
    digits = one.id.removeprefix("secure-")
    assert len(digits) == 32
    assert not any(key[i : i + 2].hex() in digits for i in range(31))
    assert key.hex() not in repr(one)
    assert repr(key) not in repr(one)


@pytest.mark.parametrize("make", [SecureStream, lambda: SeededStream(0, "x")])
@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_stream_cannot_be_copied(make, duplicate):
    with pytest.raises(TypeError, match="cannot be copied or pickled"):
        duplicate(make())


def test_a_stream_does_not_work_in_a_forked_process(monkeypatch):
    one = SecureStream()
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(RuntimeError, match="belongs to another process"):
        one.normal((2,), 1.0)
    assert one.given == 0


def test_a_stream_counts_what_it_gave_and_stops_at_the_end(monkeypatch):
    monkeypatch.setattr(noise, "LIMIT", 1000)
    one = SecureStream()
    one.normal((60,), 1.0)
    one.bernoulli(64, 0.5)
    assert one.given == 8 * 60 + 8 * 64
    with pytest.raises(OverflowError, match="gave 992 of 1000 bytes"):
        one.normal((1,), 1.0)
    one.bernoulli(1, 0.5)
    assert one.given == 1000


def test_the_rounding_can_be_made_up_for_by_more_noise():
    count, clipping_norm = 10_000_000, 1.0
    for z in (0.3, 1.0, math.nextafter(2.0, 0), 30.0):
        std = z * (clipping_norm + 2 * rounding(count, z * clipping_norm))
        assert std / (clipping_norm + rounding(count, std)) >= z * (1 - 1e-15)
        assert std < 1.01 * z * clipping_norm


# Poisson samples


def samples(rate, rows=1000, times=4000):
    source = SeededStream(0, "sample")
    return torch.stack([source.bernoulli(rows, rate) for _ in range(times)]).numpy()


def test_sample_sizes_are_binomial():
    rate, rows, times = 0.02, 1000, 4000
    sizes = samples(rate).sum(1)
    spread = math.sqrt(rows * rate * (1 - rate))
    assert abs(sizes.mean() - rows * rate) < 4 * spread / math.sqrt(times)
    assert sizes.var() == pytest.approx(spread**2, rel=4 * math.sqrt(2 / times))
    inner = np.arange(10, 31)
    expected = stats.binom.pmf(inner, rows, rate)
    expected = np.append(expected, 1 - expected.sum()) * times
    found = [(sizes == size).sum() for size in inner]
    assert stats.chisquare([*found, times - sum(found)], expected).pvalue > UNLIKELY
    # The control: batches of one fixed size, as a shuffled loader gives them.
    assert np.full(times, rows * rate).var() != pytest.approx(spread**2, rel=0.1)


def test_rows_are_drawn_independently_of_each_other_and_of_the_time():
    table = samples(0.3, rows=40, times=40_000).astype(float)
    limit = stats.norm.isf(UNLIKELY / 1600)
    assert np.abs(correlations(table.T)).max() < limit
    assert np.abs(correlations(np.stack([table[1:].ravel(), table[:-1].ravel()]))).max() < limit
    often = (table.mean(0) - 0.3) / math.sqrt(0.21 / 40_000)
    assert np.abs(often).max() < limit


def test_the_rates_0_and_1_are_exact():
    one = SecureStream()
    assert not one.bernoulli(10_000, 0.0).any()
    assert one.bernoulli(10_000, 1.0).all()
    assert one.bernoulli(0, 0.5).shape == (0,)
    assert one.bernoulli(3, 0.5).dtype == torch.bool


@pytest.mark.parametrize("rate", [0.5, 0.1, 2.0**-53, 1 - 2.0**-53])
def test_a_row_is_taken_below_the_rate_exactly(rate):
    class Fixed(SeededStream):
        def fill(self, words):
            words[...] = boundary
            return 0

    first_out = math.floor(rate * 2**53)
    boundary = np.array([((first_out - 1) << 11) | 2047, first_out << 11], np.uint64)
    assert Fixed(0, "x").bernoulli(2, rate).tolist() == [True, False]


@pytest.mark.parametrize("rate", [-0.1, 1.1, math.nan])
def test_an_impossible_rate_is_refused(rate):
    with pytest.raises(ValueError, match="rate is a probability"):
        SecureStream().bernoulli(3, rate)
