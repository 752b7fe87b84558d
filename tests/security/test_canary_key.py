"""A key, a prompt and an output that are planted everywhere are found nowhere: not in logs, metrics, answers,
tracebacks, files, the audit log or what the process prints."""

import io
import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import structlog

from service.auth.key_format import generate
from service.auth.principal import Scope
from service.observability.logging import configure
from service.settings import Settings
from tests.fakes import FakeBackend, spelling
from tests.fakes_api import Client, Service
from tests.fakes_auth import FakeGrant, FakeVerifier
from tests.serving import Served, bearer, make_key, served, started

PROMPT = "zebra quartz prompt"
"""With spaces: a well-formed X-Request-ID is the client's to choose, and in the log."""
OUTPUT = "walrus onyx output"


def secret_of(key: str) -> str:
    """The part that nobody may see; the id before it is public."""
    return key.split("_")[3]


@contextmanager
def configured() -> Iterator[io.StringIO]:
    """What is logged, in the form in which it is kept; at the level that says most."""
    root = logging.getLogger()
    handlers, level, processors = list(root.handlers), root.level, structlog.get_config()
    stream = io.StringIO()
    configure(level="debug", fmt="json", stream=stream)
    [handler] = root.handlers
    try:
        yield stream
    finally:
        handler.flush()
        handler.close()
        root.handlers, root.level = handlers, level
        structlog.configure(**processors)


def plant(client: httpx.Client, canary: str, good: str) -> Iterator[httpx.Response]:
    """Requests with the canary in every place that a client can reach."""
    both = bearer(good)
    for who in (bearer(canary), {"x-api-key": canary}, both):
        for path in ("/v1/models", "/metrics", "/nowhere", "/health", "/admin/keys", "/docs"):
            yield client.get(path, headers=who, params={"api_key": canary, canary: "1"})
        yield client.get(f"/{canary}", headers=who)
        yield client.get(f"/v1/models/{canary}", headers=who)
        yield client.get(f"/admin/keys/{canary}", headers=who)
        yield client.delete(f"/admin/keys/{canary}", headers=who)
        for name in ("x-request-id", "cookie", "user-agent", "referer", "x-forwarded-for", "traceparent", "accept"):
            yield client.get("/v1/models", headers={**who, name: canary})
        yield client.get("/v1/models", headers={**who, "host": canary})
        yield client.request("OPTIONS", "/generate", headers={**who, "origin": f"https://{canary}"})
        for body in (
            {"prompt": canary, "max_tokens": 1},
            {"prompt": "x", "stop": [canary], "max_tokens": 1},
            {"prompt": "x", canary: 1},
            {"prompt": {canary: canary}},
            {"prompt": "x", "max_tokens": canary},
            {"prompt": "x", "stream": True, "max_tokens": 2, "chat": canary},
        ):
            yield client.post("/generate", headers=who, json=body)
        yield client.post("/v1/completions", headers=who, json={"model": canary, "prompt": canary, "user": canary})
        message = {"role": canary, "content": canary, "name": canary}
        yield client.post("/v1/chat/completions", headers=who, json={"model": "default", "messages": [message]})
        yield client.post("/v1/chat/completions", headers=who, content=canary)
        yield client.post("/generate", headers={**who, "content-type": f"application/json; x={canary}"}, content="{")
        yield client.post("/admin/keys", headers=who, json={"name": "x", "scopes": [canary]})
        yield client.post("/admin/keys", headers=who, json={"name": "x", "scopes": ["usage"], "expires_at": canary})
        yield client.post("/admin/keys", headers=who, json={canary: canary})


