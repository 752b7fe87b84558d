"""Who may come in: what the API asks, and the parts behind it, built from the settings, run and closed together.

A configuration that cannot be used (a pepper file that others may read, say) is an error at start. A database that
cannot be reached is not: the service stays up, answers 503 to every credential, and tries again. Where
authentication is off there is neither a database nor a pepper.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from service.auth import development
from service.auth.authenticator import Authenticator
from service.auth.denial_store import DatabaseDenialStore
from service.auth.denied import DenyList
from service.auth.failure_audit import AuthFailure, FailureAudit
from service.auth.issuers import Issuers
from service.auth.jwt import Issuer, TokenVerifier
from service.auth.key_store import DatabaseKeyStore
from service.auth.keyring import KeyRing
from service.auth.pepper import SECRET_BYTES, Peppers, pepper_file
from service.auth.revocation import RunningGrants
from service.errors import StorageUnavailable
from service.observability.logging import get_logger
from service.observability.metrics import Metrics
from service.settings import AuthSettings, ConfigurationError, Settings
from service.storage import audit, telemetry
from service.storage.connection import Connection
from service.storage.database import Database
from service.storage.opening import OpeningDatabase, Storage

log = get_logger(__name__)

RETRY_INTERVAL = 2.0
"""Seconds between two attempts to reach the database."""

OPEN_PATIENCE = 5.0
"""Seconds that the server waits for the database before it answers anybody."""

CLOSE_TIMEOUT = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessControl:
    """What the API asks. Belongs to the event loop's thread.

    `ready` tells whether a credential could be verified, `storage_up` whether storage answers at the moment; None
    where there is none.
    """

    authenticator: Authenticator
    running: RunningGrants
    failures: FailureAudit
    storage: Storage
    peppers: Peppers
    ready: Callable[[], bool]
    storage_up: Callable[[], bool | None] = lambda: None
    issuers: Iterable[Issuer] = ()


@dataclass(frozen=True, slots=True)
class DevelopmentKey:
    """The key that is kept in clear, and where."""

    text: str = field(repr=False)
    file: Path


class Telemetry:
    """Counts what verification did not foresee, and how looks at an issuer's keys end."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def internal_error(self, where: str) -> None:
        self._metrics.internal_errors.labels(where).inc()

    def key_set(self, issuer: str, outcome: str) -> None:
        self._metrics.jwks_refreshes.labels(issuer, outcome).inc()

    def issuer_gone(self, issuer: str) -> None:
        for gauge in (self._metrics.jwks_keys, self._metrics.jwks_age):
            gauge.remove(issuer)


