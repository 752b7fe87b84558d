"""What routes may ask for: the typed state of their request, and who is asking. Each thing that FastAPI looks up for a
route costs every request 20 microseconds, so there are few.

The state's `stack` is the owner of whatever a request holds: it unwinds when the request is over, after a disconnect
and after an exception alike, so nothing else may be relied on to give a resource back. `StrictJSONRoute` keeps it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypedDict, cast

from fastapi import Depends, Request

from service.api.errors import ErrorRenderer
from service.api.scraper import Scraper
from service.auth.access_control import AccessControl
from service.auth.grant import Grant
from service.auth.principal import Principal, Scope
from service.engine.engine import Engine
from service.errors import Forbidden
from service.inference import Inference
from service.limits.limiter import Limits, Standing
from service.limits.usage_report import UsageReports
from service.observability.metrics import Metrics
from service.observability.reloads import Reloads
from service.observability.token_rate import TokenRate
from service.settings import Settings
from service.supervision.start import Start

if TYPE_CHECKING:  # it needs an extra
    from service.observability.tracing import RequestTrace


class AppState(TypedDict):
    """What the application's lifespan puts into every request's scope."""

    settings: Settings
    engine: Engine
    inference: Inference
    metrics: Metrics
    errors: ErrorRenderer
    access: AccessControl
    limits: Limits
    scraper: Scraper
    token_rate: TokenRate
    reloads: Reloads
    usage: UsageReports | None
    """None where no usage is kept."""
    start: Start
    new_id: Callable[[], str]
    now: Callable[[], float]
    """Seconds since the epoch."""
    started: int
    loop_age: Callable[[], float]
    """Seconds since the event loop last answered the watchdog."""


class RequestState(AppState):
    """The state of one request: a copy of the application's, and what the middleware added."""

    request_id: str
    line: dict[str, Any]
    """Fields for the request's one log line."""
    trace: RequestTrace | None
    """Its span; None where none is kept."""
    grant: Grant
    """Who is asking; absent on public paths."""
    standing: Standing
    """Its limits; absent where there is no grant."""
    stack: AsyncExitStack
    """What it holds; present on routes with a JSON body."""
    timeout: float | None
    """Seconds that the client waits, where it said so; present on inference routes."""


def request_state(request: Request) -> RequestState:
    """The typed view of what lifespan and middleware put into the scope."""
    return cast("RequestState", request.scope["state"])


async def current_principal(request: Request) -> Principal:
    """Who is asking, as the authentication layer found. On a public path there is nobody: KeyError."""
    return request_state(request)["grant"].principal


@dataclass(frozen=True, slots=True)
class Requires:
    """The dependency with which a router says which scope its routes need; each route has exactly one."""

    scope: Scope

    async def __call__(self, request: Request) -> Principal:
        """Who is asking. Raises Forbidden without the scope."""
        principal = await current_principal(request)
        if not principal.may(self.scope):
            raise Forbidden(f"This needs a credential with the scope `{self.scope}`.")
        return principal


# Async, although nothing waits: FastAPI runs plain functions in threads, each a wait for the interpreter.
async def _state(request: Request) -> RequestState:
    return request_state(request)


CurrentPrincipal = Annotated[Principal, Depends(current_principal)]
StateDep = Annotated[RequestState, Depends(_state)]
