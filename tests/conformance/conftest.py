from collections.abc import Iterator

import pytest

from service.engine.generation import Delta
from tests.fakes_api import DONE, FakeInference, Service
from tests.server_api import serving_in_thread


@pytest.fixture(scope="module")
def live_server_url() -> Iterator[str]:
    """A server that answers every prompt with the same few words."""
    script = [Delta("One, "), Delta("two, "), Delta("three."), DONE]
    with serving_in_thread(Service(inference=FakeInference(script))) as url:
        yield url
