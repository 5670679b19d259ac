"""Tensors kept from one process to the next, in the folder FEDSYS_CACHE, else ~/.cache/fedsys.

A file is named after all that determines its content, so it is never out of date. What cannot be
kept is made again, and what cannot be read counts as not there. Only its owner may look into it.
"""

import hashlib
import json
import logging
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fedsys.params import Params

log = logging.getLogger(__name__)

_SUFFIX = ".safetensors"
_DAY = 86400.0  # seconds


def name_of(kind: str, *parts: Any) -> str:
    """Return the name of a file of ``kind`` for what ``parts``, which JSON can say, determine."""
    key = json.dumps(parts, sort_keys=True)
    return f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:32]}{_SUFFIX}"


def read(name: str) -> tuple[Params, dict[str, str]] | None:
    """Return the tensors of ``name``, mapped into memory, and what was said of them, or None."""
    try:
        path = _folder() / name
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            said = file.metadata() or {}
        with suppress(OSError):  # a disk that is read only
            os.utime(path)  # the last use, by which ``prune`` goes
    except FileNotFoundError:
        return None
    except (OSError, RuntimeError, SafetensorError) as error:
        log.warning("%s in the cache cannot be read and is built again: %s", name, error)
        return None
    return tensors, said


def write(name: str, tensors: Params, said: dict[str, str]) -> None:
    """Keep ``tensors`` and what JSON says of them, if that can be; readers never see half."""
    temporary = None
    try:
        folder = _folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=name, suffix=".part")
        os.close(handle)
        save_file(tensors, temporary, metadata=said)
        os.replace(temporary, folder / name)
    except (OSError, RuntimeError, SafetensorError) as error:
        log.warning("%s is not cached: %s", name, error)
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def prune(kind: str, most: int) -> None:
    """Delete files of ``kind``, longest unused first, until all take at most ``most`` bytes.

    The last one used stays, whatever its size; what a killed process left half written does not.
    """
    with suppress(OSError, RuntimeError):
        for path in _folder().glob(f"{kind}-*.part"):
            if path.stat().st_mtime < time.time() - _DAY:
                path.unlink()
        files = [(path.stat(), path) for path in _folder().glob(f"{kind}-*{_SUFFIX}")]
        files.sort(key=lambda file: file[0].st_mtime)
        left = sum(status.st_size for status, _ in files)
        for status, path in files[:-1]:
            if left <= most:
                return
            path.unlink()
            left -= status.st_size


def _folder() -> Path:
    chosen = os.environ.get("FEDSYS_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "fedsys"
