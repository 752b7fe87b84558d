"""What holds for every answer, and what each layer refuses."""

import asyncio
import json
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from service.api.errors import ErrorRenderer
from service.api.middleware.body_limit import BodyLimit
from service.api.middleware.context import RequestContext
from service.engine.generation import Delta
from service.observability.metrics import Metrics
from service.settings import HttpSettings, ServerSettings, Settings
from tests.fakes_api import DONE, Client, FakeInference, Service

pytestmark = pytest.mark.anyio

JSON = ("content-type", "application/json")
SMALL = Settings(http=HttpSettings(max_body_bytes=1024, body_timeout=0.05))


def service() -> Service:
    return Service(settings=SMALL, inference=FakeInference([Delta("ok"), DONE]))


def padded(size: int) -> bytes:
    """A valid body of exactly `size` bytes."""
    empty = len(json.dumps({"prompt": ""}))
    return json.dumps({"prompt": "x" * (size - empty)}).encode()


# Request context --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/health"), ("GET", "/nope"), ("PUT", "/health"), ("POST", "/generate")]
)
async def test_every_answer_has_an_id_and_the_safe_headers(method: str, path: str) -> None:
    answer = await Client(service()).request(method, path)
    assert answer.headers["x-request-id"] == "id-1"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-store"
    assert "server" not in answer.headers


@pytest.mark.parametrize("given", ["abc", "A.b_c-9", "x" * 64])
async def test_a_well_formed_id_is_kept(given: str) -> None:
    answer = await Client(service()).request("GET", "/health", headers=[("x-request-id", given)])
    assert answer.headers["x-request-id"] == given


@pytest.mark.parametrize(
    "given", ["mlxd_live_abc", "id-eyJhbGciOiJ9", "", "x" * 65, "a b", "a\n", "a;b", "\xe9", "../x"]
)
async def test_another_id_is_replaced(given: str) -> None:
    exchange = Client(service()).exchange("GET", "/health")
    exchange.scope["headers"].append((b"x-request-id", given.encode("latin-1")))
    exchange.push()
    await exchange.run()
    assert exchange.answer.headers["x-request-id"] == "id-1"


async def test_a_trailing_slash_means_the_same_path() -> None:
    client = Client(service())
    assert (await client.get("/health/")).status == 200
    assert (await client.post("/generate/", {"prompt": "x"})).status == 200
    assert (await client.request("HEAD", "/")).status == 200


async def run(app: Any, exchange_of: Client) -> Any:
    """Drive `app` with a request of its own; returns the exchange."""
    exchange = exchange_of.exchange("GET", "/x")
    exchange._app = app
    exchange.push()
    await exchange.run()
    return exchange


def last_resort(app: Any, metrics: Metrics) -> RequestContext:
    return RequestContext(app, errors=ErrorRenderer(lambda: 0.0), metrics=metrics, new_id=lambda: "id")


async def test_an_unexpected_exception_is_the_standard_error_and_is_counted() -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise ZeroDivisionError("secret detail")

    metrics = Metrics()
    exchange = await run(last_resort(broken, metrics), Client(service()))
    assert (exchange.answer.status, exchange.answer.error["code"]) == (500, "internal_error")
    assert b"secret detail" not in exchange.body
    assert exchange.answer.headers["x-request-id"] == "id"
    assert metrics.registry.get_sample_value("mlxd_internal_errors_total", {"where": "request"}) == 1


async def test_an_unexpected_exception_in_a_route_is_the_standard_error() -> None:
    found = service()
    found.inference.refusal = ZeroDivisionError("secret detail")  # type: ignore[assignment]
    answer = await Client(found).post("/generate", {"prompt": "x"})
    assert (answer.status, answer.error["code"]) == (500, "internal_error")
    assert found.count("mlxd_internal_errors_total", where="request") == 1
    assert found.count("mlxd_http_requests_total", route="/generate", method="POST", status="500") == 1


@pytest.mark.parametrize("kind", ["text/event-stream", "application/json"])
async def test_an_exception_in_mid_answer_never_looks_like_a_whole_answer(kind: str) -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind.encode())]})
        await send({"type": "http.response.body", "body": b": half\n\n", "more_body": True})
        raise ZeroDivisionError

    exchange = await run(last_resort(broken, Metrics()), Client(service()))
    assert exchange.starts == 1
    if kind == "text/event-stream":
        assert exchange.complete
        assert exchange.answer.events()[-1]["error"]["code"] == "internal_error"
    else:
        assert not exchange.complete  # the server breaks the connection


