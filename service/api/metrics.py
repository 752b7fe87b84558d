"""`GET /metrics`: Prometheus exposition, rendered in a thread because a scrape must not stop the event loop."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Depends, Response

from service.api.deps import Requires, StateDep
from service.api.routes import get_and_head
from service.auth.principal import Scope
from service.engine.engine import EngineState, EngineStatus
from service.observability.metrics import CONTENT_TYPE, Metrics


async def metrics(state: StateDep) -> Response:
    """Every series, with the engine's gauges as of now."""
    found = state["metrics"]
    observe_engine(found, state["engine"].status())
    text = await asyncio.to_thread(found.render)
    return Response(text, headers={"content-type": CONTENT_TYPE})


def observe_engine(metrics: Metrics, status: EngineStatus) -> None:
    """Copy a snapshot of the engine into the gauges."""
    metrics.requests_running.set(status.running)
    metrics.requests_waiting.set(status.waiting)
    metrics.memory_active.set(status.memory.active)
    metrics.memory_peak.set(status.memory.peak)
    metrics.memory_buffer_cache.set(status.memory.buffer_cache)
    metrics.prefix_cache_bytes.set(status.memory.prefix_cache)
    metrics.prefix_cache_entries.set(status.memory.prefix_entries)
    metrics.step_age.set(0.0 if status.step_age is None else status.step_age)
    for state in EngineState:
        metrics.engine_state.labels(state.value).set(state is status.state)


def build_router() -> APIRouter:
    """The routes of this module."""
    router = APIRouter(dependencies=[Depends(Requires(Scope.METRICS))], tags=["operations"])
    get_and_head(router, "/metrics", metrics, summary="Metrics in Prometheus' text format")
    return router
