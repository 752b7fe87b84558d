"""Signals and drains of the whole service, with a real model in a process of its own, as its clients see them."""

from __future__ import annotations

import json
import os
import queue
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from service.auth.principal import Scope
from service.cli import commands
from service.settings import Settings
from service.storage import audit
from service.storage.database import Database
from service.storage.schema import USAGE
from tests.serving import BRIEF_CHUNK, _banner_url, bearer, make_key
from tests.token_authority import SECRET, pack, sign_hmac

pytestmark = pytest.mark.alone

PATIENCE = 60.0
BIG = 1_000_000
LONG = {"prompt": "x", "max_tokens": 3900, "temperature": 0, "stream": True, "logit_bias": {"2": -100}}
"""Longer than any test here waits for by itself; the model's end of a text is forbidden."""


@dataclass
class Site:
    """A configuration file, the process that runs on it, and a key with every scope."""

    folder: Path
    model: Path
    drain_timeout: float
    plan: dict[str, int] = field(default_factory=lambda: {"max_output_tokens": BIG})
    level: str = "info"
    issuers: bool = True
    more: str = ""
    url: str = ""

    def __post_init__(self) -> None:
        self.config, self.log = self.folder / "mlxd.toml", self.folder / "mlxd.log"
        self.secret = self.folder / "secret"
        self.secret.write_bytes(SECRET)
        self.secret.chmod(0o600)
        self.write()
        self.settings = Settings.load(self.config)
        self.key = make_key(self.settings, *Scope).text
        self.client = httpx.Client(headers=bearer(self.key), timeout=PATIENCE)

    def write(self) -> None:
        numbers = {"requests_per_minute": BIG, "request_burst": BIG, "tokens_per_minute": BIG, **self.plan}
        lines = [
            f'[server]\nport = 0\nstate_dir = "{self.folder / "state"}"',
            f'[model]\nreference = "{self.model}"',
            f"[engine]\nmax_rows = 2\nmax_prefill_chunk = {BRIEF_CHUNK}\ndrain_timeout = {self.drain_timeout}",
            '[ops]\nbind = "127.0.0.1:0"',
            f'[log]\nlevel = "{self.level}"\nfile = "{self.log}"',
            "[limits.plans.default]",
            *(f"{name} = {number}" for name, number in numbers.items()),
        ]
        if self.issuers:
            lines.append(
                '[[auth.issuers]]\nname = "corp"\nissuer = "corp"\naudience = "mlxd"\nalgorithms = ["HS256"]\n'
                f'secret_file = "{self.secret}"'
            )
        self.config.write_text("\n".join([*lines, self.more]))

    def status(self) -> Any:
        return self.client.get(f"{self.url}/admin/status").json()

    def waits_for(self, what: Callable[[], object]) -> None:
        ends = time.monotonic() + PATIENCE
        while not what():
            assert time.monotonic() < ends
            time.sleep(0.005)

    def events(self, name: str) -> list[dict[str, Any]]:
        """Of both files, the one that was renamed first. A line that is torn is no JSON."""
        files = [file for file in (self.folder / "mlxd.log.0", self.log) if file.exists()]
        lines = [json.loads(line) for file in files for line in file.read_text("utf-8").splitlines()]
        return [line for line in lines if line["event"] == name]

    def recorded(self) -> dict[str, str]:
        """What the ledger has of each request, and the audit log's last events; the chain holds."""
        with Database.open(self.settings.storage, self.settings.server.state_dir) as database:
            assert database.read(audit.verify).result() is not None
            rows = database.read(lambda connection: connection.execute(USAGE.select()).all()).result()
        return {row.request_id: row.finish_reason for row in rows}

    def audited(self) -> list[str]:
        with Database.open(self.settings.storage, self.settings.server.state_dir) as database:
            found = database.read(lambda connection: audit.entries(connection, limit=100)).result()
        return [entry.event for entry in reversed(found)]


@contextmanager
def running(site: Site) -> Iterator[subprocess.Popen[bytes]]:
    output = site.folder / "output"
    command = [sys.executable, "-m", "service", "--config", str(site.config), "serve"]
    with (
        output.open("wb") as out,
        subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True) as process,
    ):
        try:
            site.url = _banner_url(process, output)
            yield process
        finally:
            process.kill()
            site.client.close()


