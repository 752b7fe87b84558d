"""A reload: the log file opened anew, the configuration read again, and what of it can be changed put in force.

All of it or nothing, and never the model. What differs and needs a restart is named, in the log and in
`/admin/status`. `settings/changes.py` has which keys are which.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from service.observability.logging import get_logger, reopen, set_level
from service.observability.reloads import Reload, Reloads
from service.settings import ConfigurationError, Settings
from service.settings.changes import RELOADABLE, changed, with_keys

log = get_logger(__name__)


class Reloadable(Protocol):
    """What runs on settings that may change."""

    def prepared(self, settings: Settings) -> Callable[[], None]:
        """Call what it returns, on the event loop, to have `settings` in force. Any thread; may read files.

        Raises ConfigurationError; nothing has changed then.
        """

    async def refresh(self) -> None:
        """Look at once at what is looked at from time to time anyway: keys of ours and of issuers."""


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A reload that may be carried out. `settings` are what runs then."""

    settings: Settings
    applied: tuple[str, ...]
    restart_needed: tuple[str, ...]
    put_in_force: Callable[[], None]


class Reloader:
    """Belongs to the event loop's thread. `load` reads the settings as at the start, and raises ConfigurationError.

    `running` are those that the service was started with; `now` is Unix time.
    """

    def __init__(
        self,
        running: Settings,
        load: Callable[[], Settings],
        target: Reloadable,
        reloads: Reloads,
        *,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._running = running
        self._load = load
        self._target = target
        self._reloads = reloads
        self._now = now

    async def follow(self, wanted: asyncio.Event) -> None:
        """Reload each time that `wanted` is set, until cancelled. What comes during a reload is one more."""
        while True:
            await wanted.wait()
            wanted.clear()
            await self.reload()

    async def reload(self) -> None:
        """One reload. How it ended is logged, counted, and kept for `/admin/status`."""
        try:
            prepared = await asyncio.to_thread(self._prepare)
        except ConfigurationError as error:
            self._failed(str(error).splitlines())
            return
        prepared.put_in_force()
        if "log.level" in prepared.applied:  # otherwise what an operator has set since stays
            set_level(prepared.settings.log.level)
        self._running = prepared.settings
        self._reloads.note(Reload(at=self._now(), applied=prepared.applied, restart_needed=prepared.restart_needed))
        say = log.warning if prepared.restart_needed else log.info
        say("reloaded", applied=prepared.applied, restart_needed=prepared.restart_needed)
        await self._target.refresh()

    def _failed(self, problems: list[str]) -> None:
        last = self._reloads.last
        restart_needed = () if last is None else last.restart_needed
        self._reloads.note(Reload(at=self._now(), problems=problems, restart_needed=restart_needed))
        log.error("reload_failed", problems=problems)

    def _prepare(self) -> _Prepared:
        """On a thread: disks may be slow. The log comes first: it was renamed, whatever the configuration says."""
        try:
            reopen()
        except OSError as error:
            raise ConfigurationError(f"log.file: cannot be opened anew: {error.strerror}") from None
        found = self._load()
        keys = changed(self._running, found)
        applied = tuple(key for key in keys if key in RELOADABLE)
        settings = with_keys(self._running, found, applied)
        return _Prepared(
            settings=settings,
            applied=applied,
            restart_needed=tuple(key for key in keys if key not in RELOADABLE),
            put_in_force=self._target.prepared(settings),
        )
