"""The keys of an issuer over time: asked for regularly, kept while they cannot be had, never on the event loop.

A task follows the source. A request only waits for it when there are no keys at all, or when a token names a key
that is not known; both at most once in `retry` seconds, shared by everybody who waits. So a flood of tokens with
made-up key ids costs one look, and a key withdrawn by the issuer is refused after one interval at most.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Protocol

from service.auth.jwks import MAX_BYTES, KeySetError, ParsedKeys, parse_key_set
from service.auth.jwks_https import HttpsSource, tls_context
from service.auth.jwt import BoundKey, Issuer, KeysHealth, bind
from service.errors import IssuerUnavailable
from service.observability.logging import get_logger
from service.settings import ConfigurationError, IssuerSettings, read_private

log = get_logger(__name__)

STALE_LIMIT = 24 * 3600.0
"""Seconds for which keys are gone by while their source fails."""

FILE_INTERVAL = 1.0
URL_RETRY = 30.0
MIN_SECRET_BYTES = 32


def unheard(outcome: str) -> None:
    """Nobody counts."""


class Source(Protocol):
    """Where a key set comes from."""

    async def load(self) -> bytes | None:
        """The document; None when it has not changed since the last call. Raises KeySetError."""


class KeySet:
    """The keys of one source. `interval` and `retry` are seconds; `clock` is monotonic, `jitter` within [0, 1).

    `on_load` is told how each look at the source ended, `success` or `failure`. Belongs to the event loop's thread.
    """

    def __init__(
        self,
        issuer: str,
        source: Source,
        algorithms: Sequence[str],
        *,
        interval: float,
        retry: float,
        on_load: Callable[[str], object] = unheard,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._issuer = issuer
        self._source = source
        self._algorithms = algorithms
        self._interval = interval
        self._retry = retry
        self._on_load = on_load
        self._clock = clock
        self._jitter = jitter
        self._keys = ParsedKeys()
        self._fresh_at: float | None = None
        self._error: str | None = None
        self._next_look = clock()
        self._running: asyncio.Task[None] | None = None

    async def find(self, kid: str | None) -> BoundKey | None:
        """See `jwt.Keys`. Waits for the source at most once in `retry` seconds."""
        if not self._usable() and not (await self._look_again() and self._usable()):
            raise IssuerUnavailable(
                "The token cannot be verified at the moment.", retry_after=max(1.0, self._next_look - self._clock())
            )
        key = self._keys.find(kid)
        if key is None and kid is not None and await self._look_again():
            key = self._keys.find(kid)
        return key

    @property
    def health(self) -> KeysHealth:
        age = None if self._fresh_at is None else self._clock() - self._fresh_at
        return KeysHealth(len(self._keys.keys), sum(self._keys.skipped.values()), age, self._error)

    def _usable(self) -> bool:
        return self._fresh_at is not None and self._clock() - self._fresh_at <= STALE_LIMIT

    async def _look_again(self) -> bool:
        if not self._asking() and self._clock() < self._next_look:
            return False
        await self.refresh()
        return True

    def _asking(self) -> bool:
        return self._running is not None and not self._running.done()

    async def refresh(self) -> None:
        """Ask the source; whoever comes while somebody asks already shares the answer."""
        if not self._asking():
            self._running = asyncio.create_task(self._load(), name=f"keys-{self._issuer}")
        assert self._running is not None
        # One who leaves must not take the answer from the others.
        await asyncio.shield(self._running)

    async def _load(self) -> None:
        began = self._clock()
        self._next_look = began + self._retry * (1 + 0.2 * self._jitter())
        try:
            document = await self._source.load()
            if document is not None:
                self._replace(await asyncio.to_thread(parse_key_set, document, self._algorithms))
            elif self._error is not None:
                self._on_load("failure")  # what was wrong with it still is
                return
            self._fresh_at = began
            self._on_load("success")
        except KeySetError as error:
            self._on_load("failure")
            if self._error != str(error):
                self._error = str(error)
                log.warning("issuer_keys_unavailable", issuer=self._issuer, error=self._error)

    def _replace(self, keys: ParsedKeys) -> None:
        if keys != self._keys or self._error is not None:
            log.info("issuer_keys", issuer=self._issuer, keys=len(keys.keys), skipped=dict(keys.skipped))
        self._keys, self._error = keys, None

    async def follow(self, sleep: Callable[[float], Awaitable[object]] = asyncio.sleep) -> None:
        """Ask every `interval` seconds, or after `retry` while that fails, until cancelled."""
        try:
            while True:
                await self.refresh()
                pause = self._interval if self._error is None else min(self._interval, self._retry)
                await sleep(pause * (1 - 0.1 * self._jitter()))
        finally:
            if self._running is not None:
                self._running.cancel()


class SecretKey:
    """The key of an issuer with a shared secret: one, without an id, for as long as this object is used."""

    def __init__(self, secret: bytes) -> None:
        self.key = bind(secret, "HS256")

    @property
    def health(self) -> KeysHealth:
        return KeysHealth(keys=1, skipped=0, age=0.0, error=None)

    async def find(self, kid: str | None) -> BoundKey | None:
        return self.key if kid is None else None


class FileSource:
    """A key set in a file, read in a thread when its time, size or inode has changed; replace it by renaming."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int, int] | None = None

    async def load(self) -> bytes | None:
        return await asyncio.to_thread(self._load)

    def _load(self) -> bytes | None:
        try:
            # Looked at before it is read: a change in between is seen again at the next look.
            found = self._path.stat()
            seen = (found.st_mtime_ns, found.st_size, found.st_ino)
            if seen == self._seen:
                return None
            if not self._path.is_file():
                raise KeySetError("is not a file")
            with self._path.open("rb") as file:
                document = file.read(MAX_BYTES + 1)
        except OSError as error:
            self._seen = None
            raise KeySetError(f"cannot be read: {error.strerror}") from None
        if len(document) > MAX_BYTES:
            raise KeySetError(f"has more than {MAX_BYTES} bytes")
        self._seen = seen
        return document


def open_issuer(settings: IssuerSettings, on_load: Callable[[str], object] = unheard) -> Issuer:
    """An issuer with its keys, not yet asked for. Raises ConfigurationError for a secret or authority it cannot use.

    `on_load` as in KeySet.
    """
    if settings.secret_file is not None:
        return Issuer(settings, SecretKey(read_secret(settings)))
    if settings.jwks_file is not None:
        source: Source = FileSource(settings.jwks_file)
        interval = retry = FILE_INTERVAL
    else:
        tls = tls_context(settings.jwks_ca_file)
        source = HttpsSource(settings.jwks_url, tls=tls, allow_private=settings.allow_private_addresses)
        interval, retry = float(settings.jwks_ttl), URL_RETRY
    keys = KeySet(settings.name, source, settings.algorithms, interval=interval, retry=retry, on_load=on_load)
    return Issuer(settings, keys)


def read_secret(settings: IssuerSettings) -> bytes:
    """The shared secret of an issuer that has one. Raises ConfigurationError."""
    assert settings.secret_file is not None
    where = f"auth.issuers: {settings.name}: {settings.secret_file}"
    try:
        secret = read_private(settings.secret_file).removesuffix(b"\n")
    except FileNotFoundError:
        raise ConfigurationError(f"{where}: there is no such file") from None
    if len(secret) < MIN_SECRET_BYTES:
        raise ConfigurationError(f"{where}: must hold {MIN_SECRET_BYTES} bytes or more")
    return secret
