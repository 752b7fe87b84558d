import json
from typing import Any

import pytest
from hypothesis import given, strategies as st
from starlette.exceptions import HTTPException

from service import errors
from service.api.errors import ErrorRenderer, from_http, from_validation
from service.errors import (
    ContextLengthExceeded,
    DeadlineExceeded,
    GenerationFailed,
    InvalidRequest,
    NotReady,
    QueueFull,
    ServiceError,
)
from tests.fakes_api import DONE, Client, FakeInference, Service

RENDERER = ErrorRenderer(lambda: 0.0)
CANARY = "sk-canary-7f3a"


def every_error() -> list[type[ServiceError]]:
    found = [ServiceError]
    for kind in found:
        found += [sub for sub in kind.__subclasses__() if sub.__module__ == errors.__name__]
    return found


def build(kind: type[ServiceError]) -> ServiceError:
    if kind is ContextLengthExceeded:
        return ContextLengthExceeded(context_length=10, prompt_tokens=11)
    if kind is DeadlineExceeded:
        return DeadlineExceeded("queue")
    return kind("What happened.")


@pytest.mark.parametrize("kind", every_error(), ids=lambda kind: kind.__name__)
def test_every_error_of_the_tree_has_the_one_shape(kind: type[ServiceError]) -> None:
    error = build(kind)
    response = RENDERER.response(error)
    body = json.loads(bytes(response.body))
    assert response.status_code == error.status
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    assert body["error"]["code"] == error.code
    assert ("retry-after" in response.headers) == (error.status in (429, 503))


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "invalid_request_error"),
        (429, "rate_limit_error"),
        (500, "server_error"),
        (503, "server_error"),
    ],
)
def test_the_type_follows_the_status(status: int, kind: str) -> None:
    class Some(ServiceError):
        pass

    Some.status = status
    assert RENDERER.envelope(Some("x"))["error"]["type"] == kind


def test_a_busy_service_says_when_to_come_back_and_spreads_the_crowd() -> None:
    full = QueueFull("busy", retry_after=4)
    assert dict(RENDERER.headers(full)) == {"retry-after": "4", "retry-after-ms": "4000"}
    assert dict(ErrorRenderer(lambda: 0.5).headers(full)) == {"retry-after": "5", "retry-after-ms": "4500"}
    assert dict(RENDERER.headers(NotReady("warming"))) == {"retry-after": "1", "retry-after-ms": "1000"}
    assert dict(RENDERER.headers(QueueFull("busy", retry_after=0.02))) == {"retry-after": "1", "retry-after-ms": "20"}


def test_sdks_are_told_when_not_to_retry() -> None:
    assert dict(RENDERER.headers(GenerationFailed("x"))) == {"x-should-retry": "false"}
    error = InvalidRequest("x")
    error.should_retry = True
    assert dict(RENDERER.headers(error)) == {"x-should-retry": "true"}
    assert RENDERER.headers(InvalidRequest("x")) == []


def test_other_refusals_of_the_framework_are_a_plain_400() -> None:
    error = from_http(HTTPException(418, detail=CANARY))
    assert (error.status, CANARY in error.message) == (400, False)


def test_what_pydantic_repeats_is_left_out() -> None:
    complaint = {"type": "union_tag_invalid", "loc": ("body", "kind"), "msg": f"Input tag '{CANARY}' found"}
    error = from_validation([complaint], {"kind": CANARY})
    assert (error.param, CANARY in error.message) == ("kind", False)


def test_a_message_with_half_a_character_can_still_be_sent() -> None:
    assert json.loads(RENDERER.body(InvalidRequest("\ud800")))["error"]["message"] == "?"


