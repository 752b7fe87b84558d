"""Reads, writes, opening and closing, on both databases."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError

from service.errors import NotFound, ServiceError, StorageUnavailable
from service.observability.metrics import Metrics
from service.settings import StorageSettings
from service.storage import audit, engines
from service.storage.database import Database, upgrade
from service.storage.failures import Reason, StorageFailure, failure_of
from service.storage.location import locate
from service.storage.migrations import MIGRATIONS, require_current
from service.storage.revisions import bump, revision
from service.storage.schema import SCHEMA_VERSION
from service.storage.telemetry import Telemetry
from tests.databases import BUSY_TIMEOUT, PATIENT, OpenDatabase


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def counted(open_database: OpenDatabase, metrics: Metrics) -> Database:
    return open_database(telemetry=Telemetry(metrics))


def failures(metrics: Metrics, reason: str) -> float | None:
    return metrics.registry.get_sample_value("mlxd_storage_failures_total", {"reason": reason})


def reason_of(future: Future[Any]) -> Reason:
    with pytest.raises(StorageUnavailable) as caught:
        future.result(30)
    assert isinstance(caught.value, StorageFailure)
    return caught.value.reason


@contextmanager
def busy_writer(database: Database) -> Iterator[None]:
    """The writer is inside a transaction until the block ends."""
    entered, leave = threading.Event(), threading.Event()

    def work(_: Connection) -> None:
        entered.set()
        assert leave.wait(30)

    future = database.write(work)
    assert entered.wait(30)
    try:
        yield
    finally:
        leave.set()
        future.result(30)


def test_a_read_does_not_wait_for_the_writer(database: Database) -> None:
    with busy_writer(database):
        assert database.read(revision).result(30) == 0


def test_what_is_written_is_seen_by_the_next_read_and_by_others(
    database: Database, open_database: OpenDatabase
) -> None:
    other = open_database()
    for number in range(1, 4):
        database.write(bump).result()
        assert database.read(revision).result() == other.read(revision).result() == number


def test_a_read_sees_one_moment(database: Database) -> None:
    def twice(connection: Connection) -> tuple[int, int]:
        before = revision(connection)
        database.write(bump).result(30)
        return before, revision(connection)

    assert database.read(twice).result(30) == (0, 0)


def test_writes_are_done_in_their_order_and_alone(database: Database) -> None:
    def counted_up(connection: Connection) -> int:
        bump(connection)
        return revision(connection)

    futures = [database.write(counted_up) for _ in range(50)]
    assert [future.result() for future in futures] == list(range(1, 51))


def test_a_statement_that_is_wrong_is_a_bug_on_the_callers_thread_too(database: Database) -> None:
    reader = engines.reader(database.location, busy_timeout=1)
    with pytest.raises(DBAPIError), engines.used(reader), reader.begin() as connection:
        connection.execute(sa.text("SELECT x FROM nowhere"))


def test_writers_of_several_databases_lose_no_update(open_database: OpenDatabase) -> None:
    """Each reads, then writes what it has read plus one: only right when nobody else writes in between."""

    def increment(connection: Connection) -> None:
        found = revision(connection)
        connection.execute(sa.text("UPDATE revisions SET value = :value"), {"value": found + 1})

    databases = [open_database(busy_timeout=PATIENT) for _ in range(3)]
    for future in [database.write(increment) for _ in range(20) for database in databases]:
        future.result(30)
    assert databases[0].read(revision).result() == 60


async def test_the_event_loop_awaits_without_a_thread_of_its_own(database: Database) -> None:
    await asyncio.wrap_future(database.write(bump))
    assert await asyncio.wrap_future(database.read(revision)) == 1


def test_a_reader_cannot_write(database: Database) -> None:
    assert reason_of(database.read(bump)) is Reason.READ_ONLY
    assert database.read(revision).result() == 0


def test_work_that_is_refused_changes_nothing_and_is_nothing_unforeseen(counted: Database, metrics: Metrics) -> None:
    def work(connection: Connection) -> None:
        bump(connection)
        raise NotFound("not here")

    with pytest.raises(NotFound):
        counted.write(work).result()
    assert counted.read(revision).result() == 0
    assert metrics.registry.get_sample_value("mlxd_internal_errors_total", {"where": "storage"}) is None


@pytest.mark.parametrize("error", [ZeroDivisionError("a bug"), SystemExit(3)])
def test_the_unforeseen_is_handed_over_logged_and_counted_and_the_thread_lives(
    counted: Database, metrics: Metrics, error: BaseException, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(connection: Connection) -> None:
        bump(connection)
        raise error

    with pytest.raises(type(error)):
        counted.write(work).result()
    assert "storage_work_failed" in capsys.readouterr().out
    assert metrics.registry.get_sample_value("mlxd_internal_errors_total", {"where": "storage"}) == 1
    counted.write(bump).result()
    assert counted.read(revision).result() == 1


def test_a_wrong_statement_is_a_bug_and_not_a_failure_of_storage(database: Database) -> None:
    with pytest.raises(DBAPIError) as caught:
        database.read(
            lambda connection: connection.execute(sa.text("SELECT :secret FROM nowhere"), {"secret": "s3"})
        ).result()
    assert not isinstance(caught.value, ServiceError)
    assert "s3" not in str(caught.value)


def test_without_metrics_nothing_is_counted(database: Database) -> None:
    with pytest.raises(ZeroDivisionError):
        database.read(lambda _: 1 // 0).result()
    assert reason_of(database.read(bump)) is Reason.READ_ONLY


@pytest.fixture
def shallow(database: Database, metrics: Metrics) -> Iterator[Database]:
    """A database that holds two pieces of waiting work for each thread."""
    with Database(database.location, busy_timeout=BUSY_TIMEOUT, telemetry=Telemetry(metrics), queue_depth=2) as shallow:
        yield shallow


def test_a_full_queue_refuses_at_once_and_loses_nothing_that_it_took(shallow: Database, metrics: Metrics) -> None:
    with busy_writer(shallow):
        taken = [shallow.write(bump), shallow.write(bump)]
        assert reason_of(shallow.write(bump)) is Reason.QUEUE_FULL
        assert failures(metrics, "queue_full") == 1
    assert [future.result(30) for future in taken] == [None, None]
    assert shallow.read(revision).result() == 2


def test_work_that_is_cancelled_while_it_waits_is_not_done(database: Database) -> None:
    with busy_writer(database):
        cancelled, kept = database.write(bump), database.write(bump)
        assert cancelled.cancel()
    kept.result(30)
    with pytest.raises(CancelledError):
        cancelled.result()
    assert database.read(revision).result() == 1


def test_closing_does_what_waits_even_when_the_queue_is_full(shallow: Database, database: Database) -> None:
    closers = [threading.Thread(target=shallow.close) for _ in range(2)]
    with busy_writer(shallow):
        waiting = [shallow.write(bump) for _ in range(2)]
        for closer in closers:
            closer.start()
    for closer in closers:
        closer.join(30)
        assert not closer.is_alive()
    assert all(future.done() for future in waiting)
    assert database.read(revision).result() == 2


def test_a_closed_database_refuses_and_can_be_closed_again(counted: Database, metrics: Metrics) -> None:
    counted.close()
    counted.close()
    assert reason_of(counted.read(revision)) is Reason.CLOSED
    assert reason_of(counted.write(bump)) is Reason.CLOSED
    assert failures(metrics, "closed") == 2


def test_closing_leaves_no_thread(open_database: OpenDatabase) -> None:
    before = set(threading.enumerate())
    database = open_database()
    assert {thread.name for thread in set(threading.enumerate()) - before} == {"storage-reader", "storage-writer"}
    database.close()
    assert set(threading.enumerate()) == before


# -- opening ----------------------------------------------------------------------------------------------


def test_opening_migrates_only_when_asked_to(storage_settings: StorageSettings, tmp_path: Path) -> None:
    with pytest.raises(StorageFailure, match="run: mlxd db migrate"):
        Database.open(storage_settings, tmp_path)
    upgrade(storage_settings, tmp_path, clock=lambda: 12.5)
    with Database.open(storage_settings, tmp_path) as database:
        applied = database.read(lambda connection: connection.execute(SCHEMA_VERSION.select()).all()).result()
    assert applied == [(number, 12.5) for number in range(1, len(MIGRATIONS) + 1)]


def test_a_database_of_an_older_version_is_not_opened(storage_settings: StorageSettings, tmp_path: Path) -> None:
    location = locate(storage_settings, tmp_path, create=True)
    with pytest.raises(StorageFailure, match=r"version 0, this mlxd needs \d+; run: mlxd db migrate") as caught:
        Database.open(storage_settings, tmp_path)
    assert caught.value.reason is Reason.SCHEMA
    with engines.used(engines.reader(location, busy_timeout=1)) as reader, reader.begin() as connection:
        assert sa.inspect(connection).get_table_names() == []


@pytest.mark.parametrize("migrate", [False, True])
def test_a_database_of_a_newer_version_is_not_opened_and_not_changed(
    open_database: OpenDatabase, migrate: bool
) -> None:
    newer = SCHEMA_VERSION.insert().values(version=99, applied_at=1.0)
    with open_database() as database:
        database.write(lambda connection: connection.execute(newer)).result()
    with pytest.raises(StorageFailure, match="version 99, newer than this mlxd") as caught:
        open_database(migrate=migrate)
    assert caught.value.reason is Reason.SCHEMA


def test_an_empty_table_of_versions_is_version_0(database: Database) -> None:
    database.write(lambda connection: connection.execute(SCHEMA_VERSION.delete())).result()
    with pytest.raises(StorageFailure, match="version 0"):
        database.read(require_current).result()


# -- PostgreSQL only --------------------------------------------------------------------------------------


def test_a_server_that_is_not_there_is_unreachable(tmp_path: Path) -> None:
    settings = StorageSettings(url=f"postgresql://mlxd@/x?host={tmp_path}")
    with pytest.raises(StorageFailure) as caught:
        Database.open(settings, tmp_path, migrate=True)
    assert caught.value.reason is Reason.UNREACHABLE


TERMINATE = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'mlxd' AND datname = %s"


@pytest.mark.parametrize("storage_settings", ["postgres"], indirect=True)
class TestPostgres:
    @pytest.fixture
    def storage_settings(self, postgres_url: str) -> StorageSettings:
        return StorageSettings(url=postgres_url, busy_timeout=BUSY_TIMEOUT)

    @pytest.fixture
    def terminate(self, postgres_server: str, postgres_url: str) -> Any:
        def now() -> None:
            import psycopg

            name = postgres_url.partition("@/")[2].partition("?")[0]
            with psycopg.connect(host=postgres_server, user="mlxd", dbname="postgres", autocommit=True) as server:
                assert server.execute(TERMINATE, [name]).rowcount == 2

        return now

    def test_connections_that_the_server_has_closed_are_made_anew(self, database: Database, terminate: Any) -> None:
        database.write(bump).result()
        database.read(revision).result()
        terminate()
        database.write(bump).result()
        assert database.read(revision).result() == 2

    def test_a_connection_that_breaks_within_a_transaction_loses_it_and_says_so(
        self, database: Database, terminate: Any
    ) -> None:
        database.read(revision).result()

        def work(connection: Connection) -> None:
            bump(connection)
            terminate()
            audit.append(connection, "x", actor="x", at=1.0)

        assert reason_of(database.write(work)) is Reason.UNREACHABLE
        assert database.read(revision).result() == 0
        database.write(bump).result()
        assert database.read(revision).result() == 1


class DriverError(Exception):
    """As psycopg's: `sqlstate` is None where there is no server that could tell."""

    def __init__(self, sqlstate: str | None) -> None:
        super().__init__("said the driver")
        self.sqlstate = sqlstate


