"""Where the database may be, and how its file is made."""

import os
import sqlite3
import stat
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from service.settings import ConfigurationError, StorageSettings
from service.storage import engines, location
from service.storage.failures import Reason, StorageFailure
from service.storage.location import filesystem_of, locate

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def refusal(settings: StorageSettings, state_dir: Path) -> str:
    with pytest.raises(ConfigurationError) as caught:
        locate(settings, state_dir, create=True)
    return str(caught.value)


def sqlite(path: Path) -> StorageSettings:
    return StorageSettings(url=f"sqlite:///{path}")


def test_by_default_it_is_a_private_file_in_a_private_state_directory(tmp_path: Path) -> None:
    state = tmp_path / "a" / "state"
    found = locate(StorageSettings(), state, create=True)
    assert found.file == state / "mlxd.db"
    assert (mode(state), mode(found.file)) == (0o700, 0o600)
    assert [path.name for path in state.iterdir()] == ["mlxd.db"]
    with closing(sqlite3.connect(found.file)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_the_umask_does_not_matter(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        found = locate(StorageSettings(), tmp_path / "state", create=True)
    finally:
        os.umask(before)
    assert found.file is not None
    assert (mode(found.file.parent), mode(found.file)) == (0o700, 0o600)


def test_an_open_state_directory_and_file_of_ours_are_closed(tmp_path: Path) -> None:
    found = locate(StorageSettings(), tmp_path, create=True)
    assert found.file is not None
    tmp_path.chmod(0o755)
    found.file.chmod(0o644)
    assert locate(StorageSettings(), tmp_path, create=False) == found
    assert (mode(tmp_path), mode(found.file)) == (0o700, 0o600)


def test_what_is_there_is_not_made_anew(tmp_path: Path) -> None:
    found = locate(StorageSettings(), tmp_path, create=True)
    assert found.file is not None
    with closing(sqlite3.connect(found.file)) as connection:
        connection.execute("CREATE TABLE t (x)")
        assert locate(StorageSettings(), tmp_path, create=True) == found
        assert connection.execute("SELECT count(*) FROM t").fetchone() == (0,)


def test_of_two_that_make_it_one_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one comes between the look and the making."""
    file = tmp_path / "mlxd.db"

    def link(self: Path, target: Path) -> None:
        file.write_bytes(b"the other's")
        os.link(target, self)

    monkeypatch.setattr(Path, "hardlink_to", link)
    assert locate(StorageSettings(), tmp_path, create=True).file == file
    assert file.read_bytes() == b"the other's"
    assert [path.name for path in tmp_path.iterdir()] == ["mlxd.db"]


def test_nothing_is_made_unless_asked_for(tmp_path: Path) -> None:
    with pytest.raises(StorageFailure, match="run: mlxd db migrate") as caught:
        locate(StorageSettings(), tmp_path / "state", create=False)
    assert caught.value.reason is Reason.UNREACHABLE
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_the_operators_own_is_not_changed_but_must_be_closed(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir(mode=0o750)
    assert (
        refusal(sqlite(folder / "x.db"), tmp_path)
        == f"{folder}: holds the database and is open to others; chmod 700 it"
    )
    assert mode(folder) == 0o750
    folder.chmod(0o700)
    assert locate(sqlite(folder / "x.db"), tmp_path, create=True).file == folder / "x.db"


def a_link(file: Path) -> None:
    file.with_name("elsewhere").touch(0o600)
    file.symlink_to(file.with_name("elsewhere"))


def a_dangling_link(file: Path) -> None:
    file.symlink_to(file.with_name("nowhere"))


@pytest.mark.parametrize("make", [a_link, a_dangling_link, Path.mkdir, os.mkfifo])
def test_what_is_not_a_plain_file_is_refused(tmp_path: Path, make: Any) -> None:
    make(tmp_path / "mlxd.db")
    assert "must be a plain file" in refusal(StorageSettings(), tmp_path)


def test_a_folder_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("real")
    assert "cannot be used as the database" in refusal(sqlite(tmp_path / "link" / "x.db"), tmp_path)


@needs_root
def test_a_file_of_another_user_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mlxd.db"
    file.touch(0o600)
    os.chown(file, 12345, -1)
    assert refusal(StorageSettings(), tmp_path) == f"{file}: must belong to the user that runs mlxd"


@needs_root
def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir(mode=0o700)
    os.chown(folder, 12345, -1)
    assert refusal(sqlite(folder / "x.db"), tmp_path) == f"{folder}: must belong to the user that runs mlxd"


def test_a_full_or_broken_disk_is_told_when_the_file_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Path) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr("service.storage.location.sqlite3.connect", fail)
    with pytest.raises(StorageFailure):
        locate(StorageSettings(), tmp_path, create=True)
    assert list(tmp_path.iterdir()) == []


WRONG_URLS = {
    "relative": ("sqlite:///x.db", "absolute path"),
    "in memory": ("sqlite://", "absolute path"),
    "in memory by name": ("sqlite:///:memory:", "absolute path"),
    "with options": ("sqlite:////tmp/x.db?mode=ro", "absolute path"),
    "another database": ("mysql://localhost/x", "must begin with"),
    "another driver": ("postgresql+asyncpg://localhost/x", "must begin with"),
    "no URL": ("over there", "not a URL"),
    "a port that is none": ("postgresql://localhost:x/y", "not a URL"),
    "a password": ("postgresql://u:hunter2@localhost/x", "holds a password"),
    "a password in the query": ("postgresql://localhost/x?password=hunter2", "holds a password"),
}


@pytest.mark.parametrize(("url", "why"), WRONG_URLS.values(), ids=WRONG_URLS.keys())
def test_a_url_that_cannot_be_used_is_refused_without_being_repeated(url: str, why: str, tmp_path: Path) -> None:
    said = refusal(StorageSettings(url=url), tmp_path)
    assert said.startswith("storage.url: ")
    assert why in said
    assert "hunter2" not in said


def url_file(tmp_path: Path, content: bytes, permissions: int = 0o600) -> StorageSettings:
    file = tmp_path / "url"
    file.write_bytes(content)
    file.chmod(permissions)
    return StorageSettings(url_file=file)


def test_a_url_with_a_password_comes_from_a_file_and_is_never_shown(tmp_path: Path) -> None:
    settings = url_file(tmp_path, b" postgresql://u:hunter2@db.example/x \n")
    found = locate(settings, tmp_path, create=True)
    assert found.url.password == "hunter2"
    assert found.url.drivername == "postgresql+psycopg"
    assert found.file is None
    assert "hunter2" not in f"{found} {found!r}"


WRONG_FILES = {
    "open to others": (b"sqlite:////x", 0o640, "chmod 600"),
    "not text": (b"\xff\xfe", 0o600, "is not UTF-8"),
    "not a URL": (b"hunter2", 0o600, "storage.url_file: not a URL"),
    "too long": (b"x" * 5000, 0o600, "at most 4096 bytes"),
}


@pytest.mark.parametrize(("content", "permissions", "why"), WRONG_FILES.values(), ids=WRONG_FILES.keys())
def test_a_file_of_a_url_that_cannot_be_used_is_refused(
    content: bytes, permissions: int, why: str, tmp_path: Path
) -> None:
    said = refusal(url_file(tmp_path, content, permissions), tmp_path)
    assert why in said
    assert "hunter2" not in said


def test_a_missing_file_of_a_url_is_named(tmp_path: Path) -> None:
    assert (
        refusal(StorageSettings(url_file=tmp_path / "no"), tmp_path) == f"storage.url_file: there is no {tmp_path}/no"
    )


def test_one_of_url_and_url_file_is_enough(tmp_path: Path) -> None:
    settings = url_file(tmp_path, b"sqlite:////x").model_copy(update={"url": "sqlite:////y"})
    assert "not both" in refusal(settings, tmp_path)


def test_without_psycopg_the_operator_is_told_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "psycopg", None)
    found = locate(StorageSettings(url="postgresql://localhost/x"), tmp_path, create=True)
    with pytest.raises(ConfigurationError, match=r"pip install 'mlxd\[postgres\]'"):
        engines.reader(found, busy_timeout=1)


MOUNTS = r"""22 1 254:0 / / rw,relatime - ext4 /dev/vda rw
23 22 0:40 / /srv/share rw shared:1 master:2 - nfs4 server:/export rw
24 22 0:41 / /srv/share/local rw - xfs /dev/vdb rw
25 22 0:42 / /srv/my\040disk rw - fuse.sshfs host: rw
26 22 0:43 / /srv/over rw - ext4 /dev/vdc rw
27 26 0:44 / /srv/over rw - cifs //server/share rw
"""


@pytest.mark.parametrize(
    ("folder", "kind"),
    {
        "/srv": "ext4",
        "/srv/share": "nfs4",
        "/srv/share/deep/er": "nfs4",
        "/srv/shared": "ext4",
        "/srv/share/local/x": "xfs",
        "/srv/my disk/x": "fuse.sshfs",
        "/srv/over/x": "cifs",
    }.items(),
)
def test_the_file_system_is_that_of_the_innermost_and_latest_mount(folder: str, kind: str, tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS)
    assert filesystem_of(Path(folder), mounts) == kind


def test_where_the_kernel_tells_nothing_nothing_is_refused(tmp_path: Path) -> None:
    assert filesystem_of(tmp_path, tmp_path / "none") is None
    location._refuse_network(tmp_path, tmp_path / "none")


@pytest.mark.parametrize("kind", ["nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "fuse.sshfs", "fuse.mount-s3", "fuse"])
def test_a_network_file_system_is_refused(kind: str, tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"22 1 0:9 / / rw - {kind} somewhere rw\n")
    with pytest.raises(ConfigurationError, match=f"is on {kind}, where SQLite's locks do not hold"):
        location._refuse_network(tmp_path, mounts)


@pytest.mark.parametrize("kind", ["ext4", "xfs", "fuseblk", "btrfs", "zfs", "tmpfs", "overlay", "apfs"])
def test_a_local_file_system_is_not(kind: str, tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"22 1 0:9 / / rw - {kind} somewhere rw\n")
    location._refuse_network(tmp_path, mounts)
