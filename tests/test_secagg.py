"""Secure aggregation: the sum is the plain sum, whoever is lost, and shows no summand."""

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsys.secagg import (
    SecAggError,
    SecureAggregation,
    TooFewClients,
)
from fedsys.secagg import keys as crypto
from fedsys.secagg.client import Client
from fedsys.secagg.parts import Keys, Request, Roster, Shares
from fedsys.secagg.quantise import field as field_of
from fedsys.secagg.quantise import from_bytes, to_bytes
from fedsys.secagg.server import Server
from fedsys.secagg.shamir import combine, split
from tests.secagg import (
    FIVE,
    FIVE_NUMBERS,
    FIVE_VECTORS,
    NEVER,
    check_sum,
    numbers_of,
    play,
    table,
    uniform,
    vectors_of,
)

# ---- drop-out

PATTERNS = [dict(enumerate(p)) for p in itertools.product(range(NEVER + 1), repeat=5)]


def staying(pattern: dict[int, int]) -> int:
    return sum(phase == NEVER for phase in pattern.values())


def test_there_are_as_many_patterns_as_there_should_be() -> None:
    assert sum(staying(p) >= 3 for p in PATTERNS) == 1 + 5 * 4 + 10 * 4**2


def test_every_drop_out_pattern_above_the_threshold_gives_the_plain_sum() -> None:
    assert FIVE.least(5) == FIVE.least(4) == FIVE.least(3) == 3
    for pattern in PATTERNS:
        if staying(pattern) >= 3:
            survivors = [c for c, phase in pattern.items() if phase >= 3]
            played = play(FIVE, FIVE_NUMBERS, pattern)
            check_sum(played, FIVE_NUMBERS, FIVE_VECTORS, FIVE.quantiser, survivors)


def _below(which: list[dict[int, int]]) -> None:
    for pattern in which:
        with pytest.raises(TooFewClients, match=r"of \d clients|clients sent|hold shares"):
            play(FIVE, FIVE_NUMBERS, pattern)


def test_patterns_below_the_threshold_are_refused() -> None:
    _below([p for p in PATTERNS if [p[3], p[4]] == [NEVER, NEVER] and staying(p) == 2])


@pytest.mark.slow
def test_every_drop_out_pattern_below_the_threshold_is_refused() -> None:
    _below([p for p in PATTERNS if staying(p) < 3])


@given(st.integers(3, 9), st.integers(1, 12), st.integers(3, 32), st.data())
@settings(deadline=None, max_examples=40)
def test_any_cohort_any_vector_any_pattern(clients: int, size: int, bits: int, data) -> None:
    options = SecureAggregation(clipping_norm=data.draw(st.floats(1e-3, 1e3)), bits=bits)
    quantiser = options.quantiser
    entries = st.lists(st.floats(-1e6, 1e6, width=32), min_size=size, max_size=size)
    names = data.draw(
        st.lists(st.integers(0, 10**6), min_size=clients, max_size=clients, unique=True)
    )
    vectors = {c: quantiser.clip(np.array(data.draw(entries)))[0] for c in names}
    numbers = {c: numbers_of(quantiser, v, c) for c, v in vectors.items()}
    lost = {c: data.draw(st.sampled_from([0, 1, 2, 3, NEVER, NEVER, NEVER])) for c in names}
    members = sum(phase > 0 for phase in lost.values())
    if members < 3 or staying(lost) < options.least(members):
        with pytest.raises(TooFewClients):
            play(options, numbers, lost)
        return
    played = play(options, numbers, lost)
    check_sum(played, numbers, vectors, quantiser, [c for c in names if lost[c] >= 3])


# ---- fewer neighbours

SPARSE = SecureAggregation(clipping_norm=1.0, bits=16, neighbours=6)


@pytest.mark.parametrize("seed", range(25))
def test_with_few_neighbours_two_lost_clients_are_always_made_up_for(seed: int) -> None:
    assert (SPARSE.least(7), SPARSE.least(12)) == (5, 8)
    draw = random.Random(seed)
    lost = {c: draw.choice([1, 2, 3]) for c in draw.sample(range(12), 2)}
    vectors = vectors_of(12, 5, seed=seed)
    numbers = {c: numbers_of(SPARSE.quantiser, vectors[c], c) for c in range(12)}
    played = play(SPARSE, numbers, lost)
    survivors = [c for c in range(12) if lost.get(c, NEVER) >= 3]
    check_sum(played, numbers, vectors, SPARSE.quantiser, survivors)


