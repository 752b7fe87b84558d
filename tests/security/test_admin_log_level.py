"""`/admin/log-level` over real sockets: shown and changed by an admin, audited, and gone with the process."""

import json
import logging
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import structlog

from service.settings import Settings
from service.storage import audit
from service.storage.database import Database
from tests.fakes_api import Client, Service
from tests.serving import Served, bearer, make_key

PATH = "/admin/log-level"


@pytest.fixture(autouse=True)
def _level() -> Iterator[None]:
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.INFO)
    yield
    root.setLevel(level)


@pytest.fixture
def admin(guarded: Served, master_key: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=guarded.url, headers=bearer(master_key)) as client:
        yield client


def test_an_admin_sees_and_changes_the_level_and_both_are_audited(
    admin: httpx.Client, guarded_settings: Settings, master_key: str
) -> None:
    with structlog.testing.capture_logs() as lines:
        assert admin.get(PATH).json() == {"level": "info"}
        answer = admin.put(PATH, json={"level": "debug"})
    assert (answer.status_code, answer.json()) == (200, {"level": "debug"})
    assert logging.getLogger().level == logging.DEBUG
    assert admin.get(PATH).json() == {"level": "debug"}
    [said] = [line for line in lines if line["event"] == "log_level_set"]
    assert (said["former"], said["set"]) == ("info", "debug")
    with Database.open(guarded_settings.storage, guarded_settings.server.state_dir) as database:
        entries = database.read(lambda connection: audit.entries(connection, limit=3)).result()
    assert [(entry.event, json.loads(entry.detail)) for entry in reversed(entries)] == [
        ("log_level_shown", {}),
        ("log_level_set", {"former": "info", "level": "debug"}),
        ("log_level_shown", {}),
    ]
    assert {entry.actor for entry in entries} == {f"key:{master_key.split('_')[2]}"}


@pytest.mark.parametrize(
    "body", [{"level": "trace"}, {"level": "INFO"}, {"level": 10}, {"level": None}, {}, {"level": "info", "for": 60}]
)
def test_what_is_no_level_is_refused_and_changes_nothing(admin: httpx.Client, body: dict[str, Any]) -> None:
    answer = admin.put(PATH, json=body)
    assert answer.status_code == 400
    assert logging.getLogger().level == logging.INFO


@pytest.mark.parametrize("scope", ["metrics", "inference", "usage", "models"])
def test_other_scopes_may_not(guarded: Served, guarded_settings: Settings, scope: str) -> None:
    who = bearer(make_key(guarded_settings, scope))
    assert httpx.get(f"{guarded.url}{PATH}", headers=who).status_code == 403
    assert httpx.put(f"{guarded.url}{PATH}", headers=who, json={"level": "debug"}).status_code == 403
    assert httpx.put(f"{guarded.url}{PATH}", json={"level": "debug"}).status_code == 401
    assert logging.getLogger().level == logging.INFO


@pytest.mark.anyio
async def test_what_cannot_be_audited_is_not_done() -> None:
    service = Service()  # whose database is never there
    answer = await Client(service).request(
        "PUT", PATH, b'{"level": "debug"}', [("content-type", "application/json"), ("content-length", "18")]
    )
    assert answer.status == 503
    assert logging.getLogger().level == logging.INFO


@pytest.mark.anyio
async def test_where_authentication_is_off_there_is_no_audit_log_to_write() -> None:
    service = Service(settings=Settings.load(None, {"auth.enabled": False}))
    answer = await Client(service).request(
        "PUT", PATH, b'{"level": "error"}', [("content-type", "application/json"), ("content-length", "18")]
    )
    assert (answer.status, answer.json()) == (200, {"level": "error"})
    assert (await Client(service).get(PATH)).json() == {"level": "error"}
