"""The checks on replies: what cannot be used is a ``ClientFailure`` with its reason.

A reply is bytes from somebody else. It is used whole or not at all: names, shapes and dtypes are
those that were sent, numbers are finite, counts are counts, and what is frozen is the server's.
"""

import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from fedsys.arrays import tensor_of
from fedsys.errors import ClientFailure
from fedsys.messages import BASIS, NUM_EXAMPLES, PACKED, REPLY, SPENT, decode
from fedsys.params import Layout, Params
from fedsys.privacy.release import Release, Spent, merged
from fedsys.update import Update

MAX_EXAMPLES = 2**53  # beyond it a count is no longer exact as a float

_R = TypeVar("_R", ArrayRecord, MetricRecord)
_OTHER_FACTORS = "trained with other frozen factors than the server holds"
_MAX_RELEASES = 256  # mechanisms of one client
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def read_update(
    reply: Message,
    client: int,
    sent: ArrayRecord,
    layout: Layout | None = None,
    basis: str = "",
    decode_reply: Callable[[Params], Params] | None = None,
) -> Update:
    """Return the update of a reply to ``sent``: x_n - x_t, or what ``decode_reply`` makes of it.

    Whole numbers differ in float64. Raises ``ClientFailure`` with the reason when the reply cannot
    be used: an error, other names, shapes or dtypes than were sent, NaN or Inf, no positive number
    of examples, another basis.
    """
    with _blaming(client):
        content = content_of(reply)
        arrays = _only(content, ArrayRecord)
        delta = decode_reply(decode(arrays)) if decode_reply else _difference(arrays, sent)
        metrics = read_metrics(_only(content, MetricRecord))
        if _basis_of(content) != basis:
            raise ValueError(_OTHER_FACTORS)
    if decode_reply is None and layout is not None and PACKED in delta:
        delta = layout.unpack(delta[PACKED])
    return Update(client, delta, int(metrics.pop(NUM_EXAMPLES)), metrics)


def read_masked(reply: Message, client: int, basis: str = "") -> int:
    """Return the number of examples behind a reply whose arrays nobody can read by themselves.

    Raises ``ClientFailure`` on an error, without a positive number of examples, on another basis.
    """
    with _blaming(client):
        content = content_of(reply)
        metrics = read_metrics(_only(content, MetricRecord))
        if _basis_of(content) != basis:
            raise ValueError(_OTHER_FACTORS)
    return int(metrics[NUM_EXAMPLES])


def read_arrays(reply: Message, client: int, shapes: Mapping[str, tuple[int, ...]]) -> Params:
    """Return a reply's arrays by name.

    Raises ``ClientFailure`` on an error, on other names or shapes than ``shapes``, on NaN or Inf,
    on whole numbers, on a number of examples that is none.
    """
    with _blaming(client):
        content = content_of(reply)
        arrays = decode(_only(content, ArrayRecord))
        if {name: tuple(value.shape) for name, value in arrays.items()} != dict(shapes):
            raise ValueError("names or shapes of the arrays are not those asked for")
        for name, value in arrays.items():
            if not value.is_floating_point():
                raise ValueError(f"{name} is {value.dtype}, expected floating point")
            _refuse_non_finite(name, value)
        for record in content.values():
            if isinstance(record, MetricRecord):
                read_metrics(record)
    return {name: arrays[name] for name in shapes}


def read_reply_metrics(reply: Message, client: int) -> dict[str, float]:
    """Return an evaluation reply's metrics; raise ``ClientFailure`` when it cannot be used."""
    with _blaming(client):
        return read_metrics(_only(content_of(reply), MetricRecord))


