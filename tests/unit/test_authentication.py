"""The layer that asks who is there: before the router, before the body, the same answer to every stranger."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
import structlog
from starlette.types import Receive, Scope as AsgiScope, Send

from service.api.errors import ErrorRenderer
from service.api.middleware.authentication import Authentication
from service.auth.principal import Scope
from service.engine.generation import Delta
from service.errors import CredentialRevoked, StorageUnavailable, Unauthorized
from service.observability.metrics import Metrics
from tests.fakes_api import DONE, Answer, Client, FakeInference, Service
from tests.fakes_auth import FakeGrant, FakeVerifier, principal

pytestmark = pytest.mark.anyio

BEARER = ("authorization", "Bearer fake-1")
JSON = ("content-type", "application/json")


def service(verifier: FakeVerifier | None = None) -> Service:
    known = FakeVerifier({"fake-1": FakeGrant()})
    return Service(inference=FakeInference([Delta("ok"), DONE]), verifiers=[verifier or known])


async def ask(found: Service, method: str, path: str, *headers: tuple[str, str], body: bytes = b"") -> Answer:
    return await Client(found).request(method, path, body, headers)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        *((method, path, 200) for method in ("GET", "HEAD") for path in ("/health", "/livez", "/readyz", "/health/")),
        ("HEAD", "/", 200),
        ("GET", "/", 401),
        ("POST", "/health", 401),
        ("OPTIONS", "/health", 401),
        ("BREW", "/livez", 401),
        ("GET", "/health/x", 401),
        ("GET", "//health", 401),
        ("GET", "/Health", 401),
        ("GET", "/metrics", 401),
        ("GET", "/nowhere", 401),
        ("BREW", "/nowhere", 401),
        ("OPTIONS", "*", 401),
        ("POST", "/generate", 401),
    ],
)
async def test_only_the_public_list_is_open_to_strangers(method: str, path: str, status: int) -> None:
    assert (await ask(service(), method, path)).status == status


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nowhere", 404), ("GET", "/generate", 405), ("GET", "/", 405), ("GET", "/v1/models", 200)],
)
async def test_a_principal_learns_what_there_is(method: str, path: str, status: int) -> None:
    assert (await ask(service(), method, path, BEARER)).status == status
    assert (await ask(service(), method, path, ("x-api-key", "fake-1"))).status == status


async def test_a_credential_in_the_query_is_none() -> None:
    exchange = Client(service()).exchange("GET", "/v1/models")
    exchange.scope["query_string"] = b"api_key=fake-1&access_token=fake-1"
    exchange.push()
    await exchange.run()
    assert exchange.answer.status == 401


ANY_REASON: Sequence[Any] = [
    ([], None),
    ([("authorization", "Bearer fake-2")], None),
    ([("authorization", "Basic eDp5")], None),
    ([BEARER, BEARER], None),
    ([BEARER, ("x-api-key", "fake-1")], None),
    ([("x-api-key", "sk-of-somebody-else")], None),
    ([("x-api-key", "x" * 9000)], None),
    ([("x-api-key", "")], None),
    ([BEARER], Unauthorized("revoked")),
    ([BEARER], Unauthorized("expired")),
    ([BEARER], CredentialRevoked("revoked")),
]


async def test_every_reason_is_the_same_answer() -> None:
    answers = [await ask(service(FakeVerifier(error=error)), "GET", "/v1/models", *sent) for sent, error in ANY_REASON]
    assert {answer.status for answer in answers} == {401}
    assert len({answer.body for answer in answers}) == 1
    assert len({tuple(sorted(answer.headers.items())) for answer in answers}) == 1
    assert answers[0].error == {
        "message": "A valid API key or token is required.",
        "type": "authentication_error",
        "param": None,
        "code": "invalid_credentials",
    }
    assert answers[0].headers["www-authenticate"] == "Bearer"
    assert answers[0].headers["x-should-retry"] == "false"


async def test_why_is_told_to_the_operator_only() -> None:
    found = service(FakeVerifier(error=Unauthorized("expired")))
    with structlog.testing.capture_logs() as lines:
        await ask(found, "GET", "/v1/models", BEARER)
    assert found.count("mlxd_auth_failures_total", reason="expired") == 1
    [line] = lines
    assert (line["auth_failure"], line["client"], line["route"]) == ("expired", "127.0.0.1", "unmatched")
    assert "principal" not in line
    await found.access.failures.flush()
    assert [(failure.reason, failure.address, failure.request_id) for failure in found.audited] == [
        ("expired", "127.0.0.1", "id-1")
    ]


async def test_who_it_was_is_in_the_log_line() -> None:
    with structlog.testing.capture_logs() as lines:
        await ask(service(), "GET", "/v1/models", BEARER)
    [line] = lines
    assert (line["principal"], line["tenant"], line["key_id"]) == ("key:abc", "acme", "abc")
    assert "fake-1" not in str(line)


async def test_a_store_that_cannot_be_asked_is_no_wrong_credential() -> None:
    found = service(FakeVerifier(error=StorageUnavailable("Keys cannot be checked.", retry_after=1)))
    answer = await ask(found, "POST", "/generate", BEARER, JSON, ("content-length", "0"))
    assert (answer.status, answer.error["code"]) == (503, "storage_unavailable")
    assert int(answer.headers["retry-after"]) >= 1
    assert [sample for metric in found.metrics.auth_failures.collect() for sample in metric.samples] == []


async def test_the_address_that_a_verifier_sees_is_the_clients() -> None:
    verifier = FakeVerifier({"fake-1": FakeGrant()})
    await ask(service(verifier), "GET", "/v1/models", BEARER, ("x-forwarded-for", "203.0.113.9"))
    assert verifier.addresses == ["127.0.0.1"]


# Bodies -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("announced", [("content-length", "300000000"), ("transfer-encoding", "chunked")])
@pytest.mark.parametrize("more", [(), (("expect", "100-continue"),)])
async def test_a_stranger_is_answered_before_its_body_is_asked_for(
    announced: tuple[str, str], more: tuple[tuple[str, str], ...]
) -> None:
    exchange = Client(service()).exchange("POST", "/generate", [JSON, announced, *more])
    task = asyncio.ensure_future(exchange.run())
    await exchange.until(lambda seen: b"invalid_credentials" in seen.body)
    assert exchange.answer.status == 401
    assert exchange.answer.headers["connection"] == "close"
    exchange.leave()
    await task
    assert exchange.complete
    assert exchange.starts == 1


async def test_without_a_body_the_connection_stays() -> None:
    assert "connection" not in (await ask(service(), "GET", "/v1/models")).headers
    assert "connection" not in (await ask(service(), "POST", "/generate", ("content-length", "0"))).headers


async def test_malformed_json_of_a_stranger_is_not_even_read() -> None:
    answer = await ask(service(), "POST", "/generate", JSON, ("content-length", "3"), body=b"{{{")
    assert answer.status == 401


# Scopes -----------------------------------------------------------------------------------------------------

NEEDS = [
    ("POST", "/generate", Scope.INFERENCE),
    ("POST", "/v1/chat/completions", Scope.INFERENCE),
    ("POST", "/v1/completions", Scope.INFERENCE),
    ("GET", "/v1/models", Scope.MODELS),
    ("HEAD", "/v1/models/default", Scope.MODELS),
    ("GET", "/metrics", Scope.METRICS),
    ("HEAD", "/docs", Scope.ADMIN),
    ("GET", "/openapi.json", Scope.ADMIN),
]


@pytest.mark.parametrize(("method", "path", "scope"), NEEDS)
async def test_each_route_takes_its_own_scope_and_no_other(method: str, path: str, scope: Scope) -> None:
    for given in Scope:
        found = service(FakeVerifier({"fake-1": FakeGrant(principal(given))}))
        answer = await ask(found, method, path, BEARER, body=b"not json")
        if given is scope:
            assert answer.status in (200, 415)  # the body, which was looked at
        else:
            assert answer.status == 403
            if method != "HEAD":
                assert answer.error["code"] == "permission_denied"
                assert scope in answer.error["message"]


async def test_the_scope_is_checked_before_the_body_is_read() -> None:
    found = service(FakeVerifier({"fake-1": FakeGrant(principal(Scope.MODELS))}))
    exchange = Client(found).exchange("POST", "/generate", [BEARER, JSON, ("content-length", "100")])
    await exchange.run()  # the body never comes
    assert exchange.answer.status == 403


# Models -----------------------------------------------------------------------------------------------------


async def test_a_model_that_is_not_allowed_is_not_there() -> None:
    only = principal(*Scope, models=frozenset({"default"}))
    found = service(FakeVerifier({"fake-1": FakeGrant(only)}))
    listed = (await ask(found, "GET", "/v1/models", BEARER)).json()["data"]
    assert [model["id"] for model in listed] == ["default"]
    for name, status in (("default", 200), ("org/model", 404), ("nope", 404)):
        answer = await ask(found, "GET", f"/v1/models/{name}", BEARER)
        assert answer.status == status
        body = b'{"model": "%s", "prompt": "x"}' % name.encode()
        completed = await ask(found, "POST", "/v1/completions", BEARER, JSON, body=body)
        assert completed.status == status
        if status == 404:
            assert answer.error == completed.error
            assert (answer.error["code"], answer.error["param"]) == ("model_not_found", "model")


# Other kinds of scope ---------------------------------------------------------------------------------------


async def test_lifespan_passes_and_a_websocket_does_not() -> None:
    seen: list[str] = []

    async def inner(scope: AsgiScope, _: Receive, __: Send) -> None:
        seen.append(scope["type"])

    async def nothing(*_: Any) -> Any:
        raise AssertionError

    found = service()
    errors = ErrorRenderer(lambda: 0.0)
    layer = Authentication(inner, access=found.access, limits=found.limits, errors=errors, metrics=Metrics())
    await layer({"type": "lifespan"}, nothing, nothing)
    await layer({"type": "websocket", "path": "/health"}, nothing, nothing)
    assert seen == ["lifespan"]
