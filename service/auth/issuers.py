"""The issuers in force, with the tasks that follow their keys; all of them may be replaced while the service runs.

Belongs to the event loop's thread, but for `opened`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Sequence
from functools import partial
from typing import Any

from service.auth.jwt import Issuer
from service.auth.key_sets import KeySet, open_issuer
from service.settings import IssuerSettings

SOURCE = ("name", "algorithms", "jwks_file", "jwks_url", "jwks_ttl", "jwks_ca_file", "allow_private_addresses")
"""Settings that say which keys an issuer has. Where they stay, keys that were had stay too."""

Start = Callable[[str, Coroutine[Any, Any, None]], asyncio.Task[None]]


class Issuers:
    """Iterates over what is in force. `on_load` is told an issuer's name and how each look at its keys ended.

    Raises ConfigurationError for a secret or an authority that cannot be used.
    """

    def __init__(self, settings: Sequence[IssuerSettings], on_load: Callable[[str, str], object]) -> None:
        self._on_load = on_load
        self._start: Start | None = None
        self._tasks: dict[KeySet, asyncio.Task[None]] = {}
        self._issuers: tuple[Issuer, ...] = ()
        self._issuers = tuple(self.opened(settings))

    def __iter__(self) -> Iterator[Issuer]:
        return iter(self._issuers)

    def opened(self, settings: Sequence[IssuerSettings]) -> Sequence[Issuer]:
        """What `replace` wants; changes nothing. Reads files: any thread. Raises ConfigurationError.

        A shared secret is read anew. Keys from elsewhere are taken over where they still come from the same place.
        """
        former = {issuer.settings.name: issuer for issuer in self}
        return [self._opened(each, former.get(each.name)) for each in settings]

    def _opened(self, settings: IssuerSettings, former: Issuer | None) -> Issuer:
        if former is not None and isinstance(former.keys, KeySet) and _source(former.settings) == _source(settings):
            return Issuer(settings, former.keys)
        return open_issuer(settings, partial(self._on_load, settings.name))

    def replace(self, issuers: Sequence[Issuer]) -> None:
        """These and no others from now on. Tokens of one that is gone are refused; requests that run go on."""
        self._issuers = tuple(issuers)
        if self._start is not None:
            self._follow(self._start)

    def run(self, start: Start) -> None:
        """Follow the keys of all there are, with tasks that `start` makes, until `stop`."""
        self._start = start
        self._follow(start)

    def stop(self) -> Sequence[asyncio.Task[None]]:
        """Cancel the tasks; returns them, to be waited for."""
        self._start = None
        tasks = list(self._tasks.values())
        self._tasks.clear()
        for task in tasks:
            task.cancel()
        return tasks

    def _follow(self, start: Start) -> None:
        wanted = self._key_sets()
        for gone in self._tasks.keys() - wanted:
            self._tasks.pop(gone).cancel()
        self._tasks |= {keys: start("issuer", keys.follow()) for keys in wanted - self._tasks.keys()}

    def _key_sets(self) -> set[KeySet]:
        return {issuer.keys for issuer in self if isinstance(issuer.keys, KeySet)}

    async def refresh(self) -> None:
        """Ask every source of keys now. One that fails is logged, counted, and harms nobody."""
        await asyncio.gather(*(keys.refresh() for keys in self._key_sets()))


def _source(settings: IssuerSettings) -> tuple[object, ...]:
    return tuple(getattr(settings, name) for name in SOURCE)
