"""What secure aggregation is made of: whole numbers, shares of secrets, keys, settings."""

import itertools
import math

import numpy as np
import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from fedsys.compose import FOLDER
from fedsys.secagg import (
    Quantiser,
    SecureAggregation,
)
from fedsys.secagg import keys as crypto
from fedsys.secagg.quantise import centred, from_bytes, to_bytes
from fedsys.secagg.quantise import field as field_of
from fedsys.secagg.shamir import PRIME, combine, split
from fedsys.targets import component
from tests.secagg import (
    FIVE,
    FIVE_NUMBERS,
    LEVEL,
    play,
    rng,
)

# ---- numbers


def test_rounding_is_unbiased_and_off_by_less_than_a_step() -> None:
    quantiser = Quantiser(1.0, 6)
    values = np.tile(np.linspace(-1, 1, 12), (20_000, 1))
    error = quantiser.values(quantiser.quantise(values, rng())) - values
    assert np.abs(error).max() < quantiser.step
    # Hoeffding: a mean of n errors, each within one step, beyond t s: at most 2 exp(-2 n t^2).
    bound = math.sqrt(math.log(2 * 12 / LEVEL) / (2 * 20_000))
    assert np.abs(error.mean(0)).max() < bound * quantiser.step


@given(st.integers(3, 32), st.integers(1, 2**20), st.sampled_from([-1, 1]))
def test_the_field_is_the_smallest_in_which_no_sum_wraps(bits: int, members: int, sign) -> None:
    quantiser = Quantiser(1.0, bits)
    width, extreme = quantiser.width(members), members * quantiser.largest
    assert extreme < 2 ** (8 * width - 1)
    assert width == 1 or extreme >= 2 ** (8 * width - 9)
    one = np.array([sign * quantiser.largest]).astype(field_of(width))
    total = from_bytes(to_bytes(one * np.array(members, one.dtype), width))
    assert centred(total, width).tolist() == [sign * extreme]


@pytest.mark.parametrize("bits", [3, 8, 16, 24, 32])
@pytest.mark.parametrize("clients", [3, 4, 5, 8])
def test_no_sum_wraps_where_every_number_is_at_the_bound(bits: int, clients: int) -> None:
    options = SecureAggregation(bits=bits)
    largest = options.quantiser.largest
    extreme = np.array([largest, -largest, largest, 1])
    played = play(options, dict.fromkeys(range(clients), extreme))
    want = clients * largest * options.quantiser.step
    assert played.total.values.tolist() == [want, -want, want]
    assert played.total.clipped == clients


@given(st.integers(1, 8), st.lists(st.integers(0, 2**64 - 1), max_size=9))
def test_bytes_hold_the_field_elements(width: int, values: list[int]) -> None:
    numbers = np.array([v % 2 ** (8 * width) for v in values], field_of(width))
    data = to_bytes(numbers, width)
    assert data.shape == (len(values), width)
    assert data.tobytes() == b"".join(int(v).to_bytes(width, "little") for v in numbers)
    np.testing.assert_array_equal(from_bytes(data), numbers)


@given(
    st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=20),
    st.floats(1e-6, 1e6),
    st.integers(3, 32),
)
@settings(deadline=None)
def test_a_clipped_vector_always_fits_and_keeps_its_direction(values, norm, bits) -> None:
    quantiser = Quantiser(norm, bits)
    vector = np.array(values)
    clipped, was_clipped = quantiser.clip(vector)
    length = math.hypot(*clipped)
    assert length <= norm * (1 + 1e-12)
    if was_clipped:
        assert length == pytest.approx(norm)
        peak = np.abs(vector).max()
        np.testing.assert_allclose(clipped / np.abs(clipped).max(), vector / peak, atol=1e-12)
    else:
        np.testing.assert_array_equal(clipped, vector)
    numbers = quantiser.quantise(clipped, rng())
    assert np.abs(numbers).max() <= quantiser.largest
    assert math.hypot(*quantiser.values(numbers)) <= quantiser.longest(len(values)) * (1 + 1e-12)


