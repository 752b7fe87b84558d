"""MLX's own memory limits: set by us at each load, and logged, so that no default of a device decides. Belongs to the
generation thread."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import structlog
from mlx.utils import tree_flatten

from service.settings import EngineSettings

HEADROOM_SHARE = 0.05
LEAST_HEADROOM = 256 * 1024 * 1024
"""Bytes, or a share of the rest if that is more, for what no estimate has: code of kernels, small buffers, rounding."""


def limit_buffers(engine: EngineSettings) -> None:
    """Before the load: how many freed bytes mlx keeps, and the wired limit, which is left alone unless one is set."""
    mx.set_cache_limit(engine.buffer_cache_limit)
    if engine.wired_limit:
        mx.set_wired_limit(engine.wired_limit)


def limit_memory(engine: EngineSettings, model: Any, budget: int) -> None:
    """After it: weights, budget, freed buffers and headroom. Admission keeps to the budget, so this is never met; where
    an estimate was wrong, mlx waits for what runs and gives freed buffers back before it takes more. Metal's default,
    1.5 times the recommended working set, would let it take what the system needs."""
    weights = weight_bytes(model)
    limit = weights + budget + engine.buffer_cache_limit
    limit += max(LEAST_HEADROOM, int(limit * HEADROOM_SHARE))
    mx.set_memory_limit(limit)
    structlog.get_logger("engine").info(
        "memory_limits",
        memory_limit=limit,
        cache_limit=engine.buffer_cache_limit,
        wired_limit=engine.wired_limit or None,
        weights=weights,
        budget=budget,
    )


def weight_bytes(model: Any) -> int:
    """Bytes of a model's parameters."""
    return sum(array.nbytes for _, array in tree_flatten(model.parameters()))
