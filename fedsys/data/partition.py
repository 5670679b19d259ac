"""How training rows are divided among clients; everything is drawn by the seed."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedsys.data.examples import Dataset
from fedsys.data.shards import BootstrapShards, RowShards, Shards
from fedsys.data.tables import no_column
from fedsys.errors import DataError
from fedsys.seeds import numpy_generator


class Partition(ABC):
    """A way to divide the training rows among clients."""

    @property
    def keep(self) -> tuple[str, ...]:
        """Columns of the training data that ``split`` reads."""
        return ()

    @abstractmethod
    def split(self, dataset: Dataset, num_clients: int, seed: int) -> Shards:
        """Return the rows of ``num_clients`` clients; the same seed gives the same rows."""


@dataclass(frozen=True, kw_only=True)
class _Exhaustive(Partition, ABC):
    """Gives every row to one client; a client without rows is refused unless ``allow_empty``."""

    allow_empty: bool = False

    def _shards(self, order: NDArray[np.int64], sizes: NDArray[np.int64], hint: str) -> RowShards:
        empty = np.flatnonzero(sizes == 0)
        if len(empty) and not self.allow_empty:
            first = ", ".join(map(str, empty[:5])) + (", ..." if len(empty) > 5 else "")
            raise DataError(
                f"{len(empty)} of {len(sizes)} clients would hold none of the {len(order)} training"
                f" rows (clients {first}): {hint}, or set partition.allow_empty=true"
            )
        return RowShards(torch.from_numpy(order), torch.from_numpy(sizes))


@dataclass(frozen=True, kw_only=True)
class IID(_Exhaustive):
    """Rows are shuffled and dealt out; sizes differ by at most 1."""

    def split(self, dataset: Dataset, num_clients: int, seed: int) -> Shards:
        """Return equally large random parts."""
        order = numpy_generator(seed, "partition").permutation(len(dataset.train))
        return self._shards(order, _even(len(order), num_clients), "ask for fewer clients")


@dataclass(frozen=True, kw_only=True)
class OnDevices(Partition):
    """Every client has a file of its own, on its device; the server's rows train nobody."""

    client: int | None = None  # whose device this is; None: the server

    def split(self, dataset: Dataset, num_clients: int, seed: int) -> Shards:
        """Return all rows as those of ``client``; the others hold what nobody here knows."""
        sizes = torch.zeros(num_clients, dtype=torch.int64)
        if self.client is not None:
            sizes[self.client] = len(dataset.train)
        return RowShards(torch.arange(int(sizes.sum())), sizes)


@dataclass(frozen=True, kw_only=True)
class Contiguous(_Exhaustive):
    """Client i holds rows [i L // N, (i + 1) L // N) of the L training rows as they come."""

    def split(self, dataset: Dataset, num_clients: int, seed: int) -> Shards:
        """Return equally large parts in the order of the file."""
        order = np.arange(len(dataset.train))
        return self._shards(order, _even(len(order), num_clients), "ask for fewer clients")


@dataclass(frozen=True, kw_only=True)
class _Dirichlet(_Exhaustive, ABC):
    """Label skew: the smaller ``alpha``, the fewer classes a client sees."""

    alpha: float

    def __post_init__(self) -> None:
        """Check ranges."""
        if not 0 < self.alpha < float("inf"):
            raise ValueError(f"alpha is a concentration above 0, got {self.alpha}")

    @abstractmethod
    def _cuts(
        self, counts: NDArray[np.int64], num_clients: int, draw: np.random.Generator
    ) -> NDArray[np.int64]:
        """Return where each client's slice of each class ends, (N, C); the last row is counts."""

    def split(self, dataset: Dataset, num_clients: int, seed: int) -> Shards:
        """Give each client one slice of each class's rows.

        A slice of rows as they lie in the file would skew more than labels: the digits lie there by
        writer, and clients of few writers each lose what robustness and speed the papers report.
        """
        if dataset.train.labels is None or dataset.num_classes is None:
            raise DataError("a Dirichlet partition needs labels and this data has none: use iid")
        labels = dataset.train.labels.numpy()
        counts = np.bincount(labels, minlength=dataset.num_classes)
        draw = numpy_generator(seed, "partition")
        cuts = self._cuts(counts, num_clients, draw)
        shuffled = draw.permutation(len(labels))
        by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
        taken = np.diff(cuts, axis=0, prepend=0)
        clients = np.arange(num_clients)
        owner = np.concatenate([np.repeat(clients, taken[:, c]) for c in range(len(counts))])
        order = by_class[np.lexsort((by_class, owner))]
        return self._shards(order, taken.sum(1), "ask for fewer clients, raise partition.alpha")