class Stream:
    """A streamed request that a thread reads to its end."""

    def __init__(self, site: Site, **body: Any) -> None:
        self.began: queue.Queue[int] = queue.Queue()
        self.request_id = ""
        self.status = 0
        self.events: list[Any] = []
        self.retry_after = ""
        self._thread = threading.Thread(target=self._read, args=(site, {**LONG, **body}))
        self._thread.start()

    def _read(self, site: Site, body: dict[str, Any]) -> None:
        with httpx.stream(
            "POST", f"{site.url}/generate", json=body, headers=bearer(site.key), timeout=PATIENCE
        ) as answer:
            self.status, self.request_id = answer.status_code, answer.headers["x-request-id"]
            self.retry_after = answer.headers.get("retry-after", "")
            for line in answer.iter_lines():
                if line.startswith(("data: {", "{")):
                    self.events.append(json.loads(line.removeprefix("data: ")))
                    self.began.put(1)

    def under_way(self) -> Stream:
        self.began.get(timeout=PATIENCE)
        return self

    def end(self) -> Any:
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        return self.events[-1]


def test_a_stop_under_load_refuses_finishes_and_writes_down(tiny_long_model_dir: Path, tmp_path: Path) -> None:
    site = Site(tmp_path, tiny_long_model_dir, drain_timeout=120)
    with running(site) as process:
        runs = [Stream(site, max_tokens=1500).under_way() for _ in range(2)]
        waits = Stream(site)
        site.waits_for(lambda: site.status()["requests"]["waiting"] == 1)
        process.send_signal(signal.SIGTERM)
        queued = waits.end()
        assert (waits.status, queued["error"]["code"]) == (503, "draining")
        assert 100 < int(waits.retry_after) < 160
        late = httpx.post(f"{site.url}/generate", json={"prompt": "x"}, headers=bearer(site.key))
        assert (late.status_code, late.json()["error"]["code"]) == (503, "draining")
        assert late.headers["retry-after"]
        ready = httpx.get(f"{site.url}/readyz")
        assert (ready.status_code, ready.json()["state"], ready.json()["running"]) == (503, "draining", 2)
        refused = site.client.delete(f"{site.url}/admin/drain")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        for stream in runs:
            last = stream.end()
            assert (stream.status, last["finish_reason"], last["usage"]["completion_tokens"]) == (200, "length", 1500)
        assert process.wait(PATIENCE) == 0
    [stopped] = site.events("stopped")
    assert stopped["exit_code"] == 0
    found = site.recorded()
    assert [found[stream.request_id] for stream in runs] == ["length", "length"]
    assert site.audited()[-1] == "admin_call_refused"
    assert stat.S_IMODE(site.log.stat().st_mode) == 0o600


def test_one_process_is_drained_and_taken_back_rotated_and_reloaded(tiny_long_model_dir: Path, tmp_path: Path) -> None:
    site = Site(tmp_path, tiny_long_model_dir, drain_timeout=0.3)
    with running(site) as process:
        an_operators_drain_ends_the_rest_with_a_typed_error_and_is_undone(site)
        a_rotation_under_load_loses_no_line_and_tears_none(site, process.pid)
        a_reload_that_fails_changes_nothing(site, process.pid)
        a_reload_changes_plans_issuers_and_level_and_names_what_waits(site, process.pid)
        runs = Stream(site).under_way()
        process.terminate()
        assert runs.end()["error"]["code"] == "draining", "an event, not a cut"
        assert process.wait(PATIENCE) == 0
    assert site.recorded()[runs.request_id] == "draining"


def an_operators_drain_ends_the_rest_with_a_typed_error_and_is_undone(site: Site) -> None:
    runs = Stream(site).under_way()
    began = site.client.post(f"{site.url}/admin/drain")
    assert (began.status_code, began.json()) == (
        202,
        {"state": "draining", "drained": False, "running": 1, "waiting": 0},
    )
    assert httpx.post(f"{site.url}/generate", json={"prompt": "x"}, headers=bearer(site.key)).status_code == 503
    last = runs.end()
    assert (runs.status, last["error"]["code"]) == (200, "draining")
    drained = command(site, "drain")
    assert (drained.exit_code, drained.output.splitlines()[-1].startswith("mlxd: drained")) == (0, True)
    assert httpx.get(f"{site.url}/readyz").json()["reasons"] == ["the engine is draining", "asked for by an operator"]
    assert site.client.post(f"{site.url}/admin/drain").status_code == 200
    assert site.status()["drain"] == {"drained": True, "for_good": False}
    undrained = command(site, "undrain")
    assert (undrained.exit_code, undrained.output) == (0, "mlxd: ready\n")
    assert generate(site, max_tokens=3).status_code == 200
    assert site.audited()[-4:] == ["drain_begun", "drain_begun", "drain_begun", "drain_undone"]


