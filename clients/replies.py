"""Replies that a private client keeps, so as to send one again rather than compute it again.

A reply computed anew has new noise, and two noised answers to one question tell more than one. So
the reply of a client in a round is stored before it is sent, under a key of all that it depends on
(``key_of``); whoever asks the same again gets the same bits. Beside the arrays stands what JSON can
say, such as the ledger's entries for it, which a client killed in between has yet to write.

A stored reply that cannot be read or was altered counts as none: computing it again is entered in
the ledger as the second release that it is.
"""

import hashlib
import json
import logging
import os
import shutil
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fedsys.params import Params, chained
from fedsys.privacy.held_file import sync_folder

log = logging.getLogger(__name__)

Reply = tuple[Params, dict[str, Any]]
_SUFFIX, _SAID, _SEAL = ".safetensors", "reply", "seal"


def key_of(run: str, round: int, start: str, basis: str) -> str:
    """Return the digest of a question: the run, the round, digests of x_t and of what is frozen."""
    return hashlib.sha256(json.dumps([run, round, start, basis]).encode()).hexdigest()


class ReplyStore(ABC):
    """The last reply of each client in each round, with the key of the question."""

    @abstractmethod
    def put(
        self, client: int, round: int, key: str, arrays: Params, metrics: dict[str, Any]
    ) -> None:
        """Keep a reply, whole or not at all, in place of any other of ``client`` in ``round``.

        ``metrics`` is whatever JSON can say. Nobody may change the arrays from now on. Raises
        ``OSError`` when it cannot be kept.
        """

    @abstractmethod
    def get(self, client: int, round: int, key: str) -> Reply | None:
        """Return the reply to the question of ``key``, to the bit, or None."""

    @abstractmethod
    def prune(self, client: int | None, oldest_round: int) -> None:
        """Drop the replies of ``client`` (None: of all) from before ``oldest_round``.

        That is the first round that the server may ask for again: the one after its oldest
        checkpoint.
        """


class MemoryReplies(ReplyStore):
    """Replies in this process, for a simulation that nobody will resume."""

    def __init__(self) -> None:
        """Hold nothing."""
        self._rounds: dict[int, dict[int, tuple[str, Params, str]]] = {}

    def put(
        self, client: int, round: int, key: str, arrays: Params, metrics: dict[str, Any]
    ) -> None:
        """Keep the arrays as they are, and a copy of ``metrics``."""
        reply = (key, dict(arrays), json.dumps(metrics))
        self._rounds.setdefault(round, {})[client] = reply

    def get(self, client: int, round: int, key: str) -> Reply | None:
        """Return the reply."""
        found = self._rounds.get(round, {}).get(client)
        if found is None or found[0] != key:
            return None
        return dict(found[1]), json.loads(found[2])

    def prune(self, client: int | None, oldest_round: int) -> None:
        """Drop old replies."""
        for round in [r for r in self._rounds if r < oldest_round]:
            if client is not None:
                self._rounds[round].pop(client, None)
            if client is None or not self._rounds[round]:
                del self._rounds[round]


class DiskReplies(ReplyStore):
    """A folder a round, a file a client: a round that nobody asks for again goes as a whole."""

    def __init__(self, folder: Path, durable: bool = False) -> None:
        """Keep everything below ``folder``, which need not exist yet.

        Replies survive a process that is killed. ``durable`` ones survive a power cut as well, at
        some fsyncs each; what it takes of others is computed, entered and spent again.
        """
        self._folder = folder
        self._durable = durable

    def put(
        self, client: int, round: int, key: str, arrays: Params, metrics: dict[str, Any]
    ) -> None:
        """Write a reply to a file that appears by one rename."""
        path = self._path(client, round)
        path.parent.mkdir(parents=True, exist_ok=True)
        # safetensors refuses tensors that share memory, and sorts them.
        own = {name: value.detach().cpu().contiguous().clone() for name, value in arrays.items()}
        said = json.dumps({"key": key, "names": list(own), "metrics": metrics})
        partial = path.with_suffix(".partial")
        try:
            save_file(own, partial, {_SAID: said, _SEAL: chained(said, own)})
            if self._durable:
                _sync(partial)
            partial.replace(path)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                partial.unlink(missing_ok=True)  # a full disk needs the space
            raise OSError(f"{path} cannot be written: {error}") from error
        if self._durable:
            for folder in (path.parent, self._folder, self._folder.absolute().parent):
                sync_folder(folder)

    def get(self, client: int, round: int, key: str) -> Reply | None:
        """Read the reply; one that is torn or altered is reported and counts as none."""
        path = self._path(client, round)
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                known = file.metadata()
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if known[_SEAL] != chained(known[_SAID], arrays):
                raise ValueError("it is not as it was stored")
            said = json.loads(known[_SAID])
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            log.warning("the stored reply %s cannot be used: %s", path, error)
            return None
        if said["key"] != key:
            return None
        return {name: arrays[name] for name in said["names"]}, said["metrics"]

    def prune(self, client: int | None, oldest_round: int) -> None:
        """Delete files and folders of old rounds."""
        for folder in self._old(oldest_round):
            if client is None:
                shutil.rmtree(folder, ignore_errors=True)
                continue
            self._path(client, int(folder.name)).unlink(missing_ok=True)
            with suppress(OSError):  # others' replies are still there
                folder.rmdir()

    def _old(self, oldest_round: int) -> list[Path]:
        if not self._folder.is_dir():
            return []
        numbered = (path for path in self._folder.iterdir() if path.name.isdecimal())
        return [path for path in numbered if int(path.name) < oldest_round]

    def _path(self, client: int, round: int) -> Path:
        return self._folder / str(round) / f"{client}{_SUFFIX}"


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
