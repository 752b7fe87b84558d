from typing import Any

import pytest

from service.auth.principal import LOCAL
from service.engine.generation import Delta, FinishReason, SamplingParams
from tests.fakes_api import DONE, USAGE, Client, FakeInference, Service

pytestmark = pytest.mark.anyio


def client() -> Client:
    return Client(Service(inference=FakeInference([Delta("Hel"), Delta("lo"), DONE])))


async def test_a_prompt_is_answered_with_its_text_and_its_cost() -> None:
    answer = await client().post("/generate", {"prompt": "Say"})
    assert answer.status == 200
    assert answer.json() == {
        "text": "Hello",
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8, "cached_tokens": 2},
        "model": "org/model",
        "id": "id-1",
    }


async def test_what_is_not_said_has_openai_s_defaults() -> None:
    found = client()
    await found.post("/generate", {"prompt": "Say"})
    [ask] = found.service.inference.asks
    assert (ask.prompts, ask.messages, ask.max_tokens, ask.default_max_tokens, ask.n) == (("Say",), None, 100, 100, 1)
    assert ask.sampling == SamplingParams()
    assert ask.sampling.temperature == 1.0
    assert (ask.stop, ask.request_id) == ((), "id-1")
    assert found.service.inference.principals == [LOCAL]


async def test_everything_that_is_said_reaches_the_engine() -> None:
    said: dict[str, Any] = {
        "temperature": 0,
        "top_p": 1,
        "top_k": 40,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "presence_penalty": -1,
        "frequency_penalty": 0.5,
        "seed": -7,
    }
    found = client()
    answer = await found.post(
        "/generate", {"prompt": "x", **said, "stop": ["a", "b"], "max_tokens": 7, "logit_bias": {"12": -100, "3": 1.5}}
    )
    assert answer.status == 200
    [ask] = found.service.inference.asks
    assert ask.sampling == SamplingParams(**said, logit_bias=((3, 1.5), (12, -100.0)))
    assert (ask.stop, ask.max_tokens) == (("a", "b"), 7)


async def test_null_means_absent() -> None:
    names = ("temperature", "top_p", "top_k", "min_p", "seed", "stop", "max_tokens", "logit_bias", "chat", "stream")
    found = client()
    answer = await found.post("/generate", {"prompt": "x", **dict.fromkeys(names)})
    assert answer.status == 200
    [ask] = found.service.inference.asks
    assert (ask.sampling, ask.stop, ask.max_tokens, ask.default_max_tokens) == (SamplingParams(), (), None, 100)


async def test_chat_hands_the_prompt_over_as_the_user_s_message() -> None:
    found = client()
    await found.post("/generate", {"prompt": "Hi", "chat": True, "stop": "x"})
    [ask] = found.service.inference.asks
    assert (ask.prompts, ask.messages, ask.stop) == ((), [{"role": "user", "content": "Hi"}], ("x",))


async def test_a_stream_ends_with_the_cost_and_the_terminator() -> None:
    answer = await client().post("/generate", {"prompt": "x", "stream": True})
    whole = (await client().post("/generate", {"prompt": "x"})).json()
    *texts, last, terminator = answer.events()
    assert "".join(event["text"] for event in texts) == whole["text"]
    assert all(set(event) == {"text"} for event in texts)
    assert last == {**whole, "text": ""}
    assert terminator == "[DONE]"


async def test_an_empty_answer_is_an_answer() -> None:
    nothing = Delta(finish_reason=FinishReason.LENGTH, usage=USAGE)
    found = Client(Service(inference=FakeInference([nothing])))
    assert (await found.post("/generate", {"prompt": "x"})).json()["text"] == ""
    streamed = (await found.post("/generate", {"prompt": "x", "stream": True})).events()
    assert [streamed[0]["finish_reason"], streamed[1]] == ["length", "[DONE]"]


async def test_the_schema_shows_the_body_and_no_422() -> None:
    schema = (await client().get("/openapi.json")).json()
    for path in ("/generate", "/v1/chat/completions", "/v1/completions"):
        operation = schema["paths"][path]["post"]
        body = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
        assert {"temperature", "stream", "max_tokens"} <= set(schema["components"]["schemas"][body]["properties"])
        assert set(operation["responses"]) == {"200", "4XX", "5XX"}
        assert "text/event-stream" in operation["responses"]["200"]["content"]
    assert "HTTPValidationError" not in schema["components"]["schemas"]
