"""What an operator may say about a key, checked. Every value is refused or stored as given, never bent.

Tenants. A tenant separates prefix caches and usage, so names from different sources must never meet by accident.
A key's tenant is its own principal id (`key:KID`), or the name that the operator gave it, without colon or slash. A
tenant that comes from a token is `ISSUER/CLAIM` or `ISSUER:SUBJECT`, where no issuer is called `key`. So the two are
equal only where the configuration maps an issuer's tenant to that very name.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Self

from service.auth.principal import DEFAULT_PLAN, Scope
from service.errors import InvalidRequest

MAX_NAME = 64
MAX_MODELS = 64
MAX_MODEL_NAME = 256
MAX_NETWORKS = 64
MAX_LIMITS = 16
MAX_LIMIT = 2**53
LAST_TIME = 253402300799.0
"""The last second of the year 9999: the latest that a date can say."""

RESERVED_TENANTS = frozenset({"local"})
"""Everybody's tenant where authentication is off."""

_PLAN = re.compile(r"[a-z0-9-]{1,32}", re.ASCII)
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_LIMIT = re.compile(r"[a-z][a-z0-9_]{0,31}", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeySpec:
    """What a new key is to be. Built by `of`. `tenant` None means its own; the other None mean all.

    Times are seconds since the epoch; `limits` are numbers of the plan that differ for this key.
    """

    name: str
    scopes: frozenset[str]
    plan: str = DEFAULT_PLAN
    tenant: str | None = None
    models: frozenset[str] | None = None
    networks: tuple[str, ...] | None = None
    limits: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    not_before: float | None = None
    expires_at: float | None = None

    @classmethod
    def of(cls, **given: Any) -> Self:
        """Check what was given. Raises InvalidRequest whose `param` names the field."""
        for needed in ("name", "scopes"):
            if needed not in given:
                raise InvalidRequest(f"A key needs {needed}.", param=needed)
        return cls(**checked(**given))


def checked(**given: Any) -> dict[str, Any]:
    """The same fields, each checked and in the form in which it is stored. Raises InvalidRequest."""
    for name in given:
        if name not in FIELDS:
            raise InvalidRequest("A key has no such field.", param=name)
    return {name: FIELDS[name](name, value) for name, value in given.items()}


def check_period(not_before: float | None, expires_at: float | None, now: float) -> None:
    """Refuse a key that could never be used. Raises InvalidRequest."""
    if expires_at is not None and expires_at <= max(now, not_before or 0.0):
        raise InvalidRequest("The key would have expired before it could be used.", param="expires_at")


def _name(param: str, value: object) -> str:
    if (
        not isinstance(value, str)
        or not 0 < len(value) <= MAX_NAME
        or not value.isprintable()
        or value != value.strip()
    ):
        raise InvalidRequest(f"A name is 1 to {MAX_NAME} printable characters.", param=param)
    return value


def _scopes(param: str, value: object) -> frozenset[str]:
    named = _several(param, value, len(Scope))
    if not named or not named <= set(Scope):
        raise InvalidRequest(f"Scopes are one or more of {', '.join(Scope)}.", param=param)
    return frozenset(map(str, named))


def _plan(param: str, value: object) -> str:
    if not isinstance(value, str) or _PLAN.fullmatch(value) is None:
        raise InvalidRequest("A plan's name is 1 to 32 of a-z, 0-9 and `-`.", param=param)
    return value


def _tenant(param: str, value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or _TENANT.fullmatch(value) is None or value in RESERVED_TENANTS:
        raise InvalidRequest("A tenant's name is 1 to 64 of A-Z, a-z, 0-9 and `._-`, and not `local`.", param=param)
    return value


def _models(param: str, value: object) -> frozenset[str] | None:
    if value is None:
        return None
    names = _several(param, value, MAX_MODELS)
    if not names or not all(0 < len(name) <= MAX_MODEL_NAME and name.isprintable() for name in names):
        raise InvalidRequest("Models are one or more names, or none at all for every model.", param=param)
    return names


def _networks(param: str, value: object) -> tuple[str, ...] | None:
    if value is None:
        return None
    texts = _several(param, value, MAX_NETWORKS)
    try:
        found = tuple(sorted({_canonical(text) for text in texts}))
    except ValueError:
        raise InvalidRequest(
            "A network is an address or a CIDR without host bits, as 192.0.2.0/24.", param=param
        ) from None
    if not found:
        raise InvalidRequest("Networks are one or more, or none at all for every address.", param=param)
    return found


def _canonical(text: str) -> str:
    """As it is compared: IPv4 written as IPv6 (::ffff:192.0.2.0/120) is IPv4. Raises ValueError."""
    network = ipaddress.ip_network(text)
    first = network.network_address
    if isinstance(first, ipaddress.IPv6Address) and first.ipv4_mapped is not None and network.prefixlen >= 96:  # noqa: PLR2004
        return str(ipaddress.ip_network((first.ipv4_mapped, network.prefixlen - 96)))
    return str(network)


def _limits(param: str, value: object) -> Mapping[str, int]:
    if not isinstance(value, Mapping) or len(value) > MAX_LIMITS:
        raise InvalidRequest(f"Limits are at most {MAX_LIMITS} names with numbers.", param=param)
    for name, number in value.items():
        if not isinstance(name, str) or _LIMIT.fullmatch(name) is None:
            raise InvalidRequest("A limit's name is 1 to 32 of a-z, 0-9 and `_`.", param=param)
        if type(number) is not int or not 0 <= number <= MAX_LIMIT:
            raise InvalidRequest("A limit is a whole number from 0 on.", param=param)
    return MappingProxyType(dict(value))


def _time(param: str, value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= LAST_TIME:
        raise InvalidRequest("A time is seconds since 1970.", param=param)
    return float(value)


def _several(param: str, value: object, most: int) -> frozenset[str]:
    if isinstance(value, str) or not isinstance(value, Collection) or len(value) > most:
        raise InvalidRequest(f"This is a list of at most {most}.", param=param)
    if not all(isinstance(each, str) for each in value):
        raise InvalidRequest("This is a list of texts.", param=param)
    return frozenset(value)


FIELDS: Mapping[str, Callable[[str, object], object]] = MappingProxyType(
    {
        "name": _name,
        "scopes": _scopes,
        "plan": _plan,
        "tenant": _tenant,
        "models": _models,
        "networks": _networks,
        "limits": _limits,
        "not_before": _time,
        "expires_at": _time,
    }
)
"""What can be said of a key, and how each is checked."""
