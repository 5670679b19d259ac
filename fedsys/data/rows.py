"""Which rows of a file train, evaluate or are public, and what their labels mean."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsys.errors import DataError
from fedsys.seeds import numpy_generator

Rows = NDArray[np.int64]
Where = Callable[[int], str]  # a row's place in its file, such as "a.csv, line 7"


@dataclass(frozen=True)
class Split:
    """Rows by use, each ascending; ``evaluation`` are rows of its own file if it has one."""

    train: Rows
    evaluation: Rows
    public: Rows | None


def check_sizes(
    limit: int | None, eval_fraction: float, public_fraction: float, eval_limit: int | None = None
) -> None:
    """Raise ValueError when a field that sizes a data set is out of its range."""
    for name, value in (("limit", limit), ("eval_limit", eval_limit)):
        if value is not None and value < 1:
            raise ValueError(f"{name} counts rows and must be at least 1, or null, got {value}")
    if not 0 < eval_fraction < 1:
        raise ValueError(f"eval_fraction is a fraction in (0, 1), got {eval_fraction}")
    if not 0 <= public_fraction < 1:
        raise ValueError(f"public_fraction is a fraction in [0, 1), got {public_fraction}")


def draw(rows: Rows, count: int, seed: int, purpose: str) -> tuple[Rows, Rows]:
    """Return ``count`` of ``rows`` drawn by ``seed``, and the others; both keep their order."""
    chosen = np.zeros(len(rows), dtype=bool)
    chosen[numpy_generator(seed, purpose).permutation(len(rows))[:count]] = True
    return rows[chosen], rows[~chosen]


def split_rows(
    total: int,
    seed: int,
    limit: int | None,
    eval_fraction: float,
    public_fraction: float,
    own: int | None = None,
) -> Split:
    """Divide ``total`` rows: ``limit`` of them are used, of these some evaluate, some are public.

    Nothing is held out when evaluation has ``own`` rows in another file. Raises DataError when no
    row is left to train on.
    """
    rows = np.arange(total)
    if limit is not None and limit < total:
        rows, _ = draw(rows, limit, seed, "data-limit")
    if own is not None:
        evaluation = np.arange(own)
    else:
        count = max(1, round(len(rows) * eval_fraction))
        evaluation, rows = draw(rows, count, seed, "data-evaluation")
    public = None
    if public_fraction > 0:
        count = max(1, round(len(rows) * public_fraction))
        public, rows = draw(rows, count, seed, "data-public")
    if len(rows) == 0:
        raise DataError(f"no row is left to train on: only {min(total, limit or total)} are used")
    return Split(rows, evaluation, public)


def class_names(values: Sequence[Any], where: Where) -> list[str]:
    """Return the distinct labels as text, numbers by value and everything else by name.

    Raises DataError where a label is missing.
    """
    for row, value in enumerate(values):
        if value is None or value == "" or value != value:  # a table's gap may be NaN
            raise DataError(f"{where(row)}: the label is empty, expected a class")
    names = {str(value) for value in values}
    try:
        return sorted(names, key=int)
    except ValueError:
        return sorted(names)


def encode_labels(values: Sequence[Any], names: list[str], where: Where) -> Tensor:
    """Return each label's place in ``names``, (n,) int64; DataError names the first stranger."""
    place = {name: index for index, name in enumerate(names)}
    codes = [place.get(str(value), -1) for value in values]
    if -1 in codes:
        row = codes.index(-1)
        shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
        raise DataError(
            f"{where(row)}: the label {values[row]!r} is none of the training labels ({shown})"
        )
    return torch.tensor(codes, dtype=torch.int64)
