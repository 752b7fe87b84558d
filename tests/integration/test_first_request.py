"""What `make serve` prints works as it is printed: the banner's line, given to a shell."""

import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from service.auth.development import FILE_NAME
from tests.serving import started


def overrides(model: Path) -> dict[str, str]:
    return {
        "MLXD_MODEL__REFERENCE": str(model),
        "MLXD_AUTH__ENABLED": "true",
        "MLXD_AUTH__DEVELOPMENT_KEY": "true",
    }


def run(line: str) -> dict[str, object]:
    found = subprocess.run(["sh", "-c", line], check=True, capture_output=True, text=True, timeout=120)
    return dict(json.loads(found.stdout))


def curl_line(output: str) -> str:
    found = re.search(r"^ *(curl .*?)\r?$", output, re.MULTILINE)
    assert found is not None
    return found[1]


def test_the_line_works_as_printed_and_the_same_on_every_start(
    tiny_model_dir: Path, tmp_path: Path, need_command: Callable[[str, str], str]
) -> None:
    need_command("curl", "curl")
    tmp_path.chmod(0o700)
    file = tmp_path / FILE_NAME
    keys = []
    for _ in range(2):
        with started(tmp_path, timed=False, **overrides(tiny_model_dir)) as running:
            output = running.output.read_text("utf-8")
            assert f"$(cat {shlex.quote(str(file))})" in output
            assert "text" in run(curl_line(output))
            assert file.stat().st_mode & 0o777 == 0o600
            keys.append(file.read_text("utf-8").strip())
            assert keys[0] not in output, "what is no terminal may be kept"
    assert keys[0] == keys[1]


def test_on_a_terminal_the_key_is_in_the_line(
    tiny_model_dir: Path, tmp_path: Path, need_command: Callable[[str, str], str]
) -> None:
    need_command("curl", "curl")
    tmp_path.chmod(0o700)
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "MLXD_SERVER__STATE_DIR": str(tmp_path), **overrides(tiny_model_dir)}
    command = [sys.executable, "-m", "service", "serve", "--port", "0"]
    with subprocess.Popen(command, env=environment, stdout=theirs, stderr=subprocess.DEVNULL) as running:
        os.close(theirs)
        try:
            seen = ""
            while not re.search(r"curl .*\n", seen):
                seen += os.read(ours, 65536).decode("utf-8", "replace")
            line = curl_line(seen)
            assert (tmp_path / FILE_NAME).read_text("utf-8").strip() in line
            assert "text" in run(line)
        finally:
            running.send_signal(signal.SIGTERM)
            assert running.wait(60) == 0
            os.close(ours)


@pytest.mark.parametrize("what", ["pepper", "certificate"])
def test_a_file_that_cannot_be_used_is_one_clear_line_and_code_78(
    tiny_model_dir: Path, tmp_path: Path, what: str
) -> None:
    tmp_path.chmod(0o700)
    more = {}
    if what == "pepper":
        pepper = tmp_path / "pepper.json"
        pepper.write_text("{}")
        pepper.chmod(0o644)
    else:
        more = dict.fromkeys(("MLXD_SERVER__TLS_CERTIFICATE", "MLXD_SERVER__TLS_KEY"), str(tmp_path / "absent.pem"))
    environment = {**os.environ, "MLXD_SERVER__STATE_DIR": str(tmp_path), **overrides(tiny_model_dir), **more}
    command = [sys.executable, "-m", "service", "serve", "--port", "0"]
    found = subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=120)
    assert found.returncode == os.EX_CONFIG
    [line] = [line for line in found.stderr.splitlines() if line.startswith("mlxd: ")]
    assert ("pepper.json" if what == "pepper" else "server.tls_certificate") in line
    assert "Traceback" not in found.stderr
