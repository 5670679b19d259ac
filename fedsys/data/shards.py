"""Who holds which rows."""

from abc import ABC, abstractmethod
from functools import lru_cache

import torch
from torch import Tensor

from fedsys.seeds import numpy_generator

KEPT = 2**20  # rows that were drawn


class Shards(ABC):
    """The rows of each client, clients being numbered from 0."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of clients."""

    @abstractmethod
    def rows(self, client: int) -> Tensor:
        """Return the rows of ``client``, (n_i,) int64."""

    @abstractmethod
    def sizes(self) -> Tensor:
        """Return the number of rows of every client, (N,) int64."""

    def size(self, client: int) -> int:
        """Return the number of rows of ``client``."""
        return len(self.rows(client))

    def name(self, client: int) -> str:
        """Return what ``client`` is called in tables and pictures."""
        return str(client)


class RowShards(Shards):
    """Shards as one list of rows, client after client."""

    def __init__(self, order: Tensor, sizes: Tensor, names: list[str] | None = None) -> None:
        """Cut ``order`` into parts of ``sizes`` (N,), called by ``names`` if there are any."""
        self._order = order
        self._offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
        self._names = names

    def __len__(self) -> int:
        """Return the number of clients."""
        return len(self._offsets) - 1

    def rows(self, client: int) -> Tensor:
        """Return the rows of ``client``, (n_i,) int64."""
        return self._order[self._offsets[client] : self._offsets[client + 1]]

    def sizes(self) -> Tensor:
        """Return the number of rows of every client, (N,) int64."""
        return self._offsets.diff()

    def name(self, client: int) -> str:
        """Return the natural key of ``client``, or its number."""
        return str(client) if self._names is None else self._names[client]


class BootstrapShards(Shards):
    """Shards that are drawn when they are asked for, so that idle clients cost nothing."""

    def __init__(self, num_clients: int, examples: int, total: int, seed: int) -> None:
        """Let each client draw ``examples`` of ``total`` rows with replacement."""
        self._num_clients = num_clients
        self._examples = examples
        self._total = total
        self._seed = seed
        # Of clients that were asked lately, for they may be asked again.
        self._drawn = lru_cache(max(1, KEPT // max(examples, 1)))(self._draw)

    def __len__(self) -> int:
        """Return the number of clients."""
        return self._num_clients

    def rows(self, client: int) -> Tensor:
        """Return the rows of ``client``, (examples,) int64."""
        if not 0 <= client < self._num_clients:
            raise IndexError(f"client {client} of {self._num_clients}")
        return self._drawn(client)

    def _draw(self, client: int) -> Tensor:
        draw = numpy_generator(self._seed, "partition", client)
        return torch.from_numpy(draw.integers(self._total, size=self._examples))

    def sizes(self) -> Tensor:
        """Return the number of rows of every client, (N,) int64, as a view of one number."""
        return torch.tensor(self._examples).expand(self._num_clients)

    def size(self, client: int) -> int:
        """Return the number of rows of every client."""
        return self._examples
