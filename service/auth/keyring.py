"""API keys: which key a text is, and whether it lets in. Belongs to the event loop's thread.

A text that is not a key by form or checksum stops at once: that depends on the public format only. Every other
credential takes the same path, whether the key is unknown or the secret wrong, or the key revoked, expired, not
yet valid or used from elsewhere: find the record (or a stand-in), HMAC, compare in constant time, look at the
status; on any failure ask the store once, with a poll that began after the request came, and do it all again. So
a key works the moment it was created, and a flood of unknown keys costs one query at a time.

While the store cannot be read only two answers are certain. A key that is good in the snapshot stays good for
`stale_for` seconds after the last successful poll, and a revoked one (its secret shown) stays refused, because
revocation is final. For everything else the answer is StorageUnavailable, never a refusal: an unknown key may have
been created, an expired one extended; a wrong secret must look like an unknown key.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import StrEnum

from service.auth.key_format import PREFIX, MalformedKey, ParsedKey, parse
from service.auth.last_used import FLUSH_INTERVAL, LastUsed, Touch
from service.auth.pepper import Peppers
from service.auth.principal import Principal, Scope
from service.auth.snapshot import POLL_TIMEOUT, Follower, KeyStore, Snapshot
from service.errors import CredentialRevoked, ServiceError, StorageUnavailable, Unauthorized
from service.observability.logging import get_logger
from service.settings import ConfigurationError
from service.storage.keys import KeyRecord

log = get_logger(__name__)

POLL_INTERVAL = 0.25
"""Seconds between two looks at the store; a change is in effect within this, one reload and a bit."""

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Refusal(StrEnum):
    """Why a key does not let in: the reasons of Unauthorized, for the operator only."""

    MALFORMED = "malformed"
    UNKNOWN = "unknown_key"
    WRONG_SECRET = "wrong_secret"  # noqa: S105 -- a reason
    REVOKED = "revoked"
    NOT_YET_VALID = "not_yet_valid"
    EXPIRED = "expired"
    WRONG_NETWORK = "wrong_network"
    PEPPER_MISSING = "pepper_missing"


def status(record: KeyRecord, now: float) -> Refusal | None:
    """Why a key would be refused at `now` from wherever it is used; None when it would not."""
    if record.revoked_at is not None:
        return Refusal.REVOKED
    if record.not_before is not None and now < record.not_before:
        return Refusal.NOT_YET_VALID
    if record.expires_at is not None and now >= record.expires_at:
        return Refusal.EXPIRED
    return None


class KeyRing:
    """A Verifier of API keys over a snapshot of all of them.

    `stale_for` and `poll_interval` are seconds of `clock` (monotonic), `now` is wall time, `touch` writes when keys
    were last used. `run` must be running, `close` is called after it was cancelled.
    """

    def __init__(
        self,
        store: KeyStore,
        peppers: Peppers,
        *,
        touch: Touch,
        stale_for: float,
        poll_interval: float = POLL_INTERVAL,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
        compare: Callable[[bytes, bytes], bool] = hmac.compare_digest,
    ) -> None:
        self._snapshot = Snapshot(store, clock=clock)
        self._snapshot.on_change(self._reloaded)
        self._peppers = peppers
        self._last_used = LastUsed(touch)
        self._stale_for = stale_for
        self._poll_interval = poll_interval
        self._now = now
        self._sleep = sleep
        self._compare = compare
        self._stand_in = secrets.token_bytes(32)
        self._networks: dict[tuple[str, ...], tuple[Network, ...]] = {}
        self._principals: dict[str, tuple[KeyRecord, Principal]] = {}

    @property
    def reached(self) -> bool:
        """Whether the store answered the last polls."""
        return self._snapshot.fresh_within(POLL_TIMEOUT + 2 * self._poll_interval)

    async def run(self) -> None:
        """Follow the store and write last uses until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._snapshot.follow(self._poll_interval, self._sleep), name="key-poll")
            tasks.create_task(self._last_used.follow(FLUSH_INTERVAL, self._sleep), name="key-last-used")

    async def refresh(self) -> None:
        """Look at the store now."""
        await self._snapshot.refresh()

    async def close(self) -> None:
        """Write the last uses that are not written yet."""
        await self._last_used.flush()

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call `listener` after each change of any key; then `Grant.refusal` may have changed. It must not raise."""
        self._snapshot.on_change(listener)

    def on_poll(self, follower: Follower) -> None:
        """As `Snapshot.on_poll`."""
        self._snapshot.on_poll(follower)

    def recognises(self, credential: str) -> bool:
        return credential.startswith(PREFIX)

    async def verify(self, credential: str, address: str) -> KeyGrant:
        """Raises Unauthorized with a Refusal, or StorageUnavailable."""
        try:
            key = parse(credential)
        except MalformedKey:
            raise Unauthorized(Refusal.MALFORMED) from None
        record, refusal = self._judge(key, address)
        if refusal is not None or not self._snapshot.fresh_within(self._stale_for):
            readable = await self._snapshot.refresh()
            record, refusal = self._judge(key, address)
            if not readable and not self._certain(refusal):
                raise StorageUnavailable("Keys cannot be checked at the moment.", retry_after=1.0)
        if record is None or refusal is not None:
            raise Unauthorized(refusal or Refusal.UNKNOWN)
        self._last_used.note(record.kid, self._now())
        return KeyGrant(self._principal(record), record, address, self)

    def _principal(self, record: KeyRecord) -> Principal:
        """Whose key it is; made once for each record of the snapshot."""
        known, principal = self._principals.get(record.kid, (None, None))
        if known is not record or principal is None:
            principal = _principal(record)
            self._principals[record.kid] = record, principal
        return principal

    def _judge(self, key: ParsedKey, address: str) -> tuple[KeyRecord | None, Refusal | None]:
        """What the snapshot says; the same work for every key that nobody has the secret of."""
        record = self._snapshot.get(key.kid)
        expected = self._stand_in if record is None else record.hash
        version = self._peppers.current if record is None else record.pepper_version
        try:
            same = self._compare(self._peppers.digest(version, key.text), expected)
        except KeyError:
            return record, Refusal.PEPPER_MISSING
        if record is None:
            return None, Refusal.UNKNOWN
        if not same:
            return record, Refusal.WRONG_SECRET
        if (refusal := status(record, self._now())) is not None:
            return record, refusal
        return record, None if self._allows(record, address) else Refusal.WRONG_NETWORK

    def _certain(self, refusal: Refusal | None) -> bool:
        """Whether the answer holds although the store cannot be asked."""
        if refusal is None:
            return self._snapshot.fresh_within(self._stale_for)
        return refusal is Refusal.REVOKED

    def _allows(self, record: KeyRecord, address: str) -> bool:
        if record.networks is None:
            return True
        try:
            client = ipaddress.ip_address(address)
        except ValueError:
            return False
        if isinstance(client, ipaddress.IPv6Address) and client.ipv4_mapped is not None:
            client = client.ipv4_mapped
        networks = self._networks.get(record.networks)
        if networks is None:
            networks = self._networks[record.networks] = tuple(map(ipaddress.ip_network, record.networks))
        return any(client in network for network in networks)

    def _reloaded(self) -> None:
        self._networks.clear()
        self._principals.clear()
        if not self._snapshot.pepper_versions() - self._peppers.versions:
            return
        try:  # on the loop: a small file, read only after another process added a pepper to it
            self._peppers.reload()
        except ConfigurationError:
            log.exception("peppers_not_read")
        if missing := self._snapshot.pepper_versions() - self._peppers.versions:
            log.error("pepper_missing", versions=sorted(missing))

    def refusal(self, granted: KeyRecord, address: str) -> ServiceError | None:
        """What `KeyGrant.refusal` says of a key that was granted as `granted`."""
        record = self._snapshot.get(granted.kid)
        if record is granted:
            return None
        if record is None or _withdrawn(granted, record, self._now()) or not self._allows(record, address):
            return CredentialRevoked(Refusal.REVOKED)
        return None


@dataclass(frozen=True, slots=True)
class KeyGrant:
    """A verified key. Refused once it was revoked or deleted, or lost something it had: a scope, a model, its
    tenant, the client's network. A scope counts although this request may not need it. A changed plan holds from
    the next request on.
    """

    principal: Principal
    _record: KeyRecord = field(repr=False)
    _address: str
    _ring: KeyRing = field(repr=False)

    def refusal(self) -> ServiceError | None:
        return self._ring.refusal(self._record, self._address)


def _withdrawn(granted: KeyRecord, record: KeyRecord, now: float) -> bool:
    """Whether `record` gives less than `granted` gave. An expiry that was known then is no reason."""
    why = status(record, now)
    if why is not None and not (why is Refusal.EXPIRED and record.expires_at == granted.expires_at):
        return True
    if (record.principal, record.tenant, record.hash) != (granted.principal, granted.tenant, granted.hash):
        return True
    if not granted.scopes <= record.scopes:
        return True
    return record.models is not None and (granted.models is None or not granted.models <= record.models)


def _principal(record: KeyRecord) -> Principal:
    return Principal(
        id=record.principal,
        tenant=record.tenant,
        scopes=frozenset(scope for scope in Scope if scope in record.scopes),  # a newer release may know more
        plan=record.plan,
        key_id=record.kid,
        models=record.models,
        limits=record.limits,
    )
