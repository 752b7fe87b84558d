"""When each key was last used, written in batches: a request never waits for it, and a busy key costs one row."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from service.errors import StorageUnavailable
from service.observability.logging import get_logger

log = get_logger(__name__)

FLUSH_INTERVAL = 30.0
"""Seconds between two writes; what a crash loses of `last_used_at`."""

Touch = Callable[[Mapping[str, float]], Awaitable[object]]


class LastUsed:
    """The latest use of each key since the last write. Belongs to the event loop's thread.

    `touch` writes kid -> seconds since the epoch, and raises StorageUnavailable when it cannot. One time is held
    for each key that was verified, so this is as bounded as the keys are.
    """

    def __init__(self, touch: Touch) -> None:
        self._touch = touch
        self._pending: dict[str, float] = {}

    def note(self, kid: str, at: float) -> None:
        self._pending[kid] = at

    async def flush(self) -> None:
        """Write what is pending. What cannot be written stays pending, also when the caller is cancelled."""
        taken, self._pending = self._pending, {}
        if not taken:
            return
        try:
            await self._touch(taken)
        except StorageUnavailable:
            log.warning("last_used_not_written", keys=len(taken))
            self._pending = taken | self._pending
        except asyncio.CancelledError:
            self._pending = taken | self._pending
            raise

    async def follow(
        self, interval: float = FLUSH_INTERVAL, sleep: Callable[[float], Awaitable[object]] = asyncio.sleep
    ) -> None:
        """Write every `interval` seconds until cancelled."""
        while True:
            await sleep(interval)
            await self.flush()
