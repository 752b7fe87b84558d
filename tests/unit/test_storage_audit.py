"""The audit log's chain: what is appended, what tampering is seen, and that several processes do not fork it."""

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given, strategies as st
from sqlalchemy import Connection

from service.settings import StorageSettings
from service.storage import audit
from service.storage.audit import BEFORE_FIRST, MAX_ITEMS, MAX_TEXT, AuditReport, Head, Problem
from service.storage.database import Database
from service.storage.schema import AUDIT
from tests.conftest import ROOT


def append(database: Database, event: str = "key_created", **options: Any) -> Head:
    arguments: Any = {"actor": "cli:root", "at": 1.5, "detail": {"kid": "k1"}} | options
    return database.write(lambda connection: audit.append(connection, event, **arguments)).result()


def verify(database: Database, expected_head: Head | None = None) -> AuditReport:
    return database.read(lambda connection: audit.verify(connection, expected_head=expected_head)).result()


def newest(database: Database) -> audit.Entry:
    return database.read(lambda connection: audit.entries(connection, limit=1)).result()[0]


def test_an_empty_log_is_sound_and_has_no_head(database: Database) -> None:
    assert verify(database) == AuditReport(count=0, head=None)
    assert database.read(audit.head).result() is None


def test_each_entry_holds_the_hash_of_the_one_before(database: Database) -> None:
    heads = [append(database, at=number / 10) for number in range(5)]
    log = list(reversed(database.read(lambda connection: audit.entries(connection, limit=10)).result()))
    assert [entry.seq for entry in log] == [1, 2, 3, 4, 5]
    assert [entry.previous_hash for entry in log] == [BEFORE_FIRST, *(head.hash for head in heads[:-1])]
    assert [entry.hash for entry in log] == [entry.digest() for entry in log] == [head.hash for head in heads]
    assert verify(database) == AuditReport(count=5, head=heads[-1])
    assert database.read(audit.head).result() == heads[-1]


def test_an_entry_says_when_who_and_what(database: Database) -> None:
    append(
        database, "key_revoked", actor="key:k1", at=12.25, detail={"kid": "k2", "n": 3, "why": None, "s": ("a", "b")}
    )
    entry = newest(database)
    assert (entry.event, entry.actor, entry.at) == ("key_revoked", "key:k1", 12.25)
    assert json.loads(entry.detail) == {"kid": "k2", "n": 3, "why": None, "s": ["a", "b"]}


def test_an_entry_shares_the_fate_of_its_transaction(database: Database) -> None:
    append(database)

    def fail(connection: Connection) -> None:
        audit.append(connection, "lost", actor="x", at=1.0)
        raise audit_error

    audit_error = LookupError("on purpose")
    with pytest.raises(LookupError):
        database.write(fail).result()
    assert verify(database).count == 1
    append(database)
    assert verify(database).ok


@given(st.text(max_size=2 * MAX_TEXT))
def test_any_text_becomes_short_and_printable(text: str) -> None:
    stored = audit._capped(text)
    assert len(stored) <= MAX_TEXT
    assert stored.isprintable() or stored == ""
    stored.encode("utf-8")
    if text.isprintable() and len(text) <= MAX_TEXT:
        assert stored == text


def test_nobody_can_fill_the_log_or_the_terminal_with_one_entry(database: Database) -> None:
    append(
        database,
        event="e" * 5000,
        actor="\x00\x1b[31m\ud800\n" * 500,
        detail={"text": "x" * 100_000, "list": ["y" * 5000] * 1000, "nul": "\x00", **{f"k{n}": n for n in range(99)}},
    )
    entry = newest(database)
    detail = json.loads(entry.detail)
    assert (len(entry.event), len(entry.actor)) == (MAX_TEXT, MAX_TEXT)
    assert entry.actor.startswith(r"\x00\x1b[31m\ud800\n")
    assert (detail["text"], len(detail["list"]), len(detail)) == ("x" * (MAX_TEXT - 1) + "…", MAX_ITEMS, MAX_ITEMS)
    assert detail["nul"] == r"\x00"
    assert verify(database).ok


def test_a_number_that_json_does_not_have_is_refused(database: Database) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        append(database, at=float("nan"))
    assert verify(database).count == 0


def test_the_log_is_read_in_pages(database: Database) -> None:
    for number in range(5):
        append(database, at=float(number))

    def page(before: int | None) -> list[int]:
        work = partial(audit.entries, limit=2, before=before)
        return [entry.seq for entry in database.read(work).result()]

    assert [page(before) for before in (None, 4, 2, 1)] == [[5, 4], [3, 2], [1], []]


# -- tampering --------------------------------------------------------------------------------------------


def change(seq: int, /, **values: Any) -> Callable[[Connection], object]:
    return lambda connection: connection.execute(AUDIT.update().where(AUDIT.c.seq == seq).values(values))


def delete(*seqs: int) -> Callable[[Connection], object]:
    return lambda connection: connection.execute(AUDIT.delete().where(AUDIT.c.seq.in_(seqs)))


def swap(first: int, second: int) -> Callable[[Connection], object]:
    def swapped(connection: Connection) -> None:
        for seq, new in ((first, -1), (second, first), (-1, second)):
            change(seq, seq=new)(connection)

    return swapped


def delete_and_renumber(seq: int) -> Callable[[Connection], object]:
    def closed_up(connection: Connection) -> None:
        delete(seq)(connection)
        for following in range(seq + 1, 7):
            change(following, seq=following - 1)(connection)

    return closed_up


