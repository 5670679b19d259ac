"""What a Message holds: every record key of fedsys stands in this file.

    down  arrays   x_t, one packed vector (key ``packed``) or one array per name
          frozen   factors a client has not seen yet (first contact only)
          config   server-round, and the digest of the frozen factors as ``basis``
    up    arrays   x_n, in the form that came down
          metrics  num-examples, train_loss, whatever else the client reports
          reply    ``basis``: the digest of the factors the client trained with

One packed vector keeps the framing of many small matrices below a few per cent of the payload.
An app of somebody else's knows nothing of it and meets plain named arrays.
"""

import math
from collections.abc import Mapping
from io import BytesIO
from typing import TypeVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from fedsys.errors import ClientFailure
from fedsys.params import Layout, Params
from fedsys.update import Update

ARRAYS, FROZEN, CONFIG, METRICS, REPLY = "arrays", "frozen", "config", "metrics", "reply"
PACKED = "packed"
ROUND, BASIS, NUM_EXAMPLES = "server-round", "basis", "num-examples"
MAX_EXAMPLES = 2**53  # beyond it a count is no longer exact as a float

_R = TypeVar("_R", ArrayRecord, MetricRecord)
_NPY_HEADER = 128  # bytes np.save puts before the numbers


class TensorArray(Array):
    """A Flower Array that keeps its tensor and serialises it only when someone asks.

    ``numpy()`` returns a copy, so that no reader can change the tensor of another.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()
        self.dtype = str(tensor.dtype).removeprefix("torch.")
        self.shape = tuple(tensor.shape)
        self.stype = "numpy.ndarray"

    @property  # type: ignore[override]
    def data(self) -> bytes:
        """The bytes of ``np.save``, as Flower's own arrays carry them."""
        buffer = BytesIO()
        np.save(buffer, self.tensor.cpu().numpy(), allow_pickle=False)
        return buffer.getvalue()

    def numpy(self) -> np.ndarray:
        """Return a copy as a NumPy array."""
        return self.tensor.cpu().numpy().copy()


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


def tensor_of(array: Array) -> Tensor:
    """Return an array's tensor; raise ``ValueError`` when its bytes are not a NumPy array."""
    if isinstance(array, TensorArray):
        return array.tensor
    try:
        values = array.numpy()
        # Writable, because torch warns of read-only memory and a reader may own the result.
        return torch.from_numpy(values if values.flags.writeable else values.copy())
    except (OSError, TypeError, EOFError) as error:
        raise ValueError(f"an array cannot be decoded: {error}") from error


def decode(record: ArrayRecord, layout: Layout | None = None) -> Params:
    """Return the record's tensors by name; raise ``ValueError`` when they do not fit ``layout``."""
    tensors = {name: tensor_of(array) for name, array in record.items()}
    if PACKED not in tensors:
        return tensors
    if layout is None or tensors[PACKED].shape != (layout.size,):
        raise ValueError("a packed vector does not fit this model: the two sides differ")
    return layout.unpack(tensors[PACKED])


def read_update(
    reply: Message, client: int, sent: ArrayRecord, layout: Layout | None = None, basis: str = ""
) -> Update:
    """Return ``x_n - x_t`` of a reply to ``sent``.

    Raises ``ClientFailure`` with the reason when the reply cannot be used: an error, other names,
    shapes or dtypes than were sent, NaN or Inf, no positive number of examples, another basis.
    """
    if reply.has_error():
        raise ClientFailure(client, reply.error.reason or f"error code {reply.error.code}")
    content = reply.content
    try:
        delta = _difference(_only(content, ArrayRecord), sent)
        metrics = read_metrics(_only(content, MetricRecord))
    except ValueError as error:
        raise ClientFailure(client, str(error)) from error
    answered = content[REPLY].get(BASIS, "") if REPLY in content else basis
    if answered != basis:
        raise ClientFailure(client, "trained with other frozen factors than the server holds")
    if layout is not None and PACKED in delta:
        delta = layout.unpack(delta[PACKED])
    return Update(client, delta, int(metrics.pop(NUM_EXAMPLES)), metrics)


