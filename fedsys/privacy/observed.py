"""What clients have sent in an audited run: a file a round, ``round_000001.safetensors``.

    start (size,) x_t       clients (K,) int64       moves (K, size) float32, x_n - x_t by row

Those are the updates as they were decoded, before a defence or the mean: all that a curious server
sees of a client that protects its rows, and what ``fedsys audit`` attacks.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from fedsys.errors import RunError
from fedsys.params import Layout, Params
from fedsys.privacy.scores import Seen
from fedsys.update import Update


class Observed:
    """The rounds kept below ``folder``; one round's updates are in memory at a time."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        """Touch nothing yet."""
        self.folder = folder
        self.layout = layout
        self._start: Tensor | None = None
        self._moves: dict[int, Tensor] = {}

    def watch(self, start: Params, updates: Iterator[Update]) -> Iterator[Update]:
        """Pass on the updates of a round from ``start``, and note them."""
        self._start, self._moves = self.layout.pack(start), {}
        for update in updates:
            self._moves[update.client] = self.layout.pack(update.delta).float()
            yield update

    def write(self, round: int) -> None:
        """Write the round that was watched, whole or not at all; without updates there is none.

        Raises ``RunError`` when it cannot be written.
        """
        if self._start is None or not self._moves:
            return
        content = save(
            {
                "start": self._start.cpu(),
                "clients": torch.tensor(list(self._moves)),
                "moves": torch.stack(list(self._moves.values())).cpu(),
            }
        )
        self._moves = {}
        path = self.folder / f"round_{round:06d}.safetensors"
        partial = path.with_suffix(".partial")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError as error:
            raise RunError(f"{path} cannot be written: {error}") from error

    def keep(self, last_round: int) -> None:
        """Drop the rounds after ``last_round``."""
        for round, path in self._files().items():
            if round > last_round:
                path.unlink()

    def read(self, attended: dict[int, list[int]]) -> Iterator[Seen]:
        """Yield the rounds of ``attended``: by round, the clients whose updates were used.

        Raises ``RunError`` where a round is missing, damaged, or of other clients.
        """
        files = self._files()
        for round, clients in attended.items():
            if not clients:
                continue
            try:
                tensors = load_file(files[round])
                found = tensors["clients"].tolist()
            except (KeyError, OSError, SafetensorError) as error:
                raise RunError(
                    f"what clients sent in round {round} cannot be read from {self.folder}, so"
                    f" the run cannot be audited ({type(error).__name__}: {error})"
                ) from error
            if sorted(found) != sorted(clients):
                raise RunError(f"{files[round]} is not of the clients that took part: {clients}")
            yield Seen(tensors["start"], dict(zip(found, tensors["moves"], strict=True)))

    def _files(self) -> dict[int, Path]:
        paths = self.folder.iterdir() if self.folder.is_dir() else ()
        found = [(re.fullmatch(r"round_(\d{6,})\.safetensors", path.name), path) for path in paths]
        return {int(match[1]): path for match, path in found if match}
