"""Refused credentials in the audit log: a sample, capped, written beside the requests and never by them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from service.errors import StorageUnavailable
from service.observability.logging import get_logger

log = get_logger(__name__)

PER_MINUTE = 30
MAX_PENDING = 300
"""Failures that wait for a store that cannot be written; beyond that they are only counted."""

FLUSH_INTERVAL = 2.0
WINDOW = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AuthFailure:
    """One refused credential, `at` seconds since the epoch. `unrecorded` others before it were kept out by the cap."""

    reason: str
    address: str
    request_id: str
    at: float
    unrecorded: int = 0


Write = Callable[[Sequence[AuthFailure]], Awaitable[object]]


class FailureAudit:
    """Keeps the first `per_minute` failures of each minute and counts the others. Belongs to the event loop's thread.

    `write` takes what is pending and raises StorageUnavailable when it cannot; `clock` is monotonic, `now` wall time.
    """

    def __init__(
        self,
        write: Write,
        *,
        per_minute: int = PER_MINUTE,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._write = write
        self._per_minute = per_minute
        self._clock = clock
        self._now = now
        self._window_began = clock()
        self._in_window = 0
        self._unrecorded = 0
        self._pending: list[AuthFailure] = []

    def note(self, *, reason: str, address: str, request_id: str) -> None:
        """Take note of one failure; returns at once."""
        now = self._clock()
        if now - self._window_began >= WINDOW:
            self._window_began, self._in_window = now, 0
        if self._in_window >= self._per_minute or len(self._pending) >= MAX_PENDING:
            self._unrecorded += 1
            return
        self._in_window += 1
        unrecorded, self._unrecorded = self._unrecorded, 0
        failure = AuthFailure(
            reason=reason, address=address, request_id=request_id, at=self._now(), unrecorded=unrecorded
        )
        self._pending.append(failure)

    async def flush(self) -> None:
        """Write what is pending; what cannot be written stays, also when the caller is cancelled."""
        taken, self._pending = self._pending, []
        if not taken:
            return
        try:
            await self._write(taken)
        except StorageUnavailable:
            log.warning("auth_failures_not_audited", count=len(taken))
            self._pending = taken + self._pending
        except asyncio.CancelledError:
            self._pending = taken + self._pending
            raise

    async def follow(
        self, interval: float = FLUSH_INTERVAL, sleep: Callable[[float], Awaitable[object]] = asyncio.sleep
    ) -> None:
        """Write every `interval` seconds until cancelled."""
        while True:
            await sleep(interval)
            await self.flush()
