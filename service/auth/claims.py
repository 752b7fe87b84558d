"""The claims of a verified token, and the principal they make. Pure; any thread.

Whatever an issuer says, it grants only what its settings list: other scopes are dropped, another tenant or plan
refuses the token, and nothing is ever defaulted upwards.

Identities from different sources never meet. An issuer's name has neither `:` nor `/`, so the first of them ends it:

    id        ISSUER:SUBJECT, or user:NAME for a subject that the settings map
    tenant    ISSUER/CLAIM, or a name of ours that the settings map it to; without a tenant claim, the id
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from service.auth.principal import Principal, Scope
from service.auth.strict_jwt import Reason
from service.settings import IssuerSettings

MAX_TEXT = 256
"""Characters of a subject, a token id, a tenant, a plan or a model."""

MAX_ITEMS = 64
"""Of a claim that is a list."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a token speaks for, and its own id if it has one."""

    issuer: str
    subject: str
    token_id: str | None


def check_claims(claims: Mapping[str, Any], issuer: IssuerSettings, now: float) -> Identity:
    """The registered claims (RFC 7519, 4.1), all of them required but `nbf` and `jti`. `now` is Unix time.

    Raises Unauthorized: claims (absent, or of a wrong type), unknown_issuer, audience, expired, not_yet_valid,
    lifetime.
    """
    if claims.get("iss") != issuer.issuer:
        raise Reason.UNKNOWN_ISSUER.refusal()
    subject = _text(claims.get("sub"))
    token_id = _text(claims["jti"]) if "jti" in claims else None
    _check_audience(claims.get("aud"), issuer.audience)
    expires, issued = _seconds(claims.get("exp")), _seconds(claims.get("iat"))
    begins = _seconds(claims["nbf"]) if "nbf" in claims else issued
    if now >= expires + issuer.leeway:
        raise Reason.EXPIRED.refusal()
    if max(begins, issued) > now + issuer.leeway:
        raise Reason.NOT_YET_VALID.refusal()
    if not 0 < expires - issued <= issuer.max_lifetime:
        raise Reason.LIFETIME.refusal()
    return Identity(issuer.name, subject, token_id)


def _check_audience(found: object, audience: str) -> None:
    if found is None:
        raise Reason.CLAIMS.refusal()
    if audience not in ((_text(found),) if isinstance(found, str) else _texts(found)):
        raise Reason.AUDIENCE.refusal()


def _seconds(value: object) -> int:
    if type(value) is not int:  # a bool is an int too
        raise Reason.CLAIMS.refusal()
    return value


def is_text(value: object) -> TypeGuard[str]:
    """Printable and not empty, so that no log line, terminal or header takes it for something else."""
    return isinstance(value, str) and 0 < len(value) <= MAX_TEXT and value.isprintable()


def _text(value: object) -> str:
    if not is_text(value):
        raise Reason.CLAIMS.refusal()
    return value


def _texts(value: object) -> list[str]:
    if not isinstance(value, list) or len(value) > MAX_ITEMS:
        raise Reason.CLAIMS.refusal()
    return [_text(each) for each in value]


def principal_of(claims: Mapping[str, Any], issuer: IssuerSettings) -> Principal:
    """The principal of checked claims. Raises Unauthorized: claims, tenant, plan."""
    subject = _text(claims.get("sub"))
    own = issuer.subjects.get(subject)
    identity = f"{issuer.name}:{subject}" if own is None else f"user:{own}"
    return Principal(
        id=identity,
        tenant=_tenant(claims, issuer) or identity,
        scopes=_scopes(claims, issuer),
        plan=_plan(claims, issuer),
        key_id=issuer.name,
        models=_models(claims, issuer),
    )


def _tenant(claims: Mapping[str, Any], issuer: IssuerSettings) -> str | None:
    if not issuer.tenant_claim or issuer.tenant_claim not in claims:
        return None
    name = _text(claims[issuer.tenant_claim])
    if name not in issuer.tenants and "*" not in issuer.tenants:
        raise Reason.TENANT.refusal()
    return issuer.tenants.get(name) or f"{issuer.name}/{name}"


def _scopes(claims: Mapping[str, Any], issuer: IssuerSettings) -> frozenset[Scope]:
    found = claims.get(issuer.scope_claim, "")
    asked = found.split(" ") if isinstance(found, str) else _texts(found)
    return frozenset(Scope(each) for each in issuer.scopes if each in asked)


def _plan(claims: Mapping[str, Any], issuer: IssuerSettings) -> str:
    if not issuer.plan_claim or issuer.plan_claim not in claims:
        return issuer.default_plan
    plan = _text(claims[issuer.plan_claim])
    if plan != issuer.default_plan and plan not in issuer.plans:
        raise Reason.PLAN.refusal()
    return plan


def _models(claims: Mapping[str, Any], issuer: IssuerSettings) -> frozenset[str] | None:
    if not issuer.models_claim:
        return None
    return frozenset(_texts(claims.get(issuer.models_claim, [])))
