"""`/generate` with the real model over real sockets: mlx-lm's own words, streamed or not, alone or in company."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.real_model import Alone
from tests.serving import Served

pytestmark = pytest.mark.real_model

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time, in a village by the sea,",
    "1, 2, 3, 4,",
    "Une pomme est",
    "The three primary colours are red,",
    "Water boils at",
    "Q: What is the opposite of hot?\nA:",
)


async def stream(client: httpx.AsyncClient, url: str, **body: Any) -> tuple[list[str], dict[str, Any]]:
    """All pieces of a streamed `/generate`, and its last event."""
    pieces: list[str] = []
    last: dict[str, Any] = {}
    async with client.stream("POST", f"{url}/generate", json={"temperature": 0, "stream": True, **body}) as answer:
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                last = json.loads(line.removeprefix("data: "))
                pieces.append(last["text"])
    return pieces, last


@pytest.mark.parametrize("prompt", PROMPTS[:4])
def test_the_text_is_what_mlx_lm_generates(demo: Served, alone: Alone, prompt: str) -> None:
    answer = demo.generate(prompt, max_tokens=24)
    assert answer["text"] == alone(prompt, 24)


async def test_stream_and_whole_give_the_same_text(demo: Served) -> None:
    whole = demo.generate(PROMPTS[2], max_tokens=24)
    async with httpx.AsyncClient(timeout=120) as client:
        pieces, last = await stream(client, demo.url, prompt=PROMPTS[2], max_tokens=24)
    assert "".join(pieces) == whole["text"]
    assert len(pieces) > 10, "token by token"
    assert last["finish_reason"] == whole["finish_reason"]
    assert last["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]


async def test_sixteen_at_once_each_equal_their_solo_run(demo: Served, count: Callable[[str, int, int], int]) -> None:
    length = count("sixteen at once: output tokens of each", 8, 32)
    asked = [f"{prompt} {extra}" for prompt in PROMPTS for extra in ("", "Well, the truth is that")]
    async with httpx.AsyncClient(timeout=300) as client:

        async def one(prompt: str) -> str:
            body = {"prompt": prompt, "max_tokens": length, "temperature": 0}
            return str((await client.post(f"{demo.url}/generate", json=body)).json()["text"])

        together = await asyncio.gather(*map(one, asked))
    assert together == [demo.generate(prompt, max_tokens=length)["text"] for prompt in asked]


def test_a_stop_string_split_across_tokens_ends_the_text(demo: Served) -> None:
    full = demo.generate(PROMPTS[0], max_tokens=24)["text"]
    middle = len(full) // 2
    stop = full[middle - 3 : middle + 4]
    answer = demo.generate(PROMPTS[0], max_tokens=24, stop=[stop])
    assert answer["text"] == full[: full.index(stop)]
    assert answer["finish_reason"] == "stop"


async def test_characters_are_never_broken_across_chunks(demo: Served) -> None:
    prompt = "Repeat after me: 😀🎉👩‍👩‍👧 déjà vu 日本語. 😀🎉👩‍👩‍👧 déjà vu 日本語. 😀🎉"
    async with httpx.AsyncClient(timeout=120) as client:
        pieces, _ = await stream(client, demo.url, prompt=prompt, max_tokens=40)
    text = "".join(pieces)
    assert any(ord(character) > 0x2000 for character in text), "the model did not say anything multi-byte"
    assert "�" not in text[:-1]


def test_a_repeated_prompt_comes_from_the_prefix_cache(demo: Served) -> None:
    prompt = "Quartz begins no other prompt of these tests, and this one is long enough to be worth keeping. " * 4
    first = demo.generate(prompt, max_tokens=8)
    second = demo.generate(prompt, max_tokens=8)
    assert first["usage"]["cached_tokens"] == 0
    assert second["usage"]["cached_tokens"] >= second["usage"]["prompt_tokens"] - 2
    assert second["text"] == first["text"]


def test_a_prompt_beyond_the_context_is_refused_with_both_numbers(demo: Served) -> None:
    answer = httpx.post(f"{demo.url}/generate", json={"prompt": "word " * 9000}, timeout=60)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "8192" in error["message"]
    assert "9000" in error["message"] or "9001" in error["message"]


def test_chat_applies_the_template(demo: Served) -> None:
    raw = demo.generate("What is 2 + 2?", max_tokens=12)
    chat = demo.generate("What is 2 + 2?", max_tokens=12, chat=True)
    assert chat["usage"]["prompt_tokens"] > raw["usage"]["prompt_tokens"] + 5
    assert chat["text"] != raw["text"]
