"""What routes may ask for, as annotated aliases. Everything comes from the typed lifespan state.

`RequestStack` is the owner of whatever a request holds: it unwinds after the last byte was sent, after a
disconnect and after an exception alike, so nothing else may be relied on to give a resource back.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Annotated, Any, TypedDict, cast

from fastapi import Depends, Request

from service.api.errors import ErrorRenderer
from service.auth.principal import LOCAL, Principal
from service.engine.engine import Engine
from service.inference import Inference
from service.observability.metrics import Metrics
from service.settings import Settings


class AppState(TypedDict):
    """What the application's lifespan puts into every request's scope."""

    settings: Settings
    engine: Engine
    inference: Inference
    metrics: Metrics
    errors: ErrorRenderer
    new_id: Callable[[], str]
    now: Callable[[], float]
    """Seconds since the epoch."""
    started: int


class RequestState(AppState):
    """The state of one request: a copy of the application's, and what the middleware added."""

    request_id: str
    line: dict[str, Any]
    """Fields for the request's one log line."""


def request_state(request: Request) -> RequestState:
    """The typed view of what lifespan and middleware put into the scope."""
    return cast("RequestState", request.scope["state"])


def current_principal() -> Principal:
    """Who is asking. There is no authentication yet, and the service answers on loopback only."""
    return LOCAL


async def request_stack() -> AsyncIterator[AsyncExitStack]:
    """A stack that unwinds when the request is over, whatever its end."""
    async with AsyncExitStack() as stack:
        yield stack


def _engine(request: Request) -> Engine:
    return request_state(request)["engine"]


def _inference(request: Request) -> Inference:
    return request_state(request)["inference"]


CurrentPrincipal = Annotated[Principal, Depends(current_principal)]
RequestStack = Annotated[AsyncExitStack, Depends(request_stack)]
StateDep = Annotated[RequestState, Depends(request_state)]
EngineDep = Annotated[Engine, Depends(_engine)]
InferenceDep = Annotated[Inference, Depends(_inference)]
