"""Keys, refused tokens and the revision, on both databases."""

import time
from dataclasses import fields, replace
from functools import partial
from typing import Any

import pytest

from service.storage import denied, keys
from service.storage.database import Database
from service.storage.keys import KeyExists, KeyRecord
from service.storage.revisions import revision
from service.storage.schema import KEYS
from tests.databases import OpenDatabase

PLAIN = KeyRecord(
    kid="k1",
    principal="key:k1",
    name="Grüße, 'Bobby'; DROP TABLE keys--",
    tenant="tenant",
    scopes=frozenset({"models", "inference"}),
    plan="default",
    hash=bytes(range(32)),
    pepper_version=1,
    created_at=1_700_000_000.123456,
)
FULL = replace(
    PLAIN,
    kid="k2",
    models=frozenset({"a", "b"}),
    networks=("10.0.0.0/8", "::1/128"),
    limits={"max_tokens": 5},
    not_before=1.5,
    expires_at=2.5,
    revoked_at=3.5,
    last_used_at=4.5,
    rotated_to="k1",
)


def insert(database: Database, *records: KeyRecord) -> None:
    for record in records:
        database.write(partial(keys.insert, record=record)).result()


def found(database: Database, kid: str = "k1") -> KeyRecord | None:
    return database.read(lambda connection: keys.find(connection, kid)).result()


def revision_of(database: Database) -> int:
    return database.read(revision).result()


def test_a_record_has_the_columns_of_the_table() -> None:
    assert {field.name for field in fields(KeyRecord)} == set(KEYS.c.keys())


def test_a_key_comes_back_as_it_was_stored(database: Database) -> None:
    insert(database, PLAIN, FULL)
    assert found(database, "k1") == PLAIN
    assert found(database, "k2") == FULL
    assert database.read(keys.all_keys).result() == [PLAIN, FULL]
    assert found(database, "nobody") is None


def test_an_empty_allow_list_is_not_no_allow_list(database: Database) -> None:
    insert(database, replace(PLAIN, models=frozenset(), networks=()))
    record = found(database)
    assert record is not None
    assert (record.models, record.networks) == (frozenset(), ())


def test_the_hash_is_not_in_the_text_of_a_record() -> None:
    assert "hash" not in repr(PLAIN)


def test_keys_come_in_the_order_of_their_birth(database: Database) -> None:
    insert(database, *(replace(PLAIN, kid=kid, created_at=at) for kid, at in [("c", 1.0), ("a", 2.0), ("b", 1.0)]))
    assert [record.kid for record in database.read(keys.all_keys).result()] == ["b", "c", "a"]


def test_a_second_key_of_the_same_id_is_refused_and_changes_nothing(database: Database) -> None:
    insert(database, PLAIN)
    before = revision_of(database)
    with pytest.raises(KeyExists):
        insert(database, replace(PLAIN, name="another"))
    assert (found(database), revision_of(database)) == (PLAIN, before)


def test_fields_change_one_by_one(database: Database) -> None:
    insert(database, PLAIN)
    changes: keys.KeyChanges = {
        "name": "new",
        "scopes": frozenset({"admin"}),
        "networks": ("10.0.0.0/8",),
        "limits": {"rows": 1},
        "hash": b"other",
        "expires_at": 9.0,
        "rotated_to": "k9",
    }
    assert database.write(lambda connection: keys.update(connection, "k1", **changes)).result()
    assert found(database) == replace(PLAIN, **changes)


def test_what_is_not_there_cannot_be_changed(database: Database) -> None:
    before = revision_of(database)
    assert not database.write(lambda connection: keys.update(connection, "k1", name="x")).result()
    assert not database.write(lambda connection: keys.revoke(connection, "k1", 1.0)).result()
    assert revision_of(database) == before


def test_a_key_is_revoked_once(database: Database) -> None:
    insert(database, PLAIN)
    assert database.write(lambda connection: keys.revoke(connection, "k1", 10.0)).result()
    assert not database.write(lambda connection: keys.revoke(connection, "k1", 20.0)).result()
    assert found(database) == replace(PLAIN, revoked_at=10.0)


