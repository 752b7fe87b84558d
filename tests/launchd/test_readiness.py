"""Whether it is ready: every answer is one, and the wait ends."""

import httpx
import pytest

from service.launchd import readiness
from service.launchd.launchctl import Seen
from service.launchd.plan import StepFailed
from service.launchd.readiness import Readiness

READY = Readiness(ready=True, reachable=True, state="ready", reasons=())
LOADING = Readiness(ready=False, reachable=True, state="starting", reasons=("the engine is starting",))


def answered(status: int, content: bytes) -> Readiness:
    return readiness.ask("http://x", transport=httpx.MockTransport(lambda _: httpx.Response(status, content=content)))


def test_readyz_is_believed() -> None:
    assert answered(200, b'{"ready": true, "state": "ready", "reasons": []}') == READY
    body = b'{"ready": false, "state": "starting", "reasons": ["the engine is starting"]}'
    assert answered(503, body) == LOADING
    assert not answered(503, b'{"ready": true, "state": "ready", "reasons": []}').ready


@pytest.mark.parametrize("content", [b"", b"<html>", b"[]", b"{}", b'{"ready": true}'])
def test_what_is_not_mlxd_is_not_ready(content: bytes) -> None:
    found = answered(200, content)
    assert (found.ready, found.reachable, found.reasons) == (False, True, ("http://x: what answers is not mlxd",))


def test_nobody_there_is_not_reachable() -> None:
    def refuse(_: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    found = readiness.ask("http://x", transport=httpx.MockTransport(refuse))
    assert (found.ready, found.reachable, found.reasons) == (False, False, ("http://x: ConnectError refused",))


class Job:
    """launchd, as far as it is looked at."""

    def __init__(self, seen: Seen | None) -> None:
        self.seen = seen

    def look(self) -> Seen | None:
        return self.seen


def wait(answers: list[Readiness], seen: Seen | None) -> list[float]:
    """Ask until it ends; the last answer is repeated. Returns the pauses."""
    moments = iter(range(1000))
    slept: list[float] = []
    readiness.wait(
        lambda: answers.pop(0) if len(answers) > 1 else answers[0],
        Job(seen),  # type: ignore[arg-type]
        timeout=5,
        explain=lambda: "last words",
        clock=lambda: float(next(moments)),
        sleep=slept.append,
    )
    return slept


def test_the_wait_ends_when_it_is_ready() -> None:
    assert len(wait([LOADING, LOADING, READY], Seen("running", 1, 1, None))) == 2


def test_the_wait_ends_when_time_is_over_with_the_reason_and_the_last_words() -> None:
    with pytest.raises(StepFailed, match="not ready after 5 s: the engine is starting\nlast words"):
        wait([LOADING], Seen("running", 1, 1, None))


def test_the_wait_ends_at_once_when_the_service_stays_down() -> None:
    with pytest.raises(StepFailed, match="stays down"):
        wait([LOADING], Seen("not running", None, 1, 0))


def test_a_service_that_is_started_again_is_waited_for() -> None:
    assert len(wait([LOADING, LOADING, READY], Seen("not running", None, 1, 70))) == 2
