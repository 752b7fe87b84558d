"""A held lock, a full disk, a damaged file, a killed process: typed answers, and nothing lost or half-written."""

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from service.settings import StorageSettings
from service.storage import audit, keys
from service.storage.database import Database
from service.storage.engines import WRITER_LOCK
from service.storage.failures import Reason, StorageFailure, failure_of
from service.storage.inspection import inspect
from service.storage.revisions import revision
from tests.conftest import ROOT
from tests.databases import BUSY_TIMEOUT, PATIENT, OpenDatabase, create


def assert_whole(database: Database, *, at_least: set[str]) -> int:
    """Every acknowledged key is there, each with its entry and its step of the revision; returns how many."""
    kids = {each.kid for each in database.read(keys.all_keys).result()}
    assert at_least <= kids
    log = database.read(lambda connection: audit.entries(connection, limit=100_000)).result()
    assert {entry.detail for entry in log} == {f'{{"kid":"{kid}"}}' for kid in kids}
    report = database.read(audit.verify).result()
    assert (report.ok, report.count) == (True, len(kids))
    assert database.read(revision).result() == len(kids)
    return len(kids)


# -- locked -----------------------------------------------------------------------------------------------


@contextmanager
def held_lock(url: str) -> Iterator[None]:
    """Another program is in the middle of a write."""
    if url.startswith("sqlite"):
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            yield
        return
    import psycopg

    with psycopg.connect(url) as server:
        server.execute(f"SELECT pg_advisory_xact_lock({WRITER_LOCK})".encode())
        yield


def test_a_held_lock_is_a_typed_answer_in_bounded_time_while_reads_go_on(
    open_database: OpenDatabase, database_url: str
) -> None:
    database = open_database()
    database.write(create(0)).result()
    with held_lock(database_url):
        began = time.monotonic()
        waiting = database.write(create(1))
        reads = 0
        while not waiting.done():
            assert database.read(revision).result() == 1
            reads += 1
        with pytest.raises(StorageFailure) as caught:
            waiting.result()
        took = time.monotonic() - began
    assert caught.value.reason is Reason.LOCKED
    assert BUSY_TIMEOUT * 0.9 <= took < BUSY_TIMEOUT + 5
    assert reads > 1
    database.write(create(2)).result()
    assert assert_whole(database, at_least={"k0", "k2"}) == 2


def test_a_write_waits_for_a_lock_that_is_given_back(open_database: OpenDatabase, database_url: str) -> None:
    database = open_database(busy_timeout=PATIENT)
    with held_lock(database_url):
        waiting = database.write(create(1))
        database.read(revision).result()
        assert not waiting.done()
    waiting.result()
    assert_whole(database, at_least={"k1"})


# -- full -------------------------------------------------------------------------------------------------


def fill(database: Database, number: int) -> tuple[set[str], StorageFailure]:
    """Write until it fails; what was acknowledged, and the failure."""
    acknowledged: set[str] = set()
    while True:
        try:
            database.write(create(number, name="x" * 8000)).result()
        except StorageFailure as failure:
            return acknowledged, failure
        acknowledged.add(f"k{number}")
        number += 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 600 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k,mode=0700", "mlxd-test", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("NOT TESTED HERE: needs root, who may mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_a_typed_answer_and_keys_and_chain_stay_whole(small_disk: Path, tmp_path: Path) -> None:
    settings = StorageSettings(url=f"sqlite:///{small_disk / 'mlxd.db'}")
    ballast = small_disk / "ballast"
    with Database.open(settings, tmp_path, migrate=True) as database:
        ballast.write_bytes(b"x" * 150_000)
        acknowledged, failure = fill(database, 0)
        assert failure.reason is Reason.FULL
        assert len(acknowledged) > 3
        assert_whole(database, at_least=acknowledged)
        _, again = fill(database, 1000)
        assert again.reason is Reason.FULL
        before = assert_whole(database, at_least=acknowledged)
        ballast.unlink()
        database.write(create(2000)).result()
        assert assert_whole(database, at_least=acknowledged | {"k2000"}) == before + 1
    assert all(finding.ok for finding in inspect(settings, tmp_path))


def test_a_process_that_finds_its_disk_full_at_the_next_start_still_reads(small_disk: Path, tmp_path: Path) -> None:
    settings = StorageSettings(url=f"sqlite:///{small_disk / 'mlxd.db'}")
    with Database.open(settings, tmp_path, migrate=True) as database:
        (small_disk / "ballast").write_bytes(b"x" * 150_000)
        acknowledged, _ = fill(database, 0)
    with Database.open(settings, tmp_path, migrate=True) as database:
        assert_whole(database, at_least=acknowledged)


def test_a_database_that_may_not_grow_is_a_typed_answer(sqlite_url: str, tmp_path: Path) -> None:
    """As a full disk, but for everybody: SQLite's own limit."""
    with Database.open(StorageSettings(url=sqlite_url), tmp_path, migrate=True) as database:
        database.write(lambda connection: connection.exec_driver_sql("PRAGMA max_page_count = 40")).result()
        acknowledged, failure = fill(database, 0)
        assert failure.reason is Reason.FULL
        assert_whole(database, at_least=acknowledged)
        database.write(lambda connection: connection.exec_driver_sql("PRAGMA max_page_count = 4000")).result()
        database.write(create(2000)).result()
        assert_whole(database, at_least=acknowledged | {"k2000"})


