"""The text of a JWT, read strictly before any library sees a byte. Pure; any thread.

python-jose takes the last of duplicate keys, junk and padding in base64, any `crit`, and raises RecursionError or
UnicodeEncodeError on hostile JSON. Here a text has exactly one reading (RFC 7515, RFC 8725) or none.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NoReturn

from service.errors import Unauthorized

MAX_BYTES = 4096
"""Of a token. Verification costs loop time by its length: a token of 20 MB took 0.2 s."""

MAX_DEPTH = 8
MAX_DIGITS = 20
"""Of an integer in JSON, sign included; 64 bits fit."""

FORBIDDEN = frozenset({"crit", "b64", "zip", "jku", "x5u", "x5c", "jwk", "cty"})
"""Header parameters that change how a token is read, or bring a key along."""


class Reason(StrEnum):
    """Why a token is refused, as the operator sees it; a client never does. The closed set of this kind."""

    TOO_LARGE = "too_large"
    MALFORMED = "malformed"
    NOT_JSON = "not_json"
    UNKNOWN_ISSUER = "unknown_issuer"
    ALGORITHM = "algorithm"
    TOKEN_TYPE = "token_type"  # noqa: S105 - a header parameter
    HEADER = "header_parameter"
    UNKNOWN_KEY = "unknown_key"
    SIGNATURE = "signature"
    CLAIMS = "claims"
    AUDIENCE = "audience"
    EXPIRED = "expired"
    NOT_YET_VALID = "not_yet_valid"
    LIFETIME = "lifetime"
    TENANT = "tenant"
    PLAN = "plan"
    DENIED = "denied"
    UNVERIFIABLE = "unverifiable"

    def refusal(self) -> Unauthorized:
        return Unauthorized(self.value)


class NotStrictJson(ValueError):
    """The bytes are not JSON with one reading. The message never holds them."""


@dataclass(frozen=True, slots=True)
class UnverifiedToken:
    """What a text says, believed by nobody yet."""

    text: str = field(repr=False)
    header: Mapping[str, Any]
    claims: Mapping[str, Any]


_SEGMENTS = re.compile(r"([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)", re.ASCII)
_KID = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)
# A string that never ends is one match to the end of the text: a match that failed at each quote would be quadratic.
_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_BRACKET = re.compile(r"[\[\]{}]")


def looks_like_jwt(text: str) -> bool:
    """Whether the outer form is a token's; no key of ours has a dot."""
    return _SEGMENTS.fullmatch(text) is not None


def parse(text: str) -> UnverifiedToken:
    """The header and claims of a token. Raises Unauthorized: too_large, malformed, not_json."""
    if len(text) > MAX_BYTES:
        raise Reason.TOO_LARGE.refusal()
    segments = _SEGMENTS.fullmatch(text)
    if segments is None:
        raise Reason.MALFORMED.refusal()
    try:
        header, claims, _ = map(decode_base64url, segments.groups())
    except ValueError:
        raise Reason.MALFORMED.refusal() from None
    return UnverifiedToken(text, _json_object(header), _json_object(claims))


def decode_base64url(text: str) -> bytes:
    """The bytes of canonical base64url (RFC 4648, 5; no padding). Raises ValueError for any other spelling."""
    data = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    if base64.urlsafe_b64encode(data).rstrip(b"=") != text.encode("ascii"):
        raise ValueError("not canonical")
    return data


def _json_object(data: bytes) -> Mapping[str, Any]:
    try:
        value = strict_json(data)
    except NotStrictJson:
        raise Reason.NOT_JSON.refusal() from None
    if not isinstance(value, dict):
        raise Reason.NOT_JSON.refusal()
    return value


def strict_json(data: bytes) -> Any:
    """A JSON document with one reading: UTF-8, no byte order mark, no duplicate keys, no NaN, no lone surrogates.

    At most MAX_DEPTH levels and integers of MAX_DIGITS. Raises NotStrictJson; linear in the length of `data`.
    """
    try:
        text = data.decode("utf-8")
        _check_depth(text)
        value = json.loads(
            text, object_pairs_hook=_object, parse_constant=_constant, parse_float=_float, parse_int=_integer
        )
        if "\\u" in text:  # the only way in for half of a surrogate pair
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except ValueError:
        raise NotStrictJson("not strict JSON") from None
    return value


def _check_depth(text: str) -> None:
    """Before the parser recurses: with 3,000 levels it would end in a RecursionError."""
    depth = 0
    for bracket in _BRACKET.findall(_STRING.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        if depth > MAX_DEPTH:
            raise ValueError("too deep")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is given twice")
    return found


def _constant(_: str) -> NoReturn:
    raise ValueError("no JSON number")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("too large")
    return value


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError("too long")
    return int(text)


def check_header(header: Mapping[str, Any], algorithms: Collection[str], types: Collection[str]) -> str | None:
    """The key id that a header names, or None. `types` are `typ`s; an empty one stands for a header without.

    Raises Unauthorized: algorithm, token_type, header_parameter, unknown_key.
    """
    algorithm = header.get("alg")
    if not isinstance(algorithm, str) or algorithm not in algorithms:
        raise Reason.ALGORITHM.refusal()
    kind = header.get("typ", "")
    # A media type: its case and the prefix `application/` do not matter (RFC 7515, 4.1.9).
    if not isinstance(kind, str) or kind.lower().removeprefix("application/") not in {each.lower() for each in types}:
        raise Reason.TOKEN_TYPE.refusal()
    if FORBIDDEN & header.keys():
        raise Reason.HEADER.refusal()
    if "kid" not in header:
        return None
    return checked_kid(header["kid"])


def checked_kid(kid: object) -> str:
    """A key id that can only be looked up: no path, no query. Raises Unauthorized: unknown_key."""
    if not isinstance(kid, str) or _KID.fullmatch(kid) is None:
        raise Reason.UNKNOWN_KEY.refusal()
    return kid
