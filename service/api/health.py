"""Probes. Public: they say whether to send work here, and nothing about anybody's work.

Dead, busy and stuck are different answers: a full queue is busy, and busy is healthy.
Stuck is work that nothing comes of.
"""

from __future__ import annotations

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse
from typing_extensions import TypedDict

from service.api.deps import RequestState, StateDep
from service.api.routes import get_and_head
from service.engine.engine import Engine, EngineState, EngineStatus

PUBLIC_PATHS = ("/", "/health", "/livez", "/readyz")


class Health(TypedDict):
    status: str
    model_loaded: bool


class Readiness(TypedDict):
    ready: bool
    state: str
    reasons: list[str]
    model_loaded: bool
    batching: bool | None
    running: int
    waiting: int
    step_age_seconds: float | None
    progress_age_seconds: float | None
    event_loop_age_seconds: float


def loaded(engine: Engine) -> bool:
    """Whether there is a model that work could run on."""
    return engine.info is not None and engine.state not in (EngineState.FAILED, EngineState.STOPPED)


def stuck(state: RequestState, status: EngineStatus) -> bool:
    """Whether a ready engine has had work for so long without progress that it may be lost: busy is something else."""
    limit = state["settings"].watchdog.suspect_after
    return status.state is EngineState.READY and 0 < limit < (status.progress_age or 0.0)


def reasons(state: RequestState, status: EngineStatus) -> list[str]:
    """What keeps requests from being served; nothing when they are."""
    found = []
    if status.state is not EngineState.READY:
        found += [f"the engine is {status.state.value}", *([status.detail] if status.detail else [])]
    if stuck(state, status):
        found.append(f"the engine has made no progress for {status.progress_age:.0f} s")
    if not state["access"].ready():
        found.append("credentials cannot be verified: the storage was not reached yet")
    return found


async def health(state: StateDep) -> Response:
    """200 when requests would be served, else 503 with the same two fields."""
    engine = state["engine"]
    status = engine.status()
    ready = not reasons(state, status)
    waiting_for = "stalled" if stuck(state, status) else "storage"
    word = waiting_for if status.state is EngineState.READY else status.state.value
    body: Health = {"status": "ok" if ready else word, "model_loaded": loaded(engine)}
    return JSONResponse(body, 200 if ready else 503)


async def livez() -> Response:
    """200 for as long as the event loop answers."""
    return JSONResponse({"status": "ok"})


async def readyz(state: StateDep) -> Response:
    """The engine's state, and what keeps the service from being ready."""
    engine = state["engine"]
    status = engine.status()
    why_not = reasons(state, status)
    body: Readiness = {
        "ready": not why_not,
        "state": status.state.value,
        "reasons": why_not,
        "model_loaded": loaded(engine),
        "batching": None if engine.info is None else engine.info.batchable,
        "running": status.running,
        "waiting": status.waiting,
        "step_age_seconds": status.step_age,
        "progress_age_seconds": status.progress_age,
        "event_loop_age_seconds": state["loop_age"](),
    }
    return JSONResponse(body, 503 if why_not else 200)


async def root() -> Response:
    """Some clients send `HEAD /` to see whether anybody is there."""
    return Response()


def build_router() -> APIRouter:
    """The routes of this module."""
    router = APIRouter(tags=["probes"])
    get_and_head(router, "/health", health, summary="Would a request be served?")
    get_and_head(router, "/livez", livez, summary="Is the process alive?")
    get_and_head(router, "/readyz", readyz, summary="Is it ready, and if not, why?")
    router.add_api_route("/", root, methods=["HEAD"], include_in_schema=False)
    return router
