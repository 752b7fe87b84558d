"""No answer ever holds another's words: many prompts at once, random cancels, late joins, cached prefixes.

Every answer that was not cancelled equals its solo run (true on the CPU in float32). A mutant backend that
swaps two rows shows that this test can fail.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.engine.backend import StepResult, Token
from service.engine.mlx_backend import MlxBackend
from service.settings import Settings
from tests.serving import AMPLE, Served, served

pytestmark = pytest.mark.filterwarnings("ignore:.*asyncio.*:ResourceWarning")


@dataclass(frozen=True)
class Question:
    prompt: str
    max_tokens: int
    leaves_after: int | None  # events of the stream, or None: stays


def questions(count: int, seed: int) -> list[Question]:
    """Prompts of mixed lengths, a third of them beginning alike, a quarter of them abandoned."""
    rng = random.Random(seed)
    shared = "".join(rng.choices("abcdefgh ", k=700))
    found = []
    for number in range(count):
        own = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz ", k=rng.choice([1, 9, 60, 400, 1500])))
        prefix = shared[: rng.randrange(300, 700)] if number % 3 == 0 else ""
        leaves = rng.randrange(1, 10) if rng.random() < 0.25 else None
        found.append(Question(f"{prefix}{number} {own}", rng.randrange(4, 40), leaves))
    return found


async def ask(client: httpx.AsyncClient, service: Served, question: Question, start: asyncio.Event) -> str | None:
    """The answer to a question, or None when its asker left."""
    await start.wait()
    body = {"prompt": question.prompt, "max_tokens": question.max_tokens, "temperature": 0}
    if question.leaves_after is None:
        return str((await client.post(f"{service.url}/generate", json=body)).json()["text"])
    async with client.stream("POST", f"{service.url}/generate", json={**body, "stream": True}) as answer:
        seen = 0
        async for line in answer.aiter_lines():
            seen += line.startswith("data: ")
            if seen >= question.leaves_after:
                return None
    return None


async def answers(service: Served, asked: list[Question], seed: int) -> list[str | None]:
    """Ask everything in four waves, each while the one before is still being answered."""
    rng = random.Random(seed)
    waves = [asyncio.Event() for _ in range(4)]
    limits = httpx.Limits(max_connections=len(asked))
    async with httpx.AsyncClient(timeout=300, limits=limits) as client:
        tasks = [asyncio.create_task(ask(client, service, question, rng.choice(waves))) for question in asked]
        for wave in waves:
            wave.set()
            waiting = [task for task in tasks if not task.done()]
            if waiting:
                await asyncio.wait(waiting, timeout=0.05, return_when=asyncio.FIRST_COMPLETED)
        return await asyncio.gather(*tasks)


def wrong(together: list[str | None], alone: list[str]) -> list[int]:
    return [number for number, said in enumerate(together) if said is not None and said != alone[number]]


def settings_for(model: Path, state: Path) -> Settings:
    return Settings.load(
        None,
        {
            "model.reference": str(model),
            "server.state_dir": state,
            "server.port": 0,
            "auth.enabled": False,
            "engine.max_rows": 8,
            "engine.max_queue": 1000,
            "engine.max_prefill_chunk": 256,
            "engine.memory_budget": 256 << 20,
            **AMPLE,
        },
    )


async def test_every_answer_equals_its_solo_run(
    tiny_long_model_dir: Path, tmp_path: Path, count: Callable[[str, int, int], int]
) -> None:
    asked = questions(count("contamination: prompts", 44, 3000), seed=11)
    with served(settings_for(tiny_long_model_dir, tmp_path)) as service:
        together = await answers(service, asked, seed=12)
        await service.settled()
        cached = service.app.engine.status().memory.prefix_entries
        with served(settings_for(tiny_long_model_dir, tmp_path)) as fresh:
            alone = [fresh.generate(q.prompt, max_tokens=q.max_tokens)["text"] for q in asked]
    assert cached > 10
    assert sum(said is not None for said in together) > len(asked) / 2
    assert wrong(together, alone) == []


class Swapping(MlxBackend):
    """A backend with the bug that this test is there for: now and then two rows get each other's token."""

    def step(self) -> StepResult:
        result = super().step()
        if len(result.tokens) >= 2 and result.decode_rows % 3 == 2:
            first, second, *rest = result.tokens
            swapped = [
                Token(first.uid, second.token, first.finish_reason),
                Token(second.uid, first.token, second.finish_reason),
            ]
            result.tokens = [*swapped, *rest]
        return result


async def test_a_backend_that_swaps_rows_is_caught(
    tiny_long_model_dir: Path, tmp_path: Path, count: Callable[[str, int, int], int]
) -> None:
    asked = questions(count("contamination: prompts of the swapped backend", 30, 60), seed=11)
    settings = settings_for(tiny_long_model_dir, tmp_path)
    with served(settings, Swapping(settings)) as mutant:
        together = await answers(mutant, asked, seed=12)
        with served(settings) as fresh:
            alone = [fresh.generate(q.prompt, max_tokens=q.max_tokens)["text"] for q in asked]
    print(f"{len(wrong(together, alone))} of {len(asked)} answers are wrong")
    assert len(wrong(together, alone)) > 3


@pytest.mark.real_model
async def test_the_demo_model_keeps_answers_apart(demo: Served, count: Callable[[str, int, int], int]) -> None:
    cities = ["Paris", "Rome", "Oslo", "Cairo", "Lima", "Delhi", "Tokyo", "Quito", "Bern", "Doha", "Riga", "Seoul"]
    rng = random.Random(3)
    asked = [
        Question(f"{rng.choice(['', 'Listen. ', 'A question about geography. '])}The city of {city} is", 12, leaves)
        for city, leaves in zip(
            cities * count("contamination, demo model: rounds", 1, 20), [None, None, None, 2] * 1000, strict=False
        )
    ]
    together = await answers(demo, asked, seed=4)
    await demo.settled(60)
    alone: dict[str, Any] = {q.prompt: demo.generate(q.prompt, max_tokens=12)["text"] for q in asked}
    assert wrong(together, [alone[q.prompt] for q in asked]) == []
