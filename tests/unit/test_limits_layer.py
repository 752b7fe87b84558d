"""What limits look like on the wire: headers on every answer, refusals before the body, and nothing to strangers."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import structlog

from service.auth.principal import Principal, Scope
from service.engine.generation import Delta
from service.errors import (
    DeadlineExceeded,
    Draining,
    GenerationFailed,
    QueueFull,
    QuotaExhausted,
    ServiceError,
    StorageUnavailable,
    TokenLimited,
    TooManyConcurrent,
    Unauthorized,
)
from service.settings import HttpSettings, LimitsSettings, PlanSettings, Settings
from tests.fakes_api import DONE, Answer, Client, Exchange, FakeInference, Service
from tests.fakes_auth import EVERYTHING, FakeGrant, FakeVerifier

pytestmark = pytest.mark.anyio

BEARER = ("authorization", "Bearer fake-1")
JSON = ("content-type", "application/json")
NAMES = {
    f"x-ratelimit-{what}-{of}" for what in ("limit", "remaining", "reset") for of in ("requests", "tokens")
}  # fmt: skip


def service(who: Principal | None = EVERYTHING, *, strangers: int = 60, **plan: Any) -> Service:
    """With `who` as the only principal; None: authentication is off."""
    limits = LimitsSettings(plans={"default": PlanSettings(**plan)}, failed_authentication_per_minute=strangers)
    return Service(
        settings=Settings(limits=limits, http=HttpSettings(max_body_bytes=1024)),
        inference=FakeInference([Delta("ok"), DONE]),
        verifiers=None if who is None else [FakeVerifier({"fake-1": FakeGrant(who)})],
    )


async def ask(found: Service, method: str, path: str, *headers: tuple[str, str], body: bytes = b"") -> Answer:
    return await Client(found).request(method, path, body, headers)


def told(answer: Answer) -> set[str]:
    return {name for name in answer.headers if name.startswith("x-ratelimit-")}


GENERATE = b'{"prompt": "x"}'
ANSWERS: dict[str, tuple[str, str, bytes, int]] = {
    "whole": ("POST", "/generate", GENERATE, 200),
    "stream": ("POST", "/generate", b'{"prompt": "x", "stream": true}', 200),
    "HEAD": ("HEAD", "/v1/models", b"", 200),
    "metrics": ("GET", "/metrics", b"", 200),
    "malformed": ("POST", "/generate", b"{", 400),
    "nowhere": ("GET", "/nowhere", b"", 404),
    "another method": ("GET", "/generate", b"", 405),
    "too large": ("POST", "/generate", b"x" * 2000, 413),
}


@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.parametrize("who", [EVERYTHING, None])
async def test_every_answer_to_a_principal_says_where_it_stands(name: str, who: Principal | None) -> None:
    method, path, body, status = ANSWERS[name]
    length = ("content-length", str(len(body)))
    answer = await ask(service(who, requests_per_minute=60), method, path, BEARER, JSON, length, body=body)
    assert answer.status == status
    assert told(answer) == NAMES
    assert answer.headers["x-ratelimit-limit-requests"] == "60"
    assert answer.headers["x-ratelimit-remaining-requests"] == "59"


ERRORS: list[tuple[ServiceError | Exception, int]] = [
    (TokenLimited("Too many.", retry_after=2.0), 429),
    (GenerationFailed("Failed."), 500),
    (ZeroDivisionError(), 500),
    (QueueFull("Full."), 503),
    (DeadlineExceeded("queue"), 504),
]


@pytest.mark.parametrize(("error", "status"), ERRORS)
async def test_so_does_every_failure(error: ServiceError, status: int) -> None:
    found = service()
    found.inference.refusal = error
    answer = await ask(found, "POST", "/generate", BEARER, JSON, body=GENERATE)
    assert (answer.status, told(answer)) == (status, NAMES)


async def test_strangers_and_probes_are_told_nothing_and_not_counted() -> None:
    found = service(requests_per_minute=1)
    for _ in range(5):
        assert told(await ask(found, "GET", "/health")) == set()
        assert told(await ask(found, "GET", "/v1/models")) == set()
    assert (await ask(found, "GET", "/v1/models", BEARER)).status == 200


# Requests ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", [EVERYTHING, None])
async def test_beyond_its_rate_a_principal_is_refused_whatever_it_asks(who: Principal | None) -> None:
    found = service(who, requests_per_minute=2, request_burst=2)
    assert [(await ask(found, "GET", path, BEARER)).status for path in ("/v1/models", "/nowhere")] == [200, 404]
    for method, path, body, _ in ANSWERS.values():
        with structlog.testing.capture_logs() as lines:
            answer = await ask(found, method, path, BEARER, JSON, body=body)
        assert answer.status == 429
        assert answer.headers["x-ratelimit-remaining-requests"] == "0"
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert lines[-1]["error"] == "rate_limit_requests"
        if method != "HEAD":
            assert (answer.error["code"], answer.error["type"]) == ("rate_limit_requests", "rate_limit_error")
    assert found.count("mlxd_limits_refused_total", code="rate_limit_requests") == len(ANSWERS)
    assert found.inference.asks == []


async def test_a_refused_request_is_answered_before_its_body_is_asked_for() -> None:
    found = service(requests_per_minute=1)
    await ask(found, "GET", "/v1/models", BEARER)
    exchange = Client(found).exchange("POST", "/generate", [BEARER, JSON, ("content-length", "100000000")])
    exchange.leave()  # nothing of it ever came
    await exchange.run()
    assert (exchange.answer.status, exchange.answer.headers["connection"]) == (429, "close")
    assert "connection" not in (await ask(found, "GET", "/v1/models", BEARER)).headers


async def test_a_credential_without_usable_limits_is_403_and_the_operator_learns_why() -> None:
    found = service(replace(EVERYTHING, plan="canary-plan"))
    with structlog.testing.capture_logs() as lines:
        answer = await ask(found, "POST", "/generate", BEARER, JSON, body=GENERATE)
    assert (answer.status, answer.error["code"]) == (403, "unknown_limits")
    assert (answer.headers["x-should-retry"], told(answer)) == ("false", set())
    assert b"canary" not in answer.body
    assert [(line["error"], line["limits_error"]) for line in lines] == [("unknown_limits", "unknown_plan")]


# Failed credentials -----------------------------------------------------------------------------------------


async def test_too_many_failed_credentials_are_429_and_a_valid_one_is_never_refused() -> None:
    found = service(strangers=3)
    answers = [await ask(found, "GET", "/v1/models", ("x-api-key", "fake-2")) for _ in range(5)]
    assert [answer.status for answer in answers] == [401, 401, 401, 429, 429]
    assert len({answer.body for answer in answers[:3]}) == 1
    refused = answers[-1]
    assert refused.error == {
        "message": "Too many failed credentials from this address.",
        "type": "rate_limit_error",
        "param": None,
        "code": "rate_limit_authentication",
    }
    assert 19 <= int(refused.headers["retry-after"]) <= 25
    assert refused.headers["x-should-retry"] == "false"
    assert (await ask(found, "GET", "/v1/models", BEARER)).status == 200
    assert found.count("mlxd_auth_failures_total", reason="unknown_key") == 5
    other = Client(found).exchange("GET", "/v1/models")
    other.scope["client"] = ("203.0.113.9", 1)
    other.push()
    await other.run()
    assert other.answer.status == 401


async def test_a_database_that_is_not_there_empties_nobodys_bucket() -> None:
    found = service(strangers=1)
    [verifier] = found.verifiers or ()
    assert isinstance(verifier, FakeVerifier)
    verifier.error = StorageUnavailable("Not now.")
    assert {(await ask(found, "GET", "/v1/models", BEARER)).status for _ in range(3)} == {503}
    verifier.error = Unauthorized("expired")
    assert [(await ask(found, "GET", "/v1/models", BEARER)).status for _ in range(2)] == [401, 429]
    verifier.error = StorageUnavailable("Not now.")
    assert (await ask(found, "GET", "/v1/models", BEARER)).status == 503


# When to come back ------------------------------------------------------------------------------------------

QUOTA = QuotaExhausted("Used up.", retry_after=3600.0)
CODES: list[tuple[ServiceError, int, str, str | None, str | None]] = [
    (TokenLimited("x", retry_after=2.5), 429, "rate_limit_tokens", "2500", None),
    (TooManyConcurrent("x", retry_after=1.0), 429, "concurrency_limit", "1000", None),
    (QUOTA, 429, "quota_exhausted", "3600000", "false"),
    (QueueFull("x", retry_after=0.25), 503, "queue_full", "250", None),
    (Draining("x", retry_after=30.0), 503, "draining", "30000", None),
    (DeadlineExceeded("queue"), 504, "deadline_exceeded", None, "false"),
    (GenerationFailed("x"), 500, "generation_failed", None, "false"),
]


@pytest.mark.parametrize(("error", "status", "code", "after_ms", "should_retry"), CODES)
async def test_each_refusal_has_a_code_of_its_own_and_says_whether_to_come_back(
    error: ServiceError, status: int, code: str, after_ms: str | None, should_retry: str | None
) -> None:
    found = service()
    found.inference.refusal = error
    answer = await ask(found, "POST", "/generate", BEARER, JSON, body=GENERATE)
    assert (answer.status, answer.error["code"]) == (status, code)
    assert answer.headers.get("retry-after-ms") == after_ms
    assert ("retry-after" in answer.headers) is (after_ms is not None)
    assert answer.headers.get("x-should-retry") == should_retry


# Given back before the last byte ----------------------------------------------------------------------------


class Watched(Exchange):
    """Notes, at each message, whether the request still holds its generations."""

    held: list[bool]

    async def _send(self, message: Any) -> None:
        inference: FakeInference = self.service.inference
        self.held.append(any(not generation.closed for generation in inference.generations))
        await super()._send(message)

    service: Service


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("script", [[Delta("ok"), DONE], [Delta(error=GenerationFailed("x"))]])
async def test_what_a_request_holds_is_given_back_before_its_last_byte(stream: bool, script: list[Delta]) -> None:
    """So that a client with one place may come back at once."""
    found = replace(service(), inference=FakeInference(script))
    client = Client(found)
    exchange = Watched(found.app, "POST", "/generate", state=client._state(), headers=[BEARER, JSON])
    exchange.service, exchange.held = found, []
    exchange.push(json.dumps({"prompt": "x", "stream": stream}).encode())
    await exchange.run()
    assert exchange.complete
    assert exchange.held[-1] is False


async def test_every_scope_is_counted_together() -> None:
    """The rate belongs to the principal, not to a route."""
    found = service(requests_per_minute=3, request_burst=3)
    paths = ["/v1/models", "/metrics", "/openapi.json", "/v1/models"]
    assert [(await ask(found, "GET", path, BEARER)).status for path in paths] == [200, 200, 200, 429]
    assert EVERYTHING.scopes == frozenset(Scope)
