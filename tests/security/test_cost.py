"""What it costs to be let in: the authentication layer of the real application, over a real database, per request."""

import json
import statistics
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from service.api.errors import ErrorRenderer
from service.api.middleware.authentication import Authentication
from service.auth.access_control import AccessService
from service.limits.limiter import Limits
from service.observability.metrics import Metrics
from service.settings import Settings
from tests.serving import bearer, make_key, opened
from tests.token_authority import SECRET, ec_jwk, ec_key, key_set, pack, rsa_jwk, rsa_key, sign_ec, sign_hmac, sign_rsa

ROUNDS, EACH = 30, 50


def private(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    path.chmod(0o600)
    return str(path)


def issuer(name: str, algorithm: str, **keys: str) -> dict[str, Any]:
    return {"name": name, "issuer": name, "audience": "mlxd", "algorithms": [algorithm], **keys}


async def microseconds(call: Callable[[], Awaitable[None]]) -> float:
    """Of one call, the median of the rounds."""
    rounds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for _ in range(EACH):
            await call()
        rounds.append((time.perf_counter() - began) / EACH)
    return statistics.median(rounds) * 1e6


async def test_the_cost_of_being_let_in_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jwks = private(tmp_path / "jwks", key_set(rsa_jwk(rsa_key(), kid="r"), ec_jwk(ec_key(), kid="e")))
    shared = private(tmp_path / "secret", SECRET)
    issuers = [
        issuer("hs", "HS256", secret_file=shared),
        issuer("rs", "RS256", jwks_file=jwks),
        issuer("es", "ES256", jwks_file=jwks),
    ]
    settings = Settings.load(None, {"server.state_dir": tmp_path / "state", "auth.issuers": issuers})
    now = int(time.time())

    def token(name: str, header: dict[str, str], sign: Callable[[bytes], bytes]) -> str:
        claims = {"iss": name, "aud": "mlxd", "sub": "s", "iat": now, "exp": now + 3600, "jti": "j", "scope": "models"}
        return pack({"typ": "JWT", **header}, claims, sign)

    credentials = {
        "API key": make_key(settings, "models").text,
        "JWT HS256": token("hs", {"alg": "HS256"}, sign_hmac(SECRET)),
        "JWT RS256": token("rs", {"alg": "RS256", "kid": "r"}, sign_rsa(rsa_key())),
        "JWT ES256": token("es", {"alg": "ES256", "kid": "e"}, sign_ec(ec_key())),
    }
    let_in = 0

    async def application(*_: object) -> None:
        nonlocal let_in
        let_in += 1

    async def nothing(*_: object) -> Any:
        raise AssertionError("nobody reads or answers")

    metrics = Metrics()
    service = AccessService(settings, metrics)
    limits = Limits(settings, metrics, service.control.storage)
    errors = ErrorRenderer(lambda: 0.0)
    layer = Authentication(application, access=service.control, limits=limits, errors=errors, metrics=metrics)
    figures = {}
    async with opened(service):
        for name, text in credentials.items():
            headers = [(key.encode(), value.encode()) for key, value in bearer(text).items()]

            async def request(headers: list[tuple[bytes, bytes]] = headers) -> None:
                scope = {
                    "type": "http", "method": "GET", "path": "/v1/models", "headers": headers,
                    "client": ("127.0.0.1", 1), "state": {"line": {}, "request_id": "r"},
                }  # fmt: skip
                await layer(scope, nothing, nothing)

            await request()
            figures[name] = await microseconds(request)
    assert let_in == len(credentials) * (ROUNDS * EACH + 1), "every single one was let in"
    assert max(figures.values()) < 5000
    with capsys.disabled():
        print("\nauthentication, microseconds a request: " + json.dumps({k: round(v, 1) for k, v in figures.items()}))
