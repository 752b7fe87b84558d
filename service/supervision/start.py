"""This start: what the ledger says about it, and what it says to the ledger."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

from service.errors import NotEnoughMemory
from service.observability.logging import get_logger
from service.observability.process import boot_time, is_running
from service.settings import Settings
from service.supervision.attempts import LONGEST_PAUSE, Attempts, Need
from service.supervision.host_lock import HostLock, host_lock_file
from service.supervision.memory import require
from service.supervision.policy import Verdict, judge
from service.supervision.starts import StartLedger, StartRecord

_log = get_logger(__name__)

SAFE_BUDGET_SHARE = 0.5

RECORD_TIMEOUT = 2.0
"""Seconds that the end waits for the ledger's disk."""

FINAL = (os.EX_UNAVAILABLE,)
"""Codes that under a supervisor become 0, which keeps it from trying again: patience is over by then."""


class Start:
    """One start of the service. Unsupervised it only hands through what it is given, and knows no ledger.

    `verdict` is what earlier starts say about this one.
    """

    def __init__(self, settings: Settings, ledger: StartLedger | None = None, verdict: Verdict | None = None) -> None:
        self.verdict = verdict or Verdict()
        self.settings = _with_less(settings) if self.verdict.safe_mode else settings
        self.lock = _lock(settings, supervised=ledger is not None)
        self._ledger = ledger
        self._record: StartRecord | None = None
        self._guard = threading.Lock()

    @property
    def supervised(self) -> bool:
        return self._ledger is not None

    def attempts(self, *needs: Need) -> Attempts:
        """How this start loads: after its delay, when it has `needs` and is the only engine on this host."""
        wanted = self.settings.supervised
        return Attempts(
            delay=self.verdict.delay,
            because="the last starts failed" if self.verdict.delay else "",
            patience=wanted.give_up_after if self.supervised else 0.0,
            needs=(*needs, *(() if self.lock is None else (self.lock.take,))),
            first=wanted.backoff_first,
            longest=min(LONGEST_PAUSE, wanted.backoff_max),
        )

    def room(self, need: int) -> None:
        """A load takes `need` bytes. Raises NotEnoughMemory where that is refused; in a shell it is only told."""
        try:
            require(need)
        except NotEnoughMemory as error:
            if self.supervised:
                raise
            _log.warning("memory_low", reason=error.message)

    def begin(self) -> None:
        """Put this start into the ledger. What it does not end in there, it died of. Blocks for a disk."""
        if self._ledger is None:
            return
        now = self._ledger.now()
        self._note(StartRecord(began=now, pid=os.getpid(), safe_mode=self.verdict.safe_mode))
        if self.verdict.safe_mode:
            _log.warning("safe_mode", reason=self.verdict.safe_mode, max_rows=self.settings.engine.max_rows)

    def ready(self) -> None:
        """It serves. Blocks for a disk; any thread."""
        if self._ledger is not None:
            self._change(ready=self._ledger.now())

    def end(self, code: int, reason: str = "") -> int:
        """It ends, with the code that this returns: 0 where a supervisor would only try the hopeless again. Any thread.

        Waits for the disk for a bounded time.
        """
        if self._ledger is None:
            return code
        code = os.EX_OK if code in FINAL else code
        if reason and code == os.EX_OK:
            _log.error("stays_down", reason=reason)
        writing = threading.Thread(
            target=self._change, kwargs={"ended": self._ledger.now(), "exit_code": code, "reason": reason}, daemon=True
        )
        writing.start()
        writing.join(RECORD_TIMEOUT)
        return code

    def leaving(self, leave: Callable[[int], object]) -> Callable[[int], object]:
        """`leave`, for an end on the spot, which is put into the ledger before."""
        return lambda code: leave(self.end(code))

    def _change(self, **what: object) -> None:
        with self._guard:
            if self._record is not None:
                self._note(self._record.model_copy(update=what))

    def _note(self, record: StartRecord) -> None:
        self._record = record
        if self._ledger is not None:
            self._ledger.put(record)


def prepare(settings: Settings, *, supervised: bool) -> Start:
    """This process' start, judged by those before it but not yet in the ledger. Reads a small file; raises nothing."""
    if not supervised:
        return Start(settings)
    ledger = StartLedger(settings.server.state_dir)
    earlier = [
        start for start in ledger.read().starts if start.ended is not None or not is_running(start.pid, start.began)
    ]
    return Start(settings, ledger, judge(earlier, settings.supervised, now=ledger.now(), boot=boot_time()))


def _with_less(settings: Settings) -> Settings:
    """Safe mode: one row at a time in half the memory, which is what kept machines up that went down with more."""
    share = settings.engine.memory_budget_share * SAFE_BUDGET_SHARE
    engine = settings.engine.model_copy(update={"max_rows": 1, "memory_budget_share": share})
    return settings.model_copy(update={"engine": engine})


def _lock(settings: Settings, *, supervised: bool) -> HostLock | None:
    """In a shell only where a file is named: `make serve` and `make test` may run beside each other."""
    match settings.supervised.host_lock:
        case "off":
            return None
        case "auto":
            return HostLock(host_lock_file()) if supervised else None
        case file:
            return HostLock(Path(file))
