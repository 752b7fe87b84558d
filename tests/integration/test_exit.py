"""The process with a real model: it comes, serves, and leaves with the code it promises."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import httpx

from tests.serving import process


def test_every_stop_exits_with_zero(
    tiny_model_dir: Path, tmp_path: Path, count: Callable[[str, int, int], int]
) -> None:
    """mlx aborts a process whose generation thread left its streams behind, about every second time."""
    for _ in range(count("starts and stops of the process", 4, 50)):
        with process(tmp_path, MLXD_MODEL__REFERENCE=str(tiny_model_dir)) as url:  # asserts the exit code
            assert httpx.post(f"{url}/generate", json={"prompt": "hello", "max_tokens": 3}).status_code == 200
