"""Real replies, ways to spoil them, and a judge that reads them without the code under test."""

import json
import math
import sys
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field
from io import BytesIO
from random import Random
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.app.message.arraychunk import ArrayChunk
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_children_ids_from_object_content,
    get_object_type_from_object_content,
)
from numpy.lib import format as npy

LARGEST = float(np.finfo(np.float32).max)
Numbers = np.ndarray[Any, Any]
Way = Callable[["Spoiler", Message], Message]
Read = Callable[[dict[str, Numbers]], Numbers | None]  # arrays -> the update (d,); None: malformed


# ---- the judge


@dataclass(frozen=True)
class Judged:
    """What a reply is worth."""

    delta: Numbers | None  # None: it must be refused
    examples: int = 0
    certain: bool = True  # or it may be refused for its framing


REFUSED = Judged(None)


@dataclass
class Scene:
    """A round that was really played, of which replies are spoiled."""

    name: str
    round: int
    clients: dict[int, int]  # by node
    replies: list[Message]  # as they arrived, one of each client
    read: Read
    basis: str = ""
    private: bool = False
    names: tuple[str, ...] = ()  # of the arrays

    def judge(self, reply: Message) -> Judged:
        """Judge a reply that has the right sender and round, by itself."""
        if not reply.has_content():
            return REFUSED
        records = list(reply.content.values())
        arrays = [r for r in records if isinstance(r, ArrayRecord)]
        metrics = [r for r in records if isinstance(r, MetricRecord)]
        examples = count_of(metrics[0]) if len(metrics) == 1 else 0
        said = reply.content.get("reply", {})
        if len(arrays) != 1 or not examples or said.get("basis", "") != self.basis:
            return REFUSED
        if self.private and not _has_spent(said.get("spent")):
            return REFUSED
        found = {name: loaded(array) for name, array in arrays[0].items()}
        if any(value is None for value, _ in found.values()):
            return REFUSED
        with np.errstate(all="ignore"):
            delta = self.read({name: value for name, (value, _) in found.items()})  # type: ignore[misc]
            if delta is None or not (np.abs(delta.astype(np.float64)) <= LARGEST).all():
                return REFUSED
        return Judged(delta, examples, all(certain for _, certain in found.values()))


def loaded(array: Array) -> tuple[Numbers | None, bool]:
    """Return what NumPy reads of an array, and whether NumPy would have written it so."""
    try:
        stream = BytesIO(array.data)
        version = npy.read_magic(stream)
        header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, _, dtype = header(stream, max_header_size=2**16)
        left = len(array.data) - stream.tell()
        if dtype.hasobject or math.prod(shape) * dtype.itemsize != left:
            return None, True
        value = np.load(BytesIO(array.data), allow_pickle=False, max_header_size=2**16)
    except Exception:  # whatever NumPy says of nonsense
        return None, True
    if array.stype != "numpy.ndarray" or array.shape != value.shape:
        return None, True
    if array.dtype != value.dtype.name or value.dtype.kind not in "biuf":
        return None, True
    buffer = BytesIO()
    np.save(buffer, value, allow_pickle=False)
    return value, buffer.getvalue() == array.data


def count_of(metrics: MetricRecord) -> int:
    """Return the number of examples; 0 where these metrics are none."""
    count = metrics.get("num-examples")
    if type(count) not in (int, float) or not 1 <= count <= 2**53 or count != int(count):
        return 0
    numbers = [value for value in metrics.values() if isinstance(value, int | float)]
    return int(count) if all(-LARGEST <= value <= LARGEST for value in numbers) else 0


def _has_spent(said: object) -> bool:
    if not isinstance(said, list) or len(said) % 3 or not 1 <= len(said) // 3 <= 256:
        return False
    if any(type(number) not in (int, float) for number in said):
        return False
    if any(number > sys.float_info.max and number != math.inf for number in said):
        return False  # an int that is no float
    triples = list(zip(said[::3], said[1::3], said[2::3], strict=True))
    good = [
        z >= 0 and 1e-9 <= q <= 1 and 0 <= steps <= 10**6 and steps == int(steps)
        for z, q, steps in triples
    ]
    return all(good) and sum(steps for *_, steps in triples) <= 10**6


# ---- ways to spoil a reply