@pytest.mark.parametrize("seed", range(25))
def test_with_few_neighbours_there_is_the_right_sum_or_none(seed: int) -> None:
    draw = random.Random(seed)
    lost = {c: draw.choice([1, 2, 3]) for c in draw.sample(range(12), 4)}
    vectors = vectors_of(12, 5, seed=seed)
    numbers = {c: numbers_of(SPARSE.quantiser, vectors[c], c) for c in range(12)}
    try:
        played = play(SPARSE, numbers, lost)
    except TooFewClients:
        return
    for c in played.total.clients:
        assert lost.get(c, NEVER) >= 2  # or a later neighbour of too few others
    whole = sum(numbers[c][:-1] for c in played.total.clients)
    np.testing.assert_array_equal(played.total.values, whole * SPARSE.quantiser.step)


@pytest.mark.parametrize("members", [7, 8, 9, 20])
def test_neighbours_are_mutual_as_many_as_asked_and_connect_everybody(members: int) -> None:
    server = Server(SPARSE, 1)
    for c in range(members):
        server.keys(c, Client(SPARSE, server.session, c).keys())
    near = {c: set(roster.keys) for c, roster in server.rosters().items()}
    assert {len(peers) for peers in near.values()} == {6}
    assert all(c in near[peer] and c != peer for c, peers in near.items() for peer in peers)
    reached = {0}
    for _ in range(members):
        reached |= {peer for c in reached for peer in near[c]}
    assert reached == set(range(members))


# ---- what the server sees


def test_a_masked_vector_is_uniform_and_the_numbers_are_not() -> None:
    numbers = {c: np.append(np.full(20_000, 3 * c), 0) for c in range(3)}
    played = play(FIVE, numbers)
    width = FIVE.quantiser.width(3)
    for c in range(3):
        assert not uniform(to_bytes(numbers[c].astype(field_of(width)), width))
        assert played.masked[c].shape == (20_001, width)
        assert all(uniform(played.masked[c][:, place]) for place in range(width))


def test_two_rounds_of_the_same_numbers_have_nothing_in_common() -> None:
    numbers = {c: np.zeros(5001, np.int64) for c in range(3)}
    first, second = play(FIVE, numbers), play(FIVE, numbers)
    difference = from_bytes(first.masked[0]) - from_bytes(second.masked[0])
    assert uniform(to_bytes(difference, FIVE.quantiser.width(3)))
    np.testing.assert_array_equal(first.total.values, second.total.values)


def test_what_comes_late_from_a_client_taken_for_lost_stays_hidden() -> None:
    size = 20_000
    numbers = {c: np.append(np.full(size, c), 0) for c in range(4)}
    played = play(FIVE, numbers, {1: 2})
    server, late = played.server, played.clients[1]
    with pytest.raises(ValueError, match="numbers while those are secrets that count"):
        server.masked(1, np.zeros((size + 1, 2), np.uint8))
    # All the server knows by now: its key, and so the masks that it shares with the others.
    width = FIVE.quantiser.width(4)
    parcels = {c: server._parcels[c][1] for c in (0, 2, 3)}
    key = crypto.private(combine(dict(list(server._masks[1].items())[:3])))
    open_numbers = from_bytes(late.mask(parcels, numbers[1])).copy()
    for c in (0, 2, 3):
        shared = crypto.mask_key(key, server._keys[c].mask, server.session)
        mask = crypto.expand(shared, size + 1, width)
        open_numbers += mask if c < 1 else -mask
    assert uniform(to_bytes(open_numbers, width))


def test_shares_below_the_threshold_say_nothing_of_a_secret() -> None:
    shares = [split(bytes(32), 3, [1, 2, 3])[2] for _ in range(3000)]
    assert uniform(np.frombuffer(b"".join(share[:16] for share in shares), np.uint8))


# ---- what a client refuses


def test_both_secrets_of_one_peer_are_never_told() -> None:
    clients = table(3, lost=(4,)).clients
    with pytest.raises(ValueError, match="both secrets of client 2"):
        clients[1].reveal(Request([0, 1, 2, 3], [2]))
    client = clients[0]
    shares = client.reveal(Request([0, 1, 2, 3], [4]))
    assert set(shares.seeds) == {0, 1, 2, 3}
    assert set(shares.masks) == {4}
    with pytest.raises(ValueError, match="a client that has done cannot be done"):
        client.reveal(Request([0, 1, 4], [2, 3]))


