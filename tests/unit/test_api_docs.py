"""The description of the service: complete, and for nobody without a principal."""

import pytest

from service.api.deps import current_principal
from service.errors import InvalidRequest
from tests.fakes_api import Client, Service

pytestmark = pytest.mark.anyio


async def test_the_page_shows_the_schema_that_is_served() -> None:
    client = Client(Service())
    page = await client.get("/docs")
    assert page.status == 200
    assert page.headers["content-type"].startswith("text/html")
    assert b"'/openapi.json'" in page.body
    schema = (await client.get("/openapi.json")).json()
    assert {"/generate", "/health", "/metrics", "/v1/models"} <= set(schema["paths"])


@pytest.mark.parametrize("path", ["/docs", "/openapi.json"])
async def test_it_is_not_for_strangers(path: str) -> None:
    def stranger() -> None:
        raise InvalidRequest("Who are you?")

    service = Service()
    service.app.dependency_overrides[current_principal] = stranger
    for method in ("GET", "HEAD"):
        assert (await Client(service).request(method, path)).status == 400