@pytest.mark.parametrize(
    ("sqlstate", "reason"),
    {
        None: Reason.UNREACHABLE,
        "08006": Reason.UNREACHABLE,
        "57P03": Reason.UNREACHABLE,
        "53300": Reason.UNREACHABLE,
        "28P01": Reason.UNREACHABLE,
        "55P03": Reason.LOCKED,
        "57014": Reason.LOCKED,
        "40P01": Reason.LOCKED,
        "53100": Reason.FULL,
        "25006": Reason.READ_ONLY,
        "42501": Reason.READ_ONLY,
        "XX001": Reason.DAMAGED,
        "42P01": None,
        "22021": None,
    }.items(),
)
def test_what_postgresql_says_becomes_a_reason(sqlstate: str | None, reason: Reason | None) -> None:
    failure = failure_of(OperationalError("SELECT 1", {}, DriverError(sqlstate)))
    assert (failure and failure.reason) == reason


def test_a_duplicate_is_no_failure_of_storage() -> None:
    assert failure_of(IntegrityError("INSERT", {}, DriverError("23505"))) is None
    assert failure_of(ValueError("no database at all")) is None


def test_every_failure_is_a_503_that_names_nothing_private() -> None:
    for reason in Reason:
        failure = StorageFailure(reason)
        assert (failure.status, failure.code, failure.retry_after) == (503, "storage_unavailable", 1.0)
        assert failure.message.startswith("The storage")
