"""What the service wrote about itself: its last start, and the last lines of a log.

Read by whoever asks, root too, from folders that the service may write: so links are not followed, little is read, and
what is not as expected counts as nothing. Nothing here raises.
"""

from __future__ import annotations

import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path

FILE_NAME = "starts.json"
LIMIT = 64 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class LastStart:
    """Seconds since the epoch, or None where that did not happen. `reason` and `safe_mode` may be empty."""

    began: float | None
    ready: float | None
    ended: float | None
    exit_code: int | None
    reason: str
    safe_mode: str


def last_start(state: Path) -> LastStart | None:
    """The newest entry of the file in `state`; None when there is none that can be read."""
    try:
        found = json.loads(_end(state / FILE_NAME))["starts"][-1]
        return LastStart(
            began=_number(found.get("began")),
            ready=_number(found.get("ready")),
            ended=_number(found.get("ended")),
            exit_code=code if isinstance(code := found.get("exit_code"), int) else None,
            reason=str(found.get("reason") or ""),
            safe_mode=str(found.get("safe_mode") or ""),
        )
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError):
        return None


def last_lines(path: Path, count: int) -> list[str]:
    """At most `count` lines; none when there is no such file."""
    try:
        return _end(path).decode("utf-8", "replace").splitlines()[-count:]
    except (OSError, ValueError):
        return []


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


def _end(path: Path) -> bytes:
    """The last LIMIT bytes of a plain file."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(handle, "rb") as file:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("is no plain file")
        file.seek(max(0, found.st_size - LIMIT))
        return file.read(LIMIT)
