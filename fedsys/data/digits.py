"""Scikit-learn's handwritten digits: 1,797 real images of 8 x 8 pixels that come with it."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fedsys.data.examples import Dataset, TensorExamples
from fedsys.data.rows import check_sizes, split_rows
from fedsys.data.tables import no_column

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Digits:
    """Digits, turned counter-clockwise by ``rotate`` degrees for clients and evaluation alike.

    A base model may be pre-trained on ``source``: images before they were turned, never those of
    evaluation. They are the public ones or, where there are none, the clients' own.
    """

    rotate: int = 90  # degrees, a multiple of 90
    shift: float = 0.0  # subtracted from each pixel, which is in [0, 1]
    limit: int | None = None  # rows used in all
    eval_fraction: float = 0.2
    public_fraction: float = 0.0

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.rotate % 90:
            raise ValueError(f"rotate is in degrees, a multiple of 90, got {self.rotate}")
        check_sizes(self.limit, self.eval_fraction, self.public_fraction)

    @property
    def source_is_private(self) -> bool:
        """Whether a base that is pre-trained on ``source`` has seen clients' rows."""
        return self.rotate % 360 != 0 and not self.public_fraction

    def check(self) -> list[str]:
        """Return the problems that can be found without loading: none."""
        return []

    def load(
        self, tokenizer: "PreTrainedTokenizerBase | None", seed: int, keep: Sequence[str]
    ) -> Dataset:
        """Return rows (1, 8, 8) in [0, 1] less ``shift``; ``label`` may be kept."""
        for name in keep:
            if name != "label":
                raise no_column("digits", name, ["label"])
        upright, labels = _images()
        upright = upright - self.shift
        turned = torch.rot90(upright, self.rotate // 90, dims=(2, 3)).contiguous()
        split = split_rows(len(labels), seed, self.limit, self.eval_fraction, self.public_fraction)
        clients = TensorExamples(turned, labels)
        train = torch.from_numpy(split.train)
        known = torch.from_numpy(split.train if split.public is None else split.public)
        return Dataset(
            train=clients.subset(train),
            evaluation=clients.subset(torch.from_numpy(split.evaluation)),
            source=TensorExamples(upright, labels).subset(known) if self.rotate % 360 else None,
            public=None if split.public is None else clients.subset(torch.from_numpy(split.public)),
            num_classes=10,
            input_shape=(1, 8, 8),
            columns={name: labels[train].numpy() for name in keep},
            label_names=[str(digit) for digit in range(10)],
        )


def _images() -> tuple[Tensor, Tensor]:
    # Found without importing scikit-learn, which takes a second and a hundred megabytes.
    (package,) = find_spec("sklearn").submodule_search_locations  # type: ignore[union-attr,misc]
    table = np.loadtxt(Path(package) / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    x = torch.from_numpy(table[:, :64]).float().div_(16).view(-1, 1, 8, 8)
    return x, torch.from_numpy(table[:, 64]).long()
