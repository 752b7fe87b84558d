"""The log as a file of ours, which others may rename, as newsyslog does.

Once another file is at the path, that is where the next lines go; SIGHUP says so too, and makes one that is not there.
Rotation, counts and sizes are theirs. Lines that wait when it is opened anew go to the new file; none is cut in two.
"""

from __future__ import annotations

import errno
import os
import stat
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
        self._current = _open(path)
        self._descriptor = Descriptor(self._current)

    def reopen(self) -> None:
        """Make the file where there is none, so that what comes from now on goes there. Any thread.

        Raises OSError, and then all goes on in the former file. That one is closed by the writer, between two lines,
        which looks at the path by itself: what a rotation hands over could be a file that the next one has taken away.
        """
        os.close(_open(self.path))

    def write(self, lines: Sequence[str]) -> int:
        """See `log_queue.Outlet`."""
        if self._replaced():
            with suppress(OSError):  # then all goes on in the former file
                opened = _open(self.path)
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
