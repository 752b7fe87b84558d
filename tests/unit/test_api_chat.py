from typing import Any

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from service.engine.generation import Delta, FinishReason, SamplingParams
from service.settings import EngineSettings, Settings
from tests.fakes_api import DONE, USAGE, Answer, Client, FakeInference, Service

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
USER = {"role": "user", "content": "Hi"}
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


async def chat(found: Client, **fields: Any) -> Answer:
    return await found.post(CHAT, {"messages": [USER], **fields})


async def messages(*given: Any) -> Any:
    """What the template is given for these messages."""
    found = client()
    answer = await found.post(CHAT, {"messages": list(given)})
    assert answer.status == 200, answer.body
    return found.service.inference.asks[0].messages


async def test_a_chat_completion_is_whole() -> None:
    answer = (await chat(client(), model="default")).json()
    ChatCompletion.model_validate(answer, strict=True)
    assert answer == {
        "id": "chatcmpl-id-2",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": "org/model",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": WIRE_USAGE,
    }


async def test_a_chat_stream_has_one_role_one_end_and_no_usage_unless_asked() -> None:
    *chunks, terminator = (await chat(client(), stream=True)).events()
    assert terminator == "[DONE]"
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk)
        assert "usage" not in chunk
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert all("role" not in choice["delta"] for choice in choices[1:])
    assert "".join(choice["delta"].get("content", "") for choice in choices) == "Hello"
    assert choices[-1]["delta"] == {}
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_usage_comes_in_a_last_chunk_when_asked_for(path: str) -> None:
    asked = {"messages": [USER], "prompt": "x", "stream": True, "stream_options": {"include_usage": True}}
    *chunks, last, terminator = (await client().post(path, asked)).events()
    assert terminator == "[DONE]"
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks)
    assert (last["choices"], last["usage"]) == ([], WIRE_USAGE)


@pytest.mark.parametrize("options", [None, {}, {"include_usage": None}, {"include_usage": False}, {"other": 1}])
async def test_usage_is_not_sent_to_who_did_not_ask(options: Any) -> None:
    for chunk in (await chat(client(), stream=True, stream_options=options)).events()[:-1]:
        assert chunk["choices"]
        assert "usage" not in chunk


async def test_n_rows_are_interleaved_by_index_and_their_prompt_counts_once() -> None:
    whole = (await chat(client(), n=3)).json()
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2]
    assert (whole["usage"]["prompt_tokens"], whole["usage"]["completion_tokens"]) == (5, 9)
    found = client()
    chunks = (await chat(found, n=3, stream=True)).events()[:-1]
    assert found.service.inference.asks[0].n == 3
    for index in range(3):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(choice["delta"].get("content", "") for choice in own) == "Hello"
        assert own[-1]["finish_reason"] == "stop"


async def test_the_finish_reason_is_the_engine_s() -> None:
    cut = Delta("x", finish_reason=FinishReason.LENGTH, usage=USAGE)
    found = Client(Service(inference=FakeInference([cut])))
    assert (await chat(found)).json()["choices"][0]["finish_reason"] == "length"
    chunks = (await chat(found, stream=True)).events()[:-1]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "length"]


async def test_the_newer_name_of_max_tokens_wins() -> None:
    found = client()
    await chat(found, max_tokens=3, max_completion_tokens=4)
    await chat(found, max_tokens=3, max_completion_tokens=None)
    await chat(found)
    asks = found.service.inference.asks
    assert [ask.max_tokens for ask in asks] == [4, 3, None]
    assert {ask.default_max_tokens for ask in asks} == {1024}


async def test_every_optional_field_may_be_null() -> None:
    required = {"messages", "prompt"}
    schema = (await client().get("/openapi.json")).json()["components"]["schemas"]
    for path, name in ((CHAT, "ChatRequest"), (TEXT, "CompletionRequest")):
        optional = set(schema[name]["properties"]) - required
        answer = await client().post(path, {"messages": [USER], "prompt": "x", **dict.fromkeys(optional)})
        assert answer.status == 200, answer.body


