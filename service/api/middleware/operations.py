"""The operator's listener: the same application, of which it has only what an operator asks for.

Inside `Authentication`, so that also here a stranger learns nothing of what there is: 401 comes before 404.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from service.api.docs import SCHEMA_PATH
from service.api.errors import ErrorRenderer
from service.api.health import PUBLIC_PATHS
from service.api.middleware.refusal import refuse
from service.errors import NotFound

SERVED = (*PUBLIC_PATHS, "/metrics", "/docs", SCHEMA_PATH)
"""And everything below `/admin/`."""

LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "[::1]")
"""Names of this machine, which no stranger's name can be made to look like: answered whatever
`server.allowed_hosts` says, because it speaks of the public address."""


def for_operators(app: ASGIApp) -> ASGIApp:
    """The application as the operator's listener serves it."""

    async def marked(scope: Scope, receive: Receive, send: Send) -> None:
        scope.setdefault("state", {})["operations"] = True
        await app(scope, receive, send)

    return marked


def is_operators(scope: Scope) -> bool:
    """Whether the request came in by the operator's listener."""
    return bool(scope.get("state", {}).get("operations"))


class OperationsOnly:
    """Refuses there what is not the operator's, as a path at which there is nothing."""

    def __init__(self, app: ASGIApp, *, errors: ErrorRenderer) -> None:
        self._app = app
        self._errors = errors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not is_operators(scope) or _served(scope["path"]):
            await self._app(scope, receive, send)
            return
        error = NotFound("There is nothing at this path.")
        scope["state"]["line"]["error"] = error.code
        await refuse(error, self._errors, scope, receive, send)


def _served(path: str) -> bool:
    return path in SERVED or path.startswith("/admin/")
