"""The ledger of starts: when each of the last ones began, whether it became ready, how it ended. Any thread.

A small JSON file in the state directory (0600, replaced whole), written by supervised starts only. A start without an
end died: by a signal, an abort, or with the machine. Nothing about this file ever stops a start: one that is damaged,
or that cannot be written, is told in the log and counts as empty.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from service.observability.logging import get_logger
from service.settings import ConfigurationError, read_private, write_private

_log = get_logger(__name__)

FILE_NAME = "starts.json"

KEPT = 32
"""Starts that are remembered."""

MAX_REASON = 300
"""Characters of a reason, so that the file stays within what is read of it."""


class StartRecord(BaseModel):
    """One start. Times are seconds since the epoch; `pid` and `began` name it.

    `ready` is None while it never was. `exit_code` is None without an end that we saw; `reason` says why it ended,
    where that was not a plain stop. `safe_mode` says why it served with less, or nothing.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    began: float
    pid: int
    ready: float | None = None
    ended: float | None = None
    exit_code: int | None = None
    reason: str = ""
    safe_mode: str = ""

    @property
    def refused(self) -> bool:
        """Whether it ended by itself before it was ready, to stay down."""
        return self.exit_code == os.EX_OK and self.ready is None


class History(BaseModel):
    """What the file holds, oldest start first."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    starts: tuple[StartRecord, ...] = ()

    @property
    def down_because(self) -> str:
        """Why the last start stays down; empty where it runs, died, or was stopped."""
        last = self.starts[-1] if self.starts else None
        return last.reason if last is not None and last.refused else ""


class StartLedger:
    """The file in `state_dir`. Each change reads it anew, so that one process' change keeps another's.

    Two changes at the same instant may lose one of them; the starts of a state directory follow each other.
    """

    def __init__(self, state_dir: Path, *, now: Callable[[], float] = time.time) -> None:
        self.file = state_dir / FILE_NAME
        self.now = now

    def read(self) -> History:
        """What is known. Raises nothing."""
        try:
            return History.model_validate_json(read_private(self.file))
        except FileNotFoundError:
            return History()
        except (ConfigurationError, ValidationError) as error:
            _log.warning("starts_unreadable", file=str(self.file), reason=_brief(error))
            return History()

    def put(self, record: StartRecord) -> None:
        """Add the start, or replace what was said of it. Blocks for a disk. Raises nothing."""
        history = self.read()
        others = [each for each in history.starts if (each.pid, each.began) != (record.pid, record.began)]
        self._write(history.model_copy(update={"starts": (*others, record)[-KEPT:]}))

    def refuse(self, reason: str) -> None:
        """Note that this process' start stays down, because of its configuration."""
        now, ours = self.now(), [each for each in self.read().starts if each.pid == os.getpid() and each.ended is None]
        record = ours[-1] if ours else StartRecord(began=now, pid=os.getpid())
        self.put(record.model_copy(update={"ended": now, "exit_code": os.EX_OK, "reason": reason}))

    def _write(self, history: History) -> None:
        short = tuple(each.model_copy(update={"reason": each.reason[:MAX_REASON]}) for each in history.starts)
        data = history.model_copy(update={"starts": short}).model_dump_json(indent=1).encode()
        try:
            write_private(self.file, data, replace=True)
        except ConfigurationError as error:
            _log.warning("starts_not_written", file=str(self.file), reason=_brief(error))


def _brief(error: Exception) -> str:
    return str(error).splitlines()[0]