def test_a_vector_of_zeros_is_as_it_was() -> None:
    assert Quantiser(1.0, 8).clip(np.zeros(3))[1] is False
    assert Quantiser(1.0, 8).clip(np.zeros(0))[1] is False


@pytest.mark.parametrize(("value", "beyond"), [(9.0, 1), (-8.5, 1), (math.inf, 1), (math.nan, 1)])
def test_saturation_is_refused_and_counted(value: float, beyond: int) -> None:
    quantiser = Quantiser(8.0, 8)
    with pytest.raises(ValueError, match=f"{beyond} of 3 entries are beyond clipping_norm=8.0"):
        quantiser.quantise(np.array([1.0, value, 8.0]), rng())
    assert np.abs(quantiser.quantise(np.array([1.0, -8.0, 8.0]), rng())).max() <= 127


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_is_not_clipped(value: float) -> None:
    with pytest.raises(ValueError, match="NaN or Inf"):
        Quantiser(8.0, 8).clip(np.array([1.0, value]))


def test_updates_of_different_length_beyond_the_bound_have_the_sums_of_what_was_clipped() -> None:
    quantiser = Quantiser(8.0, 24)
    for factor in (9.0, 90.0, 1e30):
        clipped, was_clipped = quantiser.clip(np.array([3.0, 4.0]) * factor)
        assert was_clipped
        np.testing.assert_allclose(clipped, [4.8, 6.4])
    assert quantiser.clip(np.array([4.8, 6.3]))[1] is False


def test_a_client_does_not_mask_what_could_wrap() -> None:
    for number in (FIVE.quantiser.largest + 1, -FIVE.quantiser.largest - 1, -(2**63)):
        with pytest.raises(ValueError, match="wrap around"):
            play(FIVE, {**FIVE_NUMBERS, 2: np.full(8, number, np.int64)})


