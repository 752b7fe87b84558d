"""What was used and who may know: real requests over real sockets, from the row in the database to the reports."""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from service.auth.api_keys import IssuedKey
from service.settings import Settings
from service.storage import audit
from service.storage.database import Database
from service.storage.schema import USAGE
from service.storage.usage import UsageRow
from tests.fakes_api import Client, Service
from tests.serving import Served, bearer, make_key

WRITTEN_WITHIN = 5.0
"""Seconds; usually it is half a second, but these machines have other things to do."""

NewKey = Callable[..., IssuedKey]


@pytest.fixture
def client(guarded: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=guarded.url, timeout=30) as client:
        yield client


@pytest.fixture
def new_key(guarded_settings: Settings) -> NewKey:
    def make(*scopes: str, **more: Any) -> IssuedKey:
        return make_key(guarded_settings, *(scopes or ("inference", "usage")), **more)

    return make


@pytest.fixture
def database(guarded_settings: Settings) -> Iterator[Database]:
    """As another process has it."""
    with Database.open(guarded_settings.storage, guarded_settings.server.state_dir) as database:
        yield database


def generate(client: httpx.Client, key: IssuedKey, tokens: int = 5) -> None:
    body = {"prompt": "hello", "max_tokens": tokens}
    assert client.post("/generate", json=body, headers=bearer(key)).status_code == 200


def usage_of(client: httpx.Client, key: IssuedKey, path: str = "/v1/usage", *, requests: int, **asked: str) -> Any:
    """The report, once it holds so many requests."""
    ends = time.monotonic() + WRITTEN_WITHIN
    while True:
        answer = client.get(path, params=asked, headers=bearer(key))
        assert answer.status_code == 200, answer.text
        if answer.json()["total"]["requests"] == requests or time.monotonic() > ends:
            assert answer.json()["total"]["requests"] == requests
            return answer.json()
        time.sleep(0.02)


def rows_of(database: Database, key: IssuedKey) -> list[UsageRow]:
    mine = USAGE.select().where(USAGE.c.principal == key.record.principal).order_by(USAGE.c.at)
    return database.read(lambda connection: [UsageRow(**row._mapping) for row in connection.execute(mine)]).result()


def test_what_was_used_is_in_ones_own_usage_and_in_nobody_elses(client: httpx.Client, new_key: NewKey) -> None:
    key, other = new_key(), new_key()
    generate(client, key, 5)
    generate(client, key, 7)
    generate(client, other, 3)
    report = usage_of(client, key, requests=2)
    today = datetime.now(UTC).date()
    assert (report["object"], report["by"]) == ("usage", "day")
    assert (report["from"], report["to"]) == ((today - timedelta(days=29)).isoformat(), today.isoformat())
    assert len(report["data"]) == 30
    assert report["total"]["completion_tokens"] == 12
    assert report["total"]["total_tokens"] == report["total"]["prompt_tokens"] + 12
    (own,) = usage_of(client, other, requests=1, by="key")["data"]
    assert (own["key"], own["completion_tokens"]) == (other.record.kid, 3)


def test_each_kind_of_request_leaves_one_row(client: httpx.Client, new_key: NewKey, database: Database) -> None:
    key = new_key(tenant="acme")
    sent: list[tuple[str, dict[str, Any]]] = [
        ("/generate", {"prompt": "hello", "max_tokens": 4}),
        ("/v1/completions", {"model": "default", "prompt": "hello", "max_tokens": 4, "stream": True}),
        ("/v1/completions", {"model": "default", "prompt": "hello", "max_tokens": 4, "n": 3}),
    ]
    for path, body in sent:
        answer = client.post(path, json=body, headers=bearer(key))
        assert answer.status_code == 200, answer.text
        usage_of(client, key, requests=sent.index((path, body)) + 1)
    found = rows_of(database, key)
    assert [(row.endpoint, row.stream, row.rows) for row in found] == [
        ("/generate", False, 1),
        ("/v1/completions", True, 1),
        ("/v1/completions", False, 3),
    ]
    for row in found:
        assert (row.tenant, row.key_id, row.finish_reason) == ("acme", key.record.kid, "length")
        assert row.completion_tokens == 4 * row.rows
        assert row.prompt_tokens > row.cached_tokens >= 0
        assert 0 <= (row.queue_seconds or 0) <= (row.time_to_first_token or 0) <= row.duration_seconds < 60
    assert len({row.id for row in found}) == len({row.request_id for row in found}) == 3


def test_a_request_that_was_refused_before_it_ran_leaves_none(
    client: httpx.Client, new_key: NewKey, database: Database
) -> None:
    key = new_key()
    for body in ({"prompt": ""}, {"prompt": "x", "max_tokens": 10**9}, {"prompt": "x", "nonsense": 1}):
        assert client.post("/generate", json=body, headers=bearer(key)).status_code == 400
    generate(client, key)
    usage_of(client, key, requests=1)
    assert len(rows_of(database, key)) == 1


