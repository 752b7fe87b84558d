"""The openai SDK against the real demo model over real sockets: typed answers, streams, errors, its own helpers."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types import Completion, CompletionChoice, CompletionUsage, Model
from openai.types.chat import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionMessage,
    ChatCompletionMessageParam,
    ParsedChatCompletion,
)
from openai.types.completion_usage import PromptTokensDetails
from pydantic import BaseModel

from service.engine import demo_model
from service.settings import Settings
from tests.serving import Served, make_key, served

pytestmark = [pytest.mark.real_model, pytest.mark.beside]

MODEL = "default"
PROMPT = "The capital of France is"
MESSAGES: list[ChatCompletionMessageParam] = [
    {"role": "developer", "content": "Answer in one short sentence."},
    {"role": "user", "content": "What is the capital of France?"},
]


@pytest.fixture
def client(demo: Served) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{demo.url}/v1", api_key="unused", max_retries=0) as found:
        yield found


@pytest.fixture
async def async_client(demo: Served) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{demo.url}/v1", api_key="unused", max_retries=0) as found:
        yield found


def check_usage(usage: CompletionUsage | None, *, completion_tokens: int | None = None) -> CompletionUsage:
    """Typed, consistent, with `cached_tokens`."""
    assert isinstance(usage, CompletionUsage)
    assert usage.prompt_tokens > 0
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert completion_tokens is None or usage.completion_tokens == completion_tokens
    assert isinstance(usage.prompt_tokens_details, PromptTokensDetails)
    cached = usage.prompt_tokens_details.cached_tokens
    assert cached is not None
    assert 0 <= cached < usage.prompt_tokens, "the last token of a prompt is always run"
    return usage


def check_chat(answer: ChatCompletion, model: str = demo_model.NAME) -> str:
    """Typed through and through; returns the text of the first choice."""
    assert isinstance(answer, ChatCompletion)
    assert (answer.object, answer.model) == ("chat.completion", model)
    assert answer.id.startswith("chatcmpl-")
    assert answer.created > 0
    for index, choice in enumerate(answer.choices):
        assert choice.index == index
        assert isinstance(choice.message, ChatCompletionMessage)
        assert choice.message.role == "assistant"
        assert choice.message.refusal is None
        assert choice.finish_reason in ("stop", "length")
    check_usage(answer.usage)
    assert answer.to_dict() == answer.model_dump(exclude_unset=True)
    return answer.choices[0].message.content or ""


def check_completion(answer: Completion) -> str:
    """As `check_chat`, for the legacy route."""
    assert isinstance(answer, Completion)
    assert (answer.object, answer.model) == ("text_completion", demo_model.NAME)
    assert answer.id.startswith("cmpl-")
    assert all(isinstance(choice, CompletionChoice) for choice in answer.choices)
    assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
    assert all(choice.finish_reason in ("stop", "length") for choice in answer.choices)
    check_usage(answer.usage)
    return answer.choices[0].text


def check_chat_chunks(chunks: list[ChatCompletionChunk]) -> str:
    """Typed chunks of one answer with one choice, which say the role once and the reason last; returns the text."""
    assert all(isinstance(chunk, ChatCompletionChunk) for chunk in chunks)
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    assert chunks[0].id.startswith("chatcmpl-")
    assert [chunk.choices[0].delta.role for chunk in chunks] == ["assistant"] + [None] * (len(chunks) - 1)
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons[:-1] == [None] * (len(chunks) - 1)
    assert reasons[-1] in ("stop", "length")
    assert all(chunk.usage is None for chunk in chunks)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def check_text_chunks(chunks: list[Completion]) -> str:
    """As `check_chat_chunks`, for the legacy route."""
    assert all(isinstance(chunk, Completion) for chunk in chunks)
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")
    return "".join(chunk.choices[0].text for chunk in chunks)


def test_a_streamed_chat_says_what_the_whole_one_says(client: OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_completion_tokens=12, temperature=0)
    text = check_chat(whole)
    assert "Paris" in text
    stream = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_completion_tokens=12, temperature=0, stream=True
    )
    chunks = list(stream)
    assert check_chat_chunks(chunks) == text
    assert len(chunks) > 4, "token by token"
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_a_streamed_completion_says_what_the_whole_one_says(client: OpenAI) -> None:
    text = check_completion(client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=12, temperature=0))
    assert "Paris" in text
    chunks = list(client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=12, temperature=0, stream=True))
    assert check_text_chunks(chunks) == text


async def test_the_async_client_gets_the_same_typed_chat(client: OpenAI, async_client: AsyncOpenAI) -> None:
    text = check_chat(client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=8, temperature=0))
    answer = await async_client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=8, temperature=0)
    assert check_chat(answer) == text
    stream = await async_client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=8, temperature=0, stream=True
    )
    assert check_chat_chunks([chunk async for chunk in stream]) == text


async def test_the_async_client_gets_the_same_typed_completion(client: OpenAI, async_client: AsyncOpenAI) -> None:
    text = check_completion(client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=8, temperature=0))
    answer = await async_client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=8, temperature=0)
    assert check_completion(answer) == text
    stream = await async_client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=8, temperature=0, stream=True)
    assert check_text_chunks([chunk async for chunk in stream]) == text


async def test_a_stream_left_early_gives_its_row_back(demo: Served, async_client: AsyncOpenAI) -> None:
    async with await async_client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=4000, stream=True, logit_bias={"2": -100, "0": -100}
    ) as stream:
        async for chunk in stream:
            if chunk.choices[0].delta.content:
                break
    await demo.settled()


def test_the_length_limit_is_the_finish_reason_and_the_usage(client: OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="One, two, three,", max_tokens=8, temperature=0)
    assert answer.choices[0].finish_reason == "length"
    check_usage(answer.usage, completion_tokens=8)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_stop_string_ends_the_text_before_it(client: OpenAI, *, stream: bool) -> None:
    full = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=16, temperature=0).choices[0].text
    stop = full[len(full) // 2 :][:6]
    if stream:
        chunks = list(
            client.completions.create(
                model=MODEL, prompt=PROMPT, max_tokens=16, temperature=0, stop=[stop, "zzz"], stream=True
            )
        )
        text, reason = check_text_chunks(chunks), chunks[-1].choices[0].finish_reason
    else:
        answer = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=16, temperature=0, stop=stop)
        text, reason = check_completion(answer), answer.choices[0].finish_reason
    assert (text, reason) == (full[: full.index(stop)], "stop")


def test_a_repeated_prompt_is_counted_as_cached(client: OpenAI) -> None:
    prompt = "Zinc begins no other prompt of these tests, and this one is long enough to be worth keeping. " * 3
    first, second = (
        check_usage(client.completions.create(model=MODEL, prompt=prompt, max_tokens=8, temperature=0).usage)
        for _ in range(2)
    )
    assert first.prompt_tokens_details is not None
    assert second.prompt_tokens_details is not None
    assert first.prompt_tokens_details.cached_tokens == 0
    assert (second.prompt_tokens_details.cached_tokens or 0) >= second.prompt_tokens - 2


def test_the_usage_of_a_stream_comes_last_and_only_when_asked_for(client: OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=8, temperature=0)
    *chunks, last = list(
        client.chat.completions.create(
            model=MODEL,
            messages=MESSAGES,
            max_tokens=8,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert check_chat_chunks(chunks) == whole.choices[0].message.content
    assert last.choices == []
    streamed, expected = check_usage(last.usage), check_usage(whole.usage)
    assert (streamed.prompt_tokens, streamed.completion_tokens) == (expected.prompt_tokens, expected.completion_tokens)
    *_, text_last = list(
        client.completions.create(
            model=MODEL,
            prompt=PROMPT,
            max_tokens=8,
            temperature=0,  # drawn at random, it ends sooner now and then
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert text_last.choices == []
    check_usage(text_last.usage, completion_tokens=8)


def seeded(client: OpenAI, seed: int) -> list[str]:
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=12, n=2, temperature=1.5, seed=seed
    )
    check_chat(answer)
    assert len(answer.choices) == 2
    return [choice.message.content or "" for choice in answer.choices]


def test_a_repeated_seed_gives_the_same_choices_and_each_choice_differs(client: OpenAI) -> None:
    first = seeded(client, 7)
    assert seeded(client, 7) == first
    assert seeded(client, 8) != first
    assert first[0] != first[1]


def test_several_choices_are_streamed_side_by_side(client: OpenAI) -> None:
    whole = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=8, n=2, temperature=0)
    check_usage(whole.usage, completion_tokens=2 * 8)
    texts = ["", ""]
    for chunk in client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=8, n=2, temperature=0, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]
    assert texts[0] == texts[1], "greedy"


def test_several_prompts_are_answered_in_their_order(client: OpenAI) -> None:
    prompts = [PROMPT, "1, 2, 3, 4,"]
    answer = client.completions.create(model=MODEL, prompt=prompts, max_tokens=8, temperature=0)
    check_completion(answer)
    alone = [client.completions.create(model=MODEL, prompt=p, max_tokens=8, temperature=0) for p in prompts]
    assert [choice.text for choice in answer.choices] == [each.choices[0].text for each in alone]


async def test_models_are_listed_and_retrieved_by_both_clients(client: OpenAI, async_client: AsyncOpenAI) -> None:
    listed = list(client.models.list())
    assert [model.id for model in listed] == [demo_model.NAME, MODEL]
    assert [model.id async for model in async_client.models.list()] == [demo_model.NAME, MODEL]
    for model in listed:
        assert isinstance(model, Model)
        assert (model.object, model.owned_by) == ("model", "mlxd")
        assert client.models.retrieve(model.id) == model
        assert await async_client.models.retrieve(model.id) == model


def test_what_is_wrong_with_a_request_is_a_typed_bad_request_error(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, top_p=2)
    assert (wrong.value.param, wrong.value.type) == ("top_p", "invalid_request_error")
    assert wrong.value.request_id
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=MODEL, prompt="word " * 9000, stream=True)
    assert long.value.code == "context_length_exceeded"
    assert "8192" in long.value.message


async def test_an_unknown_model_is_a_typed_not_found_error(client: OpenAI, async_client: AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="org/nope", messages=MESSAGES, stream=True)
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError) as missing:
        await async_client.models.retrieve("org/nope")
    assert missing.value.code == "model_not_found"


class Unsupported(BaseModel):
    answer: str


def test_the_parse_helper_types_a_text_answer_and_is_told_that_schemas_are_not_supported(client: OpenAI) -> None:
    answer = client.chat.completions.parse(model=MODEL, messages=MESSAGES, max_tokens=24, temperature=0, stop=["\n\n"])
    assert isinstance(answer, ParsedChatCompletion)
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.choices[0].message.parsed is None
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.parse(model=MODEL, messages=MESSAGES, max_tokens=24, response_format=Unsupported)
    assert (refused.value.param, refused.value.code) == ("response_format", "unsupported_parameter")


def test_the_stream_helper_accumulates_the_whole_answer(client: OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=24, temperature=0, stop=["."])
    assert whole.choices[0].finish_reason == "stop"
    with client.chat.completions.stream(
        model=MODEL, messages=MESSAGES, max_tokens=24, temperature=0, stop=["."]
    ) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(deltas) == final.choices[0].message.content == whole.choices[0].message.content
    assert final.choices[0].finish_reason == "stop"


def test_the_raw_response_has_headers_and_parses_to_the_typed_answer(client: OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=MESSAGES, max_tokens=8, temperature=0, extra_headers={"X-Request-ID": "mine-1"}
    )
    assert raw.status_code == 200
    assert raw.headers["x-request-id"] == "mine-1"
    answer = raw.parse()
    check_chat(answer)
    assert answer._request_id == "mine-1"


async def test_the_streaming_response_is_server_sent_events_up_to_done(async_client: AsyncOpenAI) -> None:
    async with async_client.completions.with_streaming_response.create(
        model=MODEL, prompt=PROMPT, max_tokens=8, temperature=0, stream=True
    ) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line async for line in answer.iter_lines() if line.startswith("data: ")]
    assert lines.pop() == "data: [DONE]"
    chunks = [Completion.construct(**json.loads(line.removeprefix("data: "))) for line in lines]
    whole = await async_client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=8, temperature=0)
    assert check_text_chunks(chunks) == whole.choices[0].text


def test_with_keys_a_right_one_gets_the_models_answer_and_a_wrong_one_a_typed_error(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    """The same answer as where nobody is asked for one; a tiny model's, since each of the two loads it."""
    tmp_path.chmod(0o700)
    common = {"model.reference": str(tiny_model_dir), "server.port": 0, "engine.max_rows": 1}
    settings = Settings.load(None, {**common, "server.state_dir": tmp_path})
    with served(settings) as service:
        base = f"{service.url}/v1"
        with OpenAI(base_url=base, api_key=make_key(settings, "inference").text, max_retries=0) as known:
            answer = known.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=8, temperature=0)
        with OpenAI(base_url=base, api_key="sk-nobodys", max_retries=2) as stranger:
            for stream in (False, True):
                with pytest.raises(openai.AuthenticationError) as refused:
                    stranger.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=8, stream=stream)
                assert (refused.value.status_code, refused.value.code) == (401, "invalid_credentials")
    open_settings = Settings.load(None, {**common, "server.state_dir": tmp_path / "open", "auth.enabled": False})
    with (
        served(open_settings) as service,
        OpenAI(base_url=f"{service.url}/v1", api_key="unused", max_retries=0) as anybody,
    ):
        open_answer = anybody.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=8, temperature=0)
    assert check_chat(answer, tiny_model_dir.name) == check_chat(open_answer, tiny_model_dir.name)
