"""What the engine can be, and a snapshot of how it is. `engine.py` has how it gets from one state to the next."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from service.engine.backend import MemoryUse
from service.errors import Draining, EngineFailed, NotReady, ServiceError

RETRY_LOADING = 5.0
"""Seconds after which a client may ask again while the model loads."""


class EngineState(StrEnum):
    STARTING = "starting"
    WARMING = "warming"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatus:
    """A snapshot for probes and metrics. Ages are in seconds; `detail` is the progress or the reason.

    `held` rows are not given back; those that run are promised `reserved` bytes of `budget`. While it loads and
    warms, `done` of `total` of what `detail` names are over (bytes, files or stages; `total` 0 is unknown).
    `step_age` is since the last step ended while rows run, `progress_age` since anything came of work that is there.
    `drain_for_good` is None where nothing drains.
    """

    state: EngineState
    detail: str
    done: int = 0
    total: int = 0
    waiting: int
    running: int
    held: int = 0
    reserved: int = 0
    budget: int = 0
    step_age: float | None
    progress_age: float | None = None
    memory: MemoryUse
    drain_for_good: bool | None = None


def refusal(state: EngineState, *, drain_timeout: float) -> ServiceError:
    """What work is told in a state in which it is not served."""
    match state:
        case EngineState.DRAINING | EngineState.STOPPED:
            return Draining("The service is shutting down.", retry_after=drain_timeout)
        case EngineState.FAILED:
            return EngineFailed("The engine has failed.", retry_after=RETRY_LOADING)
        case _:
            return NotReady("The model is still loading.", retry_after=RETRY_LOADING)
