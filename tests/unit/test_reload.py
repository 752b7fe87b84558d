"""A reload over a target that writes down what is done to it: all or nothing, and everybody can see which."""

import asyncio
import logging
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from service.observability.logging import configure, current_level, flush, get_logger, set_level
from service.observability.metrics import Metrics
from service.observability.reloads import Reload, Reloads
from service.reload import Reloader
from service.settings import ConfigurationError, Settings
from service.settings.changes import RELOADABLE, changed, with_keys
from tests.conftest import ROOT

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def _level() -> Iterator[None]:
    root = logging.getLogger()
    level = root.level
    set_level("info")
    yield
    root.setLevel(level)


class World:
    """A configuration file, and a service that runs on what it said at the start."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "mlxd.toml"
        self.file.write_text("")
        self.metrics = Metrics()
        self.reloads = Reloads(self.metrics)
        self.refused = ""
        self.in_force = self.load()
        self.refreshed = 0
        self.prepared_on: set[int] = set()
        self.reloader = Reloader(self.in_force, self.load, self, self.reloads, now=lambda: 1_700_000_000.5)

    def load(self) -> Settings:
        return Settings.load(self.file)

    def prepared(self, settings: Settings) -> Callable[[], None]:
        self.prepared_on.add(threading.get_ident())
        if self.refused:
            raise ConfigurationError(self.refused)
        return lambda: setattr(self, "in_force", settings)

    async def refresh(self) -> None:
        self.refreshed += 1

    def count(self, outcome: str) -> float:
        value = self.metrics.registry.get_sample_value("mlxd_config_reloads_total", {"outcome": outcome})
        return value or 0.0


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


GOLD = "[limits.plans.gold]\nrequests_per_minute = 7\n"


async def test_what_can_be_changed_is_and_the_rest_is_named(world: World) -> None:
    world.file.write_text(f'[server]\nport = 9\n[log]\nlevel = "error"\nformat = "json"\n{GOLD}')
    with structlog.testing.capture_logs() as lines:
        await world.reloader.reload()
    assert world.in_force.limits.plans["gold"].requests_per_minute == 7
    assert (world.in_force.server.port, world.in_force.log.format) == (8000, "auto")
    assert current_level() == "error"
    assert world.reloads.last == Reload(
        at=1_700_000_000.5,
        applied=("limits.plans", "log.level"),
        restart_needed=("server.port", "log.format"),
    )
    [said] = [line for line in lines if line["event"] == "reloaded"]
    assert (said["log_level"], said["restart_needed"]) == ("warning", ("server.port", "log.format"))
    assert (world.count("success"), world.count("failure"), world.refreshed) == (1, 0, 1)
    assert threading.get_ident() not in world.prepared_on, "files are read beside the event loop"


async def test_a_second_one_compares_with_what_runs_by_then(world: World) -> None:
    world.file.write_text(f"[server]\nport = 9\n{GOLD}")
    await world.reloader.reload()
    await world.reloader.reload()
    assert world.reloads.last is not None
    assert (world.reloads.last.applied, world.reloads.last.restart_needed) == ((), ("server.port",))
    world.file.write_text("")
    await world.reloader.reload()
    assert (world.reloads.last.applied, world.reloads.last.restart_needed) == (("limits.plans",), ())
    assert "gold" not in world.in_force.limits.plans


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[limits.plans.gold]\nrequests_per_minute = -1\n", "limits.plans.gold.requests_per_minute"),
        ("[limits]\nplan = 3\n", "limits.plan: unknown key"),
        ("[limits", "mlxd.toml"),
        (None, "mlxd.toml: cannot be read"),
    ],
)
async def test_one_that_does_not_validate_changes_nothing_and_says_why(
    world: World, text: str | None, problem: str
) -> None:
    world.file.write_text(f"[server]\nport = 9\n{GOLD}")
    await world.reloader.reload()
    before = world.in_force
    if text is None:
        world.file.unlink()
    else:
        world.file.write_text(f'{text}\n[log]\nlevel = "error"\n')
    with structlog.testing.capture_logs() as lines:
        await world.reloader.reload()
    assert world.in_force is before
    assert current_level() == "info"
    last = world.reloads.last
    assert last is not None
    assert problem in last.problems[0]
    assert (last.applied, last.restart_needed) == ((), ("server.port",)), "which still differs, as far as is known"
    assert [(line["event"], line["problems"]) for line in lines] == [("reload_failed", last.problems)]
    assert (world.count("success"), world.count("failure"), world.refreshed) == (1, 1, 1)


async def test_what_only_shows_when_it_is_used_counts_as_validation(world: World) -> None:
    world.refused = "auth.issuers: corp: no such file\nlimits: neither"
    world.file.write_text('[log]\nlevel = "error"\n')
    await world.reloader.reload()
    assert world.reloads.last is not None
    assert world.reloads.last.problems == ["auth.issuers: corp: no such file", "limits: neither"]
    assert current_level() == "info"


async def test_a_level_that_an_operator_has_set_outlives_a_rotation(world: World) -> None:
    set_level("debug")
    await world.reloader.reload()
    assert current_level() == "debug"


async def test_a_log_that_cannot_be_opened_anew_is_a_failed_reload_that_is_told_in_the_former_file(
    world: World, tmp_path: Path
) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    configure(file=folder / "log")
    get_logger("x").info("before")
    flush()
    moved = folder.rename(tmp_path / "elsewhere")
    world.file.write_text(GOLD)
    await world.reloader.reload()
    flush()
    assert "gold" not in world.in_force.limits.plans
    assert "log.file: cannot be opened anew: No such file or directory" in (moved / "log").read_text()


async def test_however_many_are_asked_for_during_one_there_is_one_more(world: World) -> None:
    wanted, going, go_on = asyncio.Event(), threading.Event(), threading.Event()
    loads = 0

    def load() -> Settings:
        nonlocal loads
        loads += 1
        going.set()
        assert go_on.wait(10)
        return world.load()

    reloader = Reloader(world.in_force, load, world, world.reloads)
    following = asyncio.create_task(reloader.follow(wanted))
    wanted.set()
    await asyncio.to_thread(going.wait, 10)
    for _ in range(3):
        wanted.set()
    go_on.set()
    while world.refreshed < 2:
        await asyncio.sleep(0.001)
    assert loads == 2
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    assert loads == 2


def settings(**values: Any) -> Settings:
    return Settings.load(None, {name.replace("__", "."): value for name, value in values.items()})


def test_equal_settings_differ_in_nothing() -> None:
    assert changed(settings(limits__plans={"a": {}}), settings(limits__plans={"a": {}})) == ()


def test_only_the_keys_that_are_taken_change() -> None:
    running, found = settings(), settings(log__level="error", log__format="json", server__port=9)
    merged = with_keys(running, found, ["log.level"])
    assert changed(running, merged) == ("log.level",)
    assert merged.log.level == "error"
    assert with_keys(running, found, []) == running


def test_the_documented_keys_are_the_ones_that_a_reload_changes() -> None:
    text = (ROOT / "docs/configuration.md").read_text("utf-8")
    _, _, section = text.partition("## What a reload changes\n")
    listed = re.findall(r"^- `([a-z_]+\.[a-z_]+)` \(", section.partition("\n## ")[0], re.MULTILINE)
    assert sorted(listed) == sorted(RELOADABLE)