class AccessService:
    """The parts behind an AccessControl, over the life of the process. Opens nothing when it is made.

    Raises ConfigurationError for peppers and issuers that cannot be used. `now` is wall time.
    """

    def __init__(self, settings: Settings, metrics: Metrics, *, now: Callable[[], float] = time.time) -> None:
        auth, folder = settings.auth, settings.server.state_dir
        self._settings = settings
        self._telemetry = Telemetry(metrics)
        self._now = now
        self._database = OpeningDatabase(self._connector(telemetry.Telemetry(metrics)))
        self._prepared = False
        self._problem = ""
        path = pepper_file(auth, folder)
        # Where nobody is asked nothing is kept, so this one is never used.
        self._peppers = Peppers.open(path) if auth.enabled else Peppers(path, {1: secrets.token_bytes(SECRET_BYTES)})
        self._issuers = Issuers(auth.issuers, self._telemetry.key_set)
        store = DatabaseKeyStore(self._database)
        self._keys = KeyRing(store, self._peppers, touch=store.touch, stale_for=auth.stale_for, now=now)
        self._denials = DenyList(DatabaseDenialStore(self._database), stale_for=auth.stale_for, now=now)
        tokens = TokenVerifier(self._issuers, self._denials, self._telemetry, now=now)
        self.development_key: DevelopmentKey | None = None
        self.control = AccessControl(
            authenticator=Authenticator((self._keys, tokens), enabled=auth.enabled),
            running=RunningGrants(),
            failures=FailureAudit(self._write_failures, now=now),
            storage=self._database,
            peppers=self._peppers,
            ready=lambda: self._prepared or not auth.enabled,
            storage_up=lambda: self._keys.reached if auth.enabled else None,
            issuers=self._issuers,
        )
        self._keys.on_poll(self._denials.up_to)
        self._keys.on_change(self.control.running.recheck)
        self._denials.on_change(self.control.running.recheck)

    def _connector(self, counts: telemetry.Telemetry) -> Callable[[], Database]:
        storage, folder = self._settings.storage, self._settings.server.state_dir
        return lambda: Database.open(storage, folder, migrate=True, clock=self._now, telemetry=counts)

    def open(self) -> bool:
        """Reach the database and make what must be in it; False when it cannot be reached, for `run` to try again.

        Blocks. Raises ConfigurationError. Harmless when it is open.
        """
        if self._prepared or not self._settings.auth.enabled:
            return True
        try:
            database = self._database.open()
            self._keep_development_key(database)
            database.write(self._note_start).result()
        except StorageUnavailable as error:
            self._say(error.message)
            return False
        self._prepared = True
        return True

    def _say(self, problem: str) -> None:
        """Once for each problem, not at each attempt."""
        if problem != self._problem:
            self._problem = problem
            log.error("storage_not_opened", error=problem, retry=RETRY_INTERVAL)

    def _keep_development_key(self, database: Database) -> None:
        path = self._settings.server.state_dir / development.FILE_NAME
        if self._settings.auth.development_key:
            text = development.ensure(database, self._peppers, path, now=self._now)
            self.development_key = DevelopmentKey(text, path)
        else:
            development.withdraw(database, self._peppers, path, now=self._now)

    def _note_start(self, connection: Connection) -> None:
        settings = self._settings
        detail: dict[str, audit.Value] = {
            "host": settings.server.host,
            "authentication": settings.auth.enabled,
            "issuers": [issuer.name for issuer in settings.auth.issuers],
            "development_key": settings.auth.development_key,
            "trusted_proxies": settings.server.trusted_proxies,
            "tls": settings.server.tls_certificate is not None,
        }
        audit.append(connection, "configuration_loaded", actor="service", at=self._now(), detail=detail)

    @asynccontextmanager
    async def run(self) -> AsyncIterator[None]:
        """Follow keys, deny-list and issuers while the block runs; then write what is pending."""
        self.control.authenticator.announce()
        if not self._settings.auth.enabled:
            yield
            return
        tasks = [self._task("storage", self._open_until_it_is())]
        await asyncio.wait(tasks, timeout=OPEN_PATIENCE)
        tasks += [
            self._task("keys", self._keys.run()),
            self._task("auth-failures", self.control.failures.follow()),
        ]
        self._issuers.run(self._task)
        try:
            yield
        finally:
            await self._end([*tasks, *self._issuers.stop()])

    async def _open_until_it_is(self) -> None:
        while True:
            try:
                if await asyncio.to_thread(self.open):
                    return
            except ConfigurationError as error:  # what is being mended may be wrong in another way meanwhile
                self._say(str(error))
            await asyncio.sleep(RETRY_INTERVAL)

    async def _end(self, tasks: Sequence[asyncio.Task[None]]) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._write_pending()

    async def _write_pending(self) -> None:
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT):
                await self._keys.close()
                await self.control.failures.flush()
        except TimeoutError:
            log.warning("storage_write_overdue", timeout=CLOSE_TIMEOUT)

    async def close(self) -> None:
        """Write what is pending and close the database, or give up after a while. Harmless in every state."""
        await self._write_pending()
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT):
                await asyncio.to_thread(self._database.close)
        except TimeoutError:
            log.warning("storage_close_overdue", timeout=CLOSE_TIMEOUT)

    def prepared(self, auth: AuthSettings) -> Callable[[], None]:
        """Call what it returns, on the event loop, to have these issuers from then on; nothing changes before.

        Any thread; reads files. Raises ConfigurationError.
        """
        issuers = self._issuers.opened(auth.issuers)

        def replace() -> None:
            for gone in {each.settings.name for each in self._issuers} - {each.settings.name for each in issuers}:
                self._telemetry.issuer_gone(gone)
            self._issuers.replace(issuers)

        return replace

    async def refresh(self) -> None:
        """Look at once at what is looked at from time to time: keys, deny-list, keys of issuers."""
        if self._settings.auth.enabled:
            await asyncio.gather(self._keys.refresh(), self._issuers.refresh())

    def _task(self, name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        """One that dies is a bug. Nobody comes in by what it knew for longer than `auth.stale_for`."""
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("access_task_died", task=task.get_name(), exc_info=error)
            self._telemetry.internal_error("access")

    async def _write_failures(self, failures: Sequence[AuthFailure]) -> None:
        await asyncio.wrap_future(self._database.write(lambda connection: _append(connection, failures)))


def _append(connection: Connection, failures: Sequence[AuthFailure]) -> None:
    for one in failures:
        detail: dict[str, audit.Value] = {
            "reason": one.reason,
            "address": one.address,
            "request_id": one.request_id,
            "unrecorded": one.unrecorded,
        }
        audit.append(connection, "authentication_failed", actor="stranger", at=one.at, detail=detail)
