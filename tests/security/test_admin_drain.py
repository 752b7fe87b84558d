"""`/admin/drain` with real keys on both listeners: for admins only, and in the audit log."""

import json

import httpx
import pytest

from service.settings import Settings
from service.storage import audit
from service.storage.database import Database
from tests.serving import Served, bearer, make_key

PATH = "/admin/drain"


def test_an_admin_drains_on_the_operators_listener_and_takes_it_back_and_both_are_audited(
    guarded: Served, guarded_settings: Settings, master_key: str
) -> None:
    with httpx.Client(headers=bearer(master_key)) as admin:
        try:
            answer = admin.post(f"{guarded.ops_url}{PATH}")
            told = {"state": "draining", "drained": True, "running": 0, "waiting": 0}
            assert (answer.status_code, answer.json()) == (200, told)
            refused = admin.post(f"{guarded.url}/generate", json={"prompt": "x"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
            assert int(refused.headers["retry-after"]) >= 1
            assert admin.get(f"{guarded.url}/readyz").status_code == 503
        finally:
            back = admin.delete(f"{guarded.ops_url}{PATH}")
        assert (back.status_code, back.json()["state"]) == (200, "ready")
        assert admin.post(f"{guarded.url}/generate", json={"prompt": "x", "max_tokens": 2}).status_code == 200
    with Database.open(guarded_settings.storage, guarded_settings.server.state_dir) as database:
        entries = database.read(lambda connection: audit.entries(connection, limit=2)).result()
    assert [(entry.event, json.loads(entry.detail)) for entry in reversed(entries)] == [
        ("drain_begun", {}),
        ("drain_undone", {}),
    ]
    assert {entry.actor for entry in entries} == {f"key:{master_key.split('_')[2]}"}


@pytest.mark.parametrize("scope", ["metrics", "inference", "usage", "models"])
def test_other_scopes_may_not(guarded: Served, guarded_settings: Settings, scope: str) -> None:
    who = bearer(make_key(guarded_settings, scope))
    for method in ("POST", "DELETE"):
        assert httpx.request(method, f"{guarded.ops_url}{PATH}", headers=who).status_code == 403
        assert httpx.request(method, f"{guarded.url}{PATH}").status_code == 401
    assert httpx.get(f"{guarded.url}/readyz").status_code == 200
