"""A key set (RFC 7517) read key by key: one bad or foreign key must not cost the good ones. Pure; any thread."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from service.auth.jwt import BoundKey, bind
from service.auth.strict_jwt import NotStrictJson, checked_kid, decode_base64url, strict_json
from service.errors import Unauthorized

MAX_BYTES = 256 * 1024
MAX_KEYS = 128

MIN_RSA_BITS, MAX_RSA_BITS = 2048, 8192
"""Shorter moduli can be factored one day; longer ones make each token cost more than it may."""

MIN_EXPONENT, MAX_EXPONENT = 65537, (1 << 32) - 1

_CURVES = MappingProxyType({"P-256": ("ES256", 32), "P-384": ("ES384", 48), "P-521": ("ES512", 66)})
"""Curve -> its algorithm, and the bytes of a coordinate (RFC 7518, 6.2.1)."""

_PRIVATE = frozenset({"d", "p", "q", "dp", "dq", "qi", "oth", "k"})


class KeySetError(Exception):
    """There is no key set to be had; the message is for the operator."""


class _Unusable(Exception):
    """Why one key of a set is left out, in a word of a closed set."""


@dataclass(frozen=True, slots=True)
class ParsedKeys:
    """The usable keys of a set, and how many were left out, by reason."""

    keys: tuple[BoundKey, ...] = ()
    skipped: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))

    def find(self, kid: str | None) -> BoundKey | None:
        """By id; without one the only key, if it is the only one."""
        if kid is None:
            return self.keys[0] if len(self.keys) == 1 else None
        return next((key for key in self.keys if key.kid == kid), None)


def parse_key_set(data: bytes, algorithms: Sequence[str]) -> ParsedKeys:
    """The keys of a set that fit `algorithms`; an RSA key that names no algorithm gets the first RSA one.

    A set without a usable key is a set: an issuer may have withdrawn them all. Raises KeySetError for anything that
    is no set.
    """
    try:
        document = strict_json(data)
    except NotStrictJson:
        raise KeySetError("is not strict JSON") from None
    members = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(members, list):
        raise KeySetError("has no list of keys")
    if len(members) > MAX_KEYS:
        raise KeySetError(f"has more than {MAX_KEYS} keys")
    keys: list[BoundKey] = []
    skipped: Counter[str] = Counter()
    for member in members:
        try:
            key = _key(member, algorithms)
        except _Unusable as why:
            skipped[str(why)] += 1
            continue
        if key.kid is not None and key.kid in {each.kid for each in keys}:
            skipped["duplicate_kid"] += 1
        else:
            keys.append(key)
    return ParsedKeys(tuple(keys), MappingProxyType(dict(skipped)))


def _key(member: object, algorithms: Sequence[str]) -> BoundKey:
    if not isinstance(member, dict):
        raise _Unusable("not_an_object")
    if _PRIVATE & member.keys():
        raise _Unusable("private" if member.get("kty") != "oct" else "symmetric")
    operations = member.get("key_ops", ["verify"])
    if member.get("use", "sig") != "sig" or not isinstance(operations, list) or "verify" not in operations:
        raise _Unusable("not_for_signatures")
    try:
        kid = checked_kid(member["kid"]) if "kid" in member else None
    except Unauthorized:
        raise _Unusable("kid") from None
    kind = member.get("kty")
    if kind == "RSA":
        vetted, algorithm = _rsa(member, algorithms)
    elif kind == "EC":
        vetted, algorithm = _elliptic(member)
    else:
        raise _Unusable("key_type")
    if member.get("alg", algorithm) != algorithm or algorithm not in algorithms:
        raise _Unusable("algorithm")
    try:
        return bind(vetted, algorithm, kid)
    except ValueError:  # from cryptography: a point that is not on its curve
        raise _Unusable("invalid") from None


def _rsa(member: Mapping[str, Any], algorithms: Sequence[str]) -> tuple[dict[str, str], str]:
    modulus, exponent = (int.from_bytes(_bytes(member, name)) for name in ("n", "e"))
    if not MIN_RSA_BITS <= modulus.bit_length() <= MAX_RSA_BITS or modulus % 2 == 0:
        raise _Unusable("rsa_modulus")
    if not MIN_EXPONENT <= exponent <= MAX_EXPONENT or exponent % 2 == 0:
        raise _Unusable("rsa_exponent")
    allowed = [each for each in algorithms if each.startswith("RS")]
    named = member.get("alg")
    algorithm = named if named in allowed else next(iter(allowed), "")
    return {"kty": "RSA", "n": member["n"], "e": member["e"]}, algorithm


def _elliptic(member: Mapping[str, Any]) -> tuple[dict[str, str], str]:
    name = member.get("crv")
    if not isinstance(name, str) or name not in _CURVES:
        raise _Unusable("curve")
    algorithm, size = _CURVES[name]
    if any(len(_bytes(member, axis)) != size for axis in ("x", "y")):
        raise _Unusable("invalid")
    return {"kty": "EC", "crv": name, "x": member["x"], "y": member["y"]}, algorithm


def _bytes(member: Mapping[str, Any], name: str) -> bytes:
    text = member.get(name)
    if not isinstance(text, str):
        raise _Unusable("invalid")
    try:
        return decode_base64url(text)
    except ValueError:
        raise _Unusable("invalid") from None
