"""Text to classify or to continue, from files."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fedsys.data.examples import Dataset, TokenExamples
from fedsys.data.rows import (
    Rows,
    Split,
    check_sizes,
    class_names,
    draw,
    encode_labels,
    split_rows,
)
from fedsys.data.tables import EXTENSIONS, Table, file_problems, read_table
from fedsys.data.tokens import causal_examples, classification_examples
from fedsys.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class TextColumns(ABC):
    """What the columns of a table of text are for, wherever the table comes from.

    ``text`` with ``label`` is classification; ``text`` alone is language modelling of whole rows;
    ``prompt`` with ``response`` is language modelling of the responses.
    """

    text: Any = None  # the name of one column, or of two that form a pair
    label: str | None = None
    classes: list[str] | None = None  # the labels in order; None: those of the training rows
    prompt: Any = None  # the name of a column, or of several that are joined by line breaks
    response: str | None = None
    max_length: int = 128  # tokens
    limit: int | None = None  # rows used of the training table
    eval_fraction: float = 0.1  # held out when evaluation has no table of its own
    eval_limit: int | None = None  # rows used for evaluation
    public_fraction: float = 0.0

    def __post_init__(self) -> None:
        """Check ranges."""
        check_sizes(self.limit, self.eval_fraction, self.public_fraction, self.eval_limit)
        if self.max_length < 4:
            raise ValueError(f"max_length counts tokens, at least 4, got {self.max_length}")

    def check(self) -> list[str]:
        """Return the problems that can be found without loading."""
        text, prompt = names(self.text), names(self.prompt)
        problems = []
        if not text and not (prompt and self.response):
            problems.append("text: name the column to read, or give both prompt and response")
        if text and (prompt or self.response):
            problems.append("text and prompt with response exclude each other: set one to null")
        if self.classes is not None and len(set(self.classes)) < max(2, len(self.classes)):
            problems.append(f"classes: name two or more, each once, got {self.classes}")
        if self.label and not text:
            problems.append("label: a class needs the column text, not prompt and response")
        if len(text) > (2 if self.label else 1):
            most = "at most two columns" if self.label else "one column when label is null"
            problems.append(f"text: {most}, got {', '.join(text)}")
        return problems

    @abstractmethod
    def read(self, needed: Sequence[str]) -> tuple[Table, Table | None]:
        """Return the training table and the evaluation table, if it has one of its own."""

    def load(
        self, tokenizer: "PreTrainedTokenizerBase | None", seed: int, keep: Sequence[str]
    ) -> Dataset:
        """Read, tokenise and split; the columns ``keep`` stay beside the training rows."""
        problems = self.check()
        if problems:
            raise DataError("; ".join(problems))
        if tokenizer is None:
            raise ValueError(
                "text needs a model with a tokenizer: model=hf_classifier or hf_causal"
            )
        if self.max_length > tokenizer.model_max_length:
            most = f"at most {tokenizer.model_max_length} for this model"
            raise ValueError(f"max_length counts tokens, {most}, got {self.max_length}")
        table, own = self.read(list(dict.fromkeys([*self._columns(), *keep])))
        classes = self.classes or []
        if self.label and not classes:
            classes = class_names(table.columns[self.label], table.where)
        split = self._split(len(table), None if own is None else len(own), seed)

        def examples(source: Table, rows: Rows) -> TokenExamples:
            return self._examples(source, rows, classes, tokenizer)

        return Dataset(
            train=examples(table, split.train),
            evaluation=examples(own or table, split.evaluation),
            public=None if split.public is None else examples(table, split.public),
            num_classes=len(classes) if self.label else None,
            columns={name: table.keys(name)[split.train] for name in keep},
            label_names=[table.label_name(name) for name in classes],
        )

    def _split(self, total: int, own: int | None, seed: int) -> Split:
        split = split_rows(total, seed, self.limit, self.eval_fraction, self.public_fraction, own)
        if self.eval_limit is None:
            return split
        evaluation, _ = draw(split.evaluation, self.eval_limit, seed, "data-eval-limit")
        return replace(split, evaluation=evaluation)

    def _columns(self) -> list[str]:
        label = [self.label] if self.label else []
        response = [self.response] if self.response else []
        return [*names(self.text), *names(self.prompt), *response, *label]

    def _examples(
        self, table: Table, rows: Rows, classes: list[str], tokenizer: "PreTrainedTokenizerBase"
    ) -> TokenExamples:
        part = table.subset(rows)
        if self.label:
            labels = encode_labels(part.columns[self.label], classes, part.where)
            texts = [part.texts(name) for name in names(self.text)]
            return classification_examples(tokenizer, texts, labels, self.max_length)
        if not self.response:
            (text,) = names(self.text)
            return causal_examples(tokenizer, None, part.texts(text), self.max_length)
        prompts = zip(*(part.texts(name) for name in names(self.prompt)), strict=True)
        # An unused column of an instruction format is empty and leaves no line behind.
        joined = ["\n".join([*filter(None, parts), ""]) for parts in prompts]
        return causal_examples(tokenizer, joined, part.texts(self.response), self.max_length)


@dataclass(frozen=True, kw_only=True)
class Text(TextColumns):
    """Text of csv, tsv, jsonl, json or parquet files, each also gzipped."""

    path: str
    eval_path: str | None = None

    def check(self) -> list[str]:
        """Return the problems that can be found without loading."""
        problems = file_problems("path", self.path, EXTENSIONS)
        if self.eval_path is not None:
            problems += file_problems("eval_path", self.eval_path, EXTENSIONS)
        return problems + super().check()

    def read(self, needed: Sequence[str]) -> tuple[Table, Table | None]:
        """Return the tables of both files; evaluation keeps only the columns it has use for."""
        own = None if self.eval_path is None else read_table(self.eval_path, self._columns())
        return read_table(self.path, needed), own


def names(columns: Any) -> list[str]:
    """Return column names, given as None, one name or several."""
    if columns is None:
        return []
    return [columns] if isinstance(columns, str) else list(columns)