@pytest.mark.parametrize("bits", [2, 33])
def test_bits_out_of_range(bits: int) -> None:
    with pytest.raises(ValueError, match="bits must be from 3 to 32"):
        SecureAggregation(bits=bits)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"clipping_norm": 0.0}, "clipping_norm must be positive"),
        ({"clipping_norm": math.inf}, "clipping_norm must be positive"),
        ({"threshold": 0.5}, "threshold must be above 0.5"),
        ({"threshold": 1.1}, "threshold must be above 0.5"),
        ({"neighbours": 0}, "neighbours must be even"),
        ({"neighbours": 3}, "neighbours must be even"),
    ],
)
def test_settings_out_of_range(options, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        SecureAggregation(**options)


def test_sums_beyond_64_bits_are_refused() -> None:
    assert Quantiser(1.0, 32).width(2**32) == 8
    with pytest.raises(ValueError, match="exceed 64 bits"):
        Quantiser(1.0, 32).width(2**33)


@given(st.floats(0.5, 1.0, exclude_min=True), st.integers(3, 1000))
def test_two_thresholds_of_one_cohort_share_a_client(threshold: float, holders: int) -> None:
    least = SecureAggregation(threshold=threshold).least(holders)
    assert holders < 2 * least <= 2 * holders
    assert least >= 3
    assert least >= threshold * holders - 1e-6


@pytest.mark.parametrize(
    ("threshold", "holders", "least"),
    [
        (0.6, 5, 3),
        (0.6, 100, 60),
        (0.55, 20, 11),
        (0.51, 4, 3),
        (0.5 + 1e-12, 10, 6),
        (1.0, 9, 9),
        (0.51, 3, 3),
    ],
)
def test_thresholds_by_hand(threshold: float, holders: int, least: int) -> None:
    assert SecureAggregation(threshold=threshold).least(holders) == least


# ---- shares of secrets


def test_the_field_of_shares_is_prime_and_holds_every_secret() -> None:
    assert sympy.isprime(PRIME)
    assert sympy.prevprime(PRIME) < 2**256 < PRIME


@pytest.mark.parametrize("secret", [bytes(32), b"\xff" * 32, bytes(range(32))])
def test_any_threshold_of_shares_restores_the_secret(secret: bytes) -> None:
    for threshold in range(1, 6):
        shares = split(secret, threshold, [1, 2, 5, 6, 10**6])
        for some in itertools.combinations(shares, threshold):
            assert combine({x: shares[x] for x in some}) == secret


def test_a_line_by_hand() -> None:
    shares = split(bytes(range(32)), 2, [1, 2, 7])
    one, two, seven = (int.from_bytes(shares[x], "little") for x in (1, 2, 7))
    secret = int.from_bytes(bytes(range(32)), "little")
    assert (2 * one - two) % PRIME == secret
    assert (secret + 7 * (two - one)) % PRIME == seven


def test_fewer_shares_give_another_secret() -> None:
    shares = split(bytes(32), 3, [1, 2, 3])
    one, two = (int.from_bytes(shares[x], "little") for x in (1, 2))
    assert (2 * one - two) % PRIME != 0


@pytest.mark.parametrize("points", [[], [0, 1, 2], [1, 1, 2], [-1, 2, 3], [1, 2, PRIME]])
def test_points_are_distinct_and_none_is_where_the_secret_lies(points: list[int]) -> None:
    with pytest.raises(ValueError, match="distinct points"):
        split(bytes(32), 2, points)


def test_what_is_no_share_or_no_secret_is_refused() -> None:
    with pytest.raises(ValueError, match="no element of the field"):
        combine({1: b"\xff" * 33})
    with pytest.raises(ValueError, match="no element of the field"):
        combine({1: bytes(32)})
    with pytest.raises(ValueError, match="not all of one secret"):
        combine({1: (2**256 + 1).to_bytes(33, "little")})
    with pytest.raises(ValueError, match="a secret of 32 bytes"):
        split(bytes(31), 2, [1, 2])
    with pytest.raises(ValueError, match="2 points"):
        split(bytes(32), 3, [1, 2])


# ---- keys


def test_two_clients_agree_and_a_third_or_another_round_does_not() -> None:
    a, b, c = (crypto.private(crypto.fresh()) for _ in range(3))
    session, other = crypto.fresh(16), crypto.fresh(16)
    key = crypto.mask_key(a, crypto.public(b), session)
    assert key == crypto.mask_key(b, crypto.public(a), session)
    assert key != crypto.mask_key(c, crypto.public(b), session)
    assert key != crypto.mask_key(a, crypto.public(b), other)
    there, back = crypto.sealing_keys(a, crypto.public(a), crypto.public(b), session)
    assert (back, there) == crypto.sealing_keys(b, crypto.public(b), crypto.public(a), session)
    assert len({there, back, key}) == 3


def test_masks_are_the_keystream_of_rfc_8439() -> None:
    # Section 2.4.2's cipher with an all-zero key, nonce and counter: appendix A.1, vector 1.
    stream = "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
    assert crypto.expand(bytes(32), 8, 4).tobytes().hex() == stream
    assert crypto.expand(bytes(32), 4, 7).tobytes().hex() == stream


@pytest.mark.parametrize("peer", [bytes(32), bytes(31), b""])
def test_what_is_no_public_key_is_refused(peer: bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        crypto.mask_key(crypto.private(crypto.fresh()), peer, bytes(16))


# ---- settings


def test_the_options_of_the_group_are_the_class_and_nothing() -> None:

    problems: dict[str, str] = {}
    nodes = {
        f.stem: OmegaConf.to_container(OmegaConf.load(f))
        for f in (FOLDER / "secagg").glob("*.yaml")
    }
    made = {name: component("secagg", node, [], problems) for name, node in nodes.items()}
    assert made == {"none": None, "true": SecureAggregation()}
    assert not problems
