"""The server in one round of secure aggregation: it forwards, adds up, and takes masks away.

What a client sends is checked as it arrives: a ``ValueError`` says why it is not taken, and its
client is then lost to the round, as if it had not answered. Between two phases somebody calls
``rosters``, ``parcels``, ``requests`` and ``sum``, which end a phase and raise ``TooFewClients``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random

import numpy as np
from numpy.typing import NDArray

from fedsys.secagg import keys as crypto
from fedsys.secagg.parts import Keys, Parcels, Request, Roster, Shares
from fedsys.secagg.quantise import Field, Floats, centred, field, from_bytes
from fedsys.secagg.settings import FEWEST, SecureAggregation
from fedsys.secagg.shamir import combine

_PHASES = ("keys", "shares", "numbers", "secrets")


class SecAggError(RuntimeError):
    """A round of secure aggregation gives no sum; the message says why."""


class TooFewClients(SecAggError):
    """So many clients were lost that no sum can be told from the masks."""


@dataclass(frozen=True)
class Sum:
    """The sum of the clipped updates, and all else that the server learns."""

    values: Floats  # (d,)
    clients: list[int]  # whose updates it is of, in order
    clipped: int  # how many of them had to be scaled down


class Server:
    """A round under way, for vectors of ``size`` numbers."""

    def __init__(self, settings: SecureAggregation, size: int) -> None:
        """Begin a round with a name that no other has."""
        self.settings = settings
        self.session = crypto.fresh(crypto.SESSION_BYTES)
        self._size = size + 1  # the last number counts the clipped
        self._phase = 0
        self._keys: dict[int, Keys] = {}
        self._neighbours: dict[int, list[int]] = {}
        self._parcels: dict[int, Parcels] = {}  # by sender
        self._total: Field = np.zeros(0, np.uint32)
        self._survivors: list[int] = []
        self._seeds: dict[int, dict[int, bytes]] = {}  # shares by point, by whose seed it is
        self._masks: dict[int, dict[int, bytes]] = {}
        self._revealed: set[int] = set()

    # ---- phase 0: keys

    def keys(self, client: int, keys: Keys) -> None:
        """Take the keys of ``client``."""
        self._expect(0, client not in self._keys, "its keys twice")
        known = {key for other in self._keys.values() for key in (other.seal, other.mask)}
        if keys.seal == keys.mask or known & {keys.seal, keys.mask}:
            raise ValueError("its keys are another's")
        self._keys[client] = keys

    def rosters(self) -> dict[int, Roster]:
        """Return for every member the keys of its neighbours."""
        members = len(self._keys)
        if members < FEWEST:
            raise TooFewClients(f"{members} clients sent keys; a sum of less than {FEWEST} is bare")
        self._phase = 1
        self._neighbours = _graph(sorted(self._keys), self.settings.degree(members), self.session)
        self._width = self.settings.quantiser.width(members)
        self._total = np.zeros(self._size, field(self._width))
        return {
            client: Roster(members, {peer: self._keys[peer] for peer in self._neighbours[client]})
            for client in sorted(self._keys)
        }

    # ---- phase 1: shares

    def shared(self, client: int, parcels: Parcels) -> None:
        """Take the parcels that ``client`` made for its neighbours."""
        self._expect(1, client not in self._parcels, "its shares twice")
        if parcels.keys() != set(self._neighbours.get(client, ())):
            raise ValueError("its shares are not for its neighbours, each one")
        self._parcels[client] = parcels

    def parcels(self) -> dict[int, Parcels]:
        """Return for every client that may go on what its neighbours made for it."""
        self._enough(len(self._parcels), "sent shares")
        able = self._able(set(self._parcels))
        self._enough(len(able), "are left with enough neighbours")
        self._phase = 2
        self._parcels = {client: self._parcels[client] for client in sorted(able)}
        return {
            client: {
                peer: self._parcels[peer][client]
                for peer in self._neighbours[client]
                if peer in self._parcels
            }
            for client in self._parcels
        }

    def _able(self, present: set[int]) -> set[int]:
        """Return those of ``present`` with enough of their neighbours among each other."""
        least = self.settings.least(self.settings.degree(len(self._keys)) + 1)
        while True:
            able = {c for c in present if 1 + len(present & {*self._neighbours[c]}) >= least}
            if able == present:
                return able
            present = able

    # ---- phase 2: masked numbers

    def masked(self, client: int, data: NDArray[np.uint8]) -> None:
        """Add the masked numbers of ``client``, bytes (size + 1, width)."""
        self._expect(2, client in self._parcels, "numbers without shares")
        self._expect(2, client not in self._survivors, "its numbers twice")
        if data.dtype != np.uint8 or data.shape != (self._size, self._width):
            raise ValueError(
                f"its masked numbers are {data.dtype} {data.shape}, expected uint8"
                f" {(self._size, self._width)}"
            )
        self._total += from_bytes(data)
        self._survivors.append(client)

    def requests(self) -> dict[int, Request]:
        """Return for every survivor whose secrets to reveal a share of."""
        survivors = set(self._survivors)
        self._enough(len(survivors), "sent their numbers")
        self._phase = 3
        self._survivors.sort()
        requests = {}
        for client in self._survivors:
            near = sorted(self._parcels.keys() & {client, *self._neighbours[client]})
            requests[client] = Request(
                [peer for peer in near if peer in survivors],
                [peer for peer in near if peer not in survivors],
            )
        for request in requests.values():
            self._seeds.update({peer: {} for peer in request.survivors})
            self._masks.update({peer: {} for peer in request.lost})
        for peer in (*self._seeds, *self._masks):
            self._recoverable(peer, len(survivors & {peer, *self._neighbours[peer]}))
        return requests

    # ---- phase 3: secrets

    def revealed(self, client: int, shares: Shares) -> None:
        """Take the shares that ``client`` held of its neighbours' secrets."""
        self._expect(3, client in self._survivors, "shares without numbers")
        self._expect(3, client not in self._revealed, "its neighbours' shares twice")
        near = {client, *self._neighbours[client]}
        seeds, masks = self._seeds.keys() & near, self._masks.keys() & near
        if set(shares.seeds) != seeds or set(shares.masks) != masks:
            raise ValueError("its shares are not those asked for")
        self._revealed.add(client)
        for kept, given in ((self._seeds, shares.seeds), (self._masks, shares.masks)):
            for peer, share in given.items():
                kept[peer][client + 1] = share  # whose it is follows from who sent it

    def sum(self) -> Sum:
        """Return the sum; raises ``SecAggError`` when secrets were not restored or it is no sum."""
        total = self._total.copy()
        for client in self._survivors:
            seed = self._restore(client, self._seeds[client])
            if crypto.commitment(seed, self.session) != self._keys[client].commitment:
                raise SecAggError(f"wrong shares of the seed of client {client}")
            total -= crypto.expand(crypto.self_key(seed, self.session), self._size, self._width)
        for client in self._masks:
            self._unmask(client, total)
        numbers = centred(total, self._width)
        quantiser, count = self.settings.quantiser, len(self._survivors)
        clipped = int(numbers[-1])
        if np.abs(numbers).max() > count * quantiser.largest or not 0 <= clipped <= count:
            raise SecAggError("what is left when masks are gone is no sum of clipped updates")
        return Sum(quantiser.values(numbers[:-1]), list(self._survivors), clipped)

    def _unmask(self, lost: int, total: Field) -> None:
        """Take from ``total`` the masks that survivors share with a client that was lost."""
        key = crypto.private(self._restore(lost, self._masks[lost]))
        if crypto.public(key) != self._keys[lost].mask:
            raise SecAggError(f"wrong shares of the mask key of client {lost}")
        for peer in set(self._survivors) & set(self._neighbours[lost]):
            shared = crypto.mask_key(key, self._keys[peer].mask, self.session)
            mask = crypto.expand(shared, self._size, self._width)
            if peer < lost:
                total -= mask
            else:
                total += mask

    def _restore(self, client: int, shares: Mapping[int, bytes]) -> bytes:
        least = self._recoverable(client, len(shares))
        try:
            return combine({point: shares[point] for point in sorted(shares)[:least]})
        except ValueError as error:
            raise SecAggError(f"the secret of client {client} is lost: {error}") from error

    def _recoverable(self, client: int, holders: int) -> int:
        """Return how many holders restore a secret; raises unless there are as many."""
        all_holders = len(self._neighbours[client]) + 1
        least = self.settings.least(all_holders)
        if holders < least:
            raise TooFewClients(
                f"{holders} of {all_holders} hold shares of client {client}, {least} are needed"
            )
        return least

    def _enough(self, present: int, what: str) -> None:
        members = len(self._keys)
        least = self.settings.least(members)
        if present < least:
            raise TooFewClients(f"{present} of {members} clients {what}, {least} are needed")

    def _expect(self, phase: int, holds: bool, what: str) -> None:
        if self._phase != phase:
            raise ValueError(f"{_PHASES[phase]} while those are {_PHASES[self._phase]} that count")
        if not holds:
            raise ValueError(f"it sent {what}")


def _graph(members: list[int], degree: int, session: bytes) -> dict[int, list[int]]:
    """Return the neighbours of each member: ``degree`` / 2 on either side in a random circle.

    The graph of Bell et al. (2020) for a server that follows the protocol; of all the others where
    ``degree`` says so.
    """
    if degree == len(members) - 1:
        return {client: [c for c in members if c != client] for client in members}
    circle, half = members.copy(), degree // 2
    Random(session).shuffle(circle)
    count = len(circle)
    return {
        client: sorted(circle[(i + j) % count] for j in range(-half, half + 1) if j)
        for i, client in enumerate(circle)
    }
