"""The openai SDK with a real key, and with keys that are not: its own classes of error, and no vain retries."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from openai import OpenAI

from service.settings import Settings
from tests.fakes import FakeBackend, spelling
from tests.serving import Served, bearer, make_key, served

COUNT = "mlxd_auth_failures_total{"


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder: Path = tmp_path_factory.mktemp("keys")
    folder.chmod(0o700)
    return Settings.load(None, {"server.port": 0, "server.state_dir": folder})


@pytest.fixture(scope="module")
def service(settings: Settings) -> Iterator[Served]:
    with served(settings, FakeBackend(script=spelling("One, two."))) as found:
        yield found


def ask(service: Served, key: str) -> str:
    with OpenAI(base_url=f"{service.url}/v1", api_key=key, max_retries=3) as client:
        return client.completions.create(model="default", prompt="Count.").choices[0].text


def refusals(service: Served, settings: Settings) -> int:
    """How many requests were refused so far."""
    headers = bearer(make_key(settings, "metrics"))
    text = httpx.get(f"{service.url}/metrics", headers=headers).text
    return sum(int(float(line.rpartition(" ")[2])) for line in text.splitlines() if line.startswith(COUNT))


def test_a_real_key_is_answered(service: Served, settings: Settings) -> None:
    key = make_key(settings, "inference", "models").text
    assert ask(service, key) == "One, two."
    with OpenAI(base_url=f"{service.url}/v1", api_key=key) as client:
        assert [model.id for model in client.models.list()] == ["fake", "default"]


def test_a_wrong_key_is_its_authentication_error_and_is_not_tried_again(service: Served, settings: Settings) -> None:
    before = refusals(service, settings)
    with pytest.raises(openai.AuthenticationError) as refused:
        ask(service, "sk-something-else")
    assert (refused.value.code, refused.value.type) == ("invalid_credentials", "authentication_error")
    assert refusals(service, settings) == before + 1


def test_a_key_for_something_else_is_its_permission_error(service: Served, settings: Settings) -> None:
    with pytest.raises(openai.PermissionDeniedError) as refused:
        ask(service, make_key(settings, "models").text)
    assert refused.value.code == "permission_denied"


def test_a_model_that_the_key_may_not_use_is_not_found(service: Served, settings: Settings) -> None:
    key = make_key(settings, "inference", "models", models=["fake-2"]).text
    with pytest.raises(openai.NotFoundError) as refused:
        ask(service, key)
    assert refused.value.code == "model_not_found"
    with OpenAI(base_url=f"{service.url}/v1", api_key=key) as client:
        assert list(client.models.list()) == []


def test_a_key_may_use_the_aliases_of_a_model_that_it_may_use(service: Served, settings: Settings) -> None:
    assert ask(service, make_key(settings, "inference", models=["fake"]).text) == "One, two."
    assert ask(service, make_key(settings, "inference", models=["default"]).text) == "One, two."
