"""Who is asking, settled before a byte of the body is read: default deny.

A request is on the short public list or needs a principal, whether or not its path or method exist. (FastAPI would
read and parse the whole body before any dependency of a route.) Every refused credential gets the same bytes; why
it was refused is in the log, a metric and the audit log. An address with too many of them gets 429 instead.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from service.api.errors import ErrorRenderer
from service.api.health import PUBLIC_PATHS
from service.api.middleware.refusal import refuse
from service.auth.access_control import AccessControl
from service.auth.grant import Grant
from service.errors import ServiceError, Unauthorized
from service.limits.limiter import Limits
from service.observability.metrics import Metrics


class Authentication:
    """Puts the `grant` into the scope's state, and who it is into the request's log line."""

    def __init__(
        self, app: ASGIApp, *, access: AccessControl, limits: Limits, errors: ErrorRenderer, metrics: Metrics
    ) -> None:
        self._app = app
        self._access = access
        self._limits = limits
        self._errors = errors
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or _is_public(scope):
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # there are no WebSockets here; the server ends what is not answered
        address = _address(scope)
        try:
            grant = await self._grant(scope, address)
        except ServiceError as error:
            await self._refuse(error, address, scope, receive, send)
            return
        _introduce(grant, scope)
        await self._app(scope, receive, send)

    async def _grant(self, scope: Scope, address: str) -> Grant:
        verifying = self._access.authenticator.authenticate(scope["headers"], address)
        trace = scope["state"].get("trace")
        return await (verifying if trace is None else trace.during("authenticate", verifying))

    async def _refuse(self, error: ServiceError, address: str, scope: Scope, receive: Receive, send: Send) -> None:
        if isinstance(error, Unauthorized):
            scope["state"]["line"]["auth_failure"] = error.reason
            self._metrics.auth_failures.labels(error.reason).inc()
            self._access.failures.note(reason=error.reason, address=address, request_id=scope["state"]["request_id"])
            # One answer for all of them, also for its subclasses.
            error = self._limits.stranger(address) or Unauthorized(error.reason)
        await refuse(error, self._errors, scope, receive, send)


def _is_public(scope: Scope) -> bool:
    if scope["type"] != "http" or scope["path"] not in PUBLIC_PATHS:
        return False
    methods = ("HEAD",) if scope["path"] == "/" else ("GET", "HEAD")
    return scope["method"] in methods


def _address(scope: Scope) -> str:
    client: tuple[str, int] | None = scope.get("client")
    return client[0] if client else ""


def _introduce(grant: Grant, scope: Scope) -> None:
    who = grant.principal
    scope["state"]["grant"] = grant
    scope["state"]["line"].update(principal=who.id, tenant=who.tenant)
    if who.key_id is not None:
        scope["state"]["line"]["key_id"] = who.key_id