def rewrite(start: int, *, last: int) -> Callable[[Connection], object]:
    """Alter the entry at `start` and compute the hashes anew, up to `last`."""

    def rewritten(connection: Connection) -> None:
        change(start, actor="innocent")(connection)
        query = AUDIT.select().where(AUDIT.c.seq <= last).order_by(AUDIT.c.seq)
        previous = BEFORE_FIRST
        for row in connection.execute(query).all():
            entry = audit.Entry(**{**row._mapping, "previous_hash": previous})
            change(entry.seq, previous_hash=previous, hash=entry.digest())(connection)
            previous = entry.digest()

    return rewritten


def wrong_type(connection: Connection) -> None:
    """SQLite keeps what it is given; PostgreSQL would refuse, so there a text is altered."""
    value = "x'00ff'" if connection.dialect.name == "sqlite" else "'x'"
    connection.execute(sa.text(f"UPDATE audit SET detail = {value} WHERE seq = 4"))


TAMPERING: dict[str, tuple[Any, Problem, int]] = {
    "altered detail": (change(3, detail='{"kid":"k2"}'), Problem.ALTERED, 3),
    "altered actor": (change(3, actor="somebody"), Problem.ALTERED, 3),
    "altered event": (change(1, event="nothing"), Problem.ALTERED, 1),
    "altered time": (change(6, at=99.0), Problem.ALTERED, 6),
    "changed hash": (change(3, hash=b"\1" * 32), Problem.ALTERED, 3),
    "changed previous hash": (change(3, previous_hash=b"\1" * 32), Problem.ALTERED, 3),
    "a value of another type": (wrong_type, Problem.ALTERED, 4),
    "altered, with its own hash computed anew": (rewrite(3, last=3), Problem.ALTERED, 4),
    "deleted first": (delete(1), Problem.MISSING, 1),
    "deleted in the middle": (delete(3, 4), Problem.MISSING, 3),
    "deleted, the rest renumbered": (delete_and_renumber(3), Problem.ALTERED, 3),
    "swapped": (swap(3, 4), Problem.REORDERED, 3),
    "swapped far apart": (swap(2, 5), Problem.REORDERED, 2),
    "first moved to the end": (swap(1, 6), Problem.REORDERED, 1),
    "one inserted before the first": (change(6, seq=0), Problem.MISSING, 1),
}


@pytest.mark.parametrize(("tamper", "problem", "seq"), TAMPERING.values(), ids=TAMPERING.keys())
def test_tampering_is_seen_and_where(database: Database, tamper: Any, problem: Problem, seq: int) -> None:
    for number in range(6):
        append(database, at=float(number))
    database.write(tamper).result()
    report = verify(database)
    assert not report.ok
    assert (report.problem, report.broken_seq, report.count) == (problem, seq, seq - 1)


UNSEEN: dict[str, tuple[Any, Problem, int]] = {
    "the newest cut off": (delete(5, 6), Problem.TRUNCATED, 5),
    "everything cut off": (delete(1, 2, 3, 4, 5, 6), Problem.TRUNCATED, 1),
    "the whole chain computed anew": (rewrite(3, last=6), Problem.REWRITTEN, 6),
}


@pytest.mark.parametrize(("tamper", "problem", "seq"), UNSEEN.values(), ids=UNSEEN.keys())
def test_what_the_chain_cannot_show_a_remembered_head_does(
    database: Database, tamper: Any, problem: Problem, seq: int
) -> None:
    head = [append(database, at=float(number)) for number in range(6)][-1]
    database.write(tamper).result()
    assert verify(database).ok
    report = verify(database, expected_head=head)
    assert (report.problem, report.broken_seq) == (problem, seq)


def test_a_remembered_head_stays_good_while_the_log_grows(database: Database) -> None:
    head = append(database)
    assert verify(database, expected_head=head).ok
    newer = append(database)
    assert verify(database, expected_head=head) == AuditReport(count=2, head=newer)


def test_a_head_is_a_text_and_back() -> None:
    head = Head(12, bytes(range(32)))
    assert Head.parse(str(head)) == head


@pytest.mark.parametrize(
    "text", ["", "1", "1:", ":", "x:00", "1:zz", f"0:{'00' * 32}", f"01:{'00' * 32}", "1:00", f"1:{'AA' * 32}"]
)
def test_what_is_no_head_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        Head.parse(text)


APPENDER = """
import sys
from pathlib import Path
from service.settings import StorageSettings
from service.storage import audit
from service.storage.database import Database
url, state, name, number = sys.argv[1:]
with Database.open(StorageSettings(url=url, busy_timeout=30), Path(state), migrate=True) as database:
    for _ in range(int(number)):
        database.write(lambda connection: audit.append(connection, "tick", actor=name, at=1.0)).result()
"""


def test_several_processes_start_at_once_and_append_to_one_chain(database_url: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", APPENDER, database_url, str(tmp_path)]
    processes = [
        subprocess.Popen([*command, f"p{number}", "25"], cwd=ROOT, stdout=subprocess.DEVNULL) for number in range(4)
    ]
    assert [process.wait(60) for process in processes] == [0, 0, 0, 0]
    with Database.open(StorageSettings(url=database_url), tmp_path) as database:
        report = verify(database)
        log = database.read(lambda connection: audit.entries(connection, limit=200)).result()
    assert (report.ok, report.count) == (True, 100)
    assert {actor: sum(entry.actor == actor for entry in log) for actor in ("p0", "p1", "p2", "p3")} == dict.fromkeys(
        ("p0", "p1", "p2", "p3"), 25
    )
