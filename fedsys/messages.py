"""What a Message holds: every record key of fedsys stands in this file.

    down  arrays   x_t, one packed vector (key ``packed``) or one array per name, or what a codec
                   makes of it
          frozen   factors a client has not seen yet (first contact only)
          moves    factors of W_t - W_{t-1}, where the frozen base moves, for a client at W_{t-1}
          base     W_t itself, for one that has missed more
          config   server-round, and the digest of all that is frozen as ``basis``; where it
                   matters, the number of the ``client``; for a client with memory, the round of
                   it that was ``accepted`` last and the ``checkpoints`` the server may go back to
    up    arrays   x_n, in the form that came down, or what a codec makes of it
          metrics  num-examples, train_loss, whatever else the client reports
          reply    ``basis``: the digest of the factors the client trained with; ``spent``: what a
                   private client has released in all, as (z, q, steps) one after the other

Where updates are summed securely, messages hold a record ``secagg`` besides: ``fedsys.secagg``.

One packed vector keeps the framing of many small matrices below a few per cent of the payload.
An app of somebody else's knows nothing of it and meets plain named arrays.
"""

from collections.abc import Iterable, Mapping
from dataclasses import astuple
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from fedsys.arrays import TensorArray, array_bytes, tensor_of
from fedsys.params import Layout, Params
from fedsys.privacy.release import Release, Spent

ARRAYS, FROZEN, CONFIG, METRICS, REPLY = "arrays", "frozen", "config", "metrics", "reply"
PACKED = "packed"
ROUND, BASIS, NUM_EXAMPLES, CLIENT = "server-round", "basis", "num-examples", "client"
BASE, MOVES, ACCEPTED, CHECKPOINTS = "base", "moves", "accepted", "checkpoints"
SPENT = "spent"

Arrays = Mapping[str, Array | Tensor]
Held = tuple[Params, dict[str, float], dict[str, Any]]  # the records of a reply, not yet made

# What Flower's serialisation puts around a record and an array: types, hashes, lengths.
_PER_RECORD, _PER_ARRAY = 160, 330

_NOT_MADE = RecordDict()  # nobody sees it


class TensorReply(Message):
    """A reply that makes records of its tensors and numbers when somebody asks for its content.

    Where client and server are one process few do, and records cost more than a small update.
    Nobody may change what it holds. It stays in the process, where Flower need not know its class.
    """

    def __init__(
        self, to: Message, arrays: Params, metrics: dict[str, float], facts: dict[str, Any]
    ) -> None:
        """Reply to ``to``; raises ``TypeError`` unless all ``arrays`` are tensors."""
        if not all(isinstance(value, Tensor) for value in arrays.values()):
            kinds = {name: type(value).__name__ for name, value in arrays.items()}
            raise TypeError(f"a reply holds tensors, got {kinds}")
        super().__init__(_NOT_MADE, reply_to=to)
        self.held: Held | None = arrays, metrics, facts  # None once the content is made

    @property
    def content(self) -> RecordDict:
        """The content, which may be changed."""
        if self.held is not None:
            arrays, metrics, facts = self.held
            records = RecordDict({ARRAYS: encode(arrays), METRICS: MetricRecord({**metrics})})
            if facts:
                records[REPLY] = ConfigRecord({**facts})
            self.content = records
        return super().content

    @content.setter
    def content(self, value: RecordDict) -> None:
        self.held = None
        Message.content.fset(self, value)  # type: ignore[attr-defined]

    def plain(self, to: Message) -> Message:
        """Return it as Flower's own class, replying to ``to``: that can leave the process."""
        return Message(self.content, reply_to=to)


def held_by(reply: Message) -> Held | None:
    """Return the arrays, metrics and facts of a reply that has made no records of them."""
    return reply.held if isinstance(reply, TensorReply) else None


def encode(params: Params, layout: Layout | None = None) -> ArrayRecord:
    """Return ``params`` as a record, packed into one vector when a ``layout`` is given."""
    if layout is None:
        record = ArrayRecord()
        for name, value in params.items():
            record[name] = TensorArray(value)
        return record
    return encode_flat(layout.pack(params))


def encode_flat(flat: Tensor) -> ArrayRecord:
    """Return one packed vector (size,) as a record."""
    record = ArrayRecord()
    record[PACKED] = TensorArray(flat)
    return record


def decode(record: Arrays, layout: Layout | None = None) -> Params:
    """Return the record's tensors by name; raise ``ValueError`` when they do not fit ``layout``."""
    tensors = {name: tensor_of(array) for name, array in record.items()}
    if PACKED not in tensors:
        return tensors
    if layout is None or tensors[PACKED].shape != (layout.size,):
        raise ValueError("a packed vector does not fit this model: the two sides differ")
    return layout.unpack(tensors[PACKED])


def arrays_of(content: RecordDict, name: str = ARRAYS) -> ArrayRecord:
    """Return the arrays called ``name``; raise ``ValueError`` when there are none."""
    record = content.get(name)
    if not isinstance(record, ArrayRecord):
        raise ValueError(f"the message has no arrays called {name!r}")
    return record


def config_of(content: RecordDict) -> ConfigRecord:
    """Return the settings; raise ``ValueError`` when there are none."""
    record = content.get(CONFIG)
    if not isinstance(record, ConfigRecord):
        raise ValueError(f"the message has no settings called {CONFIG!r}")
    return record


def checkpoints_of(config: ConfigRecord) -> list[int]:
    """Return the rounds that the server may go back to, as far as it says so."""
    rounds = config.get(CHECKPOINTS, [])
    return [int(r) for r in rounds] if isinstance(rounds, list) else []


def spent_numbers(spent: Spent) -> list[float]:
    """Return the releases as one list, which records can hold."""
    # Flower has no empty lists: no step says that nothing was released.
    releases = spent or (Release(1.0, 1.0, 0),)
    return [float(number) for release in releases for number in astuple(release)]


def numbers(params: Params) -> int:
    """Return how many numbers ``params`` hold."""
    return sum(value.numel() for value in params.values())


def wire_bytes(content: RecordDict) -> int:
    """Return the bytes of ``content`` as Flower serialises it, transport framing excluded."""
    return _bytes_of(content.values())


def reply_bytes(reply: Message) -> int:
    """Return the bytes of what ``reply`` holds, as ``wire_bytes`` does."""
    if (held := held_by(reply)) is None:
        return wire_bytes(reply.content)
    return _bytes_of(held if held[-1] else held[:-1])  # there is no record without facts


def _bytes_of(records: Iterable[Mapping[str, Any]]) -> int:
    total = 0
    for record in records:
        total += _PER_RECORD
        for name, value in record.items():
            total += len(name) + _value_bytes(value)
    return total


def _value_bytes(value: object) -> int:
    if isinstance(value, float | int):
        return 8
    if isinstance(value, Array | Tensor):
        return _PER_ARRAY + array_bytes(value)
    if isinstance(value, list):
        return sum(map(_value_bytes, value))
    return len(value) if isinstance(value, str | bytes) else 8
