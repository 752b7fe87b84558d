"""Tokens of our own making, for development: only for issuers with a shared secret."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from service.auth.claims import check_claims, principal_of
from service.auth.jwt import BoundKey, sign
from service.errors import InvalidRequest, Unauthorized
from service.settings import IssuerSettings


def issue(
    issuer: IssuerSettings,
    key: BoundKey,
    *,
    subject: str,
    scopes: Sequence[str] = (),
    tenant: str | None = None,
    plan: str | None = None,
    lifetime: int,
    now: int,
    token_id: str,
) -> str:
    """A token that grants all that was asked for. `lifetime` is seconds, `now` Unix time.

    Without `scopes`: all that the issuer may grant but `admin`. Raises InvalidRequest for what it would not grant.
    """
    asked = tuple(scopes) or tuple(each for each in issuer.scopes if each != "admin")
    if refused := [each for each in asked if each not in issuer.scopes]:
        raise InvalidRequest(f"{issuer.name} may not grant {', '.join(refused)}.", param="scope")
    claims: dict[str, Any] = {
        "iss": issuer.issuer,
        "aud": issuer.audience,
        "sub": subject,
        "iat": now,
        "exp": now + lifetime,
        "jti": token_id,
        issuer.scope_claim: " ".join(asked),
    }
    for param, name, value in (("tenant", issuer.tenant_claim, tenant), ("plan", issuer.plan_claim, plan)):
        if value is None:
            continue
        if not name:
            raise InvalidRequest(f"{issuer.name} has no {param}_claim.", param=param)
        claims[name] = value
    try:
        check_claims(claims, issuer, now)
        principal_of(claims, issuer)
    except Unauthorized as error:
        raise InvalidRequest(f"The service would refuse this token: {error.reason}.") from None
    return sign(claims, key)
