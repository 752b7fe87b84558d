"""Start, serve, abandon, stop, again and again: threads, descriptors, tasks and memory come back."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Collection
from pathlib import Path

import httpx
import mlx.core as mx

from service.inference import ENCODER_THREADS
from service.settings import Settings
from tests.serving import AMPLE, Served, served


def settings_for(model: Path, state: Path) -> Settings:
    return Settings.load(
        None,
        {
            "model.reference": str(model),
            "server.state_dir": state,
            "server.port": 0,
            "auth.enabled": False,
            "engine.max_rows": 4,
            "engine.memory_budget": 128 << 20,
            **AMPLE,
        },
    )


def descriptors() -> int:
    folder = Path("/proc/self/fd")
    return len(list((folder if folder.is_dir() else Path("/dev/fd")).iterdir()))


async def mixed(service: Served, requests: int) -> None:
    """Requests of every ending: whole, streamed to the end, and abandoned."""
    async with httpx.AsyncClient(timeout=60) as client:

        async def one(number: int) -> None:
            body = {"prompt": f"number {number}", "max_tokens": 30, "stream": number % 2 == 0}
            async with client.stream("POST", f"{service.url}/generate", json=body) as answer:
                async for _ in answer.aiter_bytes():
                    if number % 4 == 0:
                        return

        await asyncio.gather(*map(one, range(requests)))
    await service.settled()


def lasting_threads(others: Collection[threading.Thread]) -> list[str]:
    """Names of all threads but `others` and the encoders, of which the second starts when two prompts first meet."""
    names = [thread.name for thread in threading.enumerate() if thread not in others]
    encoders = [name for name in names if name.startswith("encode")]
    assert len(encoders) <= ENCODER_THREADS
    return [name for name in names if name not in encoders]


def tasks_of(service: Served) -> int:
    async def count() -> int:
        return len(asyncio.all_tasks())

    return asyncio.run_coroutine_threadsafe(count(), service.loop).result(10)


async def test_a_running_service_returns_to_where_it_was(
    tiny_model_dir: Path, tmp_path: Path, count: Callable[[str, int, int], int]
) -> None:
    rounds = count("leaks: rounds of 40 requests", 4, 200)
    others = set(threading.enumerate())
    with served(settings_for(tiny_model_dir, tmp_path)) as service:
        seen = []
        resting = tasks_of(service)
        for _ in range(rounds):
            await mixed(service, 40)
            while tasks_of(service) > resting:  # the connections' own tasks end a moment after their sockets
                await asyncio.sleep(0.005)
            seen.append((len(lasting_threads(others)), descriptors()))
        threads, files = zip(*seen, strict=True)
        assert threads[-1] <= threads[0], threads
        assert files[-1] <= files[0] + 1, files  # a closed socket may linger for a moment
        status = service.app.engine.status()
        assert (status.running, status.waiting) == (0, 0)
        assert service.app.engine._worker._admission.reserved_bytes == 0  # type: ignore[union-attr]


def test_starting_and_stopping_leaves_nothing(
    tiny_model_dir: Path, tmp_path: Path, count: Callable[[str, int, int], int]
) -> None:
    seen = []
    for _ in range(count("leaks: starts and stops", 3, 50)):
        with served(settings_for(tiny_model_dir, tmp_path)) as service:
            service.generate("hello", max_tokens=5)
        gc.collect()
        mx.clear_cache()
        seen.append((threading.active_count(), descriptors(), mx.get_active_memory()))
    assert len({(threads, files) for threads, files, _ in seen[1:]}) == 1, seen
    assert seen[-1][2] <= seen[0][2] + 4096, seen
