"""MLX's own memory limits: set by us at each load, and logged, so that no default of a device decides. Belongs to the
generation thread."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import mlx.core as mx
import structlog
from mlx.utils import tree_flatten

from service.engine.memory import BUDGET_SHARE, HOST_SHARE
from service.settings import EngineSettings

HEADROOM_SHARE = 0.05
LEAST_HEADROOM = 256 * 1024 * 1024
"""Bytes, or a share of the rest if that is more, for what no estimate has: code of kernels, small buffers, rounding."""

POOL_SHARE = 1 / 16
"""Of a GPU's working set, for freed buffers. What a chunk of prompts freed is of other sizes than what decoding takes.
Where they do not fit side by side, steps give buffers back to the device, which waits for it to be idle: on an H100,
with 512 MiB, those of 32 rows took 5 to 40 ms by turns; with 4 GiB 19.5, 2 % less in the mean (64 rows: 2 to 4 %)."""
LEAST_POOL = 512 * 1024 * 1024


def recommended_bytes() -> int | None:
    """What a GPU recommends to stay below (Metal), or has (CUDA); None on a CPU."""
    return None if mx.default_device() == mx.Device(mx.cpu) else _of_device()


@cache
def _of_device() -> int | None:
    """Asked once, because it is for each step: with CUDA mlx asks the driver each time, for what is free as well."""
    info = mx.device_info()
    recommended = info.get("max_recommended_working_set_size") or info.get("memory_size") or info.get("total_memory")
    return int(recommended) if recommended else None


def working_set() -> int:
    """Bytes that weights and caches together may use on this device."""
    if (recommended := recommended_bytes()) is not None:
        return int(recommended * BUDGET_SHARE)
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * HOST_SHARE)


def pool_bytes(engine: EngineSettings) -> int:
    """Bytes of freed buffers that mlx may keep: as configured, or a share of a GPU's working set."""
    on_gpu = 0 if recommended_bytes() is None else int(working_set() * POOL_SHARE)
    return engine.buffer_cache_limit or max(LEAST_POOL, on_gpu)


def limit_buffers(engine: EngineSettings) -> None:
    """Before the load: how many freed bytes mlx keeps, and the wired limit, which is left alone unless one is set."""
    mx.set_cache_limit(pool_bytes(engine))
    if engine.wired_limit:
        mx.set_wired_limit(engine.wired_limit)


def limit_memory(engine: EngineSettings, model: Any, budget: int) -> None:
    """After it: weights, budget, freed buffers and headroom. Admission keeps to the budget, so this is never met; where
    an estimate was wrong, mlx waits for what runs and gives freed buffers back before it takes more. Metal's default,
    1.5 times the recommended working set, would let it take what the system needs."""
    weights, pool = weight_bytes(model), pool_bytes(engine)
    limit = weights + budget + pool
    limit += max(LEAST_HEADROOM, int(limit * HEADROOM_SHARE))
    mx.set_memory_limit(limit)
    structlog.get_logger("engine").info(
        "memory_limits",
        memory_limit=limit,
        cache_limit=pool,
        wired_limit=engine.wired_limit or None,
        weights=weights,
        budget=budget,
    )


def weight_bytes(model: Any) -> int:
    """Bytes of a model's parameters."""
    return sum(array.nbytes for _, array in tree_flatten(model.parameters()))