def test_an_operator_sees_everybodys_by_key_tenant_and_model(
    client: httpx.Client, new_key: NewKey, database: Database
) -> None:
    operator, one, two = new_key("admin"), new_key(tenant="tenant-1"), new_key(tenant="tenant-1")
    for key in (one, two, two):
        generate(client, key)
    by_key = usage_of(client, operator, "/admin/usage", requests=3, by="key", tenant="tenant-1")
    assert [(each["key"], each["requests"]) for each in by_key["data"]] == [(two.record.kid, 2), (one.record.kid, 1)]
    everybody = client.get("/admin/usage", params={"by": "tenant"}, headers=bearer(operator)).json()
    assert {"tenant-1": 3}.items() <= {each["tenant"]: each["requests"] for each in everybody["data"]}.items()
    asked = {"by": "model", "principal": one.record.principal}
    (model,) = client.get("/admin/usage", params=asked, headers=bearer(operator)).json()["data"]
    assert model["requests"] == 1
    newest, *_ = database.read(lambda connection: audit.entries(connection, limit=1)).result()
    assert (newest.event, newest.actor) == ("usage_read", operator.record.principal)
    assert json.loads(newest.detail) == {**asked, "format": "json"}


def test_csv_is_a_file_for_a_spreadsheet(client: httpx.Client, new_key: NewKey) -> None:
    operator, key = new_key("admin"), new_key(tenant="tenant-2")
    generate(client, key)
    usage_of(client, operator, "/admin/usage", requests=1, tenant="tenant-2")
    today = datetime.now(UTC).date().isoformat()
    asked = {"by": "tenant", "tenant": "tenant-2", "format": "csv", "from": today, "to": today}
    answer = client.get("/admin/usage", params=asked, headers=bearer(operator))
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    name = f"usage-{today}-{today}-tenant.csv"
    assert answer.headers["content-disposition"] == f'attachment; filename="{name}"'
    header, line = csv.reader(io.StringIO(answer.text, newline=""))
    assert (header[:2], line[:2]) == (["tenant", "requests"], ["tenant-2", "1"])


def test_nobody_sees_more_than_the_scope_gives(client: httpx.Client, new_key: NewKey, master_key: str) -> None:
    own, none = new_key("usage"), new_key("inference", "models", "metrics")
    for key, path in ((own, "/admin/usage"), (none, "/v1/usage"), (none, "/admin/usage")):
        answer = client.get(path, headers=bearer(key))
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "permission_denied")
    for unknown in ({"principal": "key:other"}, {"tenant": "other"}, {"format": "csv"}):
        answer = client.get("/v1/usage", params=unknown, headers=bearer(own))
        assert answer.status_code == 400  # and never ignored: it would be taken for a filter
        assert answer.json()["error"] | {"message": ""} == {
            "message": "",
            "type": "invalid_request_error",
            "param": next(iter(unknown)),
            "code": "unknown_parameter",
        }
    assert client.head("/v1/usage", headers=bearer(master_key)).status_code == 200


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("from=2026-13-01", "from"),
        ("to=yesterday", "to"),
        ("from=1700000000", "from"),
        ("to=", "to"),
        ("from=2026-02-02&to=2026-02-01", "from"),
        ("from=2020-01-01", "from"),
        ("to=2026-01-01T00:00:00Z", "to"),
        ("by=hour", "by"),
        ("by=principal", "by"),
        ("format=xml", "format"),
        ("tenant=", "tenant"),
        (f"principal={'x' * 300}", "principal"),
        ("%00=1", None),
        ("by=day&since=1", "since"),
    ],
)
def test_what_cannot_be_told_is_refused_by_name(
    client: httpx.Client, master_key: str, query: str, param: str | None
) -> None:
    answer = client.get(f"/admin/usage?{query}", headers=bearer(master_key))
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    assert "Value error" not in answer.text


def test_a_hostile_filter_finds_nothing_and_breaks_nothing(client: httpx.Client, master_key: str) -> None:
    for text in ("' OR 1=1 --", "%", "x\x1b[2J", "\u202e", "日本"):
        answer = client.get("/admin/usage", params={"by": "key", "tenant": text}, headers=bearer(master_key))
        assert (answer.status_code, answer.json()["data"]) == (200, [])


@pytest.mark.parametrize("path", ["/v1/usage", "/admin/usage"])
async def test_where_nobody_is_asked_for_a_key_no_usage_is_kept(path: str) -> None:
    answer = await Client(Service(Settings.load(None, {"auth.enabled": False}))).get(path)
    assert (answer.status, answer.error["code"]) == (404, "usage_not_kept")


@pytest.mark.parametrize("path", ["/v1/usage", "/admin/usage"])
async def test_a_database_that_cannot_be_asked_is_503(path: str) -> None:
    answer = await Client(Service()).get(path)
    assert (answer.status, answer.error["code"]) == (503, "storage_unavailable")
