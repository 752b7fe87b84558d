from typing import Any

import pytest
from openai.types import Completion

from service.api.openai.wire import Head, TextShape
from service.engine.generation import Delta, FinishReason
from service.settings import EngineSettings, Settings
from tests.fakes_api import DONE, Client, FakeInference, Service

pytestmark = pytest.mark.anyio

TEXT = "/v1/completions"
WIRE_USAGE = {
    "prompt_tokens": 5,
    "completion_tokens": 3,
    "total_tokens": 8,
    "prompt_tokens_details": {"cached_tokens": 2},
    "completion_tokens_details": {"reasoning_tokens": 0},
}


def client(**engine: Any) -> Client:
    settings = Settings(engine=EngineSettings(**engine))
    return Client(Service(settings=settings, inference=FakeInference([Delta("Hel"), Delta("lo"), DONE])))


async def test_a_text_completion_is_whole() -> None:
    answer = (await client().post(TEXT, {"model": "org/model", "prompt": "x"})).json()
    Completion.model_validate(answer, strict=True)
    assert answer == {
        "id": "cmpl-id-2",
        "object": "text_completion",
        "created": 1_700_000_000,
        "model": "org/model",
        "choices": [{"index": 0, "text": "Hello", "logprobs": None, "finish_reason": "stop"}],
        "usage": WIRE_USAGE,
    }


@pytest.mark.parametrize(
    ("prompt", "asked"),
    [
        ("ab", ["ab"]),
        ("", [""]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
async def test_prompts_are_texts_or_tokens_one_or_several(prompt: Any, asked: list[Any]) -> None:
    found = client()
    answer = (await found.post(TEXT, {"prompt": prompt, "n": 2})).json()
    [ask] = found.service.inference.asks  # one request to the engine: all of its rows or none
    assert list(ask.prompts) == asked
    assert [choice["index"] for choice in answer["choices"]] == list(range(2 * len(asked)))
    assert answer["usage"]["prompt_tokens"] == 5 * len(asked)
    assert answer["usage"]["completion_tokens"] == 6 * len(asked)


async def test_too_many_rows_in_one_request_are_refused() -> None:
    answer = await client(max_choices=3).post(TEXT, {"prompt": ["a", "b"], "n": 2})
    assert (answer.status, answer.error["param"]) == (400, "prompt")


async def test_a_text_stream_ends_with_its_reason() -> None:
    *chunks, terminator = (await client().post(TEXT, {"prompt": "x", "stream": True})).events()
    for chunk in chunks:
        Completion.model_validate(chunk | {"usage": None}) if chunk["choices"][0]["finish_reason"] else None
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "Hello"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert terminator == "[DONE]"


async def test_models_are_listed_under_every_name() -> None:
    answer = (await client().get("/v1/models")).json()
    model = {"object": "model", "created": 1_700_000_000, "owned_by": "mlxd", "max_model_len": 2048}
    assert answer == {"object": "list", "data": [{"id": "org/model", **model}, {"id": "default", **model}]}
    for name in ("org/model", "default"):
        assert (await client().get(f"/v1/models/{name}")).json() == {"id": name, **model}


async def test_other_models_are_not_found() -> None:
    for name in ("gpt-4", "org", "org/model/x"):
        answer = await client().get(f"/v1/models/{name}")
        assert (answer.status, answer.error["code"]) == (404, "model_not_found")


def test_a_delta_that_says_nothing_is_no_chunk() -> None:
    shape = TextShape(Head(id="x", created=0, model="m", rows=1, rows_per_prompt=1))
    assert shape.chunk(0, Delta("")) == []
    assert len(shape.chunk(0, Delta("", finish_reason=FinishReason.STOP))) == 1