PARAMS: list[tuple[str, dict[str, Any], str | None]] = [
    ("/generate", {}, "prompt"),
    ("/generate", {"prompt": 3}, "prompt"),
    ("/generate", {"prompt": "x", "max_tokens": "3"}, "max_tokens"),
    ("/generate", {"prompt": "x", "max_tokens": 3.0}, "max_tokens"),
    ("/generate", {"prompt": "x", "max_tokens": True}, "max_tokens"),
    ("/generate", {"prompt": "x", "max_tokens": 0}, "max_tokens"),
    ("/generate", {"prompt": "x", "max_tokens": 2**40}, "max_tokens"),
    ("/generate", {"prompt": "x", "max_tokens": 20_000}, "max_tokens"),
    ("/generate", {"prompt": "x", "stream": "yes"}, "stream"),
    ("/generate", {"prompt": "x", "tempreature": 0}, "tempreature"),
    ("/generate", {"prompt": "x", f"a{CANARY} b": 0}, None),
    ("/generate", {"prompt": "x", "temperature": 2.5}, "temperature"),
    ("/generate", {"prompt": "x", "temperature": True}, "temperature"),
    ("/generate", {"prompt": "x", "temperature": "hot"}, "temperature"),
    ("/generate", {"prompt": "x", "top_p": 0}, "top_p"),
    ("/generate", {"prompt": "x", "top_p": 1.1}, "top_p"),
    ("/generate", {"prompt": "x", "top_k": -1}, "top_k"),
    ("/generate", {"prompt": "x", "min_p": -0.1}, "min_p"),
    ("/generate", {"prompt": "x", "repetition_penalty": 0}, "repetition_penalty"),
    ("/generate", {"prompt": "x", "presence_penalty": -2.1}, "presence_penalty"),
    ("/generate", {"prompt": "x", "frequency_penalty": 2.1}, "frequency_penalty"),
    ("/generate", {"prompt": "x", "seed": 2**63}, "seed"),
    ("/generate", {"prompt": "x", "seed": -(2**63) - 1}, "seed"),
    ("/generate", {"prompt": "x", "stop": ["a", "b", "c", "d", "e"]}, "stop"),
    ("/generate", {"prompt": "x", "stop": ["a", ""]}, "stop[1]"),
    ("/generate", {"prompt": "x", "stop": "x" * 257}, "stop"),
    ("/generate", {"prompt": "x", "stop": 3}, "stop"),
    ("/generate", {"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias"),
    ("/generate", {"prompt": "x", "logit_bias": {"\N{ARABIC-INDIC DIGIT ONE}": 1}}, "logit_bias"),
    ("/generate", {"prompt": "x", "logit_bias": {"1": 101}}, "logit_bias"),
    ("/generate", {"prompt": "x", "logit_bias": {str(i): 1 for i in range(301)}}, "logit_bias"),
    ("/v1/chat/completions", {}, "messages"),
    ("/v1/chat/completions", {"messages": []}, "messages"),
    ("/v1/chat/completions", {"messages": [{"content": "x"}]}, "messages[0].role"),
    ("/v1/chat/completions", {"messages": [{"role": CANARY, "content": "x"}]}, "messages[0].role"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": [3]}]}, "messages[0].content[0]"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{}]}]}, "messages[0].content[0].type"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "n": 0}, "n"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "stream_options": 1}, "stream_options"),
    ("/v1/completions", {}, "prompt"),
    ("/v1/completions", {"prompt": []}, "prompt"),
    ("/v1/completions", {"prompt": [1, "a"]}, "prompt[1]"),
    ("/v1/completions", {"prompt": [[]]}, "prompt[0]"),
    ("/v1/completions", {"prompt": [-1]}, "prompt[0]"),
    ("/v1/completions", {"prompt": {}}, "prompt"),
]


@pytest.mark.anyio
@pytest.mark.parametrize(("path", "payload", "param"), PARAMS, ids=lambda value: str(value)[:60])
async def test_a_wrong_field_is_a_400_that_names_it(path: str, payload: dict[str, Any], param: str | None) -> None:
    service = Service()
    answer = await Client(service).post(path, payload)
    assert (answer.status, answer.error["param"]) == (400, param)
    assert CANARY not in answer.body.decode()
    assert service.inference.asks == []


secret = st.just(CANARY) | st.lists(st.just(CANARY), max_size=3) | st.dictionaries(st.just("type"), st.just(CANARY))
FIELDS = ("prompt", "messages", "stop", "temperature", "logit_bias", "stream", "n", "seed", "response_format", "tools")


@pytest.fixture(scope="module")
def answering() -> Client:
    return Client(Service(inference=FakeInference([DONE])))


@pytest.mark.anyio
@given(
    st.sampled_from(["/generate", "/v1/chat/completions", "/v1/completions"]),
    st.dictionaries(st.sampled_from(FIELDS), secret | st.lists(secret | st.integers()), min_size=1),
)
async def test_no_refusal_repeats_the_input(answering: Client, path: str, payload: dict[str, Any]) -> None:
    answer = await answering.post(path, payload)
    assert answer.status in (200, 400)
    assert CANARY not in answer.body.decode()


@pytest.mark.anyio
async def test_many_wrong_tokens_cost_one_complaint() -> None:
    service = Service()
    answer = await Client(service).post("/v1/completions", {"prompt": ["a", *[1] * 100_000]})
    assert (answer.status, answer.error["param"]) == (400, "prompt[0]")


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nope", 404, "not_found"),
        ("GET", "/generate", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("OPTIONS", "/health", 405, "method_not_allowed"),
        ("BREW", "/health", 405, "method_not_allowed"),
        ("GET", "/", 405, "method_not_allowed"),
    ],
)
async def test_the_router_refuses_in_the_same_shape(method: str, path: str, status: int, code: str) -> None:
    answer = await Client(Service()).request(method, path)
    assert (answer.status, answer.error["code"]) == (status, code)
    assert ("allow" in answer.headers) == (status == 405)


@pytest.mark.anyio
@pytest.mark.parametrize("kind", [k for k in every_error() if k.status >= 400], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("path", ["/generate", "/v1/chat/completions", "/v1/completions"])
async def test_a_refusal_by_the_engine_is_rendered_by_every_route(path: str, kind: type[ServiceError]) -> None:
    service = Service()
    service.inference.refusal = build(kind)
    payload = {"messages": [{"role": "user", "content": "x"}]} if "chat" in path else {"prompt": "x"}
    answer = await Client(service).post(path, payload)
    assert answer.status == kind.status
    assert answer.error["code"] == service.inference.refusal.code
    if kind is ContextLengthExceeded:
        assert answer.error["param"] == ("messages" if "chat" in path else "prompt")
