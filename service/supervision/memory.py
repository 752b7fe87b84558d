"""Whether there is memory for a model before it is loaded: arithmetic and file sizes, no mlx, any thread.

A load beyond what is free ends in the system's killing the process, and under a supervisor in a loop of that. So the
need is compared with what is free, and as long as that is less nothing is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from service.errors import NotEnoughMemory
from service.observability.process import available_memory

LEAST_BUDGET = 256 * 1024 * 1024
"""Bytes beside the weights without which not even one short request could be served."""

DENSE_BITS = 32
GROUP_BITS = 32
"""Of a group of quantised weights: its scale and its bias, 16 bits each."""

WIDTHS = (("float32", 32), ("float16", 16), ("bfloat16", 16))


def needed(folder: Path, config: Mapping[str, Any], *, dense: bool, budget: int) -> int:
    """Bytes that a load takes at least: the weights as they will be, and the least that KV caches need.

    `dense`: they become float32. `budget` is a configured memory budget, or 0.
    """
    weights = sum(file.stat().st_size for file in folder.glob("model*.safetensors"))
    return int(weights * (dense_factor(config) if dense else 1)) + min(budget or LEAST_BUDGET, LEAST_BUDGET)


def dense_factor(config: Mapping[str, Any]) -> float:
    """How much larger the weights of a model with this config.json are as float32."""
    quantised = config.get("quantization")
    if isinstance(quantised, Mapping) and isinstance(bits := quantised.get("bits"), int) and bits > 0:
        group = quantised.get("group_size")
        return DENSE_BITS / (bits + GROUP_BITS / (group if isinstance(group, int) and group > 0 else 64))
    said = str(config.get("dtype") or config.get("torch_dtype") or "")
    return DENSE_BITS / next((width for name, width in WIDTHS if said.endswith(name)), DENSE_BITS)


def require(need: int, *, free: Callable[[], int] = available_memory) -> None:
    """Raises NotEnoughMemory while less than `need` bytes are free."""
    there = free()
    if there < need:
        raise NotEnoughMemory(
            f"not enough memory: loading the model takes {_gib(need)}, and {_gib(there)} are free of "
            f"{_gib(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'))}"
        )


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