@dataclass
class Spoiler:
    """Spoils replies with random numbers of one seed."""

    scene: Scene
    rng: Random
    ways: tuple[Way, ...] = ()  # (): all
    counts: dict[str, int] = field(default_factory=dict)  # how often each way was taken

    def spoil(self, reply: Message) -> Message:
        """Return a changed copy of ``reply``, in one to three ways."""
        spoiled = fresh(reply)
        for _ in range(self.rng.choice((1, 1, 1, 2, 3))):
            way = self.rng.choice(self.ways or WAYS)
            self.counts[way.__name__] = self.counts.get(way.__name__, 0) + 1
            spoiled = way(self, spoiled)
        return spoiled

    def pick(self, record: Any) -> Any:
        """Return a key, or None where there is none."""
        return self.rng.choice(list(record)) if len(record) else None

    def arrays(self, reply: Message) -> ArrayRecord | None:
        """Return some arrays of a reply."""
        found: ArrayRecord | None = self._some(reply, ArrayRecord)
        return found

    def metrics(self, reply: Message) -> MetricRecord | None:
        """Return some metrics of a reply."""
        found: MetricRecord | None = self._some(reply, MetricRecord)
        return found

    def config(self, reply: Message) -> ConfigRecord | None:
        """Return some settings in a reply."""
        found: ConfigRecord | None = self._some(reply, ConfigRecord)
        return found

    def _some(self, reply: Message, kind: type) -> Any:
        if not reply.has_content():
            return None
        found = [record for record in reply.content.values() if isinstance(record, kind)]
        return self.rng.choice(found) if found else None


def fresh(reply: Message) -> Message:
    """Return a copy whose records and metadata may be changed; arrays are replaced, not changed."""
    other = copy(reply)
    other.__dict__["_metadata"] = copy(reply.metadata)
    if reply.has_content():
        other.content = RecordDict({name: r.copy() for name, r in reply.content.items()})
    return other


def _force(record: Any, key: Any, value: Any) -> None:
    """Set a value past Flower's own checks."""
    record.__dict__["_data"][key] = value


NAMES = ["", "w", "packed", "arrays", "metrics", "reply", "num-examples", "\ud800", "\x1b[31mred\n",
         "\x1b]0;title\x07", "n" * 5000, "../../etc", "ü", "\x00", "values", "indices"]  # fmt: skip


def drop_record(it: Spoiler, reply: Message) -> Message:
    if reply.has_content() and len(reply.content):
        del reply.content[it.pick(reply.content)]
    return reply


def rename_record(it: Spoiler, reply: Message) -> Message:
    if reply.has_content() and len(reply.content):
        _force(reply.content, it.rng.choice(NAMES), reply.content.pop(it.pick(reply.content)))
    return reply


def double_record(it: Spoiler, reply: Message) -> Message:
    if reply.has_content() and len(reply.content):
        record = reply.content[it.pick(reply.content)]
        _force(reply.content, it.rng.choice(NAMES), record.copy())
    return reply


def add_record(it: Spoiler, reply: Message) -> Message:
    if reply.has_content():
        made = it.rng.choice([ArrayRecord, MetricRecord, ConfigRecord])()
        for _ in range(it.rng.choice((0, 1, 300))):
            if isinstance(made, ArrayRecord):
                made[f"{it.rng.random()}"] = Array(np.zeros(1))
            else:
                made[f"{it.rng.random()}"] = it.rng.choice([0, -1.5, [1, 2]])
        _force(reply.content, it.rng.choice(NAMES), made)
    return reply


def drop_array(it: Spoiler, reply: Message) -> Message:
    if (record := it.arrays(reply)) is not None and len(record):
        del record[it.pick(record)]
    return reply


def rename_array(it: Spoiler, reply: Message) -> Message:
    if (record := it.arrays(reply)) is not None and len(record):
        _force(record, it.rng.choice([*NAMES, *it.scene.names]), record.pop(it.pick(record)))
    return reply


def add_array(it: Spoiler, reply: Message) -> Message:
    if (record := it.arrays(reply)) is not None and len(record):
        _force(record, it.rng.choice([*NAMES, *it.scene.names]), record[it.pick(record)])
    return reply


def _replace(it: Spoiler, reply: Message, change: Callable[[Array], Array]) -> Message:
    if (record := it.arrays(reply)) is not None and len(record):
        name = it.pick(record)
        _force(record, name, change(record[name]))
    return reply


