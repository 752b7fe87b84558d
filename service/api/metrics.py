"""`GET /metrics`: every series, in Prometheus' format or OpenMetrics'."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Request, Response

from service.api.deps import Requires, StateDep
from service.api.routes import get_and_head
from service.auth.principal import Scope
from service.observability.exposition import content_type


async def metrics(request: Request, state: StateDep) -> Response:
    """Every series, as of now. OpenMetrics, with exemplars, for a client whose Accept header names it."""
    form = content_type(request.headers.get("accept", ""))
    return Response(await state["scraper"].scrape(form), headers={"content-type": form})


def build_router() -> APIRouter:
    """The routes of this module."""
    router = APIRouter(dependencies=[Depends(Requires(Scope.METRICS))], tags=["operations"])
    get_and_head(router, "/metrics", metrics, summary="Metrics in Prometheus' text format")
    return router
