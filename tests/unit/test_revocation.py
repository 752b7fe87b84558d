"""What runs on a credential that is revoked meanwhile."""

import asyncio
from typing import Any

import pytest

from service.auth.revocation import RunningGrants
from service.engine.generation import Delta, Generation, GenerationRequest
from service.errors import CredentialRevoked, GenerationFailed, ServiceError
from service.settings import HttpSettings, Settings
from tests.fakes_api import DONE, Client, Exchange, FakeInference, Service
from tests.fakes_auth import FakeGrant, FakeVerifier

pytestmark = pytest.mark.anyio

REVOKED = CredentialRevoked("revoked")
HEADERS = [("content-type", "application/json"), ("authorization", "Bearer fake-1")]


def _never(_: ServiceError) -> None:
    raise AssertionError


def test_only_what_is_refused_is_ended_and_once() -> None:
    ended: list[ServiceError] = []
    running = RunningGrants()
    good, bad = FakeGrant(), FakeGrant()
    with running.watching(good, ended.append), running.watching(bad, ended.append), running.watching(bad, ended.append):
        running.recheck()
        assert ended == []
        bad.refused = REVOKED
        running.recheck()
        running.recheck()
        assert len(running) == 1
    assert ended == [REVOKED, REVOKED]
    assert len(running) == 0


def test_a_change_after_the_credential_was_verified_is_not_missed() -> None:
    running = RunningGrants()
    with pytest.raises(CredentialRevoked), running.watching(FakeGrant(refused=REVOKED), _never):
        raise AssertionError
    assert len(running) == 0


async def generation(*deltas: Delta) -> tuple[Generation, list[Generation]]:
    cancelled: list[Generation] = []
    found = Generation(GenerationRequest(request_id="r", prompt=(1,), max_tokens=9), cancelled.append)
    for delta in deltas:
        found.put(delta)
    return found, cancelled


async def test_a_generation_that_fails_says_so_and_is_cancelled_once() -> None:
    found, cancelled = await generation(Delta("a"))
    found.fail(REVOKED)
    found.fail(GenerationFailed("again"))
    found.put(Delta("late"))
    assert (await found.read()).error is REVOKED
    found.close()
    assert cancelled == [found]


async def test_a_generation_that_is_over_does_not_fail() -> None:
    found, cancelled = await generation(DONE)
    found.fail(REVOKED)
    assert (await found.read()).error is None
    found.close()
    found.fail(REVOKED)
    assert cancelled == []


class Running:
    """A request that runs on a credential which the test revokes."""

    def __init__(self, **payload: Any) -> None:
        self.grant = FakeGrant()
        self.service = Service(
            settings=Settings(http=HttpSettings(stream_keepalive=0.01)),
            inference=FakeInference(),
            verifiers=[FakeVerifier({"fake-1": self.grant})],
        )
        self.exchange: Exchange = Client(self.service).exchange("POST", "/v1/completions", HEADERS)
        body = b'{"model": "default", "prompt": ["a", "b"], "stream": %s}' % str(payload["stream"]).lower().encode()
        self.exchange.push(body)
        self.task = asyncio.ensure_future(self.exchange.run())

    async def until_running(self) -> None:
        while len(self.service.running) == 0:
            await asyncio.sleep(0)

    def revoke(self, why: ServiceError = REVOKED) -> None:
        self.grant.refused = why
        self.service.running.recheck()
        assert len(self.service.running) == 0

    @property
    def cancelled(self) -> bool:
        return self.service.inference.cancelled == self.service.inference.generations


async def test_a_stream_ends_with_an_error_event_and_no_normal_end() -> None:
    running = Running(stream=True)
    await running.until_running()
    running.service.inference.generations[0].put(Delta("Hello"))
    await running.exchange.until(lambda seen: b"Hello" in seen.body)
    running.revoke()
    await running.task
    assert running.exchange.complete
    *_, last = running.exchange.answer.events()
    assert last["error"]["code"] == "credential_revoked"
    assert b"[DONE]" not in running.exchange.body
    assert running.cancelled
    assert len(running.service.running) == 0


async def test_a_whole_answer_is_a_401() -> None:
    running = Running(stream=False)
    await running.until_running()
    running.service.inference.generations[0].put(Delta("Hello"))
    running.revoke()
    await running.task
    answer = running.exchange.answer
    assert (answer.status, answer.error["code"]) == (401, "credential_revoked")
    assert answer.headers["www-authenticate"] == "Bearer"
    assert running.cancelled


async def test_a_credential_that_is_revoked_before_the_answer_begins_is_a_401() -> None:
    grant = FakeGrant()
    service = Service(inference=FakeInference(), verifiers=[FakeVerifier({"fake-1": grant})])
    start = service.inference.start

    async def slow_start(*arguments: Any) -> list[Generation]:
        grant.refused = REVOKED  # while the prompt is encoded
        return await start(*arguments)

    service.inference.start = slow_start  # type: ignore[method-assign,assignment]
    answer = await Client(service).request("POST", "/generate", b'{"prompt": "x", "stream": true}', HEADERS)
    assert (answer.status, answer.error["code"]) == (401, "credential_revoked")
    assert service.inference.cancelled == service.inference.generations
    assert len(service.running) == 0
