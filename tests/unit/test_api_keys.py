"""What an operator does with keys, on real databases: the keys, the audit log beside them, and a ring that follows."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from service.auth import api_keys
from service.auth.api_keys import IssuedKey, Operator, describe, find, list_all
from service.auth.key_format import generate, parse
from service.auth.key_spec import KeySpec
from service.auth.key_store import DatabaseKeyStore
from service.auth.keyring import KeyRing
from service.auth.pepper import Peppers
from service.errors import CredentialRevoked, InvalidRequest, NotFound, StorageUnavailable, Unauthorized
from service.settings import LimitsSettings, PlanSettings
from service.storage import audit, keys
from service.storage.database import Database
from service.storage.keys import KeyExists, KeyRecord

DAY = 86_400.0
NOW = 1_800_000_000.0
HERE = "192.0.2.7"
SPEC = KeySpec.of(name="ci", scopes=["inference"])


class Desk:
    """An operator over a database, with a clock that the test sets."""

    def __init__(self, database: Database, peppers: Peppers) -> None:
        self.database = database
        self.now = NOW
        self.operator = Operator(actor="tester", peppers=peppers, environment="live", now=lambda: self.now)

    def create(self, **given: Any) -> IssuedKey:
        spec = KeySpec.of(**{"name": "ci", "scopes": ["inference"], **given})
        return self.database.write(lambda connection: self.operator.create(connection, spec)).result()

    def rotate(self, kid: str, **given: Any) -> IssuedKey:
        return self.database.write(lambda connection: self.operator.rotate(connection, kid, **given)).result()

    def update(self, kid: str, changes: dict[str, Any]) -> KeyRecord:
        return self.database.write(lambda connection: self.operator.update(connection, kid, **changes)).result()

    def revoke(self, kid: str) -> KeyRecord:
        return self.database.write(lambda connection: self.operator.revoke(connection, kid)).result()

    def take(self, *texts: str, spec: KeySpec = SPEC) -> list[KeyRecord]:
        return self.database.write(lambda connection: self.operator.take(connection, texts, spec)).result()

    def find(self, kid: str) -> KeyRecord:
        return self.database.read(lambda connection: find(connection, kid)).result()

    def audited(self) -> list[tuple[str, dict[str, Any]]]:
        """Event and detail of each entry, oldest first; the chain is verified on the way."""
        assert self.database.read(audit.verify).result().ok
        entries = self.database.read(lambda connection: audit.entries(connection, limit=100)).result()
        assert {entry.actor for entry in entries} <= {"tester"}
        return [(entry.event, json.loads(entry.detail)) for entry in reversed(entries)]


@pytest.fixture
def peppers(tmp_path: Path) -> Peppers:
    return Peppers.open(tmp_path / "pepper.json")


@pytest.fixture
def desk(database: Database, peppers: Peppers) -> Desk:
    return Desk(database, peppers)


@pytest.fixture
def follow(desk: Desk, peppers: Peppers) -> Callable[[], KeyRing]:
    def ring() -> KeyRing:
        store = DatabaseKeyStore(desk.database)
        return KeyRing(store, peppers, touch=store.touch, stale_for=60.0, now=lambda: desk.now)

    return ring


def test_a_new_key_is_stored_as_a_hash_and_audited_without_its_secret(desk: Desk, peppers: Peppers) -> None:
    issued = desk.create(plan="gold", networks=["10.0.0.0/8"], expires_at=NOW + DAY)
    parsed, record = parse(issued.text), desk.find(issued.record.kid)
    assert record == issued.record
    assert (record.kid, record.principal, record.tenant) == (parsed.kid, f"key:{parsed.kid}", f"key:{parsed.kid}")
    assert (record.plan, record.networks, record.created_at) == ("gold", ("10.0.0.0/8",), NOW)
    assert record.hash == peppers.digest(1, issued.text)
    ((event, detail),) = desk.audited()
    assert (event, detail["kid"], detail["scopes"]) == ("key_created", parsed.kid, ["inference"])
    secret = issued.text.split("_")[3]
    if (file := desk.database.location.file) is not None:
        assert all(secret.encode() not in each.read_bytes() for each in file.parent.iterdir())
    assert secret not in f"{detail}{issued!r}{describe(record, NOW)}"
    assert record.hash.hex() not in f"{detail}{issued!r}{describe(record, NOW)}"


def test_a_key_has_the_tenant_it_was_given(desk: Desk) -> None:
    assert desk.create(tenant="acme").record.tenant == "acme"


def test_a_key_that_would_be_dead_on_arrival_is_not_made(desk: Desk) -> None:
    with pytest.raises(InvalidRequest):
        desk.create(expires_at=NOW)
    assert desk.audited() == []


async def test_a_rotated_key_and_its_successor_are_one_principal_until_the_overlap_ends(
    desk: Desk, follow: Callable[[], KeyRing]
) -> None:
    ring, old = follow(), desk.create(tenant="acme", models=["m"])
    desk.now += 10
    new = desk.rotate(old.record.kid, overlap=DAY)
    assert new.text.split("_")[2:4] != old.text.split("_")[2:4]
    principals = [(await ring.verify(text, HERE)).principal for text in (old.text, new.text)]
    assert replace(principals[0], key_id=None) == replace(principals[1], key_id=None)
    assert new.record.created_at == desk.now
    assert desk.find(old.record.kid).rotated_to == new.record.kid
    desk.now += DAY
    with pytest.raises(Unauthorized, match="required") as caught:
        await ring.verify(old.text, HERE)
    assert caught.value.reason == "expired"
    await ring.verify(new.text, HERE)
    assert [event for event, _ in desk.audited()] == ["key_created", "key_rotated"]
    assert desk.audited()[1][1]["to"] == new.record.kid


async def test_a_rotation_without_overlap_ends_the_old_key_and_its_running_requests(
    desk: Desk, follow: Callable[[], KeyRing]
) -> None:
    ring, old = follow(), desk.create()
    grant = await ring.verify(old.text, HERE)
    new = desk.rotate(old.record.kid, overlap=0)
    await ring.verify(new.text, HERE)
    assert isinstance(grant.refusal(), CredentialRevoked)


def test_a_rotation_neither_shortens_nor_extends_a_life_unless_told(desk: Desk) -> None:
    old = desk.create(expires_at=NOW + 100)
    new = desk.rotate(old.record.kid, overlap=DAY)
    assert (new.record.expires_at, desk.find(old.record.kid).expires_at) == (NOW + 100, NOW + 100)
    newer = desk.rotate(new.record.kid, overlap=50, expires_at=NOW + 5 * DAY)
    assert (newer.record.expires_at, desk.find(new.record.kid).expires_at) == (NOW + 5 * DAY, NOW + 50)
    assert newer.record.principal == old.record.principal


def test_what_cannot_be_rotated(desk: Desk) -> None:
    kid = desk.create().record.kid
    desk.rotate(kid)
    revoked, short = desk.create().record.kid, desk.create(expires_at=NOW + 5).record.kid
    desk.revoke(revoked)
    desk.now += 5
    before = desk.audited()
    for refused in (kid, revoked, short):
        with pytest.raises(InvalidRequest) as caught:
            desk.rotate(refused)
        assert caught.value.param == "kid"
    with pytest.raises(NotFound):
        desk.rotate("nobody")
    fresh = desk.create().record.kid
    for wrong in ({"overlap": -1.0}, {"overlap": 91 * DAY}, {"expires_at": desk.now}, {"expires_at": float("nan")}):
        with pytest.raises(InvalidRequest):
            desk.rotate(fresh, **wrong)
    assert len(desk.audited()) == len(before) + 1


async def test_a_revoked_key_is_refused_at_once_and_for_good(desk: Desk, follow: Callable[[], KeyRing]) -> None:
    ring, issued = follow(), desk.create()
    grant = await ring.verify(issued.text, HERE)
    record = desk.revoke(issued.record.kid)
    desk.now += 1
    assert desk.revoke(issued.record.kid) == record == desk.find(issued.record.kid)
    assert record.revoked_at == NOW
    with pytest.raises(Unauthorized):  # an unknown key makes the ring look at the store
        await ring.verify(generate("live").text, HERE)
    assert isinstance(grant.refusal(), CredentialRevoked)
    with pytest.raises(InvalidRequest):
        desk.update(issued.record.kid, {"plan": "gold"})
    with pytest.raises(KeyExists):
        desk.take(issued.text)
    assert [event for event, _ in desk.audited()] == ["key_created", "key_revoked"]
    with pytest.raises(NotFound):
        desk.revoke("nobody")


def test_an_update_changes_what_was_named_and_says_so(desk: Desk) -> None:
    kid = desk.create(tenant="acme", expires_at=NOW + 5).record.kid
    desk.now += 10
    record = desk.update(kid, {"scopes": ["models"], "expires_at": NOW + DAY, "limits": {"rpm": 3}})
    assert record == desk.find(kid)
    assert (set(record.scopes), record.expires_at, dict(record.limits)) == ({"models"}, NOW + DAY, {"rpm": 3})
    assert (record.tenant, record.name) == ("acme", "ci")
    assert desk.update(kid, {"tenant": None}).tenant == f"key:{kid}"
    assert desk.audited()[1][1] == {
        "kid": kid, "scopes": ["models"], "expires_at": "2027-01-16T08:00:00Z", "limits": ["rpm=3"]
    }  # fmt: skip
    for wrong in ({}, {"expires_at": 5.0}, {"hash": b""}, {"revoked_at": None}, {"kid": "x"}):
        with pytest.raises(InvalidRequest):
            desk.update(kid, wrong)
    with pytest.raises(NotFound):
        desk.update("nobody", {"plan": "gold"})
    assert len(desk.audited()) == 3


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"plan": "gone"}, "plan"),
        ({"limits": {"rpm": 3}}, "limits"),
        ({"limits": {"requests_per_minute": 0}}, "limits"),
    ],
)
def test_a_key_whose_limits_the_service_does_not_know_is_neither_made_nor_changed_into(
    desk: Desk, wrong: dict[str, Any], param: str
) -> None:
    desk.operator = replace(desk.operator, limits=LimitsSettings(plans={"gold": PlanSettings()}))
    kid = desk.create(plan="gold", limits={"requests_per_minute": 3}).record.kid
    spec = KeySpec.of(**{"name": "moved", "scopes": ["models"], **wrong})
    calls = (
        lambda: desk.create(**wrong),
        lambda: desk.update(kid, wrong),
        lambda: desk.take(generate("old").text, spec=spec),
    )
    for call in calls:
        with pytest.raises(InvalidRequest) as caught:
            call()
        assert caught.value.param == param
    assert [record.kid for record in desk.database.read(list_all).result()] == [kid]
    assert desk.update(kid, {"plan": "default"}).plan == "default"


async def test_an_imported_key_keeps_its_id_and_secret(desk: Desk, follow: Callable[[], KeyRing]) -> None:
    made = [generate("old").text for _ in range(3)]
    taken = desk.take(*made, spec=KeySpec.of(name="moved", scopes=["models"], tenant="acme"))
    ring = follow()
    for text, record in zip(made, taken, strict=True):
        assert record == desk.find(parse(text).kid)
        assert (await ring.verify(text, HERE)).principal.tenant == "acme"
    assert [event for event, _ in desk.audited()] == ["key_imported"] * 3


@pytest.mark.parametrize("bad", ["sk-somebody-elses-key", "", "typo", "known", "twice"])
def test_an_import_is_all_or_nothing_and_repeats_nothing_of_what_it_refuses(desk: Desk, bad: str) -> None:
    good, known = generate("live").text, desk.create()
    text = {"typo": good[:-1] + "!", "known": known.text, "twice": good}.get(bad, bad)
    with pytest.raises(InvalidRequest, match="Key 2 of the import") as caught:
        desk.take(good, text)
    assert not text or text not in str(caught.value)
    assert [record.kid for record in desk.database.read(list_all).result()] == [known.record.kid]
    assert len(desk.audited()) == 1


def test_an_import_is_bounded(desk: Desk) -> None:
    for texts in ((), ("x",) * (api_keys.MAX_IMPORT + 1)):
        with pytest.raises(InvalidRequest, match="1 to 1000"):
            desk.take(*texts)


def test_a_pepper_is_audited_and_hashes_new_keys(desk: Desk, peppers: Peppers) -> None:
    old = desk.create()
    version = peppers.rotate()
    desk.database.write(lambda connection: desk.operator.note_pepper(connection, version)).result()
    new = desk.rotate(old.record.kid)
    assert (old.record.pepper_version, new.record.pepper_version) == (1, 2)
    assert desk.audited()[1] == ("pepper_rotated", {"version": 2})


def test_without_its_audit_entry_a_change_does_not_happen(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    kid = desk.create().record.kid

    def full(*_: object, **__: object) -> None:
        raise StorageUnavailable("the disk is full")

    monkeypatch.setattr(audit, "append", full)
    update = partial(desk.update, kid, {"plan": "x"})
    for change in (desk.create, partial(desk.revoke, kid), partial(desk.rotate, kid), update):
        with pytest.raises(StorageUnavailable):
            change()
    assert [(each.revoked_at, each.plan, each.rotated_to) for each in desk.database.read(list_all).result()] == [
        (None, "default", None)
    ]


def test_a_description_is_json_and_says_how_the_key_stands(desk: Desk) -> None:
    states = {
        "active": desk.create(),
        "not_yet_valid": desk.create(not_before=NOW + 10),
        "expired": desk.create(expires_at=NOW + 1),
        "revoked": desk.create(expires_at=NOW + 1),
    }
    desk.revoke(states["revoked"].record.kid)
    desk.now += 1
    for state, issued in states.items():
        described = json.loads(json.dumps(describe(desk.find(issued.record.kid), desk.now)))
        assert described["status"] == state
        assert not {"hash", "key", "text"} & described.keys()
        assert described["created_at"] == "2027-01-15T08:00:00Z"


async def test_last_uses_are_written_and_move_no_revision(desk: Desk, follow: Callable[[], KeyRing]) -> None:
    ring, issued = follow(), desk.create()
    await ring.verify(issued.text, HERE)
    before = desk.database.read(keys.revision).result()
    await ring.close()
    assert desk.find(issued.record.kid).last_used_at == NOW
    assert desk.database.read(keys.revision).result() == before


async def test_a_closed_database_is_503_and_not_401(desk: Desk, follow: Callable[[], KeyRing]) -> None:
    ring, issued = follow(), desk.create()
    await ring.verify(issued.text, HERE)
    desk.database.close()
    await ring.verify(issued.text, HERE)
    with pytest.raises(StorageUnavailable):
        await ring.verify(generate("live").text, HERE)
    await ring.close()


async def test_the_figures_of_many_keys_are_printed(
    desk: Desk, peppers: Peppers, count: Callable[[str, int, int], int], capsys: pytest.CaptureFixture[str]
) -> None:
    many = count("keys in one snapshot", 1_000, 10_000)
    template = desk.create(models=["m"]).record
    records = [replace(template, kid=f"{number:012}", principal=f"key:{number:012}") for number in range(many)]

    def fill(connection: Any) -> None:
        for record in records:
            keys.insert(connection, record)

    desk.database.write(fill).result()
    store = DatabaseKeyStore(desk.database)
    ring = KeyRing(store, peppers, touch=store.touch, stale_for=60.0)
    reloads, polls = [], []
    for _ in range(3):
        text = desk.create().text
        began = time.perf_counter()
        await ring.verify(text, HERE)
        reloads.append(time.perf_counter() - began)
    for _ in range(100):
        began = time.perf_counter()
        await store.revision()
        polls.append(time.perf_counter() - began)
    kind = "PostgreSQL" if desk.database.location.file is None else "SQLite"
    best, typical, poll = min(reloads) * 1e3, statistics.median(reloads) * 1e3, statistics.median(polls) * 1e6
    with capsys.disabled():
        print(f"\n{kind}: {many} keys reload in {best:.0f} ms (median {typical:.0f}); a poll takes {poll:.0f} us")
