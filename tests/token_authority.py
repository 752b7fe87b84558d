"""An issuer of tokens for tests: makes any token, right or wrong in one place, byte by byte and without python-jose."""

import base64
import functools
import hashlib
import hmac
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from service.auth.claims import Identity
from service.auth.jwks import ParsedKeys, parse_key_set
from service.auth.jwt import BoundKey, Issuer, KeysHealth, TokenVerifier, bind
from service.settings import IssuerSettings

SECRET = b"0123456789abcdef0123456789abcdef"
HASHES: dict[str, Any] = {"256": hashes.SHA256(), "384": hashes.SHA384(), "512": hashes.SHA512()}
CURVES: dict[str, Any] = {"P-256": ec.SECP256R1(), "P-384": ec.SECP384R1(), "P-521": ec.SECP521R1()}
Signer = Callable[[bytes], bytes]


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def number(value: int, size: int | None = None) -> str:
    return b64(value.to_bytes(size or (value.bit_length() + 7) // 8, "big"))


@functools.cache
def rsa_key(number_of: int = 0, bits: int = 2048) -> rsa.RSAPrivateKey:
    """Made once; `number_of` tells several apart."""
    return rsa.generate_private_key(65537, bits)


@functools.cache
def ec_key(curve: str = "P-256", number_of: int = 0) -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(CURVES[curve])


def rsa_jwk(key: rsa.RSAPrivateKey, **more: object) -> dict[str, Any]:
    public = key.public_key().public_numbers()
    return {"kty": "RSA", "n": number(public.n), "e": number(public.e), "use": "sig", **more}


def ec_jwk(key: ec.EllipticCurvePrivateKey, **more: object) -> dict[str, Any]:
    public = key.public_key().public_numbers()
    size = (key.curve.key_size + 7) // 8
    names = {"secp256r1": "P-256", "secp384r1": "P-384", "secp521r1": "P-521"}
    point = {"x": number(public.x, size), "y": number(public.y, size)}
    return {"kty": "EC", "crv": names[key.curve.name], **point, "use": "sig", **more}


def key_set(*keys: object) -> bytes:
    return json.dumps({"keys": keys}).encode()


def sign_rsa(key: rsa.RSAPrivateKey, bits: str = "256") -> Signer:
    return lambda data: key.sign(data, padding.PKCS1v15(), HASHES[bits])


def sign_pss(key: rsa.RSAPrivateKey) -> Signer:
    return lambda data: key.sign(data, padding.PSS(padding.MGF1(hashes.SHA256()), 32), hashes.SHA256())


def sign_ec(key: ec.EllipticCurvePrivateKey, bits: str = "256") -> Signer:
    size = (key.curve.key_size + 7) // 8

    def sign(data: bytes) -> bytes:
        r, s = decode_dss_signature(key.sign(data, ec.ECDSA(HASHES[bits])))
        return r.to_bytes(size, "big") + s.to_bytes(size, "big")

    return sign


def sign_hmac(secret: bytes, digest: str = "sha256") -> Signer:
    return lambda data: hmac.new(secret, data, getattr(hashlib, digest)).digest()


def pack(header: object, claims: object, sign: Signer) -> str:
    """A token; bytes stand for themselves, anything else is written as JSON."""
    parts = [b64(part if isinstance(part, bytes) else json.dumps(part).encode()) for part in (header, claims)]
    text = ".".join(parts)
    return f"{text}.{b64(sign(text.encode()))}"


def issuer_settings(**changes: Any) -> IssuerSettings:
    """The issuer `acme`, with a key set file that nobody reads unless the test says so."""
    given: dict[str, Any] = {
        "name": "acme",
        "issuer": "https://acme.test/",
        "audience": "mlxd",
        "algorithms": ("RS256",),
        "jwks_file": "/nowhere/keys.json",
        **changes,
    }
    return IssuerSettings(**{key: value for key, value in given.items() if value is not None})


@dataclass
class FixedKeys:
    """Keys that do not change."""

    parsed: ParsedKeys
    asked: list[str | None] = field(default_factory=list)
    health: KeysHealth = field(default_factory=lambda: KeysHealth(1, 0, 0.0, None))

    async def find(self, kid: str | None) -> BoundKey | None:
        self.asked.append(kid)
        return self.parsed.find(kid)


@dataclass
class FakeDenials:
    """A deny-list to write on."""

    denied: set[tuple[str, str]] = field(default_factory=set)
    error: Exception | None = None

    def check_readable(self) -> None:
        if self.error is not None:
            raise self.error

    def denies(self, identity: Identity) -> bool:
        return bool({(identity.issuer, identity.subject), (identity.issuer, identity.token_id)} & self.denied)


@dataclass
class CountedErrors:
    """Telemetry that remembers."""

    places: list[str] = field(default_factory=list)

    def internal_error(self, where: str) -> None:
        self.places.append(where)


class Authority:
    """`acme` and its keys `r1` (RSA) and `e1` (P-256); `verifier` believes it.

    Time stands still for our own checks; the library's are against the system's clock, so times are near it.
    """

    def __init__(self, **changes: Any) -> None:
        self.now = int(time.time())
        self.settings = issuer_settings(algorithms=("RS256", "ES256"), **changes)
        self.keys = FixedKeys(
            parse_key_set(
                key_set(rsa_jwk(rsa_key(), kid="r1", alg="RS256"), ec_jwk(ec_key(), kid="e1")), self.settings.algorithms
            )
        )
        self.denials = FakeDenials()
        self.errors = CountedErrors()

    def verifier(self, *others: Issuer) -> TokenVerifier:
        issuers = [Issuer(self.settings, self.keys), *others]
        return TokenVerifier(issuers, self.denials, self.errors, now=lambda: self.now)

    def header(self, **changes: object) -> dict[str, Any]:
        return _changed({"alg": "RS256", "typ": "JWT", "kid": "r1"}, changes)

    def claims(self, **changes: object) -> dict[str, Any]:
        given = {
            "iss": self.settings.issuer,
            "aud": self.settings.audience,
            "sub": "alice",
            "iat": self.now - 10,
            "exp": self.now + 600,
            "jti": "t1",
            "scope": "inference models admin",
        }
        return _changed(given, changes)

    def token(self, header: object = None, claims: object = None, sign: Signer | None = None) -> str:
        """A good token, but for what is given."""
        return pack(
            self.header() if header is None else header,
            self.claims() if claims is None else claims,
            sign or sign_rsa(rsa_key()),
        )

    def es_token(self, **claims: object) -> str:
        return pack(self.header(alg="ES256", kid="e1"), self.claims(**claims), sign_ec(ec_key()))


def secret_issuer(**changes: Any) -> Issuer:
    """The issuer `dev`, with a shared secret."""
    settings = issuer_settings(
        name="dev", issuer="dev", algorithms=("HS256",), jwks_file=None, secret_file="/nowhere/s", **changes
    )
    return Issuer(settings, FixedKeys(ParsedKeys((bind(SECRET, "HS256"),))))


def _changed(given: Mapping[str, Any], changes: Mapping[str, object]) -> dict[str, Any]:
    """With `changes`; None takes a key away."""
    return {key: value for key, value in {**given, **changes}.items() if value is not None}
