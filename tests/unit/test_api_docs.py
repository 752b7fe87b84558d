"""The pages that describe the API."""

import pytest

from service.auth.principal import Scope
from tests.fakes_api import Client, Service
from tests.fakes_auth import EVERYTHING, FakeGrant, FakeVerifier, principal

pytestmark = pytest.mark.anyio


async def test_the_page_shows_the_schema_that_is_served() -> None:
    page = await Client(Service()).get("/docs")
    schema = await Client(Service()).get("/openapi.json")
    assert page.headers["content-type"].startswith("text/html")
    assert "/openapi.json" in page.body.decode()
    assert {"/generate", "/v1/models", "/health"} <= set(schema.json()["paths"])


@pytest.mark.parametrize("path", ["/docs", "/openapi.json"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(
    ("given", "status"),
    [
        (None, 401),
        (principal(Scope.INFERENCE, Scope.MODELS, Scope.METRICS, Scope.USAGE), 403),
        (principal(Scope.ADMIN), 200),
        (EVERYTHING, 200),
    ],
)
async def test_it_is_not_for_strangers(path: str, method: str, given: object, status: int) -> None:
    grants = {"fake-1": FakeGrant(given)} if given else {}  # type: ignore[arg-type]
    client = Client(Service(verifiers=[FakeVerifier(grants)]))
    answer = await client.request(method, path, headers=[("authorization", "Bearer fake-1")])
    assert answer.status == status
