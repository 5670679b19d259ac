"""Images of npz archives and of parquet files with encoded pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedsys.data.decoding import Pictures, read_npz, read_pictures
from fedsys.data.examples import Dataset, TensorExamples
from fedsys.data.rows import Rows, check_sizes, class_names, encode_labels, split_rows
from fedsys.data.tables import file_problems
from fedsys.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_EXTENSIONS = (".npz", ".parquet")


@dataclass(frozen=True, kw_only=True)
class Images:
    """Images with a class each, normalised per channel by the mean and deviation of training rows.

    An npz holds the array ``x``, (n, H, W), (n, C, H, W), (n, H, W, C) or flat (n, d), and its
    labels; a parquet file holds encoded images (JPEG, PNG, ...), decoded once to uint8.
    """

    path: str
    eval_path: str | None = None
    image: str = "image"  # the column of a parquet file
    label: str | None = None  # an array or a column; None: y of an npz, label of a parquet file
    size: int | None = None  # pixels a side that encoded images are resized to
    limit: int | None = None  # rows used of path
    eval_fraction: float = 0.1  # held out when there is no eval_path
    public_fraction: float = 0.0

    def __post_init__(self) -> None:
        """Check ranges."""
        check_sizes(self.limit, self.eval_fraction, self.public_fraction)
        if self.size is not None and self.size < 1:
            raise ValueError(f"size is in pixels, at least 1, or null, got {self.size}")

    @property
    def normalises_by_clients(self) -> bool:
        """Whether every row is shifted and scaled by what the clients' rows are like."""
        return not self.public_fraction

    def check(self) -> list[str]:
        """Return the problems that can be found without loading."""
        problems = file_problems("path", self.path, _EXTENSIONS)
        if self.eval_path is not None:
            problems += file_problems("eval_path", self.eval_path, _EXTENSIONS)
        return problems

    def load(
        self, tokenizer: "PreTrainedTokenizerBase | None", seed: int, keep: Sequence[str]
    ) -> Dataset:
        """Read, decode and split; the columns ``keep`` stay beside the training rows."""
        pictures, own = self._files(keep)
        sizes = self.limit, self.eval_fraction, self.public_fraction
        split = split_rows(len(pictures.x), seed, *sizes, None if own is None else len(own.x))
        classes = class_names(pictures.labels, pictures.where)
        train = _examples(pictures, split.train, classes)
        known = train if split.public is None else _examples(pictures, split.public, classes)
        shift, scale = _normalisation(known.x)

        def normalised(source: Pictures, rows: Rows) -> TensorExamples:
            raw = _examples(source, rows, classes)
            return TensorExamples(raw.x, raw.labels, shift, scale)

        return Dataset(
            train=TensorExamples(train.x, train.labels, shift, scale),
            evaluation=normalised(own or pictures, split.evaluation),
            public=None if split.public is None else normalised(pictures, split.public),
            num_classes=len(classes),
            input_shape=tuple(train.x.shape[1:]),
            columns={name: pictures.columns[name][split.train] for name in keep},
            label_names=classes,
        )

    def _files(self, keep: Sequence[str]) -> tuple[Pictures, Pictures | None]:
        problems = self.check()
        if problems:
            raise DataError("; ".join(problems))
        pictures = self._read(self.path, keep)
        if self.eval_path is None:
            return pictures, None
        own = self._read(self.eval_path, ())
        if own.x.shape[1:] != pictures.x.shape[1:]:
            raise DataError(
                f"{self.eval_path} holds images of shape {tuple(own.x.shape[1:])}, expected"
                f" {tuple(pictures.x.shape[1:])} as in {self.path}"
            )
        return pictures, own

    def _read(self, path: str, keep: Sequence[str]) -> Pictures:
        if path.lower().removesuffix(".gz").endswith(".npz"):
            return read_npz(path, self.label or "y", keep)
        return read_pictures(path, self.image, self.label or "label", keep, self.size)


def _examples(pictures: Pictures, rows: Rows, classes: list[str]) -> TensorExamples:
    values: list[Any] = [pictures.labels[row] for row in rows]
    labels = encode_labels(values, classes, lambda row: pictures.where(int(rows[row])))
    return TensorExamples(pictures.x[torch.from_numpy(rows)], labels)


def _normalisation(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return what to subtract and multiply by, (C, 1, 1), or (1,) for flat rows."""
    channels = x.unbind(1) if x.dim() == 4 else [x]
    moments = [_moments(channel.flatten()) for channel in channels]
    shape = (-1, 1, 1) if x.dim() == 4 else (-1,)
    mean = torch.tensor([mean for mean, _ in moments]).view(shape)
    scale = torch.tensor([1 / std if std > 0 else 1.0 for _, std in moments]).view(shape)
    return mean, scale


def _moments(values: Tensor) -> tuple[float, float]:
    if values.dtype == torch.uint8:  # exact, and without a copy eight times as large
        count = torch.bincount(values, minlength=256).double() / len(values)
        grey = torch.arange(256).double()
        mean = (count * grey).sum()
        return mean.item(), (count * (grey - mean) ** 2).sum().sqrt().item()
    return values.double().mean().item(), values.double().std(correction=0).item()
