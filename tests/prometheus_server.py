"""A real Prometheus of a test's own, on a free port of loopback, with nothing kept."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.conftest import ROOT, require

SHIPPED = ROOT / "deploy" / "prometheus"
PACKAGE = "prometheus (apt-get install prometheus)"
START_TIMEOUT = 30


@dataclass(frozen=True)
class Prometheus:
    """A running server, asked through `http`."""

    http: httpx.Client

    def get(self, path: str, **parameters: str) -> Any:
        """The `data` of an answer of its HTTP API; AssertionError with its message when it refuses."""
        answer = self.http.get(f"/api/v1/{path}", params=parameters).json()
        assert answer["status"] == "success", (parameters, answer)
        return answer["data"]

    def query(self, promql: str) -> list[float]:
        """The values now, without those that are not numbers."""
        found = self.get("query", query=promql)
        pairs = [found["result"]] if found["resultType"] == "scalar" else [one["value"] for one in found["result"]]
        return [float(value) for _, value in pairs if value != "NaN"]


def promtool(*arguments: str | Path) -> str:
    """What promtool prints; AssertionError with it when it finds fault."""
    program = shutil.which("promtool")
    require(program, PACKAGE)
    done = subprocess.run(
        [str(program), *map(str, arguments)], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def shipped_copy(folder: Path, key: str) -> Path:
    """The shipped files as they are installed: with a key beside them."""
    shutil.copytree(SHIPPED, folder, dirs_exist_ok=True)
    (folder / "mlxd.key").touch(0o600)
    (folder / "mlxd.key").write_text(f"{key}\n", "utf-8")
    return folder / "prometheus.yml"


def scraping(config: Path, target: str, interval: str) -> Path:
    """Change what a test must: whom the shipped configuration scrapes, and how often."""
    text, targets = re.subn(r'targets: \["127\.0\.0\.1:8001"\]', f'targets: ["{target}"]', config.read_text("utf-8"))
    text, intervals = re.subn(r"_interval: 15s", f"_interval: {interval}", text)
    assert (targets, intervals) == (1, 2)
    config.write_text(text, "utf-8")
    return config


@contextmanager
def prometheus_server(config: Path) -> Iterator[Prometheus]:
    """Runs until the block ends; it answers when the block begins."""
    program = shutil.which("prometheus")
    require(program, PACKAGE)
    with tempfile.TemporaryDirectory(prefix="mlxd-prometheus-") as data:
        log = Path(data) / "log"
        command = [str(program), f"--config.file={config}", f"--storage.tsdb.path={data}/tsdb"]
        with log.open("wb") as output:
            process = subprocess.Popen([*command, "--web.listen-address=127.0.0.1:0"], stdout=output, stderr=output)
        try:
            with httpx.Client(base_url=_started(process, log), timeout=30) as http:
                yield Prometheus(http)
        finally:
            process.terminate()
            assert process.wait(30) == 0


def _started(process: subprocess.Popen[bytes], log: Path) -> str:
    """Wait until it is ready, and take the address from its log."""
    ends = time.monotonic() + START_TIMEOUT
    while "ready to receive web requests" not in (said := log.read_text("utf-8")):
        assert process.poll() is None, said
        assert time.monotonic() < ends, said
        time.sleep(0.02)
    match = re.search(r'msg="Listening on".* address=(\S+)', said)
    assert match, said
    return f"http://{match[1]}"