def _with_value(it: Spoiler, reply: Message, change: Callable[[Numbers], Numbers]) -> Message:
    """Change an array as a client would that computes something else."""

    def changed(array: Array) -> Array:
        value, _ = loaded(array)
        if value is None:
            return array
        with np.errstate(all="ignore"):
            return Array(np.asarray(change(value.copy())))

    return _replace(it, reply, changed)


def reshape(it: Spoiler, reply: Message) -> Message:
    def change(value: Numbers) -> Numbers:
        flat = value.reshape(-1)
        ways = [flat[:0], flat[:-1], np.append(flat, flat[:1]), value[None], value[..., None],
                value.T, flat, np.resize(flat, (1,) * 40), np.asarray(flat[:1].sum())]  # fmt: skip
        return it.rng.choice(ways)

    return _with_value(it, reply, change)


def retype(it: Spoiler, reply: Message) -> Message:
    kinds = ["f2", "f4", "f8", "g", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?", "c8",
             ">f4", "S4", "U3", "M8[s]", "V5"]  # fmt: skip
    return _with_value(it, reply, lambda value: value.astype(it.rng.choice(kinds)))


def put_number(it: Spoiler, reply: Message) -> Message:
    """Put a number that is none, or a large or strange one, somewhere."""
    numbers = [
        math.nan,
        math.inf,
        -math.inf,
        -0.0,
        5e-324,
        1e-40,
        3.4e38,
        -3.4e38,
        1e39,
        1e300,
        0,
        255,
    ]

    def change(value: Numbers) -> Numbers:
        number = it.rng.choice(numbers)
        if value.size:
            where = it.rng.randrange(value.size)
            if value.dtype.kind != "f":
                number = int(number) % 256 if math.isfinite(number) else 255
            value.reshape(-1)[where] = np.asarray(number).astype(value.dtype)
        return value

    return _with_value(it, reply, change)


def put_values(it: Spoiler, reply: Message) -> Message:
    """Put other values of the same kind: random bits, all alike, in another order."""

    def change(value: Numbers) -> Numbers:
        how = it.rng.randrange(4)
        if how == 0:
            bits = np.frombuffer(it.rng.randbytes(value.nbytes), np.uint8)
            return bits.view(value.dtype).reshape(value.shape) if value.dtype != bool else ~value
        if how == 1:
            return np.full_like(value, it.rng.choice((0, 1, 127)))
        if how == 2:
            return np.ascontiguousarray(value.reshape(-1)[::-1]).reshape(value.shape)
        return np.asfortranarray(value)

    return _with_value(it, reply, change)


HUGE = 2**62
HEADERS = ["(1000000000000,)", f"({HUGE}, {HUGE})", f"(0, {HUGE})", "(-1,)", "()", "(1,)",
           f"({'1, ' * 70})", f"({'9' * 5000},)", f"({'0, ' * 70})", "(3, 2)", "(None,)", "(1.0,)",
           "(True,)", "(2**60,)"]  # fmt: skip
KINDS = [
    "<f4",
    "|O",
    "<f8",
    ">f4",
    "<i8",
    "|u1",
    "<f99",
    "<c8",
    "[('a', '<f4')]",
    "|V0",
    "<f0",
    "=f4",
]


def claim(it: Spoiler, reply: Message) -> Message:
    """Claim another shape or dtype than the bytes have, in the header, beside it, or in both."""

    def change(array: Array) -> Array:
        shape = it.rng.choice([*HEADERS, str(array.shape)])
        kind = it.rng.choice(KINDS)
        order = it.rng.choice(("False", "True", "1"))
        text = f"{{'descr': '{kind}', 'fortran_order': {order}, 'shape': {shape}, }}"
        data = array.data[128:] if it.rng.random() < 0.7 else b""
        version = it.rng.choice((1, 1, 2, 3, 9))
        header = text.encode() + b" " * it.rng.choice((0, 7, 3000)) + b"\n"
        size = len(header).to_bytes(2 if version == 1 else 4, "little")
        other = it.rng.choice([array.shape, (10**12,), (2**62, 2**62), (0,), (-1,), (1,) * 70])
        said = it.rng.choice((array.dtype, "float32", "object", ""))
        raw = b"\x93NUMPY" + bytes([version, 0]) + size + header + data
        return Array(said, other, array.stype, raw)

    return _replace(it, reply, change)


