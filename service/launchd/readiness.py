"""Whether the installed service is ready: `/readyz`, asked from outside, and the wait for it. Blocks."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import httpx

from service.launchd.launchctl import Launchd
from service.launchd.plan import StepFailed

TIMEOUT = 5.0
POLL = 0.25


@dataclass(frozen=True, slots=True)
class Readiness:
    """What `/readyz` answered. `reachable` false: nobody did, and `reasons` say why."""

    ready: bool
    reachable: bool
    state: str | None
    reasons: tuple[str, ...]


def ask(url: str, *, transport: httpx.BaseTransport | None = None) -> Readiness:
    """Ask the service at `url` once. Never raises: what goes wrong is an answer too."""
    try:
        # Nothing secret is sent, and the certificate is for another name than this machine's loopback.
        with httpx.Client(transport=transport, timeout=TIMEOUT, trust_env=False, verify=False) as client:  # noqa: S501
            answer = client.get(f"{url}/readyz")
            body = answer.json()
            return Readiness(
                ready=answer.status_code == httpx.codes.OK and body["ready"] is True,
                reachable=True,
                state=str(body["state"]),
                reasons=tuple(map(str, body["reasons"])),
            )
    except httpx.HTTPError as error:
        return Readiness(ready=False, reachable=False, state=None, reasons=(f"{url}: {type(error).__name__} {error}",))
    except (ValueError, KeyError, TypeError):
        return Readiness(ready=False, reachable=True, state=None, reasons=(f"{url}: what answers is not mlxd",))


def wait(
    probe: Callable[[], Readiness],
    launchd: Launchd,
    *,
    timeout: float,
    explain: Callable[[], str] = lambda: "",
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], object] = time.sleep,
) -> None:
    """Wait until the service is ready. Raises StepFailed when it stays down, or is not ready within `timeout` seconds.

    `explain` is asked for more to say then, such as the last lines of its log.
    """
    ends = clock() + timeout
    while not (answer := probe()).ready:
        seen = launchd.look()
        if seen is not None and seen.down_for_good:
            raise StepFailed(f"the service ended and stays down (exit code 0)\n{explain()}".rstrip())
        if clock() >= ends:
            why = "; ".join(answer.reasons) or "no reason given"
            raise StepFailed(f"the service is not ready after {timeout:g} s: {why}\n{explain()}".rstrip())
        sleep(POLL)
