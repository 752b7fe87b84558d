"""The log as a file of ours, which others may rename, as newsyslog does.

Once another file is at the path, that is where the next lines go; SIGHUP says so too, and makes one that is not there.
Rotation, counts and sizes are theirs. Lines that wait when it is opened anew go to the new file; none is cut in two.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from service.observability.log_queue import Descriptor


class LogFile:
    """An outlet that appends to `path`; a file that is not there is made (0600), its folder is not.

    Raises OSError when it cannot be opened, or is no plain file. `write` belongs to the writer's thread.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._current = _open(path)
        self._next: int | None = None
        self._descriptor = Descriptor(self._current)

    def reopen(self) -> None:
        """Write what comes from now on to what is at the path by now. Any thread.

        Raises OSError, and then all goes on in the former file. That one is closed by the writer, between two lines.
        """
        opened = _open(self.path)
        with self._lock:
            overtaken, self._next = self._next, opened
        if overtaken is not None:
            os.close(overtaken)

    def write(self, lines: Sequence[str]) -> int:
        """See `log_queue.Outlet`."""
        with self._lock:
            opened, self._next = self._next, None
        if opened is None and self._replaced():
            with suppress(OSError):  # then all goes on in the former file
                opened = _open(self.path)
        if opened is not None:
            os.close(self._current)
            self._current, self._descriptor = opened, Descriptor(opened)
        return self._descriptor.write(lines)

    def _replaced(self) -> bool:
        """Whether another file is at the path. While none is there, somebody may be about to make it."""
        try:
            return not os.path.samestat(self.path.stat(), os.fstat(self._current))
        except OSError:
            return False


def _open(path: Path) -> int:
    """O_NONBLOCK matters for what is refused then: a FIFO without a reader would hold up whoever opens it."""
    found = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    if not stat.S_ISREG(os.fstat(found).st_mode):
        os.close(found)
        raise OSError(errno.EINVAL, "not a plain file", str(path))
    return found
