"""Rows of usage on their way to storage: noted beside the requests, written in batches, and never waited for."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

from service.errors import StorageUnavailable
from service.observability.logging import get_logger
from service.storage.usage import DAY, UsageRow

log = get_logger(__name__)

FLUSH_INTERVAL = 0.5
"""Seconds between two writes. With the write itself it stays below the second that kill -9 may lose."""

MAX_PENDING = 100_000
"""Rows that wait for a store that cannot be written: 50 MB, and half a day at two requests a second."""

BATCH = 500
"""Rows in one transaction: 20 to 60 ms of the one writer, where there are so many."""

CLOSE_TIMEOUT = 5.0
CLOSE_RETRY = 0.1

PRUNE_INTERVAL = 3600.0
PRUNE_BATCH = 1000
"""Rows that one transaction forgets; until all are gone there is one after each flush."""

KEEP_DAYS = 400

Write = Callable[[Sequence[UsageRow]], Awaitable[None]]
Prune = Callable[[float, int], Awaitable[int]]


class UsageLog:
    """Holds what is not written yet, oldest first. Belongs to the event loop's thread.

    `write` appends rows, once for each id however often it is given them; `prune` forgets what ended before a time,
    so many at most, and returns how many. Both raise StorageUnavailable. `on_lost` is told how many rows were given
    up. `clock` is monotonic, `now` wall time.
    """

    def __init__(
        self,
        write: Write,
        *,
        on_lost: Callable[[int], None],
        prune: Prune | None = None,
        keep_days: int = KEEP_DAYS,
        capacity: int = MAX_PENDING,
        batch: int = BATCH,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._write = write
        self._on_lost = on_lost
        self._prune = prune
        self._keep = keep_days * DAY
        self._capacity = capacity
        self._batch = batch
        self._clock = clock
        self._now = now
        self._pending: deque[UsageRow] = deque()
        self._taken = 0
        self._writing = asyncio.Lock()
        self._failing = False
        self._losing = False
        self._pruned_at = -math.inf

    @property
    def pending(self) -> int:
        """Rows that are not known to be written. Any thread may ask."""
        return len(self._pending) + self._taken

    def note(self, row: UsageRow) -> None:
        """Take a row to be written; returns at once. When there are too many, the oldest is given up."""
        self._pending.append(row)
        if self.pending <= self._capacity:
            return
        self._pending.popleft()
        self._on_lost(1)
        if not self._losing:
            self._losing = True
            log.error("usage_rows_lost", pending=self.pending)

    async def flush(self) -> None:
        """Write what is pending now, or up to what cannot be written: that stays, also when the caller is cancelled."""
        async with self._writing:
            for _ in range(math.ceil(len(self._pending) / self._batch)):
                if not await self._write_some():
                    return

    async def close(self, timeout: float = CLOSE_TIMEOUT) -> None:
        """Write what is left, in several attempts if need be; after `timeout` seconds the rest is given up.

        Nothing may be noted any more, and nobody may follow.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while self._pending:
                    await self.flush()
                    await asyncio.sleep(CLOSE_RETRY if self._pending else 0)
        if self._pending:
            log.error("usage_rows_lost", lost=self.pending)
            self._on_lost(self.pending)

    async def _write_some(self) -> bool:
        """One transaction. False when storage did not take it, or nobody knows whether it did."""
        taken = [self._pending.popleft() for _ in range(min(self._batch, len(self._pending)))]
        self._taken = len(taken)
        written = False
        try:
            await self._write(taken)
            written = True
        except StorageUnavailable:
            self._say_failing()
        finally:
            self._taken = 0
            if not written:
                self._pending.extendleft(reversed(taken))
        if written:
            self._say_written()
        return written

    def _say_failing(self) -> None:
        """Once, not twice a second."""
        if not self._failing:
            self._failing = True
            log.warning("usage_not_written", pending=self.pending)

    def _say_written(self) -> None:
        if self._failing:
            log.info("usage_written_again", pending=self.pending)
        self._failing = self._losing = False

    async def follow(
        self, interval: float = FLUSH_INTERVAL, sleep: Callable[[float], Awaitable[object]] = asyncio.sleep
    ) -> None:
        """Write every `interval` seconds until cancelled, and forget what is too old, once an hour."""
        while True:
            await sleep(interval)
            await self.flush()
            await self._forget_some()

    async def _forget_some(self) -> None:
        """One batch when it is time; the hour begins when there was less than a batch, or when storage failed."""
        if self._prune is None or self._clock() - self._pruned_at < PRUNE_INTERVAL:
            return
        began = self._clock()
        try:
            gone = await self._prune(self._now() - self._keep, PRUNE_BATCH)
        except StorageUnavailable:
            gone = 0
        if gone < PRUNE_BATCH:
            self._pruned_at = began
