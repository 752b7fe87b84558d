"""`/admin/keys` over real sockets and a real database: keys made, changed, replaced and revoked, all of it audited."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from service.auth.principal import Scope
from service.settings import Settings
from service.storage import audit
from service.storage.database import Database
from tests.serving import Served, bearer, make_key

Audited = Callable[[], list[tuple[str, str, dict[str, Any]]]]


@pytest.fixture
def admin(guarded: Served, master_key: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=guarded.url, headers=bearer(master_key)) as client:
        yield client


@pytest.fixture
def audited(guarded: Served, guarded_settings: Settings) -> Iterator[Audited]:
    """What came into the audit log since the test began, oldest first: event, actor, detail."""
    with Database.open(guarded_settings.storage, guarded_settings.server.state_dir) as database:
        first = database.read(audit.head).result()

        def since() -> list[tuple[str, str, dict[str, Any]]]:
            found = database.read(lambda connection: audit.entries(connection, limit=100)).result()
            report = database.read(audit.verify).result()
            assert report.ok
            assert first is not None
            return [
                (entry.event, entry.actor, json.loads(entry.detail))
                for entry in reversed(found)
                if entry.seq > first.seq and entry.event != "authentication_failed"
            ]

        yield since


def create(admin: httpx.Client, **fields: Any) -> dict[str, Any]:
    answer = admin.post("/admin/keys", json={"name": "of a test", "scopes": ["models"], **fields})
    assert answer.status_code == 201, answer.text
    assert answer.headers["cache-control"] == "no-store"
    return dict(answer.json())


def test_a_key_works_from_the_moment_it_is_made_and_its_text_is_shown_once(
    admin: httpx.Client, audited: Audited, master_key: str
) -> None:
    made = create(admin, plan="gold", expires_at="2999-01-01T00:00:00+00:00", models=["default"])
    assert admin.get("/v1/models", headers=bearer(made["key"])).status_code == 200
    assert (made["status"], made["plan"], made["models"]) == ("active", "gold", ["default"])
    assert made["expires_at"] == "2999-01-01T00:00:00Z"
    shown = admin.get(f"/admin/keys/{made['kid']}").json()
    listed = admin.get("/admin/keys").json()["keys"]
    assert shown == {name: value for name, value in made.items() if name != "key"}
    assert [each["kid"] for each in listed if each["kid"] == made["kid"]] == [made["kid"]]
    assert made["key"] not in json.dumps(listed)
    assert "hash" not in shown
    actor = f"key:{master_key.split('_')[2]}"
    assert [(event, who) for event, who, _ in audited()] == [
        ("key_created", actor),
        ("key_shown", actor),
        ("keys_listed", actor),
    ]
    assert made["key"].split("_")[3] not in str(audited())


def test_a_plan_that_the_service_does_not_have_is_refused_by_name(admin: httpx.Client) -> None:
    answer = admin.post("/admin/keys", json={"name": "of a test", "scopes": ["models"], "plan": "gone"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "plan")


def test_a_change_is_in_effect_and_what_is_not_named_stays(admin: httpx.Client, audited: Audited) -> None:
    made = create(admin, networks=["127.0.0.0/8"])
    where = f"/admin/keys/{made['kid']}"
    changed = admin.patch(where, json={"scopes": ["metrics"], "name": "other"}).json()
    assert (changed["scopes"], changed["name"], changed["networks"]) == (["metrics"], "other", ["127.0.0.0/8"])
    assert changed == admin.get(where).json()
    assert [event for event, _, _ in audited()] == ["key_created", "key_updated", "key_shown"]


def test_a_rotated_key_works_beside_the_new_one_for_as_long_as_was_said(admin: httpx.Client, audited: Audited) -> None:
    made = create(admin)
    where = f"/admin/keys/{made['kid']}"
    answer = admin.post(f"{where}/rotate", json={"overlap": 3600, "expires_at": "2999-01-01T00:00:00Z"})
    assert answer.status_code == 201
    new = answer.json()
    assert new["principal"] == made["principal"]
    assert new["kid"] != made["kid"]
    for key in (made["key"], new["key"]):
        assert admin.get("/v1/models", headers=bearer(key)).status_code == 200
    assert admin.get(where).json()["rotated_to"] == new["kid"]
    again = admin.post(f"{where}/rotate", json={})
    assert (again.status_code, again.json()["error"]["param"]) == (400, "kid")
    assert [event for event, _, _ in audited()][-1] == "admin_call_refused"


def test_a_revoked_key_is_refused_and_revoking_it_again_is_the_same(admin: httpx.Client, audited: Audited) -> None:
    made = create(admin)
    for _ in range(2):
        answer = admin.delete(f"/admin/keys/{made['kid']}")
        assert (answer.status_code, answer.json()["status"]) == (200, "revoked")
    assert [event for event, _, _ in audited()] == ["key_created", "key_revoked"]


def test_a_key_without_the_scope_admin_may_not_even_look(
    admin: httpx.Client, audited: Audited, guarded_settings: Settings
) -> None:
    other = bearer(make_key(guarded_settings, *(set(Scope) - {Scope.ADMIN})))
    for method, path in (("GET", ""), ("POST", ""), ("DELETE", "/x"), ("PATCH", "/x"), ("POST", "/x/rotate")):
        answer = admin.request(method, f"/admin/keys{path}", headers=other)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "permission_denied")
    assert [event for event, _, _ in audited()] == ["key_created"]  # by the command line, above


@pytest.mark.parametrize(
    ("call", "body", "status", "param"),
    [
        ("GET /000000000000", None, 404, "kid"),
        ("GET /no-kid-at-all", None, 404, "kid"),
        ("DELETE /000000000000", None, 404, "kid"),
        ("PATCH /000000000000", {"name": "x"}, 404, "kid"),
        ("POST /000000000000/rotate", {}, 404, "kid"),
        ("GET /%00", None, 404, "kid"),
        ("POST ", {"name": "x"}, 400, "scopes"),
        ("POST ", {"scopes": ["models"]}, 400, "name"),
        ("POST ", {"name": "x", "scopes": ["everything"]}, 400, "scopes"),
        ("POST ", {"name": "x", "scopes": []}, 400, "scopes"),
        ("POST ", {"name": "", "scopes": ["models"]}, 400, "name"),
        ("POST ", {"name": "x", "scopes": ["models"], "sudo": True}, 400, "sudo"),
        ("POST ", {"name": "x", "scopes": ["models"], "networks": ["10.0.0.1/8"]}, 400, "networks"),
        ("POST ", {"name": "x", "scopes": ["models"], "expires_at": "tomorrow"}, 400, "expires_at"),
        ("POST ", {"name": "x", "scopes": ["models"], "expires_at": "2999-01-01T00:00:00"}, 400, "expires_at"),
        ("POST ", {"name": "x", "scopes": ["models"], "expires_at": 32503680000}, 400, "expires_at"),
        ("POST ", {"name": "x", "scopes": ["models"], "expires_at": "2001-01-01T00:00:00Z"}, 400, "expires_at"),
        ("POST ", {"name": "x", "scopes": ["models"], "limits": {"rpm": -1}}, 400, "limits"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    admin: httpx.Client, call: str, body: Any, status: int, param: str
) -> None:
    method, _, path = call.partition(" ")
    answer = admin.request(method, f"/admin/keys{path}", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)


def test_a_refused_call_is_audited_with_its_reason(admin: httpx.Client, audited: Audited, master_key: str) -> None:
    admin.patch("/admin/keys/000000000000", json={"name": "x"})
    actor = f"key:{master_key.split('_')[2]}"
    detail = {"call": "key_update", "code": "not_found", "kid": "000000000000"}
    assert audited() == [("admin_call_refused", actor, detail)]


def test_an_empty_change_is_refused(admin: httpx.Client) -> None:
    made = create(admin)
    assert admin.patch(f"/admin/keys/{made['kid']}", json={}).status_code == 400
