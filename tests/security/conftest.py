"""A whole service with real keys, over a scripted engine."""

from collections.abc import Iterator

import pytest

from service.auth.principal import Scope
from service.settings import Settings
from tests.fakes import FakeBackend
from tests.serving import AMPLE, Served, make_key, served


@pytest.fixture(scope="session")
def guarded_settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("guarded")
    folder.chmod(0o700)
    return Settings.load(None, {"server.port": 0, "server.state_dir": folder, **AMPLE})


@pytest.fixture(scope="session")
def guarded(guarded_settings: Settings) -> Iterator[Served]:
    """The service, with authentication on."""
    with served(guarded_settings, FakeBackend()) as service:
        yield service


@pytest.fixture(scope="session")
def master_key(guarded_settings: Settings) -> str:
    """A key with every scope."""
    return make_key(guarded_settings, *Scope).text
