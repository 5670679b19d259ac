"""What client and server send each other besides numbers, and how a record holds it.

Clients are named by the server's numbers. Whoever reads a record trusts nothing of it: all that
does not have the types, the lengths and the distinct names it should have is a ``ValueError``.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from flwr.app import ConfigRecord

from fedsys.secagg.keys import KEY_BYTES

Parcels = dict[int, bytes]  # a sealed pair of shares, by who made it or whom it is for

SESSION, MEMBERS, CLIENT = "session", "members", "client"
KEYS, PARCELS, SEEDS, MASKS = "keys", "parcels", "seeds", "masks"
SURVIVORS, LOST = "survivors", "lost"


@dataclass(frozen=True)
class Keys:
    """What a client shows of its secrets: two public keys, and a commitment to its seed."""

    seal: bytes
    mask: bytes
    commitment: bytes

    @classmethod
    def of(cls, raw: bytes) -> "Keys":
        """Return the keys of their bytes (96)."""
        if len(raw) != 3 * KEY_BYTES:
            raise ValueError(f"keys are {3 * KEY_BYTES} bytes, got {len(raw)}")
        return cls(*(raw[i : i + KEY_BYTES] for i in range(0, len(raw), KEY_BYTES)))

    def __bytes__(self) -> bytes:
        return self.seal + self.mask + self.commitment


@dataclass(frozen=True)
class Roster:
    """How many clients sum, and the keys of those among them that are a client's neighbours."""

    members: int
    keys: dict[int, Keys]

    @classmethod
    def of(cls, record: ConfigRecord) -> "Roster":
        """Read a roster."""
        keys = {client: Keys.of(raw) for client, raw in take(record, KEYS).items()}
        return cls(number(record, MEMBERS), keys)

    def write(self, record: ConfigRecord) -> None:
        """Put the roster into ``record``."""
        record[MEMBERS] = self.members
        put(record, KEYS, {client: bytes(keys) for client, keys in self.keys.items()})


@dataclass(frozen=True)
class Request:
    """Of whom the server has masked numbers, and of whom only shares."""

    survivors: list[int]
    lost: list[int]

    @classmethod
    def of(cls, record: ConfigRecord) -> "Request":
        """Read a request."""
        return cls(_numbers(record, SURVIVORS), _numbers(record, LOST))

    def write(self, record: ConfigRecord) -> None:
        """Put the request into ``record``."""
        for name, clients in ((SURVIVORS, self.survivors), (LOST, self.lost)):
            if clients:  # Flower has no empty lists
                record[name] = clients


@dataclass(frozen=True)
class Shares:
    """Shares of the seeds of those that survived, and of the mask keys of those that were lost."""

    seeds: dict[int, bytes]
    masks: dict[int, bytes]

    @classmethod
    def of(cls, record: ConfigRecord) -> "Shares":
        """Read shares."""
        return cls(take(record, SEEDS), take(record, MASKS))

    def write(self, record: ConfigRecord) -> None:
        """Put the shares into ``record``."""
        put(record, SEEDS, self.seeds)
        put(record, MASKS, self.masks)


def put(record: ConfigRecord, name: str, values: Mapping[int, bytes]) -> None:
    """Put bytes by client into ``record``; nothing, where there are none."""
    if values:
        record[f"{name}-of"], record[name] = list(values), list(values.values())


def take(record: ConfigRecord, name: str) -> dict[int, bytes]:
    """Return what ``put`` has put."""
    clients, values = _numbers(record, f"{name}-of"), record.get(name, [])
    if not isinstance(values, list) or not all(isinstance(v, bytes) for v in values):
        raise ValueError(f"{name} are no list of bytes")
    if len(values) != len(clients):
        raise ValueError(f"{len(values)} {name} are those of {len(clients)} clients")
    return dict(zip(clients, (bytes(v) for v in values if isinstance(v, bytes)), strict=True))


def number(record: ConfigRecord, name: str) -> int:
    """Return a whole number from 0; raise ``ValueError`` when there is none."""
    value = record.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{name} must be a whole number from 0, got {value!r:.40}")
    return value


def raw(record: ConfigRecord, name: str) -> bytes:
    """Return bytes; raise ``ValueError`` when there are none."""
    value = record.get(name)
    if not isinstance(value, bytes):
        raise ValueError(f"{name} must be bytes, got {value!r:.40}")
    return value


def _numbers(record: ConfigRecord, name: str) -> list[int]:
    """Return distinct whole numbers from 0; none where there is no such list."""
    values = record.get(name, [])
    if not isinstance(values, list) or not all(
        isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values
    ):
        raise ValueError(f"{name} are no list of whole numbers from 0")
    clients = [v for v in values if isinstance(v, int)]
    if len(set(clients)) < len(clients):
        raise ValueError(f"{name} name a client twice")
    return clients
