"""The checks on replies: what cannot be used is a ``ClientFailure`` with its reason.

A reply is bytes from somebody else. It is used whole or not at all: names, shapes and dtypes are
those that were sent, numbers are finite, counts are counts, and what is frozen is the server's.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from fedsys.arrays import tensor_of
from fedsys.errors import ClientFailure
from fedsys.messages import BASIS, NUM_EXAMPLES, PACKED, REPLY, SPENT, Arrays, decode, held_by
from fedsys.params import Layout, Params
from fedsys.privacy.release import Release, Spent, merged
from fedsys.update import Update

MAX_EXAMPLES = 2**53  # beyond it a count is no longer exact as a float
# Beyond what float32 holds, a number may be infinite when it is squared, or weighted and summed.
LARGEST = torch.finfo(torch.float32).max

_R = TypeVar("_R", ArrayRecord, MetricRecord)
_OTHER_FACTORS = "trained with other frozen factors than the server holds"
# What a client may say it has released. Epsilon of more takes minutes and gigabytes.
_MAX_RELEASES = 256  # mechanisms
_MAX_STEPS = 10**6  # of all of them
_LEAST_RATE = 1e-9  # of one
_LONGEST = 500  # characters of a reason
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
    be used: an error, other names, shapes or dtypes than were sent, NaN or Inf (or what float32
    would take for it), no positive number of examples, another basis.
    """
    with _Blaming(client):
        arrays, numbers, facts = _records_of(reply)
        delta = _decoded(arrays, decode_reply) if decode_reply else _difference(arrays, sent)
        metrics = read_metrics(numbers)
        if facts.get(BASIS, "") != basis:
            raise ValueError(_OTHER_FACTORS)
    if decode_reply is None and layout is not None and PACKED in delta:
        delta = layout.views(delta[PACKED])
    return Update(client, delta, int(metrics.pop(NUM_EXAMPLES)), metrics)


def read_masked(reply: Message, client: int, basis: str = "") -> int:
    """Return the number of examples behind a reply whose arrays nobody can read by themselves.

    Raises ``ClientFailure`` on an error, without a positive number of examples, on another basis.
    """
    with _Blaming(client):
        metrics = read_metrics(_only(content_of(reply).values(), MetricRecord))
        if _facts(reply).get(BASIS, "") != basis:
            raise ValueError(_OTHER_FACTORS)
    return int(metrics[NUM_EXAMPLES])


def read_arrays(reply: Message, client: int, shapes: Mapping[str, tuple[int, ...]]) -> Params:
    """Return a reply's arrays by name.

    Raises ``ClientFailure`` on an error, on other names or shapes than ``shapes``, on NaN or Inf,
    on whole numbers, on a number of examples that is none.
    """
    with _Blaming(client):
        content = content_of(reply)
        arrays = decode(_only(content.values(), ArrayRecord))
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
    with _Blaming(client):
        return read_metrics(_only(content_of(reply).values(), MetricRecord))