async def test_an_exception_after_the_answer_changes_nothing() -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        start: Message = {
            "type": "http.response.start",
            "status": 200,
            "headers": [(b"content-type", b"text/event-stream")],
        }
        await send(start)
        await send({"type": "http.response.body", "body": b"whole"})
        raise ZeroDivisionError

    exchange = await run(last_resort(broken, Metrics()), Client(service()))
    assert exchange.body == b"whole"


async def test_a_client_that_leaves_while_sending_its_body_is_not_an_error() -> None:
    found = service()
    exchange = Client(found).exchange("POST", "/generate", [JSON])
    exchange.push(b'{"pro', more=True)
    exchange.leave()
    await exchange.run()
    assert exchange.sent == []
    assert found.count("mlxd_internal_errors_total", where="request") == 0
    assert found.count("mlxd_http_requests_total", route="/generate", method="POST", status="499") == 1


# Hosts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]", "[::1]:8000"])
async def test_our_own_hosts_are_answered(host: str) -> None:
    assert (await Client(service()).request("GET", "/health", headers=[("host", host)])).status == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "localhost:8000:1", "", "[::2]", "a@localhost"]
)
async def test_other_hosts_are_not(host: str) -> None:
    answer = await Client(service()).request("GET", "/health", headers=[("host", host)])
    assert (answer.status, answer.error["code"]) == (400, "invalid_host")


async def test_a_star_allows_every_host() -> None:
    open_to_all = Service(settings=Settings(server=ServerSettings(allowed_hosts=("*",))))
    assert (await Client(open_to_all).request("GET", "/health", headers=[("host", "any")])).status == 200


# Body limit -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "status"), [(1023, 200), (1024, 200), (1025, 413)])
@pytest.mark.parametrize("declared", [True, False])
async def test_the_limit_is_exact(size: int, status: int, declared: bool) -> None:
    headers = [JSON, *([("content-length", str(size))] if declared else [])]
    answer = await Client(service()).request("POST", "/generate", padded(size), headers)
    assert answer.status == status
    if status == 413:
        assert answer.error["code"] == "request_too_large"
        assert answer.headers["connection"] == "close"


async def test_a_chunked_body_is_counted_as_it_arrives() -> None:
    found = service()
    exchange = Client(found).exchange("POST", "/generate", [JSON])
    for _ in range(2):
        exchange.push(b"x" * 1000, more=True)
    exchange.leave()
    await exchange.run()
    assert exchange.answer.status == 413
    assert found.inference.asks == []


async def test_a_declared_length_over_the_limit_is_refused_before_the_body_is_asked_for() -> None:
    exchange = Client(service()).exchange(
        "POST", "/nope", [JSON, ("content-length", "1025"), ("expect", "100-continue")]
    )
    task = asyncio.ensure_future(exchange.run())
    await exchange.until(lambda seen: b"request_too_large" in seen.body)
    assert exchange.answer.status == 413
    assert exchange.sent[-1]["more_body"]  # still drops what comes, for a moment
    exchange.leave()
    await task
    assert exchange.complete
    assert exchange.starts == 1


async def test_a_refused_body_that_never_ends_is_dropped_only_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    from service.api.middleware import refusal

    monkeypatch.setattr(refusal, "LINGER_SECONDS", 0.01)
    exchange = Client(service()).exchange("POST", "/generate", [JSON, ("content-length", "1025")])
    await exchange.run()
    assert exchange.complete


async def test_a_body_that_does_not_come_in_time_is_a_408() -> None:
    exchange = Client(service()).exchange("POST", "/generate", [JSON])
    exchange.push(b"{", more=True)
    await exchange.run()
    assert (exchange.answer.status, exchange.answer.error["code"]) == (408, "request_timeout")
    assert exchange.answer.headers["connection"] == "close"
    assert exchange.starts == 1


async def test_a_lying_length_changes_nothing_about_the_count() -> None:
    for lie in ("3", "x", "-1"):
        answer = await Client(service()).request("POST", "/generate", padded(1025), [JSON, ("content-length", lie)])
        assert answer.status == 413


async def test_other_scopes_pass_untouched() -> None:
    seen: list[str] = []

    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["type"])

    async def nothing(*_: Any) -> Any:
        raise AssertionError

    errors = ErrorRenderer(lambda: 0.0)
    await BodyLimit(inner, limits=SMALL.http, errors=errors)({"type": "lifespan"}, nothing, nothing)
    await last_resort(inner, Metrics())({"type": "lifespan"}, nothing, nothing)
    assert seen == ["lifespan", "lifespan"]
