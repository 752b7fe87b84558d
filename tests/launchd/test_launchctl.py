"""What launchctl and dscl are asked, and what is made of their answers. Their output here is as people reported it."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from service.launchd.launchctl import Dscl, Launchctl, LaunchdError, Ran, Seen, parse, run
from service.launchd.layout import Account

PRINTED = """\
system/mlxd = {
\tactive count = 1
\tpath = /Library/LaunchDaemons/mlxd.plist
\ttype = LaunchDaemon
\tstate = running

\tprogram = /Library/Application Support/mlxd/current/env/bin/python
\targuments = {
\t\tstate = not this one
\t}
\truns = 3
\tpid = 4711
\timmediate reason = speculative
\tlast exit code = 70: EX_SOFTWARE
\tspawn type = interactive (4)
}
"""


class Recorder:
    """Answers each command with what is scripted for its first words, else with success."""

    def __init__(self, **answers: list[Ran]) -> None:
        self.asked: list[str] = []
        self._answers = answers

    def __call__(self, command: Sequence[str], timeout: float) -> Ran:
        self.asked.append(" ".join(command))
        scripted = next((self._answers[word] for word in command if word in self._answers), [])
        return scripted.pop(0) if len(scripted) > 1 else (scripted or [Ran(0, "")])[0]


def test_print_is_read_for_a_few_words() -> None:
    assert parse(PRINTED) == Seen("running", 4711, 3, 70)
    assert parse("") == Seen(None, None, None, None)
    assert parse("\tstate = not running\n\tlast exit code = (never exited)\n") == Seen("not running")


def test_down_for_good_is_an_end_with_success() -> None:
    assert Seen("not running", None, 1, 0).down_for_good
    assert not Seen("running", 4711, 2, 0).down_for_good
    assert not Seen("not running", None, 1, 70).down_for_good
    assert not Seen("not running", None, 0, 0).down_for_good


def test_a_job_that_is_not_loaded_is_none() -> None:
    recorder = Recorder(print=[Ran(113, 'Could not find service "mlxd" in domain for system\n')])
    assert Launchctl("system", "mlxd", run=recorder).look() is None
    assert recorder.asked == ["/bin/launchctl print system/mlxd"]


def test_the_verbs_are_launchctls_own_and_none_is_deprecated() -> None:
    recorder = Recorder()
    launchd = Launchctl("gui/501", "mlxd", run=recorder)
    launchd.bootstrap(Path("/x/mlxd.plist"))
    launchd.start()
    launchd.start(kill=True)
    launchd.signal("HUP")
    assert recorder.asked == [
        "/bin/launchctl enable gui/501/mlxd",
        "/bin/launchctl bootstrap gui/501 /x/mlxd.plist",
        "/bin/launchctl kickstart gui/501/mlxd",
        "/bin/launchctl kickstart -k gui/501/mlxd",
        "/bin/launchctl kill SIGHUP gui/501/mlxd",
    ]


def test_bootout_waits_until_the_job_is_gone() -> None:
    recorder = Recorder(bootout=[Ran(37, "Operation already in progress")], print=[Ran(0, PRINTED), Ran(113, "")])
    slept: list[float] = []
    Launchctl("system", "mlxd", run=recorder, clock=lambda: 0.0, sleep=slept.append).bootout(80)
    assert [line.split()[1] for line in recorder.asked] == ["bootout", "print", "print"]
    assert len(slept) == 1


def test_bootout_of_what_is_not_loaded_is_harmless() -> None:
    recorder = Recorder(bootout=[Ran(3, "No such process")], print=[Ran(113, "")])
    Launchctl("system", "mlxd", run=recorder).bootout(80)


def test_a_job_that_does_not_go_is_told() -> None:
    moments = iter([0.0, 40.0, 81.0])
    recorder = Recorder(print=[Ran(0, PRINTED)])
    launchd = Launchctl("system", "mlxd", run=recorder, clock=lambda: next(moments), sleep=lambda _: None)
    with pytest.raises(LaunchdError, match="still there"):
        launchd.bootout(80)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (125, "an agent needs somebody who is logged in on this Mac's screen"),
        (5, "loaded already"),
        (1, "sudo"),
        (99, "launchctl error 99"),
    ],
)
def test_a_refusal_is_explained(code: int, said: str) -> None:
    recorder = Recorder(bootstrap=[Ran(code, f"Bootstrap failed: {code}: Domain does not support specified action")])
    with pytest.raises(LaunchdError, match=said):
        Launchctl("gui/501", "mlxd", run=recorder).bootstrap(Path("/x"))


def test_a_command_that_is_not_here_is_told(tmp_path: Path) -> None:
    with pytest.raises(LaunchdError, match="this is not macOS"):
        run([str(tmp_path / "launchctl")], 1)


def test_a_command_that_does_not_end_is_told() -> None:
    with pytest.raises(LaunchdError, match=r"no end after 0\.01 s"):
        run(["sleep", "5"], 0.01)


def test_an_account_gets_an_id_that_neither_users_nor_groups_have_and_no_way_in() -> None:
    recorder = Recorder(**{"-list": [Ran(0, "_a   350\nroot   0\nme   501\n"), Ran(0, "_b    351\n")]})
    Dscl(run=recorder).create(Account("_mlxd", "_mlxd"))
    assert "/usr/bin/dscl . -create /Users/_mlxd UniqueID 352" in recorder.asked
    assert "/usr/bin/dscl . -create /Groups/_mlxd PrimaryGroupID 352" in recorder.asked
    assert "/usr/bin/dscl . -create /Users/_mlxd UserShell /usr/bin/false" in recorder.asked
    assert "/usr/bin/dscl . -create /Users/_mlxd Password *" in recorder.asked


def test_without_a_free_id_no_account_is_made() -> None:
    taken = "".join(f"_{number} {number}\n" for number in Dscl.FREE_IDS)
    recorder = Recorder(**{"-list": [Ran(0, taken), Ran(0, "")]})
    with pytest.raises(LaunchdError, match="no free id"):
        Dscl(run=recorder).create(Account("_mlxd", "_mlxd"))
    assert not [line for line in recorder.asked if "-create" in line]


def test_an_account_is_deleted_as_far_as_it_is_there() -> None:
    recorder = Recorder(**{"-read": [Ran(0, ""), Ran(56, "eDSRecordNotFound")]})
    Dscl(run=recorder).delete(Account("_mlxd", "_mlxd"))
    assert [line for line in recorder.asked if "-delete" in line] == ["/usr/bin/dscl . -delete /Users/_mlxd"]


def test_who_has_no_account_here_has_no_ids() -> None:
    assert Dscl().ids(Account("_nobody_here", "_nobody_here")) is None


def test_dscls_refusal_is_told() -> None:
    with pytest.raises(LaunchdError, match="eDSPermissionError"):
        Dscl(run=Recorder(**{"-list": [Ran(40, "eDSPermissionError")]})).create(Account("_mlxd", "_mlxd"))
