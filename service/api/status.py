"""`GET /admin/status`: how the process is, in one answer, for an operator without Prometheus.

Everything in it is at hand: it waits for nothing, so that it also tells how storage is when that hangs. Nothing in it
is anybody's (no prompt, key or principal), so unlike the other calls below `/admin` it is not in the audit log, which
a poll would fill.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Depends
from typing_extensions import TypedDict

from service import __version__
from service.api.deps import RequestState, Requires, StateDep
from service.api.drain import drain_state
from service.api.health import loaded, reasons
from service.api.routes import get_and_head
from service.auth.principal import Scope
from service.engine.backend import ModelInfo
from service.engine.engine import EngineStatus
from service.observability.logging import current_level
from service.observability.token_rate import current

Part = dict[str, Any]


class Status(TypedDict):
    """Sizes are in bytes. What an installation does not have, or what is not known yet, is null."""

    ready: bool
    state: str
    reasons: list[str]
    version: str
    started_at: int
    uptime_seconds: float
    log_level: str
    start: Part
    model: Part | None
    drain: Part | None
    reload: Part | None
    requests: Part
    tokens_per_second: Part | None
    step_age_seconds: float | None
    progress_age_seconds: float | None
    event_loop_age_seconds: float
    memory: Part
    prefix_cache: Part
    limits: Part
    storage: Part | None
    issuers: list[Part]
    redis: Part | None


async def status(state: StateDep) -> Status:
    """State, load, memory, and the health of what the service leans on."""
    engine = state["engine"].status()
    why_not = reasons(state, engine)
    rate = state["token_rate"].per_second()
    shared = state["limits"].shared_store_up
    return {
        "ready": not why_not,
        "state": engine.state.value,
        "reasons": why_not,
        "version": __version__,
        "started_at": state["started"],
        "uptime_seconds": max(0.0, state["now"]() - state["started"]),
        "log_level": current_level(),
        "start": _start(state),
        "model": _model(state["engine"].info, loaded(state["engine"])),
        "drain": _drain(state, engine),
        "reload": None if (reload := state["reloads"].last) is None else asdict(reload),
        "requests": _requests(state, engine),
        "tokens_per_second": None if rate is None else asdict(rate),
        "step_age_seconds": engine.step_age,
        "progress_age_seconds": engine.progress_age,
        "event_loop_age_seconds": state["loop_age"](),
        "memory": _memory(engine),
        "prefix_cache": {
            "bytes": engine.memory.prefix_cache,
            "capacity_bytes": engine.memory.prefix_capacity,
            "entries": engine.memory.prefix_entries,
        },
        "limits": {"open_reservations": state["limits"].open},
        "storage": _storage(state),
        "issuers": _issuers(state),
        "redis": None if shared is None else {"up": shared},
    }


def _start(state: RequestState) -> Part:
    start = state["start"]
    return {
        "supervised": start.supervised,
        "safe_mode": start.verdict.safe_mode or None,
        "died_recently": start.verdict.died_recently(state["now"]()),
    }


def _model(info: ModelInfo | None, is_loaded: bool) -> Part | None:
    if info is None:
        return None
    return {
        "name": info.name,
        "loaded": is_loaded,
        "device": info.device,
        "context_length": info.context_length,
        "batching": info.batchable,
    }


def _drain(state: RequestState, engine: EngineStatus) -> Part | None:
    if engine.drain_for_good is None:
        return None
    return {"drained": drain_state(state)["drained"], "for_good": engine.drain_for_good}


def _requests(state: RequestState, engine: EngineStatus) -> Part:
    metrics = state["metrics"]
    return {
        "in_flight": int(current(metrics.http_in_flight)),
        "running": engine.running,
        "max_running": int(current(metrics.rows_capacity)),
        "waiting": engine.waiting,
        "max_waiting": int(current(metrics.queue_capacity)),
        "held": engine.held,
    }


def _memory(engine: EngineStatus) -> Part:
    memory = engine.memory
    return {
        "active": memory.active,
        "peak": memory.peak,
        "buffer_cache": memory.buffer_cache,
        "recommended": memory.recommended,
        "reserved": engine.reserved,
        "budget": engine.budget,
    }


def _storage(state: RequestState) -> Part | None:
    up = state["access"].storage_up()
    if up is None:
        return None
    return {"up": up, "usage_rows_pending": int(current(state["metrics"].usage_rows_pending))}


def _issuers(state: RequestState) -> list[Part]:
    found = ((issuer.settings.name, issuer.keys.health) for issuer in state["access"].issuers)
    return [
        {"name": name, "keys": health.keys, "age_seconds": health.age, "error": health.error} for name, health in found
    ]


def build_router() -> APIRouter:
    """The routes of this module."""
    router = APIRouter(dependencies=[Depends(Requires(Scope.ADMIN))], tags=["operations"])
    get_and_head(router, "/admin/status", status, summary="How is the service?")
    return router
