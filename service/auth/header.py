"""Where a credential stands in a request: `Authorization: Bearer` (RFC 6750) or `x-api-key`, and nowhere else.

Never the query string: addresses end up in logs, histories and referrers. Pure; any thread.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from service.errors import Unauthorized

MAX_BYTES = 8192
"""Of a credential; far more than a key or a token that any issuer should make."""

_VISIBLE = re.compile(rb"[\x21-\x7e]+")


def credential_from(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The one credential among raw headers (names in lower case).

    Raises Unauthorized: missing, ambiguous, malformed.
    """
    found = [(name, value) for name, value in headers if name in (b"authorization", b"x-api-key")]
    if not found:
        raise Unauthorized("missing")
    if len(found) > 1:
        raise Unauthorized("ambiguous")
    [(name, value)] = found
    if name == b"authorization":
        scheme, _, value = value.partition(b" ")
        if scheme.lower() != b"bearer":
            raise Unauthorized("malformed")
    if len(value) > MAX_BYTES or _VISIBLE.fullmatch(value) is None:
        raise Unauthorized("malformed")
    return value.decode("ascii")