def reframe(it: Spoiler, reply: Message) -> Message:
    """Change what stands beside the bytes of an array, or cut, lengthen or exchange these."""

    def change(array: Array) -> Array:
        data, rng = array.data, it.rng
        raw = [b"", data[: rng.randrange(len(data) + 1)], data + b"\0", rng.randbytes(len(data)),
               b"PK\x03\x04" + data[4:], b"\x80\x04.", b"\x93NUMPY", data[6:]]  # fmt: skip
        how = rng.randrange(4)
        return Array(
            rng.choice(("float32", "int8", "object", "O", "")) if how == 0 else array.dtype,
            rng.choice(((), (0,), (-1,), (10**12,), (2**70,))) if how == 1 else array.shape,
            rng.choice(("torch", "pickle", "", "fedsys.raw")) if how == 2 else array.stype,
            rng.choice(raw) if how == 3 else data,
        )

    return _replace(it, reply, change)


def flip_bytes(it: Spoiler, reply: Message) -> Message:
    """Change some bytes of an array, in its header or behind it."""

    def change(array: Array) -> Array:
        data = bytearray(array.data)
        limit = min(len(data), it.rng.choice((128, len(data))))
        for _ in range(it.rng.choice((1, 2, 8)) if limit else 0):
            data[it.rng.randrange(limit)] = it.rng.randrange(256)
        return Array(array.dtype, array.shape, array.stype, bytes(data))

    return _replace(it, reply, change)


COUNTS: list[Any] = [0, -1, -0.0, 0.5, 2.5, 1, 7, 3.0, 2**53, 2**53 + 1, 2**63, 10**30, 10**400,
                     math.nan, math.inf, -math.inf, True, [3], [], "many", None, b"7"]  # fmt: skip


def miscount(it: Spoiler, reply: Message) -> Message:
    if (record := it.metrics(reply)) is not None:
        if it.rng.random() < 0.1:
            record.pop("num-examples", None)
        else:
            _force(record, "num-examples", it.rng.choice(COUNTS))
    return reply


def other_metric(it: Spoiler, reply: Message) -> Message:
    values: list[Any] = [
        math.nan,
        -math.inf,
        1e308,
        -1e39,
        3.4e38,
        10**400,
        1,
        [math.nan],
        [],
        "x",
        None,
    ]
    if (record := it.metrics(reply)) is not None:
        _force(record, it.rng.choice([*NAMES, "train_loss"]), it.rng.choice(values))
    return reply


def say(it: Spoiler, reply: Message) -> Message:
    """Say something else than the basis and what was spent."""
    if not reply.has_content():
        return reply
    record = reply.content.get("reply")
    if record is None or isinstance(record, ArrayRecord):
        record = ConfigRecord()
        _force(reply.content, "reply", record)
    number: list[Any] = [
        0,
        -1,
        1.5,
        1e-320,
        1e300,
        math.nan,
        math.inf,
        2**53,
        10**400,
        "1",
        b"1",
        True,
    ]
    spent = list(record.get("spent", [])) if isinstance(record.get("spent"), list) else []
    if spent and it.rng.random() < 0.5:
        spent[it.rng.randrange(len(spent))] = it.rng.choice(number)
    else:
        spent = it.rng.choice([[], [1.0], [1.0, 0.5, 1.0] * 300, [1.0, 0.5, 3.0], "x", None, 7,
                               [0.3, 1e-300, 2.0**31], [1.0, 0.5, 1e6] * 2])  # fmt: skip
    values: list[Any] = ["", "0" * 64, "x" * 10_000, 7, 1.5, True, b"", None, ["a"]]
    if it.rng.random() < 0.5:
        _force(record, "spent", spent)
    else:
        _force(record, "basis", it.rng.choice(values))
    return reply


def unsay(it: Spoiler, reply: Message) -> Message:
    """Drop what is said in settings, or say it in another type or length."""
    if (record := it.config(reply)) is not None and len(record):
        name = it.pick(record)
        value = record.pop(name)
        longer = value * 2 if isinstance(value, bytes | str | list) else -1
        values: list[Any] = [longer, b"", [], [b""], [b"x"] * 3, [0, 0], [-1], [True], "x", 7, None]
        if it.rng.random() < 0.7:
            _force(record, name, it.rng.choice(values))
    return reply


