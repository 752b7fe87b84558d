"""The openai SDK driven into limits: it comes back when it was told to, and gives up where it was told to."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import DefaultHttpxClient, OpenAI

from service.engine.engine import EngineState
from service.settings import Settings
from tests.fakes import FakeBackend, spelling
from tests.serving import Served, make_key, served

QUEUELESS: dict[str, Any] = {"engine.max_rows": 1, "engine.max_queue": 0}
HASTY: dict[str, Any] = {"engine.drain_timeout": 0.5}
STRICT: dict[str, Any] = {"limits.failed_authentication_per_minute": 1}

EARLY = 0.005
"""Seconds by which two clocks may differ."""


@dataclass
class Attempts:
    """When each request went out, and what each answer said. A list of (status, seconds told or None)."""

    sent: list[float] = field(default_factory=list)
    heard: list[float] = field(default_factory=list)
    answers: list[tuple[int, float | None]] = field(default_factory=list)

    def request(self, _: object) -> None:
        self.sent.append(time.monotonic())

    def response(self, answer: Any) -> None:
        self.heard.append(time.monotonic())
        told = answer.headers.get("retry-after-ms")
        self.answers.append((answer.status_code, None if told is None else float(told) / 1000))

    @property
    def statuses(self) -> list[int]:
        return [status for status, _ in self.answers]

    def check_that_it_waited(self) -> None:
        """Before each attempt after a refusal, for as long as that refusal said."""
        waits = []
        for (_, told), heard, sent in zip(self.answers, self.heard, self.sent[1:], strict=False):
            if told is not None:
                waits.append((told, sent - heard))
                assert sent - heard >= told - EARLY
        assert waits
        print("\ntold and waited, seconds: " + ", ".join(f"{told:.2f} {waited:.2f}" for told, waited in waits))


@dataclass
class Driven:
    """A service, and the SDK over a transport that is watched."""

    service: Served
    sdk: OpenAI
    attempts: Attempts

    def ask(self, *, prompt: str = "ab", max_tokens: int = 4) -> str:
        return self.sdk.completions.create(model="default", prompt=prompt, max_tokens=max_tokens).choices[0].text

    def wait(self, holds: Callable[[], bool]) -> None:
        until = time.monotonic() + 20
        while not holds():
            assert time.monotonic() < until
            time.sleep(0.002)


@contextmanager
def driven(
    folder: Path, plan: dict[str, Any], backend: FakeBackend | None = None, *, key: bool = False, **more: Any
) -> Iterator[Driven]:
    settings = Settings.load(
        None,
        {
            "server.port": 0,
            "server.state_dir": folder,
            "auth.enabled": key,
            "limits.plans": {"default": plan},
            **more,
        },
    )
    token = make_key(settings, "inference").text if key else "unused"
    attempts, backend = Attempts(), backend or FakeBackend()
    hooks: dict[str, list[Callable[..., Any]]] = {"request": [attempts.request], "response": [attempts.response]}
    with (
        served(settings, backend) as service,
        DefaultHttpxClient(event_hooks=hooks, timeout=60) as http,
        OpenAI(base_url=f"{service.url}/v1", api_key=token, max_retries=3, http_client=http) as sdk,
    ):
        try:
            yield Driven(service, sdk, attempts)
        finally:
            if backend.gate is not None:
                backend.gate.release(10_000)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as found:
        yield found


def test_too_many_requests_in_a_second(tmp_path: Path) -> None:
    with driven(tmp_path, {"request_burst": 2}) as to:
        assert [len(to.ask()) for _ in range(3)] == [4, 4, 4]
        assert to.attempts.statuses == [200, 200, 429, 200]
        to.attempts.check_that_it_waited()


def test_too_many_tokens_in_a_minute(tmp_path: Path) -> None:
    with driven(tmp_path, {"tokens_per_minute": 600}) as to:
        to.ask(max_tokens=590)
        to.ask(max_tokens=20)
        assert to.attempts.statuses == [200, 429, 200]
        to.attempts.check_that_it_waited()


def test_too_many_at_the_same_time(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    gate = threading.Semaphore(0)
    with driven(tmp_path, {"concurrent_requests": 1}, FakeBackend(gate=gate)) as to:
        first: Future[str] = pool.submit(to.ask)
        to.wait(lambda: to.service.app.engine.status().running == 1)
        second = pool.submit(to.ask)
        to.wait(lambda: 429 in to.attempts.statuses)
        gate.release(10_000)
        assert (len(first.result(30)), len(second.result(30))) == (4, 4)
        refused = to.attempts.statuses.index(429)
        told = to.attempts.answers[refused][1]
        assert told is not None
        assert to.attempts.sent[-1] - to.attempts.heard[refused] >= told - EARLY


def test_a_full_queue(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    gate = threading.Semaphore(0)
    with driven(tmp_path, {}, FakeBackend(gate=gate), **QUEUELESS) as to:
        first: Future[str] = pool.submit(to.ask)
        to.wait(lambda: to.service.app.engine.status().running == 1)
        second = pool.submit(to.ask)
        to.wait(lambda: 503 in to.attempts.statuses)
        gate.release(10_000)
        assert (len(first.result(30)), len(second.result(30))) == (4, 4)
        refused = to.attempts.statuses.index(503)
        told = to.attempts.answers[refused][1]
        assert told is not None
        assert to.attempts.sent[-1] - to.attempts.heard[refused] >= told - EARLY


def test_a_service_that_drains(tmp_path: Path) -> None:
    with driven(tmp_path, {}, **HASTY) as to:
        asyncio.run_coroutine_threadsafe(to.service.app.engine.drain(0.5), to.service.loop).result(10)
        assert to.service.app.engine.state is EngineState.DRAINING
        with pytest.raises(openai.InternalServerError) as refused:
            to.ask()
        assert (refused.value.status_code, refused.value.code) == (503, "draining")
        assert to.attempts.statuses == [503] * 4
        to.attempts.check_that_it_waited()


def test_a_quota_that_is_used_up_is_not_tried_again(tmp_path: Path) -> None:
    with driven(tmp_path, {"daily_tokens": 20}, key=True) as to:
        to.ask(max_tokens=10)
        with pytest.raises(openai.RateLimitError) as refused:
            to.ask(max_tokens=10)
        assert (refused.value.code, refused.value.type) == ("quota_exhausted", "rate_limit_error")
        assert to.attempts.statuses == [200, 429]


def test_a_quota_that_only_ones_own_running_request_holds_is_tried_again(
    tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    gate = threading.Semaphore(0)
    backend = FakeBackend(gate=gate, script=spelling("Hi"))
    with driven(tmp_path, {"daily_tokens": 100}, backend, key=True) as to:
        first: Future[str] = pool.submit(to.ask, max_tokens=90)
        to.wait(lambda: to.service.app.engine.status().running == 1)
        second = pool.submit(to.ask, max_tokens=10)
        to.wait(lambda: 429 in to.attempts.statuses)
        gate.release(10_000)  # it says less than it might have
        assert (first.result(30), second.result(30)) == ("Hi", "Hi")
        assert sorted(to.attempts.statuses) == [200, 200, 429]
        told = to.attempts.answers[to.attempts.statuses.index(429)][1]
        assert told is not None
        assert 1.0 <= told <= 1.25


@pytest.mark.parametrize(
    ("plan", "asked", "code"),
    [
        ({"max_output_tokens": 3}, {"max_tokens": 4}, "exceeds_output_limit"),
        ({"max_prompt_tokens": 1}, {}, "exceeds_prompt_limit"),
        ({"tokens_per_minute": 5}, {}, "exceeds_token_limit"),
    ],
)
def test_what_the_plan_never_allows_is_a_bad_request_and_not_tried_again(
    plan: dict[str, Any], asked: dict[str, Any], code: str, tmp_path: Path
) -> None:
    with driven(tmp_path, plan) as to:
        with pytest.raises(openai.BadRequestError) as refused:
            to.ask(**asked)
        assert refused.value.code == code
        assert to.attempts.statuses == [400]


def test_wrong_credentials_are_given_up_also_once_there_were_too_many(tmp_path: Path) -> None:
    with driven(tmp_path, {}, key=True, **STRICT) as to:
        to.sdk.api_key = "sk-wrong"
        with pytest.raises(openai.AuthenticationError):
            to.ask()
        with pytest.raises(openai.RateLimitError) as refused:
            to.ask()
        assert refused.value.code == "rate_limit_authentication"
        assert to.attempts.statuses == [401, 429]


def test_the_headers_are_what_the_sdk_shows(tmp_path: Path) -> None:
    with driven(tmp_path, {"requests_per_minute": 60, "tokens_per_minute": 600}) as to:
        raw = to.sdk.completions.with_raw_response.create(model="default", prompt="ab", max_tokens=58)
        shown = {name: value for name, value in raw.headers.items() if name.startswith("x-ratelimit-")}
        assert shown["x-ratelimit-remaining-requests"] == "59"
        assert 540 <= int(shown["x-ratelimit-remaining-tokens"]) <= 560
        assert shown["x-ratelimit-reset-requests"] == "1m0s"
        assert "retry-after" not in raw.headers
