"""What mlx computes on, as one line of JSON: `python -m service.engine.device`.

A process of its own for whoever only asks: where Metal cannot be used, mlx may abort instead of raising.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from typing import Self

import mlx.core as mx


@dataclass(frozen=True, slots=True)
class Device:
    """`backend` is `metal`, `cuda` or `cpu`; `working_set` the bytes that a GPU recommends to stay below, or has."""

    backend: str
    name: str
    working_set: int | None

    @classmethod
    def current(cls) -> Self:
        """mlx's default device."""
        info = mx.device_info()
        name = str(info.get("device_name") or info.get("architecture") or "unnamed")
        if mx.default_device() == mx.Device(mx.cpu):
            return cls("cpu", name, None)
        size = info.get("max_recommended_working_set_size") or info.get("memory_size") or info.get("total_memory")
        return cls("metal" if mx.metal.is_available() else "cuda", name, int(size) if size else None)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asdict(Device.current())) + "\n")
