"""Neither `cached_tokens` nor the time to the first token tells a tenant what another one asked: real model, real keys.

The class of vLLM's CVE-2025-46570: a shared prefix cache answers a prompt that somebody else has sent sooner.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from service.settings import Settings
from tests.serving import BRIEF_CHUNK, Served, bearer, make_key, served
from tests.tiny import make_tiny_llama

pytestmark = pytest.mark.alone

PROMPT_TOKENS = 3000
BY_CHANCE = 12


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("tenants")
    folder.chmod(0o700)
    model = make_tiny_llama(folder / "model", max_position_embeddings=16384)
    return Settings.load(
        None,
        {
            "server.port": 0,
            "server.state_dir": folder / "state",
            "model.reference": str(model),
            "engine.memory_budget": 8 << 30,
            "engine.max_prefill_chunk": BRIEF_CHUNK,
        },
    )


@pytest.fixture(scope="module")
def service(settings: Settings) -> Iterator[Served]:
    with served(settings) as found:
        yield found


def ask(service: Served, key: str, prompt: str) -> tuple[float, int]:
    """(seconds to the first token, cached tokens) of one streamed request."""
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": 2, "temperature": 0, "stream": True}
    began, first, cached = time.perf_counter(), 0.0, -1
    url = f"{service.url}/generate"
    with httpx.stream("POST", url, json=body, headers=bearer(key), timeout=60) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                first = first or time.perf_counter() - began
                event = json.loads(line.removeprefix("data: "))
                cached = event.get("usage", {}).get("cached_tokens", cached)
    return first, cached


def test_a_tenant_cannot_tell_what_another_one_asked(
    service: Served, settings: Settings, count: Callable[[str, int, int], int]
) -> None:
    rng = random.Random(11)
    mine, colleague, stranger = (
        make_key(settings, "inference", tenant=tenant).text for tenant in ("ours", "ours", "theirs")
    )
    times: dict[str, list[float]] = {"cold": [], "colleague": [], "stranger": []}
    ask(service, mine, "warm")
    for _ in range(count("prompts asked by two tenants", 5, 100)):
        prompt = "".join(rng.choice("abcdefgh ") for _ in range(PROMPT_TOKENS))
        for who, key, expected in (("cold", mine, 0), ("stranger", stranger, 0), ("colleague", colleague, 1)):
            seconds, cached = ask(service, key, prompt)
            times[who].append(seconds)
            assert not expected or cached > PROMPT_TOKENS // 2, (who, cached)
            # A few letters may agree with an earlier prompt of the tenant's own.
            assert expected or cached < BY_CHANCE, (who, cached)
    medians = {who: statistics.median(taken) for who, taken in times.items()}
    print("median seconds to the first token: " + ", ".join(f"{who} {taken:.3f}" for who, taken in medians.items()))
    assert medians["colleague"] < 0.5 * medians["cold"], "a hit can be told by its time, so this test can fail"
    assert medians["stranger"] > 0.75 * medians["cold"]
