"""MLX's own limits, and a load that asks for room first."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from service.engine import memory_limits
from service.engine.loading import load_model
from service.engine.memory_limits import (
    LEAST_HEADROOM,
    LEAST_POOL,
    limit_memory,
    pool_bytes,
    weight_bytes,
    working_set,
)
from service.engine.mlx_backend import MlxBackend
from service.errors import ModelTooLarge, NotEnoughMemory
from service.settings import EngineSettings, Settings
from service.supervision.memory import LEAST_BUDGET


def settings(folder: Path, **engine: Any) -> Settings:
    return Settings.load(None, {"model.reference": str(folder), **{f"engine.{name}": engine[name] for name in engine}})


@pytest.fixture(autouse=True)
def _limits_as_they_were() -> Iterator[None]:
    before = memory_limit_now()
    yield
    mx.set_memory_limit(before)


def memory_limit_now() -> int:
    limit = mx.set_memory_limit(1 << 40)
    mx.set_memory_limit(limit)
    return int(limit)


def test_the_limit_is_what_the_service_means_to_use_and_headroom(tiny_model_dir: Path) -> None:
    backend = MlxBackend(settings(tiny_model_dir, memory_budget=1 << 30, buffer_cache_limit=1 << 20))
    backend.load()
    assert memory_limit_now() == weight_bytes(backend.model) + (1 << 30) + (1 << 20) + LEAST_HEADROOM
    limit_memory(EngineSettings(buffer_cache_limit=1 << 29), backend.model, 100 << 30)
    assert memory_limit_now() == pytest.approx(1.05 * (100.5 * (1 << 30)), rel=0.001)


@pytest.mark.parametrize(("size", "pool"), [(80 << 30, 4 << 30), (8 << 30, LEAST_POOL), (None, LEAST_POOL)])
def test_freed_buffers_get_a_share_of_the_device(monkeypatch: pytest.MonkeyPatch, size: int | None, pool: int) -> None:
    monkeypatch.setattr(memory_limits, "recommended_bytes", lambda: size)
    assert pool_bytes(EngineSettings()) == pytest.approx(pool)
    assert pool_bytes(EngineSettings(buffer_cache_limit=1 << 20)) == 1 << 20


@pytest.mark.parametrize("budget", [0, 1 << 30])
def test_safe_mode_has_half_of_the_budget(tiny_model_dir: Path, budget: int) -> None:
    backend = MlxBackend(settings(tiny_model_dir, memory_budget=budget, memory_budget_share=0.5))
    whole = budget or working_set() - weight_bytes(load_model(settings(tiny_model_dir)).model)
    assert backend.load().memory.budget == whole // 2


def test_room_is_asked_for_before_anything_is_read(tiny_model_dir: Path) -> None:
    asked: list[int] = []

    def none_left(need: int) -> None:
        asked.append(need)
        if len(asked) == 1:
            raise NotEnoughMemory("none left")

    backend = MlxBackend(settings(tiny_model_dir), load=partial(load_model, room=none_left))
    before = mx.get_active_memory()
    with pytest.raises(NotEnoughMemory):
        backend.load()
    assert mx.get_active_memory() == before
    assert asked == [(tiny_model_dir / "model.safetensors").stat().st_size + LEAST_BUDGET]
    assert backend.load().name == tiny_model_dir.name, "a fresh load when it is tried again"


def test_a_model_larger_than_the_device_is_told_from_one_that_may_fit_later(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.engine.loading.working_set", lambda: 1000)
    with pytest.raises(ModelTooLarge, match="more than this device has"):
        MlxBackend(settings(tiny_model_dir)).load()


def test_what_a_gpu_recommends_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is wanted after each step, and CUDA's driver takes its time."""
    asked: list[int] = []

    def device_info(*_: object) -> dict[str, int]:
        asked.append(1)
        return {"total_memory": 1 << 36}

    memory_limits._of_device.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(mx, "device_info", device_info)
        assert memory_limits.recommended_bytes() is None
        assert not asked, "on a CPU"
        patch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
        assert [memory_limits.recommended_bytes() for _ in range(3)] == [1 << 36] * 3
    memory_limits._of_device.cache_clear()
    assert asked == [1]
