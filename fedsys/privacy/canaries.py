"""Rows planted to be looked for: an audit asks of each whether it was trained on.

A canary is a training row of one client, overwritten by what no data resemble (pixels that are off
or fully on, tokens at random) and given a wrong label, so that its gradient is large and nearly
orthogonal to those of other rows. A fair coin, tossed before training, says whether it stays; where
it does not, the row is in no shard, and its client holds one row less.

Steinke, Nasr and Jagielski, "Privacy Auditing with One (1) Training Run", NeurIPS 2023,
https://arxiv.org/abs/2305.08846.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from fedsys.data.examples import Dataset, Examples, TensorExamples, TokenExamples
from fedsys.data.shards import RowShards, Shards
from fedsys.seeds import generator

_LIT = 0.1  # of a canary's numbers are at the largest value of the data, the others at the smallest


class Planted(NamedTuple):
    """The data of an audited run, and what the audit must know about its m canaries."""

    dataset: Dataset  # with the canaries written over the rows they replace
    shards: Shards  # without the canaries that are out
    rows: Tensor  # (m,) int64, of the training rows
    owners: Tensor  # (m,) int64: whose row it is, or would have been
    coins: Tensor  # (m,) bool: in or out


@dataclass(frozen=True, kw_only=True)
class Canaries:
    """``count`` canaries, spread evenly over the clients; another ``seed`` gives other ones.

    Which row, which content, which label and which coin are drawn separately, so that none tells
    anything about another.
    """

    count: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count must be at least 1, got {self.count}")

    def plant(self, dataset: Dataset, shards: Shards, seed: int) -> Planted:
        """Return the data with canaries in place of rows; ``seed`` is that of the run.

        A row that several clients hold is never one, and every client keeps a row that is none.
        Raises ``ValueError`` where there are too few such rows, or where labels are no classes.
        """
        rows, owners = _choose(shards, self.count, self._draw(seed, "rows"))
        coins = torch.rand(self.count, generator=self._draw(seed, "coins")) < 0.5
        labels = _wrong(dataset.train.labels, rows, dataset.num_classes, self._draw(seed, "labels"))
        train = _overwritten(dataset.train, rows, labels, self._draw(seed, "content"))
        return Planted(
            replace(dataset, train=train), _without(shards, rows[~coins]), rows, owners, coins
        )

    def _draw(self, seed: int, what: str) -> Generator:
        return generator(seed, f"canary {what}", self.seed)


def _choose(shards: Shards, count: int, draw: Generator) -> tuple[Tensor, Tensor]:
    """Return ``count`` rows and their owners: one of every client before a second of any."""
    rows, owner, sizes = _flat(shards)
    shuffled = torch.randperm(len(rows), generator=draw)
    rows, owner = rows[shuffled], owner[shuffled]
    by_owner = owner.argsort(stable=True)
    place = torch.empty_like(rows)  # of a row among those of its client
    place[by_owner] = torch.arange(len(rows)) - (sizes.cumsum(0) - sizes)[owner[by_owner]]
    once = rows.bincount()[rows] == 1
    fit = (once & (place < sizes[owner] - 1)).nonzero()[:, 0]
    if count > len(fit):
        raise ValueError(
            f"privacy.canaries={count} is too many: {len(fit)} rows are held by one client only"
            " and leave it another row"
        )
    chosen = fit[place[fit].argsort(stable=True)[:count]]
    return rows[chosen], owner[chosen]


def _without(shards: Shards, gone: Tensor) -> RowShards:
    """Return ``shards`` less the rows ``gone``; names and the order of rows stay."""
    rows, owner, sizes = _flat(shards)
    kept = ~torch.isin(rows, gone)
    names = [shards.name(client) for client in range(len(shards))]
    return RowShards(rows[kept], owner[kept].bincount(minlength=len(sizes)), names)


def _flat(shards: Shards) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows of all clients in one, (n,), who holds each, (n,), and the sizes (N,)."""
    parts = [shards.rows(client) for client in range(len(shards))]
    sizes = torch.tensor([len(part) for part in parts])
    return torch.cat(parts), torch.arange(len(parts)).repeat_interleave(sizes), sizes


def _wrong(
    labels: Tensor | None, rows: Tensor, num_classes: int | None, draw: Generator
) -> Tensor | None:
    """Return ``labels`` with another class in ``rows``, all others being equally likely."""
    if labels is None:  # of language modelling: random tokens are their own wrong labels
        return None
    if num_classes is None or num_classes < 2:
        raise ValueError("privacy.canaries: they need at least 2 classes, or text to continue")
    labels = labels.clone()
    step = torch.randint(1, num_classes, (len(rows),), generator=draw)
    labels[rows] = (labels[rows] + step) % num_classes
    return labels


def _overwritten(
    examples: Examples, rows: Tensor, labels: Tensor | None, draw: Generator
) -> Examples:
    """Return ``examples`` with ``labels`` and, in ``rows``, content that resembles no other."""
    if isinstance(examples, TensorExamples) and labels is not None:
        return replace(examples, x=_sparse(examples.x, rows, draw), labels=labels)
    if isinstance(examples, TokenExamples):
        return replace(examples, tokens=_random_text(examples, rows, draw), labels=labels)
    name = type(examples).__name__
    raise ValueError(f"privacy.canaries: they are images, vectors or texts, not {name}")


def _sparse(x: Tensor, rows: Tensor, draw: Generator) -> Tensor:
    # Sparse rows are nearly orthogonal to each other; dense noise shares its mean.
    lit = torch.rand((len(rows), *x.shape[1:]), generator=draw) < _LIT
    changed = x.clone()
    changed[rows] = torch.where(lit, x.max(), x.min())
    return changed


def _random_text(examples: TokenExamples, rows: Tensor, draw: Generator) -> Tensor:
    """Redraw all tokens but the first and the last, which models may need where they are."""
    tokens = examples.tokens.clone()
    known = examples.tokens.unique()
    for row in rows.tolist():
        inner = tokens[examples.offsets[row] + 1 : examples.offsets[row + 1] - 1]
        inner.copy_(known[torch.randint(len(known), inner.shape, generator=draw)])
    return tokens
