"""Random tokens to classify: data for a text model when no text is at hand."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fedsys.data.examples import Dataset, TokenExamples
from fedsys.data.tables import no_column
from fedsys.seeds import generator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SIGNAL = 8  # tokens at the beginning of a row that tell its class


@dataclass(frozen=True, kw_only=True)
class RandomTokens:
    """Rows of a token that stands for the class, eight times, and then random tokens.

    With ``shortest`` the logarithm of a row's length is uniform: there are many short rows and few
    long ones, as of sentences.
    """

    rows: int  # to train on
    length: int  # tokens of the longest row
    num_classes: int
    eval_rows: int  # held out, beside ``rows``
    shortest: int | None = None  # tokens of the shortest row; None: all are of one length

    def __post_init__(self) -> None:
        """Check ranges."""
        least = {"rows": 1, "length": SIGNAL, "num_classes": 2, "eval_rows": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name} must be at least {value}, got {getattr(self, name)}")
        if self.shortest is not None and not SIGNAL <= self.shortest <= self.length:
            raise ValueError(
                f"shortest must be from {SIGNAL} to length={self.length}, got {self.shortest}"
            )

    def check(self) -> list[str]:
        """Return the problems that can be found without loading: none."""
        return []

    def load(
        self, tokenizer: "PreTrainedTokenizerBase | None", seed: int, keep: Sequence[str]
    ) -> Dataset:
        """Draw the rows from ``seed``; the only column to ``keep`` is ``label``."""
        for name in keep:
            if name != "label":
                raise no_column("random tokens", name, ["label"])
        if tokenizer is None:
            raise ValueError("random tokens need a model with a tokenizer: model=hf_classifier")
        if self.length > tokenizer.model_max_length:
            most = f"at most {tokenizer.model_max_length} for this model"
            raise ValueError(f"length counts tokens, {most}, got {self.length}")
        words = _words(tokenizer)
        if self.num_classes > len(words):
            raise ValueError(
                f"num_classes is at most {len(words)}, the tokens of this model's vocabulary, "
                f"got {self.num_classes}"
            )
        chosen = torch.randperm(len(words), generator=generator(seed, "data-classes"))
        signs = words[chosen[: self.num_classes]]
        pad = tokenizer.pad_token_id
        train, evaluation = (
            self._examples(words, signs, count, 0 if pad is None else int(pad), draw)
            for count, draw in (
                (self.rows, generator(seed, "data-train")),
                (self.eval_rows, generator(seed, "data-evaluation")),
            )
        )
        return Dataset(
            train=train,
            evaluation=evaluation,
            num_classes=self.num_classes,
            columns={name: np.asarray(train.labels) for name in keep},
            label_names=[str(label) for label in range(self.num_classes)],
        )

    def _examples(
        self, words: Tensor, signs: Tensor, count: int, pad: int, draw: torch.Generator
    ) -> TokenExamples:
        labels = torch.randint(self.num_classes, (count,), generator=draw)
        tokens = words[torch.randint(len(words), (count, self.length), generator=draw)]
        tokens[:, :SIGNAL] = signs[labels, None]
        lengths = torch.full((count,), self.length)
        if self.shortest is not None:
            ratio = self.length / self.shortest
            lengths = (self.shortest * ratio ** torch.rand(count, generator=draw)).round().long()
        return TokenExamples(
            tokens=tokens[torch.arange(self.length) < lengths[:, None]],
            offsets=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
            pad_id=pad,
            labels=labels,
        )


def _words(tokenizer: "PreTrainedTokenizerBase") -> Tensor:
    """Return the ids of all tokens without a special meaning, int32."""
    special = set(tokenizer.all_special_ids)
    ids = [token for token in range(len(tokenizer)) if token not in special]
    return torch.tensor(ids, dtype=torch.int32)
