"""One engine on this host: an exclusive flock on a file, for as long as the process lives.

The file is not in the state directory, because two of those on one machine are two engines all the same. It is in a
0700 folder of the user's own below /var/tmp, which survives restarts: what others could open they could also hold, and
so keep the service down. Engines of different users are therefore not told apart here; their ports and the free memory
do that. A folder that is somebody else's is told in the log, and then there is no lock: it guards against mistakes,
and must not be what keeps the service down.
"""

from __future__ import annotations

import fcntl
import os
import stat
from pathlib import Path

from service.observability.logging import get_logger

_log = get_logger(__name__)

PLACE = Path("/var/tmp")  # noqa: S108 - the folder inside is checked to be ours alone
FILE_NAME = "engine.lock"


def host_lock_file() -> Path:
    """Where engines of this user meet, whatever their state directory is."""
    return PLACE / f"mlxd-{os.geteuid()}" / FILE_NAME


class HostLock:
    """The lock on `file`, not yet taken. One thread at a time."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._handle: int | None = None

    def take(self) -> str:
        """Take it, or say who has it; empty when it is ours, now or before. Does not wait, raises nothing."""
        if self._handle is not None:
            return ""
        try:
            handle = self._open()
        except OSError as error:
            _log.warning("host_lock_unusable", file=str(self._file), reason=str(error.strerror or error))
            return ""
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(handle, 0)
            os.pwrite(handle, b"%d\n" % os.getpid(), 0)
        except OSError as error:
            holder = _holder(handle)
            os.close(handle)
            if not isinstance(error, BlockingIOError):
                _log.warning("host_lock_unusable", file=str(self._file), reason=str(error.strerror or error))
                return ""
            return f"another engine runs on this host: process {holder} holds {self._file}"
        self._handle = handle
        return ""

    def release(self) -> None:
        """Let another engine have it. The end of the process does the same."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _open(self) -> int:
        """The file, inside a folder that is ours alone; links are not followed. Raises OSError."""
        self._file.parent.mkdir(mode=0o700, exist_ok=True)
        folder = os.open(self._file.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            found = os.fstat(folder)
            if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & (stat.S_IWGRP | stat.S_IWOTH):
                raise PermissionError(0, f"{self._file.parent} must be a folder that only this user may write")
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            return os.open(self._file.name, flags, 0o600, dir_fd=folder)
        finally:
            os.close(folder)


def _holder(handle: int) -> str:
    """The number that the holder has written; it may be about to."""
    said = os.pread(handle, 16, 0).strip()
    return said.decode() if said.isdigit() else "unknown"
