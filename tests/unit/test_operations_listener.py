"""What the operator's listener has of the application, over fakes."""

from typing import Any, cast

import pytest

from service.api.middleware.operations import for_operators
from service.settings import Settings
from tests.fakes_api import Answer, Client, Exchange, Service

pytestmark = pytest.mark.anyio


async def ask(service: Service, method: str, path: str, host: str = "127.0.0.1:8001", body: bytes = b"") -> Answer:
    exchange: Exchange = Client(service).exchange(method, path, [("host", host), ("content-length", str(len(body)))])
    exchange._app = cast("Any", for_operators(service.app))
    exchange.push(body)
    await exchange.run()
    return exchange.answer


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *(
            ("GET", path)
            for path in ("/health", "/livez", "/readyz", "/metrics", "/metrics/", "/docs", "/openapi.json")
        ),
        *(("HEAD", path) for path in ("/", "/health", "/livez", "/readyz", "/metrics", "/docs")),
        ("GET", "/admin/status"),
    ],
)
async def test_what_is_the_operators_is_served(method: str, path: str) -> None:
    assert (await ask(Service(), method, path)).status == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *(("POST", path) for path in ("/generate", "/v1/chat/completions", "/v1/completions")),
        *(("GET", path) for path in ("/v1/models", "/v1/usage", "/nowhere", "/admin", "/admins/x", "/metrics/x")),
        ("BREW", "/generate"),
    ],
)
async def test_what_is_not_is_as_a_path_at_which_there_is_nothing(method: str, path: str) -> None:
    service = Service()
    answer = await ask(service, method, path, body=b'{"prompt": "x"}' if method == "POST" else b"")
    nothing = await Client(service).get("/really-nothing")
    assert (answer.status, answer.body) == (404, nothing.body)
    assert service.inference.asks == []


async def test_on_the_public_listener_all_of_it_is_served_too() -> None:
    client = Client(Service())
    for path in ("/health", "/metrics", "/docs", "/openapi.json", "/admin/status", "/v1/models"):
        assert (await client.get(path)).status == 200


@pytest.mark.parametrize(
    ("host", "operators", "public"),
    [
        ("api.example.com", 200, 200),
        ("127.0.0.1:8001", 200, 400),
        ("localhost:1", 200, 400),
        ("[::1]:8001", 200, 400),
        ("evil.example", 400, 400),
        ("127.0.0.1.evil.example", 400, 400),
    ],
)
async def test_names_of_this_machine_are_answered_there_whatever_the_public_ones_are(
    host: str, operators: int, public: int
) -> None:
    service = Service(settings=Settings.load(None, {"server.allowed_hosts": ["api.example.com"]}))
    assert (await ask(service, "GET", "/livez", host)).status == operators
    assert (await Client(service).request("GET", "/livez", headers=[("host", host)])).status == public


async def test_nobody_learns_there_what_there_is_without_a_credential() -> None:
    service = Service(verifiers=())
    answers = [await ask(service, "GET", path) for path in ("/metrics", "/admin/status", "/generate", "/nowhere")]
    assert {answer.status for answer in answers} == {401}
    assert len({answer.body for answer in answers}) == 1
    assert (await ask(service, "GET", "/livez")).status == 200
