"""One hit on the principal's request rate, before a byte of the body is read, and where it stands in every answer."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from service.api.errors import ErrorRenderer
from service.api.middleware.refusal import refuse
from service.errors import UnknownLimits
from service.limits.limiter import Limits


class RequestRate:
    """Puts the principal's `standing` into the scope's state; `RequestContext` writes it into each answer's head.

    Inside `Authentication`, which lets the public paths pass without a grant: those are not counted.
    """

    def __init__(self, app: ASGIApp, *, limits: Limits, errors: ErrorRenderer) -> None:
        self._app = app
        self._limits = limits
        self._errors = errors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or "grant" not in scope["state"]:
            await self._app(scope, receive, send)
            return
        state = scope["state"]
        try:
            standing, refusal = await self._limits.hit(state["grant"].principal)
        except UnknownLimits as error:
            state["line"]["limits_error"] = error.reason
            await refuse(error, self._errors, scope, receive, send)
            return
        state["standing"] = standing
        state["answer_headers"] = lambda: self._limits.headers(standing)
        if refusal is None:
            await self._app(scope, receive, send)
            return
        await refuse(refusal, self._errors, scope, receive, send)
