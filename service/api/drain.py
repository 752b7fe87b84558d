"""`/admin/drain`: finish what runs and take nothing new, with the process and its listeners up; and back again.

It is the drain of a stop signal, at whose end nothing stops. A restart forgets it. Audited as `operations.py` says.
"""

from __future__ import annotations

from fastapi import APIRouter, Depends, Response
from typing_extensions import TypedDict

from service.api.deps import CurrentPrincipal, RequestState, Requires, StateDep
from service.api.operations import note
from service.api.routes import refusals
from service.auth.principal import Scope
from service.errors import Draining
from service.observability.logging import get_logger

log = get_logger(__name__)


class DrainState(TypedDict):
    """`drained`: nothing waits or runs, and what requests held is settled. Rows are counted."""

    state: str
    drained: bool
    running: int
    waiting: int


def drain_state(state: RequestState) -> DrainState:
    """How far it is, at this moment."""
    engine = state["engine"].status()
    left = engine.running + engine.waiting + state["limits"].open
    return {
        "state": engine.state.value,
        "drained": engine.drain_for_good is not None and not left,
        "running": engine.running,
        "waiting": engine.waiting,
    }


async def drain(principal: CurrentPrincipal, state: StateDep, response: Response) -> DrainState:
    """Refuse new work and what waits; what runs has `engine.drain_timeout`. 202 until nothing is left, then 200."""
    await note("drain_begun", principal, state)
    if state["engine"].status().drain_for_good is None:
        log.warning("draining", principal=principal.id, timeout=state["settings"].engine.drain_timeout)
    state["engine"].begin_drain(state["settings"].engine.drain_timeout, for_good=False)
    found = drain_state(state)
    response.status_code = 200 if found["drained"] else 202
    return found


async def undrain(principal: CurrentPrincipal, state: StateDep) -> DrainState:
    """Take work again. 503 once the process is to end."""
    if state["engine"].status().drain_for_good:
        await note("admin_call_refused", principal, state, call="drain_undone", code=Draining.code)
    else:
        await note("drain_undone", principal, state)
    state["engine"].resume()
    log.warning("drain_undone", principal=principal.id)
    return drain_state(state)


def build_router() -> APIRouter:
    """The routes of this module."""
    router = APIRouter(dependencies=[Depends(Requires(Scope.ADMIN))], tags=["operations"])
    path = "/admin/drain"
    answers = {202: {"model": DrainState, "description": "Requests are still running."}, **refusals()}
    router.add_api_route(path, drain, methods=["POST"], summary="Take no new work", responses=answers)
    router.add_api_route(path, undrain, methods=["DELETE"], summary="Take work again", responses=refusals())
    return router
