"""What is frozen and shared, kept on disk for other processes of the same client.

On a device every message is answered by a new process, and on Ray by whichever is free. The server
sends factors once and a base by its moves, so what one process was sent the next must find.
"""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fedsys.params import Params

_KEPT = 2  # the last ones: a round may be begun again


@dataclass(frozen=True)
class Frozen:
    """The tensors that a basis names: the adapters' factors, or the base under them."""

    basis: str
    is_base: bool
    tensors: Params


class FrozenStore:
    """A file a basis below ``folder``, which need not exist yet."""

    def __init__(self, folder: Path) -> None:
        """Touch nothing yet."""
        self._folder = folder

    def put(self, frozen: Frozen) -> None:
        """Write ``frozen`` to a file that appears whole, and drop old ones."""
        self._folder.mkdir(parents=True, exist_ok=True)
        partial = self._folder / f".{frozen.basis}.{os.getpid()}"
        tensors = {n: t.detach().cpu().contiguous().clone() for n, t in frozen.tensors.items()}
        save_file(tensors, partial, {"is_base": str(int(frozen.is_base))})
        partial.replace(self._path(frozen.basis))
        for old in self._files()[_KEPT:]:
            old.unlink(missing_ok=True)

    def get(self, basis: str) -> Frozen | None:
        """Return what ``basis`` names; None where it is not here or cannot be read."""
        path = self._path(basis)
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return Frozen(basis, file.metadata()["is_base"] == "1", tensors)
        except (OSError, SafetensorError):  # the server sends it again
            return None

    def newest(self) -> Frozen | None:
        """Return what was kept last."""
        files = self._files()
        return self.get(files[0].stem) if files else None

    def _files(self) -> list[Path]:
        found = []
        for path in self._folder.glob("*.safetensors"):
            with suppress(FileNotFoundError):  # another process has just dropped it
                found.append((path.stat().st_mtime_ns, path))
        return [path for _, path in sorted(found, reverse=True)]

    def _path(self, basis: str) -> Path:
        return self._folder / f"{basis}.safetensors"
