"""Who is asking, and what they may do. Values only: no I/O, any thread."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType


class Scope(StrEnum):
    """What a credential may be used for; each route needs exactly one."""

    INFERENCE = "inference"
    MODELS = "models"
    METRICS = "metrics"
    USAGE = "usage"
    ADMIN = "admin"


DEFAULT_PLAN = "default"


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """An identity that a credential proved.

    `id` is what limits, fairness and usage are kept by: `key:KID` of the first key of a rotation, or
    `ISSUER:SUBJECT` of a JWT. `tenant` separates prefix caches and usage; both are qualified so that two sources of
    identities never meet by an equal name. `key_id` names the key or the issuer in logs and metrics (never a
    secret, never a client's text). `models` None means every model. `limits` overrides single numbers of the plan.
    """

    id: str
    tenant: str
    scopes: frozenset[Scope]
    plan: str = DEFAULT_PLAN
    key_id: str | None = None
    models: frozenset[str] | None = None
    limits: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))

    def may(self, scope: Scope) -> bool:
        return scope in self.scopes


LOCAL = Principal(id="local", tenant="local", scopes=frozenset(Scope))
"""Everybody, where authentication is off; that is possible on the loopback interface only."""
