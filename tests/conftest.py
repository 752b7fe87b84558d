"""What every kind of test shares: counts that `make soak` raises, loud skips, and no configuration from outside."""

import functools
import logging
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from fastapi.routing import APIRoute, _EffectiveRouteContext
from hypothesis import settings as hypothesis_settings

from service.api import admin, docs, drain, health, metrics, native, operations, status, usage
from service.api.openai import chat, completions, models
from service.engine.models import resolve
from service.observability.logging import QueuedHandler
from tests.tiny import make_tiny_llama

pytest_plugins = ["tests.real_model", "tests.databases"]
ROOT = Path(__file__).parent.parent
ROUTERS = (admin, chat, completions, drain, health, metrics, models, native, operations, status, usage)
COUNTS = pytest.StashKey[dict[str, int]]()

hypothesis_settings.register_profile("normal", deadline=None, database=None)
hypothesis_settings.register_profile("full", deadline=None, database=None, max_examples=2000)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full-counts", action="store_true", help="run the long variants (`make soak`)")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[COUNTS] = {}
    # What logs an exception before anything is configured would have every frame's locals drawn: seconds each time.
    structlog.get_config()["processors"][-1].exception_formatter = structlog.dev.plain_traceback
    hypothesis_settings.load_profile("full" if config.getoption("full_counts") else "normal")


@pytest.hookimpl(tryfirst=True)  # before pytest's own selection by marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests with the real model run `alone`, because it takes both cores, unless they may run `beside` others; tests
    without it say so themselves. First the test that needs the demo model's service as it is after its start."""
    items.sort(key=lambda item: "fresh_demo" not in getattr(item, "fixturenames", ()))
    for item in items:
        if item.get_closest_marker("real_model") and not item.get_closest_marker("beside"):
            item.add_marker("alone")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # one of several processes: the counts are printed by their controller
        session.config.workeroutput["counts"] = session.config.stash[COUNTS]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    node.config.stash[COUNTS].update(node.workeroutput["counts"])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    counts = config.stash[COUNTS]
    if counts:
        terminalreporter.section("counts (make soak raises them)")
        for name, count in sorted(counts.items()):
            terminalreporter.line(f"{name}: {count}")


@pytest.fixture(scope="session")
def count(pytestconfig: pytest.Config) -> Callable[[str, int, int], int]:
    """`count(name, normal, full)` says how often to do something, and prints it at the end."""

    def chosen(name: str, normal: int, full: int) -> int:
        number = full if pytestconfig.getoption("full_counts") else normal
        pytestconfig.stash[COUNTS][name] = number
        return number

    return chosen


def require(present: object, what: str) -> None:
    """Skip, saying what to install, where something is not `present`; with CI set that is a failure."""
    if present:
        return
    if os.environ.get("CI"):
        pytest.fail(f"needs {what}, which CI must have")
    pytest.skip(f"NOT TESTED HERE: needs {what}")


@pytest.fixture
def need_command() -> Callable[[str, str], str]:
    """`need_command(name, package)` is the path of a command, or a loud skip."""

    def find(name: str, package: str) -> str:
        found = shutil.which(name)
        require(found, f"{name} (apt-get install {package})")
        return str(found)

    return find


@pytest.fixture(autouse=True)
def _no_outside_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.upper().startswith("MLXD_")]:
        monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """What a test, or a command that it ran in this process, did to logging ends with it."""
    root = logging.getLogger()
    level = root.level
    yield
    ours = [handler for handler in root.handlers if isinstance(handler, QueuedHandler)]
    for handler in ours:
        root.removeHandler(handler)
        handler.flush()
        handler.close()
    if ours:
        structlog.reset_defaults()
    root.setLevel(level)


@pytest.fixture
def _signals_as_they_were() -> Iterator[None]:
    """For a test that runs the service's process in this one: at its end it leaves them ignored."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture(scope="session", autouse=True)
def _routers_made_once() -> Iterator[None]:
    """Pydantic takes a tenth of a second for the routes of an application, and routers hold nothing of one.

    Nor does what FastAPI makes of a route that an application includes, beyond where overridden dependencies would be.
    """
    prepare = _EffectiveRouteContext.from_api_route
    prepared: dict[int, _EffectiveRouteContext] = {}  # by the identity of a route, which it keeps

    def once(*, original_route: APIRoute, include_context: Any) -> _EffectiveRouteContext:
        found = prepared.get(id(original_route))
        if found is None:
            found = prepare(original_route=original_route, include_context=include_context)
            if original_route.endpoint.__module__ != docs.__name__:  # whose router is each application's own
                prepared[id(original_route)] = found
        return found

    with pytest.MonkeyPatch.context() as patch:
        for part in ROUTERS:
            patch.setattr(part, "build_router", functools.cache(part.build_router))
        patch.setattr(_EffectiveRouteContext, "from_api_route", once)
        yield


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def state_dir() -> Path:
    """The checkout's own state directory, where the demo model is kept between runs."""
    return ROOT / ".state"


@pytest.fixture(scope="session")
def demo_model_dir(state_dir: Path) -> Path:
    """The converted demo model; the first run of a checkout fetches it."""
    return resolve("demo", state_dir=state_dir, offline=False).path


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama of two layers, a millisecond a step, with 1,024 tokens of context: ready two seconds sooner."""
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=1024)


@pytest.fixture(scope="session")
def tiny_long_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with 4,096 tokens of context."""
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")