@pytest.mark.parametrize(
    ("request_", "match"),
    [
        (Request([1, 2, 3], [0]), "said to be lost"),
        (Request([1, 2, 3], []), "said to be lost"),
        (Request([0, 1], [2, 3]), "2 of 5 are left, and 3 are needed"),
        (Request([0, 1, 9], []), "no neighbour"),
        (Request([0, 1, 2], [9]), "no neighbour"),
        (Request([], []), "said to be lost"),
    ],
)
def test_requests_that_would_tell_too_much(request_: Request, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        table(3).clients[0].reveal(request_)


def test_shares_are_held_of_those_only_whose_parcels_came() -> None:
    it = table(2)
    client = it.clients[0]
    parcels = {c: it.parcels[0][c] for c in (1, 2)}
    client.mask(parcels, FIVE_NUMBERS[0])
    with pytest.raises(ValueError, match="no neighbour"):
        client.reveal(Request([0, 1, 2], [3]))


def test_steps_are_taken_once_and_in_their_order() -> None:
    first, second, third = table(1), table(2), table(3)
    with pytest.raises(ValueError, match="has begun cannot be masked"):
        first.clients[0].mask({}, FIVE_NUMBERS[0])
    for it, step in ((first, "begun"), (second, "shared")):
        with pytest.raises(ValueError, match=f"has {step} cannot be done"):
            it.clients[1].reveal(Request([0, 1, 2], []))
    with pytest.raises(ValueError, match="has shared cannot be shared"):
        second.clients[0].share(second.rosters[0])
    second.clients[0].mask(second.parcels[0], FIVE_NUMBERS[0])
    with pytest.raises(ValueError, match="has masked cannot be masked"):
        second.clients[0].mask(second.parcels[0], FIVE_NUMBERS[1])
    with pytest.raises(ValueError, match="has masked cannot be shared"):
        third.clients[0].share(third.rosters[0])


def test_parcels_that_are_altered_or_another_s_are_refused() -> None:
    it = table(2)
    right = it.parcels[0]
    altered = bytes([right[1][0] ^ 1]) + right[1][1:]
    exchanged = {**right, 1: right[2], 2: right[1]}
    of_another = {**right, 1: it.parcels[2][1]}
    of_before = {**right, 1: table(2).parcels[0][1]}
    for wrong in ({**right, 1: altered}, {**right, 1: b""}, exchanged, of_another, of_before):
        with pytest.raises(ValueError, match="altered, or is another's"):
            Client.load(FIVE, it.clients[0].dump()).mask(wrong, FIVE_NUMBERS[0])
    with pytest.raises(ValueError, match="no neighbour"):
        Client.load(FIVE, it.clients[0].dump()).mask({**right, 9: right[1]}, FIVE_NUMBERS[0])
    with pytest.raises(ValueError, match="2 of 5 are left"):
        Client.load(FIVE, it.clients[0].dump()).mask({1: right[1]}, FIVE_NUMBERS[0])
    it.clients[0].mask(right, FIVE_NUMBERS[0])


def test_a_parcel_is_for_a_number_as_well_as_for_a_key() -> None:
    it = table(1)
    keys = it.rosters[0].keys
    misled = it.clients[0].share(Roster(5, {**keys, 1: keys[2], 2: keys[1]}))
    for c in (1, 2, 3, 4):
        it.server.shared(c, it.clients[c].share(it.rosters[c]))
    it.server.shared(0, {**misled, 1: misled[2], 2: misled[1]})  # each to whose key it is
    with pytest.raises(ValueError, match="altered, or is another's"):
        it.clients[1].mask(it.server.parcels()[1], FIVE_NUMBERS[1])


def test_rosters_that_cannot_be_are_refused() -> None:
    it = table(1)
    keys, own = it.rosters[0].keys, it.clients[0].keys()
    wrong = [
        (Roster(2, {1: keys[1]}), "too few"),
        (Roster(5, {c: keys[c] for c in (1, 2, 3)}), "too few"),
        (Roster(5, {**keys, 4: keys[1]}), "not those of so many others"),
        (Roster(5, {0: own, 1: keys[1], 2: keys[2], 3: keys[3]}), "not those of so many others"),
        (Roster(5, {**keys, 4: Keys(bytes(32), keys[4].mask, bytes(32))}), r".+"),
    ]
    for roster, match in wrong:
        with pytest.raises(ValueError, match=match):
            Client(FIVE, it.server.session, 0).share(roster)


# ---- what the server refuses


def test_keys_that_come_twice_or_late_are_refused() -> None:
    it = table(0)
    keys = it.clients[0].keys()
    it.server.keys(0, keys)
    with pytest.raises(ValueError, match="its keys twice"):
        it.server.keys(0, it.clients[1].keys())
    with pytest.raises(ValueError, match="its keys are another's"):
        it.server.keys(1, keys)
    with pytest.raises(ValueError, match="its keys are another's"):
        it.server.keys(1, Keys(bytes(32), bytes(32), bytes(32)))
    with pytest.raises(ValueError, match="shares while those are keys"):
        it.server.shared(0, {})
    with pytest.raises(ValueError, match="keys while those are shares"):
        table(1).server.keys(9, keys)


def test_shares_that_come_twice_or_for_others_are_refused() -> None:
    it = table(1)
    parcels = it.clients[0].share(it.rosters[0])
    for wrong in ({}, {**parcels, 0: b""}, {c: parcels[c] for c in (1, 2, 3)}):
        with pytest.raises(ValueError, match="not for its neighbours"):
            it.server.shared(0, wrong)
    with pytest.raises(ValueError, match="not for its neighbours"):
        it.server.shared(9, parcels)
    it.server.shared(0, parcels)
    with pytest.raises(ValueError, match="its shares twice"):
        it.server.shared(0, parcels)


def test_numbers_that_come_twice_or_do_not_fit_are_refused() -> None:
    it = table(2)
    data = it.clients[0].mask(it.parcels[0], FIVE_NUMBERS[0])
    for wrong in (data[1:], data[:, :1], data.astype(np.int8), data.reshape(-1)):
        with pytest.raises(ValueError, match="expected uint8"):
            it.server.masked(0, wrong)
    with pytest.raises(ValueError, match="numbers without shares"):
        it.server.masked(9, data)
    it.server.masked(0, data)
    with pytest.raises(ValueError, match="its numbers twice"):
        it.server.masked(0, data)


def test_secrets_that_come_twice_or_were_not_asked_for_are_refused() -> None:
    it = table(3, lost=(4,))
    right = it.clients[0].reveal(it.requests[0])
    for wrong in (
        Shares({}, {}),
        Shares(right.seeds, {}),
        Shares({**right.seeds, 4: right.masks[4]}, right.masks),
        Shares(right.masks, right.seeds),
    ):
        with pytest.raises(ValueError, match="not those asked for"):
            it.server.revealed(0, wrong)
    with pytest.raises(ValueError, match="shares without numbers"):
        it.server.revealed(4, right)
    it.server.revealed(0, right)
    with pytest.raises(ValueError, match="shares twice"):
        it.server.revealed(0, right)


@pytest.mark.parametrize(
    ("victim", "match"), [(1, "seed of client 1"), (4, "mask key of client 4")]
)
def test_a_wrong_share_is_noticed(victim: int, match: str) -> None:
    it = table(3, lost=(4,))
    for c, request in it.requests.items():
        shares = it.clients[c].reveal(request)
        if c == 0:
            kind = shares.masks if victim == 4 else shares.seeds
            kind[victim] = (int.from_bytes(kind[victim], "little") ^ 2**100).to_bytes(33, "little")
        it.server.revealed(c, shares)
    with pytest.raises(SecAggError, match=match):
        it.server.sum()


def test_numbers_that_were_not_masked_as_agreed_give_no_sum() -> None:
    it = table(2, SecureAggregation(bits=3))
    for c, client in it.clients.items():
        data = client.mask(it.parcels[c], np.zeros(8, np.int64))
        it.server.masked(c, data + np.uint8(1) * 127 if c == 0 else data)
    for c, request in it.server.requests().items():
        it.server.revealed(c, it.clients[c].reveal(request))
    with pytest.raises(SecAggError, match="no sum of clipped updates"):
        it.server.sum()
