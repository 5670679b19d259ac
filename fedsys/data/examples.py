"""Rows in memory, and the batches that models take."""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Self

import numpy as np
import torch
from torch import Tensor

Batch = dict[str, Tensor]

IGNORE = -100  # a label without weight in the loss


class Examples(ABC):
    """An indexable set of rows.

    ``labels`` is (n,) int64 for classes, (n, D) floating for vectors to hit, and None for language
    modelling.
    """

    labels: Tensor | None

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of rows."""

    @abstractmethod
    def batch(self, rows: Tensor) -> Batch:
        """Return the inputs and the ``labels`` of ``rows`` (b,) int64, in that order."""

    def lengths(self, rows: Tensor) -> Tensor | None:
        """Return the tokens (b,) of each row; None where all rows are of one size."""
        return None

    @abstractmethod
    def subset(self, rows: Tensor) -> Self:
        """Return a copy that holds ``rows`` only, in that order."""

    def double(self) -> Self:
        """Return the same rows, whose batches hold float64 wherever they hold float32."""
        return self

    @property
    @abstractmethod
    def positions(self) -> int:
        """Positions of work that the largest row is: tokens, or 8 x 8 pixels, or 1."""

    @abstractmethod
    def _content(self) -> Iterable[Tensor | None]:
        """Return every tensor that makes the rows what they are, in a fixed order."""

    def fingerprint(self) -> str:
        """Return the SHA-256 of the content, in hexadecimal."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256(type(self).__name__.encode())
        for tensor in self._content():
            if tensor is None:
                digest.update(b"none")
                continue
            digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(memoryview(tensor.contiguous().numpy()))  # type: ignore[arg-type]
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class TensorExamples(Examples):
    """Dense rows; a batch holds ``x`` = (stored - shift) * scale.

    Images may stay uint8 in memory; ``shift`` and ``scale`` broadcast against (b, C, H, W).
    """

    x: Tensor
    labels: Tensor  # (n,) int64, or (n, D) floating
    shift: Tensor | None = None
    scale: Tensor | None = None
    dtype: torch.dtype = torch.float32  # of ``x`` and of floating labels in a batch

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.x)

    def batch(self, rows: Tensor) -> Batch:
        """Return ``{"x": (b, ...), "labels": (b,) or (b, D)}``."""
        # A copy, so the steps below may work in place; several times faster than x[rows].
        x = self.x.index_select(0, rows).to(self.dtype)
        if self.shift is not None:
            x = x.sub_(self.shift)
        if self.scale is not None:
            x = x.mul_(self.scale)
        labels = self.labels[rows]
        return {"x": x, "labels": labels.to(self.dtype) if labels.is_floating_point() else labels}

    def subset(self, rows: Tensor) -> Self:
        """Return a copy that holds ``rows`` only, in that order."""
        return replace(self, x=self.x[rows], labels=self.labels[rows])

    def double(self) -> Self:
        """Return the same rows, whose batches hold float64."""
        return replace(self, dtype=torch.float64)

    @property
    def positions(self) -> int:
        """Blocks of 8 x 8 pixels of an image, at least 1; 1 for flat rows."""
        return max(1, math.prod(self.x.shape[2:]) // 64) if self.x.dim() > 2 else 1

    def _content(self) -> Iterable[Tensor | None]:
        return self.x, self.labels, self.shift, self.scale


@dataclass(frozen=True, eq=False)
class TokenExamples(Examples):
    """Token sequences of different lengths, stored without padding.

    With ``labels`` rows are classified; without, they are modelled token by token and the first
    ``prompt_lengths`` tokens of a row carry no loss.
    """

    tokens: Tensor  # (total,) int32, row after row
    offsets: Tensor  # (n + 1,) int64: row i is tokens[offsets[i]:offsets[i + 1]]
    pad_id: int
    labels: Tensor | None = None  # (n,) int64
    token_types: Tensor | None = None  # (total,) uint8, for pairs of texts
    prompt_lengths: Tensor | None = None  # (n,) int64

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.offsets) - 1

    def batch(self, rows: Tensor) -> Batch:
        """Return rows padded on the right to the longest of them, (b, L) int64.

        ``labels`` is (b,) for classification; for language modelling it is (b, L), not shifted,
        with -100 on padding and on prompts.
        """
        index, real = self._gather(rows)
        ids = self.tokens[index].long().masked_fill_(~real, self.pad_id)
        batch = {"input_ids": ids, "attention_mask": real.long()}
        if self.token_types is not None:
            batch["token_type_ids"] = self.token_types[index].long().masked_fill_(~real, 0)
        batch["labels"] = self._targets(ids, real, rows)
        return batch

    def lengths(self, rows: Tensor) -> Tensor:
        """Return the tokens (b,) of each row."""
        return self.offsets[rows + 1] - self.offsets[rows]

    def _gather(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return positions in ``tokens`` (b, L), and which of them belong to the row."""
        start = self.offsets[rows]
        length = self.offsets[rows + 1] - start
        # One column of padding at least: models cannot run rows that are all without tokens.
        column = torch.arange(max(1, int(length.max())) if len(rows) else 0)
        index = (start[:, None] + column).clamp_(max=len(self.tokens) - 1)
        return index, column < length[:, None]

    def _targets(self, ids: Tensor, real: Tensor, rows: Tensor) -> Tensor:
        if self.labels is not None:
            return self.labels[rows]
        silent = ~real
        if self.prompt_lengths is not None:
            silent |= torch.arange(ids.shape[1]) < self.prompt_lengths[rows][:, None]
        return ids.masked_fill(silent, IGNORE)

    def subset(self, rows: Tensor) -> Self:
        """Return a copy that holds ``rows`` only, in that order."""
        length = self.offsets[rows + 1] - self.offsets[rows]
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), length.cumsum(0)])
        shift = (self.offsets[rows] - offsets[:-1]).repeat_interleave(length)
        index = torch.arange(int(offsets[-1])) + shift
        return replace(
            self,
            tokens=self.tokens[index],
            offsets=offsets,
            labels=None if self.labels is None else self.labels[rows],
            token_types=None if self.token_types is None else self.token_types[index],
            prompt_lengths=None if self.prompt_lengths is None else self.prompt_lengths[rows],
        )

    @property
    def positions(self) -> int:
        """Tokens of the longest row."""
        return max(1, int(self.offsets.diff().max())) if len(self) else 1

    def _content(self) -> Iterable[Tensor | None]:
        yield from (self.tokens, self.offsets, self.labels, self.token_types, self.prompt_lengths)


@dataclass(frozen=True, eq=False)
class Dataset:
    """The rows of an experiment, by what they are for."""

    train: Examples  # what partitions divide among the clients
    evaluation: Examples
    source: Examples | None = None  # a domain that a base model may be pre-trained on
    public: Examples | None = None  # known to everybody and never given to a client
    num_classes: int | None = None  # None for language modelling and for vectors to hit
    input_shape: tuple[int, ...] = ()  # of one row of x; () for text
    columns: dict[str, np.ndarray] = field(default_factory=dict)  # of the training rows, each (n,)
    label_names: list[str] = field(default_factory=list)

    def double(self) -> Self:
        """Return the same rows for a run in float64; a base model is pre-trained in float32."""
        public = None if self.public is None else self.public.double()
        return replace(
            self, train=self.train.double(), evaluation=self.evaluation.double(), public=public
        )

    def fingerprint(self) -> str:
        """Return the SHA-256 of all parts, in hexadecimal."""
        parts = (self.train, self.evaluation, self.source, self.public)
        text = "/".join("none" if part is None else part.fingerprint() for part in parts)
        return hashlib.sha256(text.encode()).hexdigest()
