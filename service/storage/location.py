"""Where the database is: the URL of the settings, and for SQLite a file that is ours alone."""

from __future__ import annotations

import os
import re
import sqlite3
import stat
import tempfile
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from service.settings import ConfigurationError, StorageSettings, read_private
from service.storage.failures import Reason, StorageFailure, failure_of

DEFAULT_NAME = "mlxd.db"
DRIVERS = frozenset({"sqlite", "sqlite+pysqlite", "postgresql", "postgresql+psycopg"})

MOUNTS = Path("/proc/self/mountinfo")
NETWORK = re.compile(r"nfs\d?|cifs|smb\w*|afs|9p|ceph|glusterfs|lustre|gpfs|ocfs2|gfs2|beegfs|fuse(\..+)?")
"""Types of file systems on which SQLite's locks and its shared memory between processes cannot be relied on. FUSE is
refused as a whole, because sshfs, s3fs, rclone and the like cannot be told from a local one by their promise."""


@dataclass(frozen=True, slots=True)
class Location:
    """A database that may be connected to. `file` is None for PostgreSQL."""

    url: URL
    file: Path | None = None

    def __str__(self) -> str:
        return str(self.file or self.url)  # SQLAlchemy hides the password


def locate(settings: StorageSettings, state_dir: Path, *, create: bool, repair: bool = True) -> Location:
    """Find the database, and for SQLite make its folder (0700) and its file (0600) when `create` and there is none.
    What of ours others may read is closed to them; without `repair` it is an error.

    Raises ConfigurationError for a URL that cannot be used and for a file or folder that is not ours alone, and
    StorageFailure when there is no file and none is to be made.
    """
    url = _url(settings, state_dir)
    if url.get_backend_name() != "sqlite":
        return Location(url.set(drivername="postgresql+psycopg"))
    file = Path(url.database or "")
    if not file.is_absolute() or url.query:
        raise ConfigurationError("storage.url: SQLite needs an absolute path and nothing else: sqlite:////path/to/file")
    present = os.path.lexists(file)
    if not present and not create:
        raise StorageFailure(Reason.UNREACHABLE, f"There is no database at {file}; run: mlxd db migrate")
    try:
        _own_folder(file.parent, make=create, make_private=repair and file.parent == state_dir)
        _refuse_network(file.parent)
        if not present:
            _create(file)
        _own_file(file, make_private=repair)
    except OSError as error:
        raise ConfigurationError(f"{file}: cannot be used as the database: {error.strerror}") from None
    return Location(url.set(drivername="sqlite+pysqlite"), file)


def _url(settings: StorageSettings, state_dir: Path) -> URL:
    if settings.url_file is None:
        if not settings.url:
            return URL.create("sqlite", database=str(state_dir / DEFAULT_NAME))
        url = _parse("storage.url", settings.url)
        if url.password is not None or "password" in url.query:
            raise ConfigurationError("storage.url: holds a password; put the URL into a file for storage.url_file")
        return url
    if settings.url:
        raise ConfigurationError("storage.url_file: give it or storage.url, not both")
    try:
        text = read_private(settings.url_file, limit=4096).decode("utf-8").strip()
    except FileNotFoundError:
        raise ConfigurationError(f"storage.url_file: there is no {settings.url_file}") from None
    except UnicodeDecodeError:
        raise ConfigurationError(f"storage.url_file: {settings.url_file} is not UTF-8") from None
    return _parse("storage.url_file", text)


def _parse(key: str, text: str) -> URL:
    """The text may hold a password and is therefore in no message."""
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        raise ConfigurationError(f"{key}: not a URL as SQLAlchemy writes it") from None
    if url.drivername not in DRIVERS:
        raise ConfigurationError(f"{key}: must begin with sqlite:// or postgresql://")
    return url


def _own_folder(folder: Path, *, make: bool, make_private: bool) -> None:
    """SQLite makes further files beside the database: nobody else may enter or write here."""
    if make:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(handle)
        if found.st_uid != os.geteuid():
            raise ConfigurationError(f"{folder}: must belong to the user that runs mlxd")
        if stat.S_IMODE(found.st_mode) & 0o077:
            if not make_private:
                raise ConfigurationError(f"{folder}: holds the database and is open to others; chmod 700 it")
            os.fchmod(handle, 0o700)
    finally:
        os.close(handle)


def _own_file(file: Path, *, make_private: bool) -> None:
    """Looks by name and never opens: closing a second handle would drop the locks of SQLite's own (POSIX)."""
    found = file.lstat()
    if not stat.S_ISREG(found.st_mode):
        raise ConfigurationError(f"{file}: must be a plain file, not a link or anything else")
    if found.st_uid != os.geteuid():
        raise ConfigurationError(f"{file}: must belong to the user that runs mlxd")
    if stat.S_IMODE(found.st_mode) & 0o077:
        if not make_private:
            raise ConfigurationError(f"{file}: is the database and is open to others; chmod 600 it")
        file.chmod(0o600)  # the folder is ours alone, so it is still the file that was looked at


def _create(file: Path) -> None:
    """An empty database in WAL mode, there whole or not at all; of racing processes one wins.

    Switching a database to WAL fails at once when another process has it open, so it is not done in place.
    """
    handle, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)  # 0600
    os.close(handle)
    draft = Path(name)
    try:
        with closing(sqlite3.connect(draft)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
        file.hardlink_to(draft)
    except FileExistsError:
        return
    except sqlite3.Error as error:
        raise failure_of(error) or StorageFailure(Reason.UNREACHABLE) from error
    finally:
        draft.unlink(missing_ok=True)


def _refuse_network(folder: Path, mounts: Path = MOUNTS) -> None:
    """Where the kernel tells (Linux): no network file system. Elsewhere, macOS included, nothing is checked."""
    kind = filesystem_of(folder, mounts)
    if kind is not None and NETWORK.fullmatch(kind):
        raise ConfigurationError(f"{folder}: is on {kind}, where SQLite's locks do not hold; use a local disk")


def filesystem_of(folder: Path, mounts: Path = MOUNTS) -> str | None:
    """The type of the file system that holds `folder`, None where `mounts` (proc_pid_mountinfo(5)) does not exist."""
    try:
        lines = mounts.read_text("utf-8", "surrogateescape").splitlines()
    except FileNotFoundError:
        return None
    place, best, kind = folder.resolve(), -1, None
    for line in lines:
        before, _, after = line.partition(" - ")
        point = Path(re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), before.split(" ")[4]))
        if len(point.parts) >= best and place.is_relative_to(point):  # the last of equal ones lies on top
            best, kind = len(point.parts), after.split(" ")[0]
    return kind
