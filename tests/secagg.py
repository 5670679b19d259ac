"""Rounds of secure aggregation over the pure classes, for their tests."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import Array, RecordDict
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_children_ids_from_object_content,
    get_object_type_from_object_content,
)
from scipy.stats import chi2

from fedsys.secagg import (
    Quantiser,
    SecureAggregation,
    Sum,
)
from fedsys.secagg.client import Client
from fedsys.secagg.parts import Request, Roster
from fedsys.secagg.server import Server

NEVER = 4  # the phases are 0 to 3
LEVEL = 1e-7  # of tests whose randomness is the operating system's: one failure in ten million


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def vectors_of(clients: int, size: int, norm: float = 1.0, seed: int = 0) -> np.ndarray:
    """Return one vector a client, (clients, size), each of ``norm``."""
    drawn = rng(seed).normal(size=(clients, size))
    return drawn * (norm / np.linalg.norm(drawn, axis=1, keepdims=True))


def numbers_of(quantiser: Quantiser, vector: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return what a client masks: the numbers of ``vector``, and that it was not clipped."""
    return np.append(quantiser.quantise(vector, rng(seed)), 0)


@dataclass
class Played:
    """A round, and what its server has seen."""

    total: Sum
    masked: dict[int, np.ndarray]
    clients: dict[int, Client]
    server: Server = field(repr=False)


def play(
    options: SecureAggregation, numbers: dict[int, np.ndarray], lost: dict[int, int] | None = None
) -> Played:
    """Run a round over the pure classes; ``lost`` says before which answer a client is lost."""
    lost = lost or {}

    def there(phase: int, among) -> list[int]:
        return [client for client in among if lost.get(client, NEVER) > phase]

    server = Server(options, len(next(iter(numbers.values()))) - 1)
    clients = {c: Client(options, server.session, c) for c in there(0, numbers)}
    for c, client in clients.items():
        server.keys(c, client.keys())
    rosters = server.rosters()
    for c in there(1, rosters):
        server.shared(c, clients[c].share(rosters[c]))
    parcels = server.parcels()
    masked = {c: clients[c].mask(parcels[c], numbers[c]) for c in there(2, parcels)}
    for c, data in masked.items():
        server.masked(c, data)
    requests = server.requests()
    for c in there(3, requests):
        server.revealed(c, clients[c].reveal(requests[c]))
    return Played(server.sum(), masked, clients, server)


def check_sum(played: Played, numbers, vectors, quantiser: Quantiser, survivors) -> None:
    """Check the sum: exactly that of the numbers, and of the vectors within the bound."""
    survivors = sorted(survivors)
    assert played.total.clients == survivors
    whole = sum(numbers[c][:-1] for c in survivors)
    np.testing.assert_array_equal(played.total.values, whole * quantiser.step)
    plain = sum(vectors[c] for c in survivors)
    assert np.abs(played.total.values - plain).max() < quantiser.error(len(survivors)) * (1 + 1e-9)
    assert played.total.clipped == 0


def uniform(data: np.ndarray) -> bool:
    """Return whether bytes ``data`` pass for uniform ones, by a chi-square test."""
    counts = np.bincount(data.reshape(-1), minlength=256)
    expected = data.size / 256
    return float(((counts - expected) ** 2 / expected).sum()) < chi2.isf(LEVEL, 255)


FIVE = SecureAggregation(clipping_norm=1.0, bits=12)
FIVE_VECTORS = vectors_of(5, 7)
FIVE_NUMBERS = {c: numbers_of(FIVE.quantiser, FIVE_VECTORS[c], c) for c in range(5)}


@dataclass
class Table:
    """Five clients and a server, at the beginning."""

    server: Server
    clients: dict[int, Client]
    rosters: dict[int, Roster] = field(default_factory=dict)
    parcels: dict[int, dict[int, bytes]] = field(default_factory=dict)
    masked: dict[int, np.ndarray] = field(default_factory=dict)
    requests: dict[int, Request] = field(default_factory=dict)


def table(phase: int, options: SecureAggregation = FIVE, lost: tuple[int, ...] = ()) -> Table:
    """Return a round as it is before phase ``phase``; ``lost`` send no numbers."""
    server = Server(options, 7)
    it = Table(server, {c: Client(options, server.session, c) for c in range(5)})
    if phase > 0:
        for c, client in it.clients.items():
            server.keys(c, client.keys())
        it.rosters = server.rosters()
    if phase > 1:
        for c, client in it.clients.items():
            server.shared(c, client.share(it.rosters[c]))
        it.parcels = server.parcels()
    if phase > 2:
        for c in it.clients.keys() - set(lost):
            it.masked[c] = it.clients[c].mask(it.parcels[c], FIVE_NUMBERS[c])
            server.masked(c, it.masked[c])
        it.requests = server.requests()
    return it


def travelled(content: RecordDict) -> RecordDict:
    """Return ``content`` as Flower takes it apart and builds it again."""
    objects = get_all_nested_objects(content)
    kinds = {type(o).__name__: type(o) for o in objects.values()} | {"Array": Array}
    built: dict[str, Any] = {}
    for name, made in objects.items():  # children come before their parents
        data = made.deflate()
        children = {i: built[i] for i in get_object_children_ids_from_object_content(data)}
        built[name] = kinds[get_object_type_from_object_content(data)].inflate(data, children)
    back = built[content.object_id]
    assert isinstance(back, RecordDict)
    return back