def read_metrics(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the scalar metrics; lists are left out.

    Raises ``ValueError`` unless all are finite and ``num-examples`` is a count.
    """
    count = record.get(NUM_EXAMPLES)
    # Compared and not converted: NaN fails, and so does an int too large for a float.
    if isinstance(count, bool) or not isinstance(count, int | float):
        raise ValueError(f"{NUM_EXAMPLES} must be a whole number, got {count!r:.40}")
    if not 1 <= count <= MAX_EXAMPLES or count % 1:
        raise ValueError(f"{NUM_EXAMPLES} must be a whole number from 1 to 2^53, got {count!r:.40}")
    metrics = {n: value for n, value in record.items() if isinstance(value, int | float)}
    for name, value in metrics.items():
        if not -LARGEST <= value <= LARGEST:
            raise ValueError(f"metric {name} is NaN, Inf or too large")
    return {name: float(value) for name, value in metrics.items()}


def content_of(reply: Message) -> RecordDict:
    """Return the reply's content; raise ``ValueError`` with the reason when it is an error."""
    if reply.has_error():
        # Ray's reason is a coloured traceback; its last line says what happened.
        end = (reply.error.reason or "").rstrip()[-20 * _LONGEST :]
        lines = _COLOUR.sub("", end).strip().splitlines()
        raise ValueError(legible(lines[-1]) if lines else f"error code {reply.error.code}")
    return reply.content


def read_content(reply: Message, client: int) -> RecordDict:
    """Return the reply's content; raise ``ClientFailure`` when it is an error."""
    with _Blaming(client):
        return content_of(reply)


def read_spent(reply: Message, client: int, before: Spent = ()) -> Spent:
    """Return what the client says it has released in all.

    Raises ``ClientFailure`` when it says nothing, what cannot be, or less than ``before``, which is
    what it had said: a ledger only grows.
    """
    with _Blaming(client):
        numbers = _facts(reply).get(SPENT)
        if not isinstance(numbers, list) or not numbers or len(numbers) % 3:
            raise ValueError("a private run needs what the client has spent, and it says nothing")
        if len(numbers) > 3 * _MAX_RELEASES:
            raise ValueError(f"the client has spent on more than {_MAX_RELEASES} mechanisms")
        if not all(type(number) in (int, float) for number in numbers):
            raise ValueError("what the client has spent is told in numbers")
        spent = merged(map(_release, *(map(float, numbers[i::3]) for i in range(3))))
        if sum(release.steps for release in spent) > _MAX_STEPS:
            raise ValueError(f"the client has spent on more than {_MAX_STEPS} steps")
        steps = {(r.noise_multiplier, r.sample_rate): r.steps for r in spent}
        if any(steps.get((r.noise_multiplier, r.sample_rate), 0) < r.steps for r in before):
            raise ValueError("the client says it has spent less than it had said before")
    return spent


def _release(noise_multiplier: float, sample_rate: float, steps: float) -> Release:
    """Return a release of numbers that a client has sent; raises ``ValueError``."""
    if not 0 <= steps <= _MAX_STEPS or steps % 1:
        raise ValueError(f"steps must be a whole number up to {_MAX_STEPS}, got {steps}")
    if sample_rate < _LEAST_RATE:
        raise ValueError(f"sample_rate must be at least {_LEAST_RATE}, got {sample_rate}")
    return Release(noise_multiplier, sample_rate, int(steps))


class _Blaming:  # a generator as a context manager takes three times as long
    """Raise what goes wrong inside as a ``ClientFailure`` of ``client``."""

    def __init__(self, client: int) -> None:
        self._client = client

    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ValueError | OverflowError):
            raise ClientFailure(self._client, legible(str(error))) from error


def legible(text: str) -> str:
    """Return the beginning of ``text`` in one line, without what a terminal or UTF-8 trips over."""
    words = " ".join(text[: 2 * _LONGEST].split())[:_LONGEST]
    return words if words.isprintable() else "".join(c if c.isprintable() else "?" for c in words)


def _records_of(reply: Message) -> tuple[Arrays, Mapping[str, Any], Mapping[str, Any]]:
    """Return the arrays of a reply, its metrics, and what it says besides."""
    if (held := held_by(reply)) is not None:
        return held
    records = list(content_of(reply).values())
    return _only(records, ArrayRecord), _only(records, MetricRecord), _facts(reply)


def _facts(reply: Message) -> Mapping[str, Any]:
    """Return what a reply says besides arrays and metrics."""
    if (held := held_by(reply)) is not None:
        return held[-1]
    record: Mapping[str, Any] = content_of(reply).get(REPLY, {})
    return record


def _only(records: Iterable[object], kind: type[_R]) -> _R:
    found = [record for record in records if isinstance(record, kind)]
    if len(found) != 1:
        raise ValueError(f"expected one {kind.__name__} in the reply, got {len(found)}")
    return found[0]


def _decoded(received: Arrays, decode_reply: Callable[[Params], Params]) -> Params:
    delta = decode_reply(decode(received))
    for name, value in delta.items():
        if value.dtype == torch.float64:  # others are finite, which the codec has seen to
            _refuse_non_finite(name, value)
    return delta


def _difference(received: Arrays, sent: ArrayRecord) -> Params:
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
        raise ValueError(f"{name} holds NaN or Inf, or numbers beyond those of float32")


def _is_finite(value: Tensor) -> bool:
    if value.dtype == torch.float64:
        return bool((value.abs() <= LARGEST).all())
    # The sum of finite numbers is finite but for overflow, and far cheaper than isfinite.
    return math.isfinite(value.sum().item()) or bool(value.isfinite().all())