def read_metrics(record: MetricRecord) -> dict[str, float]:
    """Return the scalar metrics; lists are left out.

    Raises ``ValueError`` unless all are finite and ``num-examples`` is a count.
    """
    count = record.get(NUM_EXAMPLES)
    # Compared and not converted: NaN fails, and so does an int too large for a float.
    if not isinstance(count, int | float) or not 1 <= count <= MAX_EXAMPLES or count % 1:
        raise ValueError(f"{NUM_EXAMPLES} must be a whole number from 1 to 2^53, got {count!r:.40}")
    metrics = {n: value for n, value in record.items() if isinstance(value, int | float)}
    for name, value in metrics.items():
        if not -sys.float_info.max <= value <= sys.float_info.max:
            raise ValueError(f"metric {name} is NaN, Inf or too large")
    return {name: float(value) for name, value in metrics.items()}


def content_of(reply: Message) -> RecordDict:
    """Return the reply's content; raise ``ValueError`` with the reason when it is an error."""
    if reply.has_error():
        # Ray's reason is a coloured traceback; its last line says what happened.
        lines = _COLOUR.sub("", reply.error.reason or "").strip().splitlines()
        raise ValueError(lines[-1].strip()[:500] if lines else f"error code {reply.error.code}")
    return reply.content


def read_content(reply: Message, client: int) -> RecordDict:
    """Return the reply's content; raise ``ClientFailure`` when it is an error."""
    with _blaming(client):
        return content_of(reply)


def read_spent(reply: Message, client: int) -> Spent:
    """Return what the client says it has released in all.

    Raises ``ClientFailure`` when it says nothing, or what cannot be.
    """
    with _blaming(client):
        content = content_of(reply)
        numbers = content[REPLY].get(SPENT) if REPLY in content else None
        if not isinstance(numbers, list) or not numbers or len(numbers) % 3:
            raise ValueError("a private run needs what the client has spent, and it says nothing")
        if len(numbers) > 3 * _MAX_RELEASES:
            raise ValueError(f"the client has spent on more than {_MAX_RELEASES} mechanisms")
        return merged(
            Release(float(z), float(q), _whole(steps))
            for z, q, steps in zip(*(map(float, numbers[i::3]) for i in range(3)), strict=True)
        )


def _whole(number: float) -> int:
    if not 0 <= number <= MAX_EXAMPLES or number % 1:
        raise ValueError(f"steps must be a whole number, got {number}")
    return int(number)


@contextmanager
def _blaming(client: int) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ClientFailure(client, str(error)) from error


def _only(content: RecordDict, kind: type[_R]) -> _R:
    found = [record for record in content.values() if isinstance(record, kind)]
    if len(found) != 1:
        raise ValueError(f"expected one {kind.__name__} in the reply, got {len(found)}")
    return found[0]


def _basis_of(content: RecordDict) -> object:
    return content[REPLY].get(BASIS, "") if REPLY in content else ""


def _difference(received: ArrayRecord, sent: ArrayRecord) -> Params:
    if received.keys() != sent.keys():
        odd = sorted(received.keys() ^ sent.keys())[:3]
        raise ValueError(f"tensor names differ from those sent: {', '.join(odd):.200}")
    delta = {}
    for name, array in sent.items():
        value, start = tensor_of(received[name]), tensor_of(array)
        if value.shape != start.shape or value.dtype != start.dtype:
            raise ValueError(
                f"{name} is {value.dtype} {tuple(value.shape)}, "
                f"expected {start.dtype} {tuple(start.shape)}"
            )
        if value.is_floating_point():
            delta[name] = value - start
            if not _is_finite(delta[name]):
                # Infinity where it was sent, as in the mask buffers of some models, has not moved.
                delta[name] = delta[name].masked_fill(value == start, 0)
                _refuse_non_finite(name, delta[name])
        else:
            delta[name] = value.double() - start.double()  # uint8 would wrap around
    return delta


def _refuse_non_finite(name: str, value: Tensor) -> None:
    if not _is_finite(value):
        raise ValueError(f"{name} holds NaN or Inf")


def _is_finite(value: Tensor) -> bool:
    # The sum of finite numbers is finite but for overflow, and far cheaper than isfinite.
    return math.isfinite(value.sum().item()) or bool(value.isfinite().all())
