"""A stream that runs while its key is revoked from another process: real model, real sockets, real database."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import httpx
import pytest

from service.auth.jwt import bind
from service.auth.token_issue import issue
from service.settings import Settings
from service.storage import denied, keys
from service.storage.database import Database
from tests.serving import BRIEF_CHUNK, Served, bearer, make_key, served
from tests.tiny import make_tiny_llama

SECRET = b"0123456789abcdef0123456789abcdef"
IN_EFFECT = 1.0
"""Seconds within which a revocation ends what runs."""


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("revocation")
    folder.chmod(0o700)
    secret = folder / "secret"
    secret.write_bytes(SECRET)
    secret.chmod(0o600)
    model = make_tiny_llama(folder / "model", max_position_embeddings=65536)  # enough words for any machine
    return Settings.load(
        None,
        {
            "server.port": 0,
            "server.state_dir": folder / "state",
            "model.reference": str(model),
            "engine.memory_budget": 4 << 30,
            "engine.max_prefill_chunk": BRIEF_CHUNK,
            "auth.issuers": [
                {
                    "name": "own",
                    "issuer": "https://own.test/",
                    "audience": "mlxd",
                    "algorithms": ["HS256"],
                    "secret_file": str(secret),
                }
            ],
        },
    )


@pytest.fixture(scope="module")
def service(settings: Settings) -> Iterator[Served]:
    with served(settings) as found:
        yield found


def revoke(settings: Settings, kid: str) -> subprocess.Popen[bytes]:
    """`mlxd keys revoke`, begun in another process."""
    environment = {"PATH": os.environ["PATH"], "MLXD_SERVER__STATE_DIR": str(settings.server.state_dir)}
    command = [sys.executable, "-m", "service", "keys", "revoke", kid]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def revoked_at(settings: Settings, kid: str) -> float:
    with Database.open(settings.storage, settings.server.state_dir) as database:
        record = database.read(lambda connection: keys.find(connection, kid)).result()
    assert record is not None
    assert record.revoked_at is not None
    return record.revoked_at


def body(stream: bool) -> dict[str, object]:
    """Words for a minute; the model may not end by itself."""
    return {"prompt": "hello", "max_tokens": 16_000, "logit_bias": {"2": -100}, "temperature": 0, "stream": stream}


@pytest.mark.parametrize("stream", [True, False])
def test_a_key_revoked_by_the_command_line_ends_what_runs_within_a_second(
    service: Served, settings: Settings, stream: bool
) -> None:
    key, other = make_key(settings, "inference"), make_key(settings, "inference")
    with (
        httpx.Client(base_url=service.url, timeout=60) as client,
        client.stream("POST", "/generate", json=body(stream=True), headers=bearer(other)) as untouched,
    ):
        with (
            revoke(settings, key.record.kid) as revoking,
            client.stream("POST", "/generate", json=body(stream=stream), headers=bearer(key)) as answer,
        ):
            *_, last = (line for line in answer.iter_lines() if line)
            ended = time.time()
        assert revoking.returncode == 0
        assert answer.status_code == (200 if stream else 401), last
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "credential_revoked"
        taken = ended - revoked_at(settings, key.record.kid)
        print(f"revocation to the end of a {'stream' if stream else 'whole answer'}: {taken * 1000:.0f} ms")
        assert 0 <= taken < IN_EFFECT
        again = client.post("/generate", json=body(stream=False), headers=bearer(key))
        assert again.json()["error"]["code"] == "invalid_credentials"
        alive = (line for line in untouched.iter_lines() if line)
        assert "text" in next(alive), "another key's stream goes on"


def test_a_subject_that_is_denied_ends_what_runs_on_its_tokens(service: Served, settings: Settings) -> None:
    [issuer] = settings.auth.issuers
    now = int(time.time())
    token = issue(
        issuer, bind(SECRET, "HS256"), subject="eve", scopes=["inference"], lifetime=600, now=now, token_id="1"
    )
    with (
        Database.open(settings.storage, settings.server.state_dir) as database,
        httpx.stream("POST", f"{service.url}/generate", json=body(stream=True), headers=bearer(token)) as answer,
    ):
        lines = (line for line in answer.iter_lines() if line)
        assert "text" in next(lines)
        database.write(
            lambda connection: denied.deny(connection, issuer.name, "sub", "eve", now + 600, now=time.time())
        ).result()
        committed = time.time()
        *_, last = lines
        taken = time.time() - committed
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "credential_revoked"
    print(f"denial to the end of a stream: {taken * 1000:.0f} ms")
    assert taken < IN_EFFECT


async def test_everything_was_given_back(service: Served) -> None:
    await service.settled()