# -- damaged ----------------------------------------------------------------------------------------------


def overwrite(file: Path, start: int, length: int) -> None:
    with file.open("r+b") as handle:
        handle.seek(start)
        handle.write(b"\xa5" * length)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "pages in the middle": lambda file: overwrite(file, 4096 * 5, 4096 * 6),
    "the first bytes": lambda file: overwrite(file, 0, 64),
    "the end cut off": lambda file: os.truncate(file, file.stat().st_size // 2 // 4096 * 4096),
}


@pytest.fixture
def used_file(sqlite_url: str, tmp_path: Path) -> Path:
    """The file of a database that has been in use and was closed."""
    with Database.open(StorageSettings(url=sqlite_url), tmp_path, migrate=True) as database:
        for number in range(40):
            database.write(create(number, name="x" * 2000)).result()
        file = database.location.file
    assert file is not None
    return file


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_file_is_not_opened_and_the_check_says_so(
    used_file: Path, sqlite_url: str, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    settings = StorageSettings(url=sqlite_url)
    damage(used_file)
    with pytest.raises(StorageFailure) as caught:
        Database.open(settings, tmp_path)
    assert caught.value.reason is Reason.DAMAGED
    findings = {finding.name: finding for finding in inspect(settings, tmp_path)}
    assert not findings["file"].ok
    assert findings["file"].detail


def test_rows_that_break_their_tables_rules_are_found_too(used_file: Path, sqlite_url: str, tmp_path: Path) -> None:
    settings = StorageSettings(url=sqlite_url)
    with closing(sqlite3.connect(used_file)) as other:
        other.execute("PRAGMA writable_schema = ON")
        other.execute("UPDATE sqlite_schema SET sql = replace(sql, 'rotated_to TEXT', 'rotated_to TEXT NOT NULL')")
        other.commit()
    with pytest.raises(StorageFailure, match=r"NULL value in keys.rotated_to; see: mlxd db check"):
        Database.open(settings, tmp_path)
    finding = inspect(settings, tmp_path)[0]
    assert (finding.name, finding.ok) == ("file", False)
    assert finding.detail.startswith("NULL value in keys.rotated_to")


@pytest.mark.parametrize(
    ("name", "reason"),
    {
        "SQLITE_BUSY": Reason.LOCKED,
        "SQLITE_BUSY_SNAPSHOT": Reason.LOCKED,
        "SQLITE_LOCKED_SHAREDCACHE": Reason.LOCKED,
        "SQLITE_FULL": Reason.FULL,
        "SQLITE_READONLY_DBMOVED": Reason.READ_ONLY,
        "SQLITE_CORRUPT_INDEX": Reason.DAMAGED,
        "SQLITE_NOTADB": Reason.DAMAGED,
        "SQLITE_IOERR_FSYNC": Reason.UNREACHABLE,
        "SQLITE_CANTOPEN": Reason.UNREACHABLE,
        "SQLITE_ERROR": None,
        "SQLITE_CONSTRAINT_UNIQUE": None,
    }.items(),
)
def test_what_sqlite_says_becomes_a_reason(name: str, reason: Reason | None) -> None:
    error = sqlite3.OperationalError("said SQLite")
    error.sqlite_errorname = name
    failure = failure_of(error)
    assert (failure and failure.reason) == reason


def test_a_text_that_is_not_utf_8_any_more_is_damage(sqlite_url: str, tmp_path: Path) -> None:
    with Database.open(StorageSettings(url=sqlite_url), tmp_path, migrate=True) as database:
        database.write(create(0)).result()
        database.write(lambda c: c.exec_driver_sql("UPDATE audit SET actor = CAST(x'ff' AS TEXT)")).result()
        with pytest.raises(StorageFailure) as caught:
            database.read(audit.verify).result()
    assert caught.value.reason is Reason.DAMAGED


def test_a_wrong_use_of_sqlite_is_no_failure_of_storage() -> None:
    assert failure_of(sqlite3.ProgrammingError("Cannot operate on a closed database.")) is None


# -- killed -----------------------------------------------------------------------------------------------

WRITER = """
import itertools, sys
from pathlib import Path
from service.settings import StorageSettings
from service.storage.database import Database
from tests.databases import create
url, state, start = sys.argv[1:]
with Database.open(StorageSettings(url=url, busy_timeout=30), Path(state)) as database:
    for number in itertools.count(int(start)):
        database.write(create(number, name="x" * 3000)).result()
        print(f"k{number}", flush=True)
"""


def test_after_kill_9_no_acknowledged_write_is_lost_and_none_is_half_there(
    open_database: OpenDatabase, database_url: str, tmp_path: Path, count: Any
) -> None:
    chance = random.Random(4)
    open_database().close()
    acknowledged: set[str] = set()
    for run in range(count("storage writers killed", 3, 200)):
        command = [sys.executable, "-c", WRITER, database_url, str(tmp_path), str(run * 1000)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        with process.stdout:
            for _ in range(chance.randint(1, 60)):
                acknowledged.add(process.stdout.readline().strip())
            process.kill()
            acknowledged.update(line.strip() for line in process.stdout if line.endswith("\n"))
        assert process.wait(30) == -signal.SIGKILL
        database = open_database(migrate=False)
        assert_whole(database, at_least=acknowledged)
        database.close()
    with open_database(migrate=False) as database:
        database.write(create(999_999)).result()
        assert_whole(database, at_least=acknowledged | {"k999999"})
