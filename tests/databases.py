"""Both databases for storage's tests: SQLite files, and a PostgreSQL server that the session starts and stops."""

import itertools
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from sqlalchemy import Connection

from service.settings import StorageSettings
from service.storage import audit, keys
from service.storage.database import Database
from service.storage.keys import KeyRecord
from service.storage.telemetry import Telemetry

BUSY_TIMEOUT = 0.3
PATIENT = 30.0
"""A busy_timeout for tests in which somebody gets the lock in the end."""

OpenDatabase = Callable[..., Database]


def record(number: int, *, name: str = "n") -> KeyRecord:
    return KeyRecord(
        kid=f"k{number}",
        principal=f"key:k{number}",
        name=name,
        tenant="t",
        scopes=frozenset({"inference"}),
        plan="default",
        hash=bytes(32),
        pepper_version=1,
        created_at=float(number),
    )


def create(number: int, *, name: str = "n") -> Callable[[Connection], None]:
    """A key and its audit entry, in one transaction."""

    def work(connection: Connection) -> None:
        keys.insert(connection, record(number, name=name))
        audit.append(connection, "key_created", actor="test", at=float(number), detail={"kid": f"k{number}"})

    return work


def postgres_programs() -> Path | None:
    """The folder of `initdb` and `pg_ctl`: Debian keeps them out of PATH."""
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"), key=lambda path: int(path.parts[4]))
    found = debian[-1] if debian else shutil.which("pg_ctl")
    return Path(found).parent if found else None


def _as_other_user() -> tuple[list[str], int | None]:
    """How to start a program as somebody but root, whom PostgreSQL refuses, and that user's id."""
    if os.geteuid() != 0:
        return [], None
    user = pwd.getpwnam("nobody")
    with suppress(KeyError):
        user = pwd.getpwnam("postgres")
    return ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"], user.pw_uid


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """The folder of a running server's socket; it listens nowhere else. A new cluster, without fsync."""
    from tests.conftest import require

    programs = postgres_programs()
    require(programs, "PostgreSQL (apt-get install postgresql)")
    assert programs is not None
    prefix, owner = _as_other_user()
    # Not below pytest's folders: the other user may not enter those, and a socket's path must be short.
    folder = Path(tempfile.mkdtemp(prefix="mlxd-pg-"))
    if owner is not None:
        os.chown(folder, owner, -1)

    def call(program: str, *arguments: str) -> None:
        command = [*prefix, str(programs / program), "-D", str(folder / "data"), *arguments]
        # An environment of its own: with OpenBLAS preloaded initdb aborts.
        done = subprocess.run(
            command, cwd="/", env={"LC_ALL": "C"}, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        log = folder / "log"
        assert done.returncode == 0, done.stderr + (log.read_text() if log.exists() else "")

    try:
        call("initdb", "--username=mlxd", "--auth=trust", "--encoding=UTF8", "--no-locale", "--no-sync")
        options = f"-F -c listen_addresses='' -c unix_socket_directories='{folder}'"
        call("pg_ctl", "start", "--wait", "--log", str(folder / "log"), "--options", options)
        try:
            yield str(folder)
        finally:
            call("pg_ctl", "stop", "--wait", "--mode=immediate")
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def _postgres_names() -> Iterator[str]:
    return (f"test{number}" for number in itertools.count())


@pytest.fixture
def postgres_url(postgres_server: str, _postgres_names: Iterator[str]) -> Iterator[str]:
    """A new, empty database on the server."""
    import psycopg

    name = next(_postgres_names)
    with psycopg.connect(host=postgres_server, user="mlxd", dbname="postgres", autocommit=True) as server:
        server.execute(f"CREATE DATABASE {name}".encode())
        yield f"postgresql://mlxd@/{name}?host={postgres_server}"
        server.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'database' / 'mlxd.db'}"


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str:
    """The URL of an empty database, of each kind in turn."""
    name = "sqlite_url" if request.param == "sqlite" else "postgres_url"
    url: str = request.getfixturevalue(name)
    return url


@pytest.fixture
def storage_settings(database_url: str) -> StorageSettings:
    return StorageSettings(url=database_url, busy_timeout=BUSY_TIMEOUT)


@pytest.fixture
def open_database(storage_settings: StorageSettings, tmp_path: Path) -> Iterator[OpenDatabase]:
    """`open_database()` opens (and migrates) the database of `database_url`; closed at the end."""
    opened: list[Database] = []

    def open_it(
        *, migrate: bool = True, busy_timeout: float = BUSY_TIMEOUT, telemetry: Telemetry | None = None
    ) -> Database:
        settings = storage_settings.model_copy(update={"busy_timeout": busy_timeout})
        opened.append(Database.open(settings, tmp_path, migrate=migrate, telemetry=telemetry))
        return opened[-1]

    yield open_it
    for database in opened:
        database.close()


@pytest.fixture
def database(open_database: OpenDatabase) -> Database:
    return open_database()
