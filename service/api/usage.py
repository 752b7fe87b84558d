"""`GET /v1/usage`, one's own, and `GET /admin/usage`, everybody's: requests and tokens by day, key, tenant or model.

What was used in the last second may be missing. Reading everybody's usage is in the audit log, as every call of
`/admin` is: when the log cannot be written, nothing is read.
"""

from __future__ import annotations

import asyncio
from datetime import date
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from service.api.deps import CurrentPrincipal, RequestState, Requires, StateDep
from service.api.routes import get_and_head
from service.auth.principal import Scope
from service.errors import NotFound
from service.limits.usage_report import Span, UsageReports
from service.storage import audit
from service.storage.usage import By


def _date(value: object) -> date:
    try:
        return date.fromisoformat(value if isinstance(value, str) else "")
    except ValueError:  # whose message repeats the text
        raise ValueError("The value should be a day, as 2030-01-31.") from None


Day = Annotated[date, BeforeValidator(_date), WithJsonSchema({"type": "string", "format": "date"})]
Name = Annotated[str, Field(min_length=1, max_length=256)]


class OwnUsage(BaseModel):
    """What is asked about; days are of UTC, both included."""

    model_config = ConfigDict(extra="forbid")

    first: Day | None = Field(None, alias="from", description="The first day; 30 days up to `to` when not given.")
    last: Day | None = Field(None, alias="to", description="The last day; today when not given.")
    by: By = Field("day", description="What to sum by.")


class AllUsage(OwnUsage):
    principal: Name | None = Field(None, description="Only this principal's.")
    tenant: Name | None = Field(None, description="Only this tenant's.")
    format: Literal["json", "csv"] = "json"


async def own_usage(
    asked: Annotated[OwnUsage, Query()], principal: CurrentPrincipal, state: StateDep
) -> dict[str, Any]:
    """What the caller's own principal has used: all keys of a rotation, or the subject of a token."""
    reports, span = _reports(state), Span.of(asked.first, asked.last, state["now"]())
    return (await reports.report(span, asked.by, principal=principal.id)).as_json()


async def all_usage(asked: Annotated[AllUsage, Query()], principal: CurrentPrincipal, state: StateDep) -> Response:
    """What everybody has used, or one principal or tenant; as JSON, or as CSV for a spreadsheet."""
    reports, span = _reports(state), Span.of(asked.first, asked.last, state["now"]())
    detail = asked.model_dump(mode="json", exclude_none=True)
    await asyncio.wrap_future(
        state["access"].storage.write(
            lambda connection: audit.append(
                connection, "usage_read", actor=principal.id, at=state["now"](), detail=detail
            )
        )
    )
    report = await reports.report(span, asked.by, principal=asked.principal, tenant=asked.tenant)
    if asked.format == "json":
        return JSONResponse(report.as_json())
    name = f"usage-{span.first}-{span.last}-{report.by}.csv"
    return Response(
        report.as_csv(), media_type="text/csv", headers={"content-disposition": f'attachment; filename="{name}"'}
    )


def _reports(state: RequestState) -> UsageReports:
    reports = state["usage"]
    if reports is None:
        raise NotFound("Where authentication is off no usage is kept.", code="usage_not_kept")
    return reports


def build_router() -> APIRouter:
    """The routes of this module."""
    router = APIRouter()
    own = APIRouter(dependencies=[Depends(Requires(Scope.USAGE))], tags=["usage"])
    get_and_head(own, "/v1/usage", own_usage, summary="Your own usage")
    everybody = APIRouter(dependencies=[Depends(Requires(Scope.ADMIN))], tags=["admin"])
    get_and_head(everybody, "/admin/usage", all_usage, summary="Everybody's usage")
    router.include_router(own)
    router.include_router(everybody)
    return router
