"""What an operator does with API keys, over HTTP or on the command line alike.

Each function is one piece of work for `Database.write` (or `read`, for the two that only look): it changes the keys
and appends to the audit log in the same transaction, so there is never one without the other. Errors are NotFound
and InvalidRequest (KeyExists among them), whose messages hold nothing secret.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from service.auth.key_format import MalformedKey, ParsedKey, Random, generate, parse
from service.auth.key_spec import FIELDS, KeySpec, check_period, checked
from service.auth.keyring import status
from service.auth.pepper import Peppers
from service.errors import InvalidRequest, NotFound
from service.settings import LimitsSettings, PlanError
from service.storage import audit, keys
from service.storage.connection import Connection
from service.storage.keys import KeyExists, KeyRecord

MAX_IMPORT = 1000
"""Keys in one import, which is one transaction."""

MAX_OVERLAP = 90 * 86_400.0
DEFAULT_OVERLAP = 86_400.0
"""Seconds for which a rotated key works beside the one that replaces it."""


@dataclass(frozen=True, slots=True)
class IssuedKey:
    """A key just made. `text` is the key itself: shown once, kept nowhere."""

    record: KeyRecord
    text: str = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """On whose behalf keys change, and what new ones are made with. `actor` is for the audit log.

    `limits` are those of the service that the keys are for: a plan that is not among them, or a number that no plan
    could have, is refused here and not first at the key's requests. None takes any.
    """

    actor: str
    peppers: Peppers
    environment: str
    limits: LimitsSettings | None = None
    now: Callable[[], float] = time.time
    random: Random = secrets

    def create(self, connection: Connection, spec: KeySpec) -> IssuedKey:
        """A new key."""
        key = generate(self.environment, self.random)
        record = self._record(key, spec)
        self._insert(connection, "key_created", record)
        return IssuedKey(record, key.text)

    def take(self, connection: Connection, texts: Sequence[str], spec: KeySpec) -> list[KeyRecord]:
        """Import keys of our own format made elsewhere; each keeps its id and secret. All of them or none."""
        if not 0 < len(texts) <= MAX_IMPORT:
            raise InvalidRequest(f"An import is 1 to {MAX_IMPORT} keys.", param="keys")
        taken = []
        for number, text in enumerate(texts, 1):
            try:
                record = self._record(parse(text), spec)
            except MalformedKey as error:
                raise InvalidRequest(f"Key {number} of the import: {error}.", param="keys") from None
            if keys.find(connection, record.kid) is not None:
                raise KeyExists(f"Key {number} of the import, {record.kid}, is there already.", param="keys")
            self._insert(connection, "key_imported", record)
            taken.append(record)
        return taken

    def rotate(
        self, connection: Connection, kid: str, *, overlap: float = DEFAULT_OVERLAP, expires_at: float | None = None
    ) -> IssuedKey:
        """A new key in the place of `kid`: the same principal and attributes, another id and secret.

        The old one works for `overlap` seconds more, 0 for not at all, and never longer than it would have. The
        new one expires when the old one would have, unless `expires_at` says otherwise.
        """
        old, now = self._living(connection, kid), self.now()
        if not 0 <= overlap <= MAX_OVERLAP:
            raise InvalidRequest(f"An overlap is 0 to {MAX_OVERLAP:g} seconds.", param="overlap")
        if old.rotated_to is not None:
            raise InvalidRequest(f"This key was rotated already; rotate {old.rotated_to}.", param="kid")
        expires_at = old.expires_at if expires_at is None else checked(expires_at=expires_at)["expires_at"]
        check_period(old.not_before, expires_at, now)
        key, version = generate(self.environment, self.random), self.peppers.current
        record = replace(
            old,
            kid=key.kid,
            hash=self.peppers.digest(version, key.text),
            pepper_version=version,
            created_at=now,
            expires_at=expires_at,
            last_used_at=None,
        )
        until = now + overlap if old.expires_at is None else min(old.expires_at, now + overlap)
        keys.insert(connection, record)
        keys.update(connection, kid, rotated_to=key.kid, expires_at=until)
        self._audit(connection, "key_rotated", kid=kid, to=key.kid, old_expires_at=_moment(until))
        return IssuedKey(record, key.text)

    def update(self, connection: Connection, kid: str, /, **changes: Any) -> KeyRecord:
        """Change what `KeySpec` has. A running request that loses what it had ends; see `KeyGrant`."""
        old = self._living(connection, kid, expired=True)
        values = checked(**changes)
        if not values:
            raise InvalidRequest("There is nothing to change.")
        if "tenant" in values and values["tenant"] is None:
            values["tenant"] = old.principal
        record = replace(old, **values)
        if {"plan", "limits"} & values.keys():
            self._check_limits(record)
        if {"not_before", "expires_at"} & values.keys():
            check_period(record.not_before, record.expires_at, self.now())
        keys.update(connection, kid, **values)
        self._audit(connection, "key_updated", kid=kid, **_told(record, values))
        return record

    def revoke(self, connection: Connection, kid: str) -> KeyRecord:
        """Revoke for good. Revoking twice is the same as once."""
        record = find(connection, kid)
        if record.revoked_at is not None:
            return record
        now = self.now()
        keys.revoke(connection, kid, now)
        self._audit(connection, "key_revoked", kid=kid)
        return replace(record, revoked_at=now)

    def note_pepper(self, connection: Connection, version: int) -> None:
        """Put into the audit log that keys are hashed with a new pepper from now on."""
        self._audit(connection, "pepper_rotated", version=version)

    def _record(self, key: ParsedKey, spec: KeySpec) -> KeyRecord:
        now, own, version = self.now(), f"key:{key.kid}", self.peppers.current
        check_period(spec.not_before, spec.expires_at, now)
        self._check_limits(spec)
        return KeyRecord(
            kid=key.kid,
            principal=own,
            name=spec.name,
            tenant=spec.tenant or own,
            scopes=spec.scopes,
            plan=spec.plan,
            models=spec.models,
            networks=spec.networks,
            limits=spec.limits,
            hash=self.peppers.digest(version, key.text),
            pepper_version=version,
            created_at=now,
            not_before=spec.not_before,
            expires_at=spec.expires_at,
        )

    def _check_limits(self, wanted: KeySpec | KeyRecord) -> None:
        if self.limits is None:
            return
        try:
            self.limits.for_principal(wanted)
        except PlanError as error:
            if error.reason == "unknown_plan":
                raise InvalidRequest("There is no such plan in the configuration.", param="plan") from None
            raise InvalidRequest("A limit is a number that its plan could have.", param="limits") from None

    def _living(self, connection: Connection, kid: str, *, expired: bool = False) -> KeyRecord:
        record = find(connection, kid)
        over = record.expires_at is not None and record.expires_at <= self.now() and not expired
        if record.revoked_at is not None or over:
            raise InvalidRequest(f"The key {kid} is {'expired' if over else 'revoked'}.", param="kid")
        return record

    def _insert(self, connection: Connection, event: str, record: KeyRecord) -> None:
        keys.insert(connection, record)
        self._audit(connection, event, kid=record.kid, **_told(record, FIELDS))

    def _audit(self, connection: Connection, event: str, **detail: Any) -> None:
        audit.append(connection, event, actor=self.actor, at=self.now(), detail=detail)


def find(connection: Connection, kid: str) -> KeyRecord:
    """One key. Raises NotFound."""
    record = keys.find(connection, kid)
    if record is None:
        raise NotFound("There is no such key.", param="kid")
    return record


def list_all(connection: Connection) -> Sequence[KeyRecord]:
    """Every key, revoked and expired ones too, oldest first."""
    return keys.all_keys(connection)


def describe(record: KeyRecord, now: float) -> dict[str, Any]:
    """All that may be told about a key, as JSON has it. Times are ISO 8601 in UTC."""
    return {
        "kid": record.kid,
        "name": record.name,
        "status": str(status(record, now) or "active"),
        "principal": record.principal,
        "tenant": record.tenant,
        "scopes": sorted(record.scopes),
        "plan": record.plan,
        "models": None if record.models is None else sorted(record.models),
        "networks": None if record.networks is None else list(record.networks),
        "limits": dict(record.limits),
        "created_at": _moment(record.created_at),
        "not_before": _moment(record.not_before),
        "expires_at": _moment(record.expires_at),
        "revoked_at": _moment(record.revoked_at),
        "last_used_at": _moment(record.last_used_at),
        "rotated_to": record.rotated_to,
        "pepper_version": record.pepper_version,
    }


def _told(record: KeyRecord, names: Iterable[str]) -> dict[str, Any]:
    """What an audit entry says of these fields."""
    shown = describe(record, record.created_at)
    shown["limits"] = [f"{name}={number}" for name, number in sorted(record.limits.items())]
    return {name: shown[name] for name in names}


def _moment(at: float | None) -> str | None:
    return None if at is None else datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
