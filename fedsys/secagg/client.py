"""One client in one round of secure aggregation.

Each step can be taken once, in its place, and what has served is forgotten. In particular a client
masks one vector with its masks, as the difference of two would show what they hide, and answers one
request for shares, as two could ask for both secrets of a peer.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

import numpy as np
from flwr.app import ConfigRecord
from numpy.typing import NDArray

from fedsys.secagg import keys as crypto
from fedsys.secagg.parts import (
    CLIENT,
    MEMBERS,
    SESSION,
    Keys,
    Parcels,
    Request,
    Roster,
    Shares,
    number,
    put,
    raw,
    take,
)
from fedsys.secagg.quantise import Field, Whole, to_bytes
from fedsys.secagg.quantise import field as field_of
from fedsys.secagg.settings import FEWEST, SecureAggregation
from fedsys.secagg.shamir import SHARE_BYTES, split

_STEP = "step"
_STEPS = ("begun", "shared", "masked", "done")
_OWN = ("_sealing", "_masking", "_seed")
_BY_PEER = ("_unsealing", "_masks", "_held")


@dataclass
class Client:
    """A member of a round: its secrets, and how far it is."""

    settings: SecureAggregation
    session: bytes  # names the round
    number: int  # the server's of this client
    _sealing: bytes = field(default_factory=crypto.fresh, repr=False)  # private keys
    _masking: bytes = field(default_factory=crypto.fresh, repr=False)
    _seed: bytes = field(default_factory=crypto.fresh, repr=False)
    _step: str = "begun"
    _members: int = 0
    _unsealing: dict[int, bytes] = field(default_factory=dict, repr=False)  # by peer
    _masks: dict[int, bytes] = field(default_factory=dict, repr=False)  # by peer
    _held: dict[int, bytes] = field(default_factory=dict, repr=False)  # pairs of shares, by peer

    def keys(self) -> Keys:
        """Return what the others need to know."""
        return Keys(
            crypto.public(crypto.private(self._sealing)),
            crypto.public(crypto.private(self._masking)),
            crypto.commitment(self._seed, self.session),
        )

    def share(self, roster: Roster) -> Parcels:
        """Return a sealed parcel for each neighbour: a share of the seed, one of the mask key.

        Raises ``ValueError`` when there are too few members or neighbours, or two have one key.
        """
        peers = roster.keys
        known = [key for keys in peers.values() for key in (keys.seal, keys.mask)]
        if roster.members < FEWEST or len(peers) != self.settings.degree(roster.members):
            raise ValueError(f"{len(peers)} neighbours among {roster.members} members are too few")
        if self.number in peers or len(set(known)) < len(known):
            raise ValueError("the keys of neighbours are not those of so many others")
        self._enter("shared")
        self._members = roster.members
        points = [peer + 1 for peer in (self.number, *peers)]
        least = self.settings.least(len(points))
        seeds, masks = split(self._seed, least, points), split(self._masking, least, points)
        pairs = {point - 1: seeds[point] + masks[point] for point in points}
        self._held = {self.number: pairs.pop(self.number)}
        parcels = self._agree(peers, pairs)
        self._sealing = self._masking = b""
        return parcels

    def _agree(self, peers: Mapping[int, Keys], pairs: Mapping[int, bytes]) -> Parcels:
        """Keep a mask key and one to unseal by for each of ``peers``; return what is sealed."""
        sealing, masking = crypto.private(self._sealing), crypto.private(self._masking)
        own, parcels = crypto.public(sealing), {}
        for peer, theirs in peers.items():
            key, self._unsealing[peer] = crypto.sealing_keys(
                sealing, own, theirs.seal, self.session
            )
            self._masks[peer] = crypto.mask_key(masking, theirs.mask, self.session)
            parcels[peer] = crypto.seal(key, pairs[peer], self._label(self.number, peer))
        return parcels

    def mask(self, parcels: Parcels, numbers: Whole) -> NDArray[np.uint8]:
        """Return ``numbers`` (d,) masked, as bytes (d, width).

        ``parcels`` are those of the neighbours that are still there, for this client. Raises
        ``ValueError`` when they are too few, not for it, or altered, and when a number is beyond
        what the field has room for.
        """
        largest = self.settings.quantiser.largest
        if numbers.max(initial=0) > largest or numbers.min(initial=0) < -largest:
            raise ValueError(f"a number is beyond {largest}, of which so many would wrap around")
        self._enter("masked")
        self._unseal(parcels)
        width = self.settings.quantiser.width(self._members)
        masked: Field = numbers.astype(field_of(width))  # -1 becomes the largest element
        masked += crypto.expand(crypto.self_key(self._seed, self.session), len(masked), width)
        for peer in parcels:
            mask = crypto.expand(self._masks[peer], len(masked), width)
            if self.number < peer:
                masked += mask
            else:
                masked -= mask
        self._seed, self._masks, self._unsealing = b"", {}, {}
        return to_bytes(masked, width)

    def _unseal(self, parcels: Parcels) -> None:
        """Keep the shares that ``parcels`` hold."""
        if not parcels.keys() <= self._unsealing.keys():
            raise ValueError("a parcel is of somebody who is no neighbour")
        self._enough(len(parcels) + 1)
        for peer, sealed in parcels.items():
            label = self._label(peer, self.number)
            self._held[peer] = crypto.unseal(self._unsealing[peer], sealed, label)
            if len(self._held[peer]) != 2 * SHARE_BYTES:
                raise ValueError(
                    f"the parcel of client {peer} holds something else than two shares"
                )

    def reveal(self, request: Request) -> Shares:
        """Return a share of one secret of each peer.

        Raises ``ValueError`` when the request asks for both secrets of one, for those of somebody
        whose shares this client does not hold, or for its own mask key, and when so few survived
        that they could not restore what was lost.
        """
        self._enter("done")  # even for a request that is refused
        survivors, lost = set(request.survivors), set(request.lost)
        if survivors & lost:
            raise ValueError(f"both secrets of client {min(survivors & lost)} are asked for")
        if not survivors | lost <= self._held.keys():
            raise ValueError("secrets are asked for of somebody who is no neighbour")
        if self.number not in survivors:
            raise ValueError("this client is said to be lost, and would open its own numbers")
        self._enough(len(survivors))
        held, self._held = self._held, {}
        return Shares(
            {peer: held[peer][:SHARE_BYTES] for peer in request.survivors},
            {peer: held[peer][SHARE_BYTES:] for peer in request.lost},
        )

    def dump(self) -> ConfigRecord:
        """Return all of it, for the time between two messages; to be kept as secret as the data."""
        record = ConfigRecord({SESSION: self.session, CLIENT: self.number})
        record[MEMBERS], record[_STEP] = self._members, self._step
        for name in _OWN:
            record[name] = getattr(self, name)
        for name in _BY_PEER:
            put(record, name, getattr(self, name))
        return record

    @classmethod
    def load(cls, settings: SecureAggregation, record: ConfigRecord) -> Self:
        """Return the client of a record that ``dump`` has made."""
        client = cls(settings, raw(record, SESSION), number(record, CLIENT))
        client._members, client._step = number(record, MEMBERS), str(record[_STEP])
        for name in _OWN:
            setattr(client, name, raw(record, name))
        for name in _BY_PEER:
            setattr(client, name, take(record, name))
        return client

    def _enter(self, step: str) -> None:
        """Begin a step; raise ``ValueError`` unless it is the next."""
        if _STEPS.index(step) != _STEPS.index(self._step) + 1:
            raise ValueError(f"a client that has {self._step} cannot be {step} now")
        self._step = step

    def _enough(self, present: int) -> None:
        holders = self.settings.degree(self._members) + 1
        least = self.settings.least(holders)
        if present < least:
            raise ValueError(f"{present} of {holders} are left, and {least} are needed")

    def _label(self, sender: int, recipient: int) -> bytes:
        return self.session + sender.to_bytes(8, "little") + recipient.to_bytes(8, "little")
