"""The line of a request, as a whole service writes it: every field that is documented, and none that is not."""

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.observability.logging import QueuedHandler, configure
from service.observability.record import RequestRecord, RowRecord
from service.settings import Settings
from tests.conftest import ROOT
from tests.fakes import FakeBackend
from tests.serving import bearer, make_key, served

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
META = {"timestamp", "level", "logger", "event"}


def queued() -> list[QueuedHandler]:
    return [handler for handler in logging.getLogger().handlers if isinstance(handler, QueuedHandler)]


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Path]:
    """The file in which the log of this process is."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    file = tmp_path / "log"
    with file.open("w") as stream:
        configure(level="info", fmt="json", stream=stream)
        yield file
        for handler in queued():
            handler.close()
    root.handlers, root.level = handlers, level


def requests_in(log: Path) -> dict[str, dict[str, Any]]:
    assert [handler.writer.flush() for handler in queued()] == [True]
    lines = map(json.loads, log.read_text().splitlines())
    return {line["request_id"]: line for line in lines if line["event"] == "request"}


def test_the_documented_fields_are_the_ones_that_are_written(log: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    settings = Settings.load(
        None, {"server.port": 0, "server.state_dir": tmp_path, "server.trusted_proxies": ["127.0.0.0/8"]}
    )
    with served(settings, FakeBackend()) as service, httpx.Client(base_url=service.url) as client:
        good, lost = make_key(settings, "inference"), make_key(settings, "inference", plan="nowhere")

        def ask(name: str, who: dict[str, str], **more: Any) -> None:
            headers = {"x-request-id": name, "x-forwarded-for": "203.0.113.7", **who}
            client.post("/v1/completions", headers=headers, **more)

        body = {"model": "default", "prompt": [[1, 2, 3], [4, 5]], "max_tokens": 6}
        ask("whole", bearer(good), json=body)
        ask("stream", {**bearer(good), "traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"}, json={**body, "stream": True})
        ask("stranger", {}, json=body)
        ask("planless", bearer(lost), json=body)
        ask("wrong", bearer(good), json={**body, "model": "other"})
    found = requests_in(log)
    documented = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs/logs.md").read_text("utf-8"), re.MULTILINE)
    assert len(set(documented)) == len(documented)
    assert set().union(*found.values()) - META == set(documented)
    sent = json.dumps(body, separators=(",", ":"))
    assert {name: value for name, value in found["whole"].items() if not name.endswith("_ms")} == {
        **{name: found["whole"][name] for name in (*META, "bytes_sent", "principal", "tenant")},
        "request_id": "whole",
        "method": "POST",
        "route": "/v1/completions",
        "status": 200,
        "client": "203.0.113.7",
        "bytes_received": len(sent),
        "complete": True,
        "key_id": good.record.kid,
        "model": found["whole"]["model"],
        "stream": False,
        "finish_reason": "length",
        "prompt_tokens": 5,
        "cached_tokens": 0,
        "completion_tokens": 12,
    }
    assert (found["stream"]["stream"], found["stream"]["trace_id"]) == (True, TRACE)
    assert (found["stranger"]["status"], found["stranger"]["error"], found["stranger"]["auth_failure"]) == (
        *(401, "invalid_credentials", "missing"),
    )
    assert found["planless"]["status"] == 403
    assert "model" not in found["wrong"]
    for name in ("whole", "stream"):
        line = found[name]
        assert line["ttft_ms"] == pytest.approx(line["queue_ms"] + line["prefill_ms"], abs=0.02)
        assert line["ttft_ms"] <= line["duration_ms"]


def row(**fields: Any) -> RowRecord:
    usual: dict[str, Any] = {
        "prefill_at": 11.0,
        "first_token_at": 12.0,
        "ended_at": 14.0,
        "prompt_tokens": 5,
        "cached_tokens": 0,
        "completion_tokens": 5,
        "max_tokens": 9,
        "finish_reason": "stop",
    }
    return RowRecord(**{**usual, **fields})


def record(*rows: RowRecord) -> RequestRecord:
    who = {"request_id": "r", "principal": "p", "tenant": "t", "key_id": None, "model": "m", "endpoint": "/generate"}
    times = {"began_at": 9.0, "encoded_at": 10.0, "submitted_at": 10.0, "ended_at": 15.0}
    return RequestRecord(**who, **times, stream=False, rows=rows)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rows", "prefill", "per_token"),
    [
        ([row()], 1.0, 0.5),
        ([row(), row(ended_at=20.0, completion_tokens=3)], 1.0, 10 / 6),
        ([row(completion_tokens=1)], 1.0, None),
        ([row(first_token_at=None, completion_tokens=0)], None, None),
        ([row(prefill_at=None, first_token_at=None, completion_tokens=0)], None, None),
        ([row(), row(prefill_at=None, first_token_at=None, completion_tokens=0)], 1.0, 0.5),
    ],
)
def test_times_are_those_of_what_happened(
    rows: list[RowRecord], prefill: float | None, per_token: float | None
) -> None:
    found = record(*rows)
    assert found.prefill_seconds == prefill
    assert found.time_per_output_token == (None if per_token is None else pytest.approx(per_token))
