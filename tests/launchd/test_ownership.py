"""Who could change what runs: refused, whatever way leads there."""

import os
from pathlib import Path

import pytest

from service.launchd.ownership import changeable, changeable_below

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="NOT TESTED HERE: needs root, to give files away")

SOMEBODY = 65534


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder and a file as root would have them."""
    place = tmp_path / "place"
    (place / "env/bin").mkdir(parents=True)
    for each in (place, place / "env", place / "env/bin"):
        each.chmod(0o755)
    (place / "env/bin/python").write_text("")
    (place / "env/bin/python").chmod(0o755)
    return place


def found(path: Path, place: Path) -> list[str]:
    return [each.replace(f"{place}/", "") for each in changeable(path, below=place)]


def test_what_only_root_can_write_is_fine(place: Path) -> None:
    assert found(place / "env/bin/python", place) == []
    assert list(changeable_below(place)) == []


@pytest.mark.parametrize("part", ["env", "env/bin", "env/bin/python"])
def test_a_component_of_another_owner_is_told(place: Path, part: str) -> None:
    os.chown(place / part, SOMEBODY, 0)
    assert found(place / "env/bin/python", place) == [f"{part}: belongs to user {SOMEBODY}"]


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o1777])
def test_a_folder_that_others_may_write_is_told_sticky_or_not(place: Path, mode: int) -> None:
    (place / "env").chmod(mode)
    assert found(place / "env/bin/python", place) == [f"env: its group or others may write (mode {mode:o})"]


def test_a_folder_that_the_account_may_not_enter_is_told(place: Path) -> None:
    (place / "env").chmod(0o700)
    assert found(place / "env/bin/python", place) == ["env: the service's account may not enter"]


def test_the_way_of_a_link_is_looked_at_too(place: Path) -> None:
    (place / "home").mkdir()
    os.chown(place / "home", SOMEBODY, 0)
    (place / "home/python").write_text("")
    (place / "env/bin/link").symlink_to("../../home/python")
    assert found(place / "env/bin/link", place) == [f"env/bin/../../home: belongs to user {SOMEBODY}"]


def test_dots_lead_nowhere_else(place: Path) -> None:
    (place / "home").mkdir(mode=0o777)
    (place / "home").chmod(0o777)
    assert found(place / "env/../home", place) == ["env/../home: its group or others may write (mode 777)"]


def test_what_is_not_there_is_told(place: Path) -> None:
    assert found(place / "nothing", place) == ["nothing: No such file or directory"]


def test_every_file_inside_is_looked_at(place: Path) -> None:
    (place / "env/bin/python").chmod(0o777)
    assert [each.replace(f"{place}/", "") for each in changeable_below(place)] == [
        "env/bin/python: its group or others may write (mode 777)"
    ]


def test_the_account_may_own_what_it_is_allowed_to(place: Path) -> None:
    os.chown(place / "env/bin/python", SOMEBODY, 0)
    assert list(changeable(place / "env/bin/python", owners=(0, SOMEBODY), below=place)) == []
