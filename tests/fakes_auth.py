"""Credentials whose fate a test decides."""

from __future__ import annotations

from dataclasses import dataclass, field

from service.auth.principal import Principal, Scope
from service.errors import ServiceError, Unauthorized

PREFIX = "fake-"


def principal(*scopes: Scope, models: frozenset[str] | None = None) -> Principal:
    return Principal(id="key:abc", tenant="acme", scopes=frozenset(scopes), key_id="abc", models=models)


EVERYTHING = principal(*Scope)


@dataclass
class FakeGrant:
    principal: Principal = EVERYTHING
    refused: ServiceError | None = None

    def refusal(self) -> ServiceError | None:
        return self.refused


@dataclass
class FakeVerifier:
    """Knows the credentials in `grants`; raises `error` for every credential when there is one."""

    grants: dict[str, FakeGrant] = field(default_factory=dict)
    error: ServiceError | None = None
    addresses: list[str] = field(default_factory=list)

    def recognises(self, credential: str) -> bool:
        return credential.startswith(PREFIX)

    async def verify(self, credential: str, address: str) -> FakeGrant:
        self.addresses.append(address)
        if self.error is not None:
            raise self.error
        if credential not in self.grants:
            raise Unauthorized("unknown_key")
        return self.grants[credential]
