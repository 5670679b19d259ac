"""A file that one process holds and only ever adds to, whole or not at all."""

import errno
import fcntl
import os
import weakref
from pathlib import Path

from fedsys.errors import LedgerError


class HeldFile:
    """The file at ``path``, locked against other processes until closed or dropped.

    Every error is a ``LedgerError``, so that whoever wants to release something has one to mind.
    """

    def __init__(self, path: Path) -> None:
        """Open the file, or create it and its folders; raises ``LedgerError``."""
        self.path = path
        self.size = 0  # bytes known to be whole; ``mend`` sets it first
        self._broken = ""
        try:
            self._handle = _open(path)
        except BlockingIOError:
            raise LedgerError(f"{path} is in use by another process") from None
        except OSError as error:
            raise LedgerError(f"{path} cannot be opened: {error}") from error
        # A finalizer, so that a file nobody closed is no warning when it is dropped.
        self._close = weakref.finalize(self, os.close, self._handle)

    def close(self) -> None:
        """Let go of the file; nothing can be added any more."""
        self._broken = "it is closed"
        self._close()

    def mend(self, size: int) -> None:
        """Cut off what is behind ``size``, end the last line, and see to it that it is on disk."""
        try:
            if os.fstat(self._handle).st_size > size:
                os.ftruncate(self._handle, size)
            if size and os.pread(self._handle, 1, size - 1) != b"\n":
                size += os.write(self._handle, b"\n")
            os.fsync(self._handle)  # whoever wrote it may have been killed before
        except OSError as error:
            raise LedgerError(f"{self.path} cannot be mended: {error}") from error
        self.size = size

    def check(self) -> None:
        """Raise ``LedgerError`` when nothing can be added, or when somebody else changed it."""
        if self._broken:
            raise LedgerError(f"{self.path} cannot be written: {self._broken}")
        try:
            at, held = os.stat(self.path), os.fstat(self._handle)
        except OSError as error:
            raise LedgerError(f"{self.path} has gone: {error}") from error
        if not os.path.samestat(at, held) or held.st_size != self.size:
            raise LedgerError(f"{self.path} was changed by somebody else while this process ran")

    def add(self, data: bytes) -> None:
        """Write ``data`` at the end, in one piece; it is on disk when this returns."""
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(self._handle, rest) :]
            os.fsync(self._handle)
        except BaseException as error:
            self._take_back()
            if isinstance(error, OSError):
                raise LedgerError(
                    f"{self.path} cannot be written: {error}; nothing was released"
                ) from error
            raise
        self.size += len(data)

    def _take_back(self) -> None:
        """Undo an addition that failed; the next one must not follow what may be half there."""
        try:
            os.ftruncate(self._handle, self.size)
            os.fsync(self._handle)
        except OSError as error:
            self._broken = f"an addition failed and could not be taken back ({error}); start again"


def _open(path: Path) -> int:
    missing = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Else a new file may be lost with the power, and all that it says.
        for changed in (path.parent, *(folder.parent for folder in missing)):
            sync_folder(changed)
    except BaseException:
        os.close(handle)
        raise
    return handle


def sync_folder(folder: Path) -> None:
    """Have the names in ``folder`` on disk, where its file system can promise that."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)