def read_arrays(
    reply: Message, client: int, shapes: Mapping[str, tuple[int, ...]]
) -> Params:
    """Return a reply's arrays by name.

    Raises ``ClientFailure`` on an error, on other names or shapes than ``shapes``, on NaN or Inf.
    """
    if reply.has_error():
        raise ClientFailure(client, reply.error.reason or f"error code {reply.error.code}")
    try:
        arrays = decode(_only(reply.content, ArrayRecord))
    except ValueError as error:
        raise ClientFailure(client, str(error)) from error
    if {name: tuple(value.shape) for name, value in arrays.items()} != dict(shapes):
        raise ClientFailure(client, "names or shapes of the arrays are not those asked for")
    for name, value in arrays.items():
        if not bool(value.isfinite().all()):
            raise ClientFailure(client, f"{name} holds NaN or Inf")
    return arrays


def read_reply_metrics(reply: Message, client: int) -> dict[str, float]:
    """Return an evaluation reply's metrics; raise ``ClientFailure`` when it cannot be used."""
    if reply.has_error():
        raise ClientFailure(client, reply.error.reason or f"error code {reply.error.code}")
    try:
        metrics = read_metrics(_only(reply.content, MetricRecord))
    except ValueError as error:
        raise ClientFailure(client, str(error)) from error
    if not all(map(math.isfinite, metrics.values())):
        raise ClientFailure(client, "a metric is NaN or Inf")
    return metrics


def read_metrics(record: MetricRecord) -> dict[str, float]:
    """Return the scalar metrics; raise ``ValueError`` without a positive ``num-examples``."""
    count = record.get(NUM_EXAMPLES)
    if not isinstance(count, int | float) or not 1 <= count <= MAX_EXAMPLES:
        raise ValueError(f"{NUM_EXAMPLES} must be a number from 1 to 2^53, got {count!r}")
    return {name: float(value) for name, value in record.items() if isinstance(value, int | float)}


def wire_bytes(content: RecordDict) -> int:
    """Return the bytes ``content`` takes as serialised records, transport framing excluded."""
    return sum(len(name) + _record_bytes(record) for name, record in content.items())


def _record_bytes(record: ArrayRecord | MetricRecord | ConfigRecord) -> int:
    if isinstance(record, ArrayRecord):
        return sum(len(name) + _array_bytes(array) for name, array in record.items())
    return sum(len(name) + _value_bytes(value) for name, value in record.items())


def _array_bytes(array: Array) -> int:
    if isinstance(array, TensorArray):
        return _NPY_HEADER + array.tensor.numel() * array.tensor.element_size()
    return len(array.data)


def _value_bytes(value: object) -> int:
    if isinstance(value, list):
        return sum(map(_value_bytes, value))
    return len(value) if isinstance(value, str | bytes) else 8


def _only(content: RecordDict, kind: type[_R]) -> _R:
    found = [record for record in content.values() if isinstance(record, kind)]
    if len(found) != 1:
        raise ValueError(f"expected one {kind.__name__} in the reply, got {len(found)}")
    return found[0]


def _difference(received: ArrayRecord, sent: ArrayRecord) -> Params:
    if received.keys() != sent.keys():
        odd = sorted(received.keys() ^ sent.keys())[:3]
        raise ValueError(f"tensor names differ from those sent: {', '.join(odd)}")
    delta = {}
    for name, array in received.items():
        value, start = tensor_of(array), tensor_of(sent[name])
        if value.shape != start.shape or value.dtype != start.dtype:
            raise ValueError(
                f"{name} is {value.dtype} {tuple(value.shape)}, "
                f"expected {start.dtype} {tuple(start.shape)}"
            )
        # The sum of finite numbers is finite but for overflow, and far cheaper than isfinite.
        if not math.isfinite(value.sum().item()) and not bool(value.isfinite().all()):
            raise ValueError(f"{name} holds NaN or Inf")
        delta[name] = value - start
    return delta