def misaddress(it: Spoiler, reply: Message) -> Message:
    """Be of another round, of another node, of another kind, or the answer to something else."""
    now = it.scene.round
    groups = [
        str(now - 1),
        str(now + 1),
        "",
        f"0{now}",
        f" {now}",
        "x" * 10_000,
        "²",
        "\ud800",
        str(now),
    ]
    nodes = [*it.scene.clients, 0, 1, -1, 2**63, 10**30]
    said = reply.metadata.__dict__
    change = it.rng.randrange(4)
    if change == 0:
        said["_group_id"] = it.rng.choice(groups)
    elif change == 1:
        said["_src_node_id"] = it.rng.choice(nodes)
    elif change == 2:
        said["_message_type"] = it.rng.choice(("train", "evaluate", "query", "x" * 1000))
    else:
        said["_reply_to_message_id"] = it.rng.choice(("", "1", "x" * 1000))
    return reply


REASONS = ["", None, "no data", "x" * 10**6, "\n" * 10**5, "a\n" * 10**5, "\x1b[31mred\x1b[0m",
           "\ud800", "\x1b]0;title\x07", "\x00", "PrivacyBudgetExceeded: all", "é" * 10_000,
           "  "]  # fmt: skip


def fail(it: Spoiler, reply: Message) -> Message:
    """Be an error, or neither an error nor content."""
    reply.__dict__["_content"] = None
    if it.rng.random() < 0.9:
        code = it.rng.choice((0, 2, 8, 999, -1))
        reply.__dict__["_error"] = Error(code, it.rng.choice(REASONS))
    return reply


def flip_in_transit(it: Spoiler, reply: Message) -> Message:
    """Change bytes of the serialised content; where Flower cannot build it again, try another."""
    if not reply.has_content():
        return reply
    try:
        deflated = {i: o.deflate() for i, o in get_all_nested_objects(reply.content).items()}
        whole = reply.content.object_id
    except Exception:  # what was put past Flower's checks cannot be sent
        return reply
    for _ in range(4):
        changed = dict(deflated)
        name = it.rng.choice(list(changed))
        data = bytearray(changed[name])
        for _ in range(it.rng.choice((1, 1, 2, 4))):
            place = it.rng.randrange(len(data))
            data[place] = it.rng.choice(
                (it.rng.randrange(256), data[place] ^ 1, ord("0"), ord("9"))
            )
        changed[name] = bytes(data)
        try:
            reply.content = _inflated(changed, whole)
        except Exception:  # Flower refuses it, or its JSON and protobuf do
            continue
        return reply
    return drop_record(it, reply)


CLASSES: dict[str, Any] = {
    cls.__name__: cls
    for cls in (RecordDict, ArrayRecord, MetricRecord, ConfigRecord, Array, ArrayChunk)
}


def _inflated(objects: dict[str, bytes], whole: str) -> RecordDict:
    """Build content as Flower does, from objects whose ids are not checked."""
    built: dict[str, Any] = {}
    for name, data in objects.items():  # children come before their parents
        children = {i: built[i] for i in get_object_children_ids_from_object_content(data)}
        built[name] = CLASSES[get_object_type_from_object_content(data)].inflate(data, children)
    content = built[whole]
    if not isinstance(content, RecordDict):
        raise TypeError("no content")
    return content


WAYS = (drop_record, rename_record, double_record, add_record, drop_array, rename_array, add_array,
        reshape, retype, put_number, put_number, put_values, put_values, claim, claim, reframe,
        flip_bytes, flip_bytes, miscount, miscount, other_metric, say, say, misaddress, fail,
        flip_in_transit, flip_in_transit)  # fmt: skip
# Ways in which a reply of secure aggregation cannot pass for another that is as good.
COARSE = (drop_record, rename_record, add_record, drop_array, reshape, retype, claim, reframe,
          unsay, unsay, unsay, miscount, other_metric, misaddress, fail)  # fmt: skip


def speakable(text: str) -> bool:
    """Return whether a reason can be shown in one line and written to a log."""
    return text.isprintable() and len(text) <= 700 and bool(json.dumps(text).encode("utf-8"))
