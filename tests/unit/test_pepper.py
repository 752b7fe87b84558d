"""The peppers: made once, by one of many; versions that are added and never lost; what is refused."""

from __future__ import annotations

import hashlib
import hmac
import json
import multiprocessing
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from service.auth.pepper import Peppers, pepper_file
from service.settings import AuthSettings, ConfigurationError, write_private

SPAWN = multiprocessing.get_context("spawn")


def stored(path: Path) -> dict[str, str]:
    found = json.loads(path.read_text())
    assert isinstance(found, dict)
    return found


def test_the_first_use_makes_a_0600_file_with_32_random_bytes(tmp_path: Path) -> None:
    path = tmp_path / "state" / "pepper.json"
    peppers = Peppers.open(path)
    assert peppers.current == 1
    assert peppers.versions == {1}
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(bytes.fromhex(stored(path)["1"])) == 32
    assert Peppers.open(tmp_path / "other.json").digest(1, "x") != peppers.digest(1, "x")


def test_a_digest_is_hmac_sha256_and_the_same_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "pepper.json"
    digest = Peppers.open(path, lambda size: b"p" * size).digest(1, "a key")
    assert digest == hmac.new(b"p" * 32, b"a key", hashlib.sha256).digest()
    assert Peppers.open(path).digest(1, "a key") == digest


def test_a_new_version_is_used_from_now_on_and_old_ones_still_verify(tmp_path: Path) -> None:
    path = tmp_path / "pepper.json"
    peppers, running = Peppers.open(path), Peppers.open(path)
    old = peppers.digest(1, "x")
    assert peppers.rotate() == 2
    assert (peppers.current, peppers.digest(1, "x")) == (2, old)
    assert peppers.digest(2, "x") != old
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(KeyError):
        running.digest(2, "x")
    running.reload()
    assert running.digest(2, "x") == peppers.digest(2, "x")


def test_a_reload_that_fails_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "pepper.json"
    peppers = Peppers.open(path)
    known = peppers.digest(1, "x")
    path.unlink()
    with pytest.raises(ConfigurationError, match="is gone"):
        peppers.reload()
    with pytest.raises(ConfigurationError, match="is gone"):
        peppers.rotate()
    assert not path.exists(), "a lost file must not be replaced by one that verifies nothing"
    assert peppers.digest(1, "x") == known


def open_together(path: Path, start: Barrier) -> str:
    start.wait()
    return Peppers.open(path).digest(1, "x").hex()


def rotate_together(path: Path, start: Barrier) -> int:
    start.wait()
    return Peppers.open(path).rotate()


def test_racing_processes_make_one_file_and_lose_no_version(tmp_path: Path) -> None:
    path = tmp_path / "pepper.json"
    with SPAWN.Manager() as manager, SPAWN.Pool(4) as pool:
        start = manager.Barrier(4)
        digests = pool.starmap(open_together, [(path, start)] * 4, chunksize=1)
        versions = pool.starmap(rotate_together, [(path, start)] * 4, chunksize=1)
        pool.close()  # what the end of the block sends would be a signal that coverage waits for
        pool.join()
    assert len(set(digests)) == 1
    assert sorted(versions) == [2, 3, 4, 5]
    assert Peppers.open(path).versions == {1, 2, 3, 4, 5}
    assert Peppers.open(path).digest(1, "x").hex() == digests[0]
    assert [each.name for each in tmp_path.iterdir()] == ["pepper.json"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[]",
        b"nonsense",
        b"\xff\xfe",
        b'{"1": "00"}',
        b'{"1": 7}',
        b'{"x": "%s"}' % (b"00" * 32),
        b'{"0": "%s"}' % (b"00" * 32),
        b'{"1": "%s"}' % (b"zz" * 32),
    ],
)
def test_a_file_without_peppers_is_refused_and_kept(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "pepper.json"
    write_private(path, content, replace=False)
    with pytest.raises(ConfigurationError, match=r"pepper\.json"):
        Peppers.open(path)
    assert path.read_bytes() == content


def test_a_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pepper.json"
    Peppers.open(path)
    path.chmod(0o640)
    with pytest.raises(ConfigurationError, match="chmod 600"):
        Peppers.open(path)


def test_a_link_is_refused_and_what_it_points_to_untouched(tmp_path: Path) -> None:
    (tmp_path / "pepper.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        Peppers.open(tmp_path / "pepper.json")
    assert not (tmp_path / "elsewhere").exists()


def test_the_file_is_in_the_state_directory_unless_configured(tmp_path: Path) -> None:
    assert pepper_file(AuthSettings(), tmp_path) == tmp_path / "pepper.json"
    elsewhere = tmp_path / "secrets" / "p.json"
    assert pepper_file(AuthSettings(pepper_file=elsewhere), tmp_path) == elsewhere