def test_no_log_line_metric_answer_or_file_has_it(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    settings = Settings.load(None, {"server.port": 0, "server.state_dir": tmp_path})
    canary = generate("live").text
    asked = 0
    with configured() as log, served(settings, FakeBackend(script=lambda row, index: 100 + index % 9)) as service:
        good = make_key(settings, *Scope)
        for answer in _ask(service, canary, good.text):
            asked += 1
            told = f"{answer.headers} {answer.text}"
            assert secret_of(canary) not in told, answer.request.url
            assert secret_of(good.text) not in told
        metrics = httpx.get(f"{service.url}/metrics", headers=bearer(good)).text
        logging.getLogger("library").error("of a library: %s %r", canary, {"headers": [canary]})
    logged = log.getvalue()
    kept = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert good.record.kid.encode() in kept, "the files that were read are the ones that count"
    assert good.record.kid in logged
    assert logged.count('"event": "request"') >= asked
    for secret in (secret_of(canary), secret_of(good.text)):
        assert secret not in logged
        assert secret not in metrics
        assert secret.encode() not in kept


def _ask(service: Served, canary: str, good: str) -> Iterator[httpx.Response]:
    with httpx.Client(base_url=service.url) as client:
        yield from plant(client, canary, good)


@pytest.mark.anyio
async def test_no_traceback_has_it() -> None:
    canary = f"fake-{generate('live').text}"
    service = Service(verifiers=[FakeVerifier({canary: FakeGrant()})])
    service.inference.refusal = ValueError(f"no such thing: {canary}")  # type: ignore[assignment]
    with configured() as log:
        headers = [("authorization", f"Bearer {canary}"), ("content-type", "application/json")]
        answer = await Client(service).request("POST", "/generate", json.dumps({"prompt": canary}).encode(), headers)
    assert answer.status == 500
    assert "ValueError" in log.getvalue()
    assert canary not in log.getvalue()
    assert secret_of(canary) not in log.getvalue()
    assert secret_of(canary) not in answer.body.decode()


class Faults:
    """Makes single steps of the engine fail, with a client's text in the exception."""

    def __init__(self) -> None:
        self.next: list[Exception] = []

    def __call__(self, _: int) -> None:
        if self.next:
            raise self.next.pop()


def test_no_prompt_and_no_output_is_in_any_sink(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    settings = Settings.load(None, {"server.port": 0, "server.state_dir": tmp_path})
    faults = Faults()
    with configured() as log, served(settings, FakeBackend(script=spelling(OUTPUT), before_step=faults)) as service:
        good = make_key(settings, *Scope).text
        with httpx.Client(base_url=service.url, headers=bearer(good)) as client:
            for answer in plant(client, PROMPT, good):
                assert answer.is_success or "zebra" not in f"{answer.headers} {answer.text}", answer.request.url
            for number, words in enumerate((PROMPT, OUTPUT)):
                spoken = client.post("/generate", json={"prompt": PROMPT, "stream": bool(number)})
                said = "".join(re.findall(r'"text":"([^"]*)"', spoken.text))  # a stream may have cut the word in two
                assert "walrus" in said, "the output that is looked for is one"
                faults.next = [KeyError(words)]
                failed = client.post("/generate", json={"prompt": PROMPT, "stream": bool(number)})
                assert "generation_failed" in failed.text
                assert not any(word in failed.text for word in ("zebra", "walrus"))
                logging.getLogger("library").error("a library failed", exc_info=ValueError(words))
            metrics = client.get("/metrics").text
            usage = client.get("/admin/usage").text
    kept = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    told = log.getvalue()
    assert told.count('"step_failed"') == told.count("a library failed") == 2
    assert told.count('"exc_type": "KeyError"') == 2
    for sink in (told, metrics, usage, kept.decode("latin-1")):
        assert not any(word in sink for word in ("zebra", "quartz", "walrus", "onyx"))


def test_the_process_says_it_to_nobody_either(tiny_model_dir: Path, tmp_path: Path) -> None:
    """With logs for a console and uvicorn's own in them; a key that is right, and one that is not."""
    tmp_path.chmod(0o700)
    settings = Settings.load(None, {"server.state_dir": tmp_path})
    good, canary = make_key(settings, *Scope).text, generate("live").text
    overrides = {
        "MLXD_MODEL__REFERENCE": str(tiny_model_dir),
        "MLXD_AUTH__ENABLED": "true",
        "MLXD_LOG__LEVEL": "debug",
        "MLXD_LOG__FORMAT": "console",
    }
    with started(tmp_path, timed=False, **overrides) as running:
        with httpx.Client(base_url=running.url) as client:
            for answer in plant(client, canary, good):
                assert secret_of(canary) not in answer.text
            for answer in plant(client, PROMPT, good):
                assert answer.is_success or "zebra" not in f"{answer.headers} {answer.text}", answer.request.url
            metrics = client.get("/metrics", headers=bearer(good)).content
        environment = Path(f"/proc/{running.pid}/environ")
        told = environment.read_bytes() if os.access(environment, os.R_OK) else b""
        output = running.output.read_bytes() + told + metrics
    kept = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert b"auth_failure" in output
    assert secret_of(canary).encode() not in output
    assert secret_of(good).encode() not in output
    assert b"zebra" not in output
    assert b"zebra" not in kept