async def test_harmless_and_unknown_fields_are_ignored() -> None:
    harmless: dict[str, Any] = {
        "user": "u",
        "metadata": {"a": "b"},
        "store": True,
        "service_tier": "auto",
        "prompt_cache_key": "k",
        "parallel_tool_calls": True,
        "safety_identifier": "s",
        "never_heard_of": [1],
        "tools": [],
        "tool_choice": "none",
        "functions": [],
        "response_format": {"type": "text"},
        "logprobs": False,
        "modalities": ["text"],
        "temperature": 1,
    }
    found = client()
    assert (await chat(found, **harmless)).status == 200
    assert found.service.inference.asks[0].sampling == SamplingParams()


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "required"),
        ("tool_choice", {"type": "function", "function": {"name": "f"}}),
        ("functions", [{"name": "f"}]),
        ("function_call", {"name": "f"}),
        ("response_format", {"type": "json_object"}),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}),
        ("response_format", {}),
        ("logprobs", True),
        ("top_logprobs", 3),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "x"}),
        ("web_search_options", {}),
        ("n", 9),
    ],
)
async def test_what_chat_cannot_do_is_refused_by_name(param: str, value: Any) -> None:
    found = client()
    answer = await chat(found, **{param: value})
    assert (answer.status, answer.error["param"], answer.error["code"]) == (400, param, "unsupported_parameter")
    assert found.service.inference.asks == []


@pytest.mark.parametrize(
    ("param", "value"),
    [("echo", True), ("suffix", "x"), ("best_of", 2), ("best_of", 0), ("logprobs", 0), ("logprobs", 5), ("n", 9)],
)
async def test_what_completions_cannot_do_is_refused_by_name(param: str, value: Any) -> None:
    answer = await client().post(TEXT, {"prompt": "x", param: value})
    assert (answer.status, answer.error["param"], answer.error["code"]) == (400, param, "unsupported_parameter")


@pytest.mark.parametrize("param", ["max_tokens", "max_completion_tokens"])
async def test_more_output_than_is_configured_is_refused_by_name(param: str) -> None:
    found = client(max_output_tokens=10)
    assert (await chat(found, **{param: 10})).status == 200
    answer = await chat(found, **{param: 11})
    assert (answer.status, answer.error["param"]) == (400, param)


async def test_system_and_developer_messages_are_merged_at_the_head() -> None:
    found = await messages(
        {"role": "developer", "content": "Be kind."},
        USER,
        {"role": "assistant", "content": None},
        {"role": "system", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": " brief."}]},
        {"role": "user", "content": "Again"},
    )
    assert found == [
        {"role": "system", "content": "Be kind.\n\nBe brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "Again"},
    ]


async def test_text_parts_of_every_kind_are_text() -> None:
    parts = [
        {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}},
        {"type": "input_text", "text": "b"},
        {"type": "output_text", "text": "c"},
        {"type": "refusal", "refusal": "d"},
    ]
    assert await messages({"role": "user", "content": parts, "name": "n"}) == [{"role": "user", "content": "abcd"}]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}},
        {"type": "text", "text": "x", "image_url": "http://localhost"},
        {"type": "input_audio", "input_audio": {}},
        {"type": "file", "file": {"file_id": "x"}},
        {"type": "text", "text": "x", "url": "file:///etc/passwd"},
        {"type": "image", "source": {}},
        {"type": "text"},
        {"type": "refusal", "text": "x"},
    ],
)
async def test_anything_but_text_is_refused(part: dict[str, Any]) -> None:
    found = client()
    answer = await found.post(
        CHAT, {"messages": [USER, {"role": "user", "content": [{"type": "text", "text": "a"}, part]}]}
    )
    assert (answer.status, answer.error["param"]) == (400, "messages[1].content[1]")
    assert found.service.inference.asks == []


@pytest.mark.parametrize(
    "message",
    [
        {"role": "tool", "tool_call_id": "1", "content": "x"},
        {"role": "function", "name": "f", "content": "x"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
        {"role": "assistant", "content": "x", "function_call": {"name": "f", "arguments": "{}"}},
    ],
)
async def test_tool_calls_in_the_history_are_refused(message: dict[str, Any]) -> None:
    answer = await client().post(CHAT, {"messages": [USER, message]})
    assert (answer.status, answer.error["param"], answer.error["code"]) == (400, "messages", "unsupported_parameter")


@pytest.mark.parametrize("role", ["system", "developer", "user"])
async def test_only_an_assistant_may_have_said_nothing(role: str) -> None:
    answer = await client().post(CHAT, {"messages": [{"role": role, "content": None}]})
    assert (answer.status, answer.error["param"]) == (400, "messages[0].content")


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_an_unknown_model_is_a_404_and_is_not_repeated(path: str) -> None:
    for name in ("gpt-4", "../../etc/passwd", "http://evil/x", "x" * 512):
        answer = await client().post(path, {"model": name, "messages": [USER], "prompt": "x"})
        assert (answer.status, answer.error["code"], answer.error["param"]) == (404, "model_not_found", "model")
        assert name not in answer.body.decode()
