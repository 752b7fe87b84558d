"""What lies in deploy/launchd is what the code makes, and the script for a Mac is sound as far as that shows here."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from service.launchd import newsyslog
from service.launchd.layout import Layout
from service.launchd.plist import Job
from service.settings import Settings
from tests.conftest import ROOT

FOLDER = ROOT / "deploy/launchd"
SCRIPT = FOLDER / "acceptance.sh"


def test_the_plist_is_what_render_prints() -> None:
    assert (FOLDER / "mlxd.plist").read_bytes() == Job.of(Layout.daemon(), Settings.load(None)).render()


def test_the_rotation_is_what_install_writes() -> None:
    assert (FOLDER / "newsyslog.conf").read_text("utf-8") == newsyslog.lines(Layout.daemon())


def test_every_rotated_file_has_an_owner_a_mode_a_count_a_size_and_signals_nobody() -> None:
    lines = [line.split() for line in newsyslog.lines(Layout.daemon()).splitlines() if not line.startswith("#")]
    assert [fields[0] for fields in lines] == ["/var/log/mlxd/mlxd.log", "/var/log/mlxd/crash.log"]
    assert {tuple(fields[1:4]) + tuple(fields[5:]) for fields in lines} == {("_mlxd:_mlxd", "640", "10", "*", "N")}


def test_the_script_is_posix_shell(need_command: Callable[[str, str], str]) -> None:
    subprocess.run(["sh", "-n", str(SCRIPT)], check=True, timeout=30)
    shellcheck = need_command("shellcheck", "shellcheck")
    found = subprocess.run([shellcheck, "-s", "sh", str(SCRIPT)], check=False, capture_output=True, timeout=60)
    assert found.stdout == b""


def test_the_scripts_plan_names_every_check_and_does_nothing(tmp_path: Path) -> None:
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "TMPDIR": str(tmp_path), "MLXD": "/not/there"}
    done = subprocess.run(
        [str(SCRIPT), "--plan"], env=environment, cwd=tmp_path, check=True, capture_output=True, text=True, timeout=30
    )
    planned = re.findall(r"^would try: (.+)$", done.stdout, re.MULTILINE)
    assert planned == re.findall(r"^ *(?:if )?try '([^']+)'", SCRIPT.read_text("utf-8"), re.MULTILINE)
    assert len(planned) > 10
    assert done.stdout.count("\n") == len(planned)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_flag_prints_the_usage_and_does_nothing(tmp_path: Path) -> None:
    done = subprocess.run([str(SCRIPT), "--help"], check=False, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (2, "")
    assert "sudo deploy/launchd/acceptance.sh" in done.stderr
    assert "set -u" not in done.stderr


@pytest.mark.skipif(sys.platform == "darwin", reason="NOT TESTED HERE: on a Mac it would go on")
def test_elsewhere_than_on_a_mac_it_fails_at_once() -> None:
    done = subprocess.run([str(SCRIPT)], check=False, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert done.stdout.startswith("FAIL  this is a Mac")
    assert "pass" not in done.stdout
