"""Tokens: keys bound to one algorithm, and the verification that leads to a grant. The only user of python-jose.

Recipe: read strictly (`strict_jwt`) -> issuer by exact `iss` -> algorithm, type and forbidden parameters of the
header -> key by id, of that algorithm -> the library's verification -> our own check of every claim -> deny-list ->
principal. RFC 7519, RFC 8725; CVE-2024-33663 (a public key taken for an HMAC secret): the library never gets key
bytes here, only a key object that knows its one algorithm.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

from jose import jwk, jwt  # type: ignore[import-untyped]
from jose.exceptions import JWSError, JWTError  # type: ignore[import-untyped]

from service.auth.claims import Identity, check_claims, principal_of
from service.auth.principal import Principal
from service.auth.strict_jwt import Reason, UnverifiedToken, check_header, looks_like_jwt, parse
from service.errors import CredentialRevoked, ServiceError
from service.observability.logging import get_logger
from service.settings import IssuerSettings

log = get_logger(__name__)

_REQUIRED = ("exp", "iat", "iss", "sub", "aud")
_VERIFIED = ("signature", *_REQUIRED, "nbf", "jti", "at_hash")
_OPTIONS: Mapping[str, Any] = MappingProxyType(
    dict.fromkeys((f"require_{claim}" for claim in _REQUIRED), True)
    | dict.fromkeys((f"verify_{claim}" for claim in _VERIFIED), True)
)


@dataclass(frozen=True, slots=True)
class BoundKey:
    """A key for one algorithm. Made by `bind`."""

    kid: str | None
    algorithm: str
    material: Any = field(repr=False, compare=False)


def bind(material: bytes | Mapping[str, str], algorithm: str, kid: str | None = None) -> BoundKey:
    """A key from an HMAC secret, or from the vetted members of a JWK.

    Raises ValueError when the cryptography below refuses it, such as for a point that is not on its curve.
    """
    key = jwk.construct(material if isinstance(material, bytes) else dict(material), algorithm)
    return BoundKey(kid, algorithm, key)


def sign(claims: Mapping[str, Any], key: BoundKey) -> str:
    """A token of these claims; `key` must be a secret."""
    token: str = jwt.encode(dict(claims), key.material, algorithm=key.algorithm)
    return token


@dataclass(frozen=True, slots=True)
class KeysHealth:
    """What an operator asks about an issuer. `age` is seconds since its keys were last had, None before that."""

    keys: int
    skipped: int
    age: float | None
    error: str | None


class Keys(Protocol):
    """The keys of one issuer."""

    @property
    def health(self) -> KeysHealth: ...

    async def find(self, kid: str | None) -> BoundKey | None:
        """The key of this id; without an id the only one. Raises IssuerUnavailable when none were ever had."""


class Denials(Protocol):
    """Tokens and subjects that are refused although their signature is good."""

    def check_readable(self) -> None:
        """Raise StorageUnavailable when what is known is too old to go by."""

    def denies(self, identity: Identity) -> bool: ...


class Telemetry(Protocol):
    """Counts what should not happen."""

    def internal_error(self, where: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Issuer:
    """An issuer's settings, with where its keys come from."""

    settings: IssuerSettings
    keys: Keys


@dataclass(frozen=True, slots=True)
class TokenGrant:
    """What a verified token lets its request do. Expiry while the request runs does not end it; a denial does."""

    principal: Principal
    identity: Identity
    denials: Denials = field(repr=False)

    def refusal(self) -> ServiceError | None:
        return CredentialRevoked(Reason.DENIED.value) if self.denials.denies(self.identity) else None


class TokenVerifier:
    """Verifies tokens of the issuers there are at the time. `now` is Unix time. Belongs to the event loop's thread."""

    def __init__(
        self,
        issuers: Iterable[Issuer],
        denials: Denials,
        telemetry: Telemetry,
        *,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._issuers = issuers
        self._denials = denials
        self._telemetry = telemetry
        self._now = now

    def health(self) -> Mapping[str, KeysHealth]:
        """The state of each issuer's keys, by its name."""
        return {issuer.settings.name: issuer.keys.health for issuer in self._issuers}

    def recognises(self, credential: str) -> bool:
        return looks_like_jwt(credential)

    async def verify(self, credential: str, address: str) -> TokenGrant:  # noqa: ARG002 - the protocol's
        """Raises Unauthorized with a Reason; IssuerUnavailable; StorageUnavailable."""
        return await self.examine(credential, lambda _: None)

    async def examine(self, credential: str, passed: Callable[[str], object]) -> TokenGrant:
        """As `verify`; `passed` is told each step that the token has passed, for the operator."""
        token = parse(credential)
        passed("form")
        issuer = self._issuer(token.claims.get("iss"))
        passed("issuer")
        kid = check_header(token.header, issuer.settings.algorithms, issuer.settings.token_types)
        passed("header")
        key = await issuer.keys.find(kid)
        if key is None:
            raise Reason.UNKNOWN_KEY.refusal()
        if key.algorithm != token.header["alg"]:
            raise Reason.ALGORITHM.refusal()
        passed("key")
        self._ask_library(token, key, issuer.settings)
        passed("signature")
        identity = check_claims(token.claims, issuer.settings, self._now())
        passed("claims")
        self._denials.check_readable()
        if self._denials.denies(identity):
            raise Reason.DENIED.refusal()
        passed("deny-list")
        principal = principal_of(token.claims, issuer.settings)
        passed("grants")
        return TokenGrant(principal, identity, self._denials)

    def _issuer(self, name: object) -> Issuer:
        for issuer in self._issuers:
            if issuer.settings.issuer == name:
                return issuer
        raise Reason.UNKNOWN_ISSUER.refusal()

    def _ask_library(self, token: UnverifiedToken, key: BoundKey, issuer: IssuerSettings) -> None:
        """The signature, and the library's view of the claims; its clock is the system's.

        Whatever it raises is a refusal: it raises TypeError for `exp: null`, and nobody knows what else.
        """
        try:
            jwt.decode(
                token.text,
                key.material,
                algorithms=(key.algorithm,),  # a tuple: a string would be a substring test
                audience=issuer.audience,
                issuer=issuer.issuer,
                options={**_OPTIONS, "leeway": issuer.leeway},
            )
        except JWTError as error:
            if isinstance(error.args[0], JWSError):
                raise Reason.SIGNATURE.refusal() from None
        except Exception as error:  # noqa: BLE001 - whatever a stranger's token makes the library raise is a refusal
            log.info("token_unverifiable", issuer=issuer.name, kind=type(error).__name__)
            self._telemetry.internal_error("jwt")
        else:
            return
        check_claims(token.claims, issuer, self._now())  # says which claim it was
        raise Reason.UNVERIFIABLE.refusal()
