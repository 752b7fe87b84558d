"""Every old version arrives at the tables of the schema; each step is made once, whole, and in one direction."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Engine

from service.settings import StorageSettings
from service.storage import engines
from service.storage.failures import Reason, StorageFailure
from service.storage.location import Location, locate
from service.storage.migrations import MIGRATIONS, migrate, version
from service.storage.revisions import revision
from service.storage.schema import METADATA, SCHEMA_VERSION

THREE: Any = (
    ("CREATE TABLE first (x TEXT, y {bytes})",),
    ("CREATE TABLE second (x TEXT)", "INSERT INTO second VALUES ('once')"),
    ("ALTER TABLE first ADD COLUMN z TEXT",),
)
BROKEN: Any = (THREE[0], ("CREATE TABLE second (x TEXT)", "INSERT INTO nowhere VALUES (1)"))


def clock() -> float:
    return 1.5


@pytest.fixture
def location(storage_settings: StorageSettings, tmp_path: Path) -> Location:
    return locate(storage_settings, tmp_path, create=True)


@pytest.fixture
def engine(location: Location) -> Iterator[Engine]:
    with engines.used(engines.writer(location, busy_timeout=10)) as engine:
        yield engine


def shape(engine: Engine) -> dict[str, Any]:
    """Everything that can be read off a database about its tables."""
    with engine.begin() as connection:
        found = sa.inspect(connection)
        return {
            name: {
                "columns": [
                    (column["name"], str(column["type"]), column["nullable"], column["default"])
                    for column in found.get_columns(name)
                ],
                "key": found.get_pk_constraint(name)["constrained_columns"],
                "unique": found.get_unique_constraints(name),
                "foreign": found.get_foreign_keys(name),
                "indexes": found.get_indexes(name),
                "checks": found.get_check_constraints(name),
            }
            for name in sorted(found.get_table_names())
        }


@pytest.mark.parametrize("start", range(len(MIGRATIONS) + 1))
def test_each_old_version_arrives_at_the_tables_of_the_schema(engine: Engine, start: int) -> None:
    migrate(engine, clock=clock, migrations=MIGRATIONS[:start])
    assert migrate(engine, clock=clock) == list(range(start + 1, len(MIGRATIONS) + 1))
    with engine.begin() as connection:
        assert version(connection) == len(MIGRATIONS)
        assert revision(connection) == 0
    arrived = shape(engine)
    with engine.begin() as connection:
        METADATA.drop_all(connection)
        METADATA.create_all(connection)
    assert arrived == shape(engine)
    assert set(arrived) == set(METADATA.tables)


def test_a_current_database_is_left_alone(engine: Engine) -> None:
    migrate(engine, clock=clock)
    assert migrate(engine, clock=clock) == []


def test_steps_are_made_in_their_order_and_written_down(engine: Engine) -> None:
    assert migrate(engine, clock=clock, migrations=THREE[:1]) == [1]
    assert migrate(engine, clock=lambda: 2.5, migrations=THREE) == [2, 3]
    with engine.begin() as connection:
        assert connection.execute(SCHEMA_VERSION.select()).all() == [(1, 1.5), (2, 2.5), (3, 2.5)]
        assert {column["name"] for column in sa.inspect(connection).get_columns("first")} == {"x", "y", "z"}


def test_a_step_that_fails_leaves_the_database_at_the_step_before(engine: Engine) -> None:
    with pytest.raises(sa.exc.DBAPIError):
        migrate(engine, clock=clock, migrations=BROKEN)
    assert set(shape(engine)) == {"first", "schema_version"}
    assert migrate(engine, clock=clock, migrations=THREE) == [2, 3]


def test_there_is_no_way_back(engine: Engine) -> None:
    migrate(engine, clock=clock, migrations=THREE)
    before = shape(engine)
    with pytest.raises(StorageFailure, match="version 3, newer than this mlxd, which knows 1") as caught:
        migrate(engine, clock=clock, migrations=THREE[:1])
    assert caught.value.reason is Reason.SCHEMA
    assert shape(engine) == before


def test_of_those_that_start_at_once_one_makes_each_step(location: Location) -> None:
    together = Barrier(6)

    def start() -> list[int]:
        with engines.used(engines.writer(location, busy_timeout=30)) as engine:
            together.wait(30)
            return list(migrate(engine, clock=clock, migrations=THREE))

    with ThreadPoolExecutor(6) as pool:
        made = [future.result() for future in [pool.submit(start) for _ in range(6)]]
    assert sorted(number for each in made for number in each) == [1, 2, 3]
    with engines.used(engines.reader(location, busy_timeout=1)) as reader, reader.begin() as connection:
        assert connection.execute(sa.text("SELECT * FROM second")).all() == [("once",)]