def test_last_use_is_noted_for_many_at_once_and_never_goes_back(database: Database) -> None:
    insert(database, PLAIN, FULL)
    before = revision_of(database)
    for used in ({"k1": 7.0, "k2": 9.0, "gone": 1.0}, {"k2": 8.0}, {}):
        database.write(partial(keys.touch, used=used)).result()
    assert found(database, "k1") == replace(PLAIN, last_used_at=7.0)
    assert found(database, "k2") == replace(FULL, last_used_at=9.0)
    assert revision_of(database) == before


CHANGES: dict[str, Any] = {
    "insert": lambda connection: keys.insert(connection, replace(FULL, kid="k3")),
    "update": lambda connection: keys.update(connection, "k1", plan="pro"),
    "revoke": lambda connection: keys.revoke(connection, "k1", 1.0),
    "deny": lambda connection: denied.deny(connection, "issuer", "sub", "mallory", 50.0, now=1.0),
    "deny for longer": lambda connection: denied.deny(connection, "issuer", "jti", "t1", 200.0, now=1.0),
    "prune": lambda connection: denied.prune(connection, 150.0),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_another_process_sees_each_change_by_the_revision(
    database: Database, open_database: OpenDatabase, change: Any
) -> None:
    insert(database, PLAIN)
    database.write(lambda connection: denied.deny(connection, "issuer", "jti", "t1", 100.0, now=1.0)).result()
    other = open_database()
    before = revision_of(other)
    database.write(change).result()
    assert revision_of(other) == before + 1


def test_a_change_that_is_rolled_back_is_none(database: Database) -> None:
    before = revision_of(database)

    def fail(connection: Any) -> None:
        keys.insert(connection, PLAIN)
        raise KeyExists("on purpose")

    with pytest.raises(KeyExists):
        database.write(fail).result()
    assert (found(database), revision_of(database)) == (None, before)


def deny(database: Database, value: str, expires_at: float, *, issuer: str = "i", kind: denied.Kind = "jti") -> None:
    database.write(lambda connection: denied.deny(connection, issuer, kind, value, expires_at, now=5.0)).result()


def refused(database: Database, now: float) -> set[tuple[str, str, str, float]]:
    found = database.read(lambda connection: denied.all_denied(connection, now)).result()
    assert all(each.created_at == 5.0 for each in found)
    return {(each.issuer, each.kind, each.value, each.expires_at) for each in found}


def test_what_is_refused_is_told_apart_by_issuer_and_claim_and_ends(database: Database) -> None:
    deny(database, "v", 10.0)
    deny(database, "v", 20.0, kind="sub")
    deny(database, "v", 30.0, issuer="j")
    assert refused(database, 0.0) == {("i", "jti", "v", 10.0), ("i", "sub", "v", 20.0), ("j", "jti", "v", 30.0)}
    assert refused(database, 10.0) == {("i", "sub", "v", 20.0), ("j", "jti", "v", 30.0)}
    assert refused(database, 30.0) == set()


def test_the_later_end_of_a_refusal_stands(database: Database) -> None:
    for expires_at in (10.0, 30.0, 20.0):
        deny(database, "v", expires_at)
    assert refused(database, 0.0) == {("i", "jti", "v", 30.0)}


def test_pruning_forgets_only_what_has_ended(database: Database) -> None:
    deny(database, "old", 10.0)
    deny(database, "new", 20.0)
    assert database.write(lambda connection: denied.prune(connection, 10.0)).result() == 1
    before = revision_of(database)
    assert database.write(lambda connection: denied.prune(connection, 10.0)).result() == 0
    assert revision_of(database) == before
    assert refused(database, 0.0) == {("i", "jti", "new", 20.0)}


def test_times_keep_every_bit(database: Database) -> None:
    now = time.time()
    insert(database, replace(PLAIN, created_at=now, expires_at=now + 1e-6))
    record = found(database)
    assert record is not None
    assert (record.created_at, record.expires_at) == (now, now + 1e-6)
