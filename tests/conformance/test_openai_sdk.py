"""What the openai SDK makes of us, over a real socket: its types, its errors, its streams."""

from collections.abc import AsyncIterator, Iterator

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletionMessageParam

from service.engine.generation import Delta
from service.errors import GenerationFailed, QueueFull
from service.settings import HttpSettings, Settings
from tests.fakes_api import DONE, FakeInference, Service
from tests.server_api import serving_in_thread

MODEL = "default"
MESSAGES: list[ChatCompletionMessageParam] = [
    {"role": "developer", "content": "Count."},
    {"role": "user", "content": "To three."},
]


@pytest.fixture
def client(live_server_url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{live_server_url}/v1", api_key="unused", max_retries=0) as found:
        yield found


@pytest.fixture
async def async_client(live_server_url: str) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{live_server_url}/v1", api_key="unused", max_retries=0) as found:
        yield found


def test_chat(client: OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_completion_tokens=16, seed=1)
    [choice] = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason in ("stop", "length")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details is not None
    assert answer.model_dump(exclude_unset=True) == answer.to_dict()


def test_chat_stream(client: OpenAI) -> None:
    stream = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=16, stream=True)
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")
    assert all(chunk.usage is None for chunk in chunks)


def test_chat_stream_with_usage_and_several_choices(client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=16, n=2, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    assert {choice.index for chunk in chunks for choice in chunk.choices} == {0, 1}
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens > 0


def test_the_stream_helper_accumulates(client: OpenAI) -> None:
    with client.chat.completions.stream(model=MODEL, messages=MESSAGES, max_tokens=16) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert final.choices[0].message.content


def test_the_parse_helper_accepts_the_answer(client: OpenAI) -> None:
    answer = client.chat.completions.parse(model=MODEL, messages=MESSAGES, max_tokens=64, stop=["zzz"])
    assert answer.choices[0].message.content


def test_completions(client: OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=["One,", "Two,"], max_tokens=8)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert all(choice.text for choice in answer.choices)
    assert answer.usage is not None


def test_completions_stream(client: OpenAI) -> None:
    chunks = list(client.completions.create(model=MODEL, prompt="One,", max_tokens=8, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")


def test_models(client: OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert MODEL in names
    for name in names:
        assert client.models.retrieve(name).id == name
        assert client.models.retrieve(name).owned_by


def test_errors_have_their_classes_and_fields(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="nope", messages=MESSAGES)
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    assert unknown.value.request_id
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=3)
    assert (wrong.value.param, wrong.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.BadRequestError) as unsupported:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, logprobs=True)
    assert (unsupported.value.param, unsupported.value.code) == ("logprobs", "unsupported_parameter")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nope/nope")


def test_the_request_id_can_be_read(client: OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=MESSAGES, max_tokens=4, extra_headers={"X-Request-ID": "mine-1"}
    )
    assert raw.headers["x-request-id"] == "mine-1"
    assert raw.parse()._request_id == "mine-1"


@pytest.mark.anyio
async def test_chat_async(async_client: AsyncOpenAI) -> None:
    answer = await async_client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=16)
    assert answer.choices[0].message.content


@pytest.mark.anyio
async def test_chat_stream_async(async_client: AsyncOpenAI) -> None:
    stream = await async_client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=16, stream=True)
    text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert text


@pytest.mark.anyio
async def test_a_stream_may_be_left_early(async_client: AsyncOpenAI) -> None:
    async with await async_client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=16, stream=True
    ) as stream:
        async for _ in stream:
            break
    assert (await async_client.models.list()).data


@pytest.mark.anyio
async def test_completions_async(async_client: AsyncOpenAI) -> None:
    answer = await async_client.completions.create(model=MODEL, prompt="One,", max_tokens=8)
    assert answer.choices[0].text
    stream = await async_client.completions.create(model=MODEL, prompt="One,", max_tokens=8, stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream])


def test_a_failure_in_mid_stream_is_an_exception_and_not_a_short_answer() -> None:
    """Needs a generation that fails, so it brings a server of its own."""
    service = Service(settings=Settings(http=HttpSettings(stream_keepalive=0.01)))  # so that the 200 goes out first
    with serving_in_thread(service) as url, OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
        stream = client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
        assert next(stream).choices[0].delta.role == "assistant"
        [generation] = service.inference.generations
        assert service.loop is not None
        service.loop.call_soon_threadsafe(generation.put, Delta(error=GenerationFailed("It broke.")))
        with pytest.raises(openai.APIError, match="It broke") as failed:
            list(stream)
    assert failed.value.code == "generation_failed"


def test_a_busy_service_is_tried_again_after_the_time_it_asks_for() -> None:
    service = Service(inference=FakeInference([Delta("done"), DONE]))
    service.inference.refusals = [QueueFull("busy", retry_after=0.001)] * 2
    with serving_in_thread(service) as url, OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=2) as client:
        answer = client.chat.completions.create(model=MODEL, messages=MESSAGES)
    assert answer.choices[0].message.content == "done"
    assert len(service.inference.asks) == 3


def test_a_request_that_must_not_be_repeated_is_not() -> None:
    service = Service(inference=FakeInference([Delta(error=GenerationFailed("It broke."))]))
    with (
        serving_in_thread(service) as url,
        OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=2) as client,
        pytest.raises(openai.InternalServerError),
    ):
        client.chat.completions.create(model=MODEL, messages=MESSAGES)
    assert len(service.inference.asks) == 1
