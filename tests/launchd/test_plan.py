"""Plans and their steps: printed first, the same twice, and all or nothing."""

import os
import stat
import subprocess
from pathlib import Path

import pytest

from service.launchd.files import Built, File, Folder, Gone, Link
from service.launchd.plan import Act, Plan, PlanFailed, Step, StepFailed


def tree(folder: Path) -> dict[str, tuple[str, int, bytes | None]]:
    """Everything below `folder`: kind or target, mode, bytes."""
    found: dict[str, tuple[str, int, bytes | None]] = {}
    for each in sorted(folder.rglob("*")):
        if each.is_symlink():
            found[str(each.relative_to(folder))] = (f"-> {each.readlink()}", 0, None)
        else:
            mode = stat.S_IMODE(each.stat().st_mode)
            found[str(each.relative_to(folder))] = ("", mode, None if each.is_dir() else each.read_bytes())
    return found


def write(path: Path) -> None:
    (path / "inside").write_text("built")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    place = tmp_path / "place"
    (place / "old/deep").mkdir(parents=True)
    (place / "old/deep/file").write_text("kept")
    (place / "changed").write_text("before")
    (place / "changed").chmod(0o600)
    (place / "link").symlink_to("old")
    (place / "narrow").mkdir(mode=0o700)
    return place


def steps(place: Path) -> list[Step]:
    return [
        Folder(place / "new/deeper", mode=0o750),
        Folder(place / "narrow"),
        File(place / "new/deeper/file", lambda: b"one", mode=0o640),
        File(place / "changed", lambda: b"after"),
        Link(place / "link", lambda: Path("new")),
        Link(place / "second", lambda: Path("new")),
        Built(place / "built", write, what="something"),
        Gone(place / "old"),
        Gone(place / "not-there"),
    ]


def test_a_plan_does_its_steps_and_the_second_time_has_nothing_to_do(place: Path) -> None:
    plan = Plan(tuple(steps(place)))
    told: list[str] = []
    plan.run(told.append)
    after = tree(place)
    assert told == [f"+ {step.describe()}" for step in plan.steps[:-1]]
    assert after["new/deeper"] == ("", 0o750, None)
    assert after["new/deeper/file"] == ("", 0o640, b"one")
    assert after["changed"] == ("", 0o644, b"after")
    assert (after["link"][0], after["second"][0]) == ("-> new", "-> new")
    assert after["narrow"] == ("", 0o755, None)
    assert "built/inside" in after
    assert not [name for name in after if name.startswith(("old", ".")) or "removed" in name or "partial" in name]
    again = Plan(tuple(steps(place)))
    assert again.nothing_to_do
    assert all(line.startswith("= ") for line in again.lines())
    again.run(pytest.fail)
    assert tree(place) == after


def test_a_printed_plan_touches_nothing(place: Path) -> None:
    before = tree(place)
    lines = Plan(tuple(steps(place))).lines()
    assert [line[0] for line in lines] == ["+"] * 8 + ["="]
    assert tree(place) == before


@pytest.mark.parametrize("number", range(9))
def test_a_step_that_fails_undoes_all_before_it(place: Path, number: int) -> None:
    def fail() -> None:
        raise StepFailed("no luck")

    before = tree(place)
    planned = steps(place)
    planned.insert(number, Act("fail", fail))
    told: list[str] = []
    with pytest.raises(PlanFailed, match="no luck") as failed:
        Plan(tuple(planned)).run(told.append)
    assert failed.value.left == ()
    assert tree(place) == before
    undone = [line.removeprefix("- undo: ") for line in told if line.startswith("- undo: ")]
    done = [line.removeprefix("+ ") for line in told if line.startswith("+ ")]
    assert undone == done[::-1]


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), subprocess.TimeoutExpired("x", 1), KeyboardInterrupt()]
)
def test_whatever_goes_wrong_is_undone(place: Path, error: BaseException) -> None:
    def fail() -> None:
        raise error

    before = tree(place)
    with pytest.raises(PlanFailed):
        Plan((*steps(place), Act("fail", fail))).run(lambda _: None)
    assert tree(place) == before


def test_a_build_that_fails_half_way_leaves_nothing(place: Path) -> None:
    def build(draft: Path) -> None:
        write(draft)
        raise OSError(28, "No space left on device")

    before = tree(place)
    with pytest.raises(PlanFailed, match="No space left"):
        Plan((Built(place / "built", build, what="something"),)).run(lambda _: None)
    assert tree(place) == before


def test_what_a_killed_run_left_half_built_is_made_anew(place: Path) -> None:
    (place / ".built.partial").mkdir()
    (place / ".built.partial/rest").write_text("")
    Plan((Built(place / "built", write, what="something"),)).run(lambda _: None)
    assert sorted(each.name for each in (place / "built").iterdir()) == ["inside"]


def test_what_cannot_be_undone_is_told_and_the_rest_is_undone_all_the_same() -> None:
    undone: list[str] = []

    def fail() -> None:
        raise StepFailed("no luck")

    def stuck() -> None:
        raise StepFailed("stuck")

    planned = (
        Act("first", lambda: None, lambda: undone.append("first")),
        Act("second", lambda: None, stuck),
        Act("third", fail),
    )
    with pytest.raises(PlanFailed) as failed:
        Plan(planned).run(lambda _: None)
    assert failed.value.left == ("second: stuck",)
    assert undone == ["first"]


def test_files_get_their_owner(place: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("NOT TESTED HERE: needs root")
    step = File(place / "changed", lambda: b"after", owner=lambda: (65534, 65534))
    step.apply()
    assert (place / "changed").stat().st_uid == 65534
    assert step.done()
    step.undo()
    assert (place / "changed").stat().st_uid == 0
