"""A folder that is written whole or not at all."""

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from fedsys.errors import RunError

MARK = "fedsys_export.json"  # a folder that holds it was written here and may be replaced


@contextmanager
def staged(folder: Path, note: dict[str, str]) -> Iterator[Path]:
    """Give a new folder that, with ``note``, takes the place of ``folder`` after the block.

    Raises ``RunError`` when ``folder`` holds anything but an earlier export, or when writing fails.
    """
    folder = folder.absolute()
    partial = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    try:
        if folder.exists() and not (folder / MARK).is_file() and any(folder.iterdir()):
            raise RunError(f"{folder} is not empty and holds no earlier export; name another")
        partial.mkdir(parents=True)
        yield partial
        (partial / MARK).write_text(json.dumps(note) + "\n")
        for file in partial.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        _replace(folder, partial)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{folder} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace(folder: Path, partial: Path) -> None:
    """Move ``partial`` to ``folder``, and what was there out of the way first."""
    old = partial.with_name(partial.name + ".old")
    if folder.exists():
        folder.rename(old)
    try:
        partial.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
