"""The mailbox: merges, ends once, and cancels exactly when an unfinished generation is closed."""

from __future__ import annotations

import asyncio

import pytest

from service.engine.generation import Delta, FinishReason, Generation, GenerationRequest, Usage
from service.errors import GenerationFailed

USAGE = Usage(prompt_tokens=1, completion_tokens=2)


def generation() -> tuple[Generation, list[Generation]]:
    cancelled: list[Generation] = []
    request = GenerationRequest(request_id="r", prompt=(1,), max_tokens=4)
    return Generation(request, cancelled.append), cancelled


async def test_a_slow_reader_gets_one_merged_delta() -> None:
    gen, _ = generation()
    for text in "abc":
        gen.put(Delta(text))
    gen.put(Delta("d", FinishReason.LENGTH, USAGE))
    assert await gen.read() == Delta("abcd", FinishReason.LENGTH, USAGE)


async def test_reading_waits_for_a_delta() -> None:
    gen, _ = generation()
    reading = asyncio.create_task(gen.read())
    await asyncio.sleep(0)
    assert not reading.done()
    gen.put(Delta("x"))
    assert (await reading).text == "x"


async def test_nothing_follows_the_final_delta() -> None:
    gen, cancelled = generation()
    gen.put(Delta(error=GenerationFailed("no")))
    gen.put(Delta("late"))
    assert (await gen.read()).text == ""
    with pytest.raises(RuntimeError):
        await gen.read()
    gen.close()
    assert cancelled == []


async def test_closing_an_unfinished_generation_cancels_it_once() -> None:
    gen, cancelled = generation()
    with gen:
        gen.put(Delta("x"))
    gen.close()
    assert cancelled == [gen]
    gen.put(Delta("late"))
    with pytest.raises(RuntimeError):
        await gen.read()


async def test_closing_releases_a_reader() -> None:
    gen, _ = generation()
    reading = asyncio.create_task(gen.read())
    await asyncio.sleep(0)
    gen.close()
    with pytest.raises(RuntimeError):
        await reading


def test_a_delta_is_final_with_a_reason_or_an_error() -> None:
    assert Delta("x", FinishReason.STOP).final
    assert Delta(error=GenerationFailed("no")).final
    assert not Delta("x").final