def a_rotation_under_load_loses_no_line_and_tears_none(site: Site, pid: int) -> None:
    answered: list[str] = []

    def ask() -> None:
        answered.extend(generate(site, max_tokens=2).headers["x-request-id"] for _ in range(20))

    asking = threading.Thread(target=ask)
    asking.start()
    site.waits_for(lambda: len(answered) > 3)
    site.log.rename(site.folder / "mlxd.log.0")
    hang_up(site, pid)
    asking.join(PATIENCE)
    site.waits_for(lambda: set(answered) <= {line["request_id"] for line in site.events("request")})
    logged = [line["request_id"] for line in site.events("request")]
    assert [logged.count(each) for each in answered] == [1] * 20
    assert stat.S_IMODE(site.log.stat().st_mode) == 0o600
    assert '"listening"' not in site.log.read_text()


def a_reload_that_fails_changes_nothing(site: Site, pid: int) -> None:
    site.plan["max_output_tokens"] = 5
    site.more = '[limits.plans.gold]\nweight = "heavy"\n'
    site.write()
    hang_up(site, pid)
    told = site.status()["reload"]
    assert told["problems"][0].startswith("limits.plans.gold.weight: ")
    site.waits_for(lambda: site.events("reload_failed"))
    assert site.events("reload_failed")[-1]["problems"] == told["problems"]
    assert generate(site, max_tokens=10).status_code == 200
    metrics = site.client.get(f"{site.url}/metrics").text
    assert 'mlxd_config_reloads_total{outcome="failure"} 1.0' in metrics


def a_reload_changes_plans_issuers_and_level_and_names_what_waits(site: Site, pid: int) -> None:
    claims = {"iss": "corp", "aud": "mlxd", "sub": "a", "iat": int(time.time()), "exp": int(time.time()) + 600}
    token = bearer(pack({"alg": "HS256", "typ": "JWT"}, {**claims, "scope": "models"}, sign_hmac(SECRET)))
    assert httpx.get(f"{site.url}/v1/models", headers=token).status_code == 200
    site.more, site.level, site.issuers, site.drain_timeout = "", "warning", False, 60
    site.write()
    hang_up(site, pid)
    status = site.status()
    assert status["reload"]["applied"] == ["auth.issuers", "limits.plans", "log.level"]
    assert status["reload"]["restart_needed"] == ["engine.drain_timeout"]
    assert (status["reload"]["problems"], status["log_level"], status["issuers"]) == ([], "warning", [])
    refused = generate(site, max_tokens=10)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "exceeds_output_limit")
    assert httpx.get(f"{site.url}/v1/models", headers=token).status_code == 401
    golden = {"name": "of the new plan", "scopes": ["models"], "plan": "gold"}
    assert site.client.post(f"{site.url}/admin/keys", json=golden).status_code == 400
    site.plan["max_output_tokens"] = BIG
    site.more = "[limits.plans.gold]\nweight = 2\n"
    site.write()
    hang_up(site, pid)
    assert generate(site, max_tokens=10).status_code == 200
    assert site.client.post(f"{site.url}/admin/keys", json=golden).status_code == 201


def hang_up(site: Site, pid: int) -> None:
    """And wait until it has been dealt with."""
    before = site.status()["reload"]
    os.kill(pid, signal.SIGHUP)
    site.waits_for(lambda: site.status()["reload"] != before)


def generate(site: Site, max_tokens: int) -> httpx.Response:
    return site.client.post(f"{site.url}/generate", json={"prompt": "x", "max_tokens": max_tokens})


def command(site: Site, name: str) -> Any:
    key = site.folder / "admin.key"
    key.write_text(site.key)
    key.chmod(0o600)
    arguments = ["--config", str(site.config), "service", name, "--url", site.url, "--key-file", str(key)]
    return CliRunner().invoke(commands(), arguments)
