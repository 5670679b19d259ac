"""Ways to make a reply malformed, each of which its reader must notice."""

import math
from collections.abc import Callable

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict

from fedsys.arrays import TensorArray, tensor_of
from fedsys.messages import NUM_EXAMPLES

Way = Callable[[np.random.Generator], None]


def garbled(content: RecordDict, rng: np.random.Generator) -> RecordDict:
    """Return a copy of ``content`` that is malformed in a way that ``rng`` draws.

    An array is named otherwise, cut, of another dtype, not of ``np.save``, or holds NaN; the number
    of examples is negative, or another metric NaN. Content without either loses a record.
    """
    copied = RecordDict({name: record.copy() for name, record in content.items()})
    ways: list[Way] = []
    for record in copied.values():
        if isinstance(record, ArrayRecord) and record:
            ways += _of_array(record, str(rng.choice(sorted(record))))
        elif isinstance(record, MetricRecord) and NUM_EXAMPLES in record:
            ways += _of_metrics(record)
    if ways:
        ways[rng.integers(len(ways))](rng)
    elif copied:
        del copied[str(rng.choice(sorted(copied)))]
    return copied


def _of_array(record: ArrayRecord, name: str) -> list[Way]:
    """Return the ways to spoil the array called ``name``."""
    value = tensor_of(record[name])

    def renamed(rng: np.random.Generator) -> None:
        record[f"{name}?"] = record.pop(name)

    def cut(rng: np.random.Generator) -> None:
        flat = value.reshape(-1)
        record[name] = TensorArray(flat[: rng.integers(flat.numel())] if len(flat) else flat[None])

    def retyped(rng: np.random.Generator) -> None:
        whole = not value.is_floating_point()
        record[name] = TensorArray(value.to(torch.float32 if whole else torch.int64))

    def scrambled(rng: np.random.Generator) -> None:
        data = rng.bytes(len(record[name].data))
        record[name] = Array(record[name].dtype, record[name].shape, record[name].stype, data)

    def holed(rng: np.random.Generator) -> None:
        spoiled = value.clone().reshape(-1)
        spoiled[rng.integers(len(spoiled))] = torch.nan
        record[name] = TensorArray(spoiled.view_as(value))

    ways: list[Way] = [renamed, cut, retyped, scrambled]
    return [*ways, holed] if value.is_floating_point() and value.numel() else ways


def _of_metrics(record: MetricRecord) -> list[Way]:
    """Return the ways to spoil metrics."""
    others = sorted(name for name in record if name != NUM_EXAMPLES)

    def negative(rng: np.random.Generator) -> None:
        record[NUM_EXAMPLES] = -int(rng.integers(1, 1000))

    def unknown(rng: np.random.Generator) -> None:
        record[str(rng.choice(others))] = math.nan

    return [negative, unknown] if others else [negative]
