"""What mlx's CUDA backend is told before it is imported."""

from __future__ import annotations

import os
from importlib import metadata
from types import MappingProxyType

PREFERRED = MappingProxyType(
    {
        # Reported by others, not seen here: of the default, 400 graphs, more than twice as many that were not found
        # raise "Cache thrashing is happening" at each step from then on. A service meets new shapes all its life.
        "MLX_ENABLE_CACHE_THRASHING_CHECK": "0",
        "MLX_CUDA_GRAPH_CACHE_SIZE": "4096",
        # By default cuDNN's plans of 256 shapes of attention, of which one takes 50 ms on an H100.
        "MLX_CUDA_SDPA_CACHE_SIZE": "2048",
        # By default a graph has 20 operations, and launching those of one step may take longer than the step: on an
        # H100, 32 rows of a model of 1B parameters, 23.3 ms (22 of them the processor's) against 19.7.
        "MLX_MAX_OPS_PER_BUFFER": "100",
        "MLX_MAX_MB_PER_BUFFER": "1000",
    }
)

DISTRIBUTIONS = ("mlx-cuda-12", "mlx-cuda-13")


def prefer_for_cuda() -> None:
    """Set `PREFERRED` where that backend is installed and the environment says nothing else; call before mlx is first
    imported. Metal, which reads the last two as well, keeps its own."""
    if any(_installed(name) for name in DISTRIBUTIONS):
        for name, value in PREFERRED.items():
            os.environ.setdefault(name, value)


def _installed(distribution: str) -> bool:
    try:
        metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True
