"""The Host header must be one of ours: otherwise a web page could reach a loopback service by DNS rebinding.

That there is exactly one Host header, and that the target is a plain path, `protocol.py` has checked before.
"""

from __future__ import annotations

import re

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from service.api.errors import ErrorRenderer, note
from service.api.middleware.operations import LOOPBACK_HOSTS, is_operators
from service.errors import InvalidRequest

_PORT = re.compile(r":\d{0,5}\Z")


class AllowedHosts:
    """Refuses requests for other hosts. `*` in `allowed` lets every host pass.

    The operator's listener is asked by this machine's names too.
    """

    def __init__(self, app: ASGIApp, *, allowed: tuple[str, ...], errors: ErrorRenderer) -> None:
        self._app = app
        self._allowed = frozenset(host.lower() for host in allowed)
        self._errors = errors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._allows(Headers(scope=scope).get("host", ""), scope):
            error = InvalidRequest("The Host header names another host.", code="invalid_host")
            note(error, scope)
            await self._errors.response(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _allows(self, host: str, scope: Scope) -> bool:
        name = _PORT.sub("", host.lower())
        return "*" in self._allowed or name in self._allowed or (is_operators(scope) and name in LOOPBACK_HOSTS)