@dataclass(frozen=True, kw_only=True)
class DirichletFedAU(_Dirichlet):
    """Clients draw a class mix L_n ~ Dir(alpha 1_C) and share each class in proportion to it.

    Client n's slice of class c ends at round(len_c * cumsum_n(L) / sum_n(L)), as in the code of
    Wang and Ji (FedAU, ICLR 2024).
    """

    def _cuts(
        self, counts: NDArray[np.int64], num_clients: int, draw: np.random.Generator
    ) -> NDArray[np.int64]:
        mix = draw.dirichlet(np.full(len(counts), self.alpha), size=num_clients)
        mix[:, mix.sum(0) == 0] = 1.0  # a class that nobody drew is shared evenly
        ends = np.cumsum(mix, axis=0)
        cuts: NDArray[np.int64] = np.rint(counts * (ends / ends[-1])).astype(np.int64)
        return cuts


@dataclass(frozen=True, kw_only=True)
class DirichletFRL(_Dirichlet):
    """Each class draws Dir(alpha 1_N) over the clients; client n gets round(len_c * d_n) rows.

    Departs from the code of FRL in one respect: there, rounding drops rows or leaves later
    clients short; here the last client takes what is left, so that every row has one owner.
    """

    def _cuts(
        self, counts: NDArray[np.int64], num_clients: int, draw: np.random.Generator
    ) -> NDArray[np.int64]:
        share = draw.dirichlet(np.full(num_clients, self.alpha), size=len(counts)).T
        cuts: NDArray[np.int64] = np.cumsum(np.rint(counts * share).astype(np.int64), axis=0)
        np.minimum(cuts, counts, out=cuts)
        cuts[-1] = counts
        return cuts


@dataclass(frozen=True, kw_only=True)
class Natural(Partition):
    """Clients are the distinct keys in ``column`` (one or several), ordered by name.

    Of more keys than clients the largest are taken, and among equals the first by name; the rows
    of the others are not used.
    """

    column: Any

    @property
    def keep(self) -> tuple[str, ...]:
        """Columns of the training data that ``split`` reads."""
        return (self.column,) if isinstance(self.column, str) else tuple(self.column)

    def split(self, dataset: Dataset, num_clients: int, seed: int) -> Shards:
        """Return the rows of the ``num_clients`` largest groups."""
        names, group = self._groups(dataset)
        sizes = np.bincount(group, minlength=len(names))
        if len(names) < num_clients:
            raise DataError(
                f"{' and '.join(self.keep)} has {len(names)} distinct values in the training rows,"
                f" too few for {num_clients} clients: set num_clients={len(names)} or less"
            )
        largest = np.sort(np.argsort(-sizes, kind="stable")[:num_clients])
        order = np.argsort(group, kind="stable")
        order = order[np.isin(group[order], largest)]
        named = [names[i] for i in largest]
        return RowShards(torch.from_numpy(order), torch.from_numpy(sizes[largest]), named)

    def _groups(self, dataset: Dataset) -> tuple[list[str], NDArray[np.int64]]:
        """Return the names of the groups in order, and the group of each row."""
        group = np.zeros(len(dataset.train), dtype=np.int64)
        parts: list[NDArray[Any]] = []
        for name in self.keep:
            if name not in dataset.columns:
                raise no_column("the training data", name, list(dataset.columns))
            values, code = np.unique(dataset.columns[name], return_inverse=True)
            seen, group = np.unique(group * len(values) + code, return_inverse=True)
            parts = [part[seen // len(values)] for part in parts] + [values[seen % len(values)]]
        return [" / ".join(map(str, key)) for key in zip(*parts, strict=True)], group


@dataclass(frozen=True, kw_only=True)
class Bootstrap(Partition):
    """Every client draws ``examples`` rows with replacement, so any number of clients has data."""

    examples: int

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.examples < 1:
            raise ValueError(f"examples counts rows and must be at least 1, got {self.examples}")

    def split(self, dataset: Dataset, num_clients: int, seed: int) -> Shards:
        """Return shards that draw their rows when they are asked for."""
        return BootstrapShards(num_clients, self.examples, len(dataset.train), seed)


def _even(total: int, parts: int) -> NDArray[np.int64]:
    ends = np.arange(parts + 1, dtype=np.int64) * total // parts
    return np.diff(ends)
