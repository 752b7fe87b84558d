"""What an operator does to the running process, over HTTP, with the scope `admin`.

`/admin/log-level`: what is logged from now on, until the process ends. Every call is in the audit log, and what cannot
be audited is not done; where authentication is off there is no audit log.
"""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Depends
from pydantic import BaseModel, ConfigDict, Field

from service.api.body import StrictJSONRoute
from service.api.deps import CurrentPrincipal, RequestState, Requires, StateDep
from service.api.routes import get_and_head, refusals
from service.auth.principal import Principal, Scope
from service.observability.logging import Level, current_level, get_logger, set_level
from service.storage import audit

log = get_logger(__name__)


class LogLevel(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    level: Level = Field(description="The least severe level that is logged.")


async def note(event: str, principal: Principal, state: RequestState, **detail: str) -> None:
    """Put a call into the audit log. Raises StorageUnavailable."""
    if state["settings"].auth.enabled:
        write = state["access"].storage.write(
            lambda connection: audit.append(connection, event, actor=principal.id, at=state["now"](), detail=detail)
        )
        await asyncio.wrap_future(write)


async def show_level(principal: CurrentPrincipal, state: StateDep) -> dict[str, str]:
    """The level that is in force."""
    await note("log_level_shown", principal, state)
    return {"level": current_level()}


async def change_level(body: LogLevel, principal: CurrentPrincipal, state: StateDep) -> dict[str, str]:
    """Change it; a restart brings back the configured one."""
    former = current_level()
    await note("log_level_set", principal, state, former=former, level=body.level)
    set_level(body.level)
    log.warning("log_level_set", former=former, set=body.level)
    return {"level": current_level()}


def build_router() -> APIRouter:
    """The routes of this module."""
    router = APIRouter(dependencies=[Depends(Requires(Scope.ADMIN))], tags=["admin"])
    path = "/admin/log-level"
    get_and_head(router, path, show_level, summary="Show the log level")
    router.add_api_route(
        path,
        change_level,
        methods=["PUT"],
        summary="Change the log level",
        responses=refusals(),
        route_class_override=StrictJSONRoute,
    )
    return router
