"""`mlxd doctor` as it is called: on real state, with the service running and stopped, and changing nothing."""

import asyncio
import json
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs
from typer.testing import CliRunner, Result

from service import cli
from service.app import build
from service.auth import jwks_https
from service.doctor import surroundings
from service.engine.loading import unheard
from service.engine.mlx_backend import MlxBackend
from service.engine.recording import RecordingBackend, measure
from service.engine.speed_record import FILE_NAME, Started, read
from service.errors import ModelUnavailable
from service.settings import IssuerSettings, Settings
from service.supervision.start import prepare
from tests.fakes import FakeBackend
from tests.https_server import HOST, https_server, make_certificates, response
from tests.serving import make_key, served
from tests.token_authority import key_set, rsa_jwk, rsa_key


@contextmanager
def taken_port() -> Iterator[int]:
    """Somebody listens who says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def free_port() -> int:
    with taken_port() as port:
        return port


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A state directory in which a key was made."""
    folder = tmp_path / "state"
    make_key(Settings.load(None, {"server.state_dir": folder}), "inference")
    return folder


class Doctor:
    """The command, with a configuration file of its own."""

    def __init__(self, tmp_path: Path, state: Path, model: Path) -> None:
        self.file = tmp_path / "mine.toml"
        self._values = {"server.state_dir": str(state), "server.port": free_port(), "ops.bind": ""}
        self._values |= {"model.reference": str(model)}

    def __call__(self, *arguments: str, **values: Any) -> Result:
        from service.settings import as_toml

        self.file.write_text(as_toml({**self._values, **{k.replace("__", "."): v for k, v in values.items()}}))
        return CliRunner().invoke(cli.commands(), ["--config", str(self.file), "doctor", *arguments])

    def findings(self, **values: Any) -> tuple[int, dict[str, dict[str, str]]]:
        """The exit code, and the findings by name."""
        result = self("--json", **values)
        answer = json.loads(result.stdout)
        assert answer["ok"] == (result.exit_code == 0)
        return result.exit_code, {each["name"]: each for each in answer["findings"]}


@pytest.fixture
def doctor(tmp_path: Path, state: Path, tiny_model_dir: Path) -> Doctor:
    return Doctor(tmp_path, state, tiny_model_dir)


def snapshot(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Every file below, but for what SQLite keeps while a database is read."""
    files = [each for each in folder.rglob("*") if not each.name.endswith(("-wal", "-shm"))]
    return {
        str(each): (each.stat().st_mode, each.stat().st_mtime_ns, b"" if each.is_dir() else each.read_bytes())
        for each in [folder, *files]
        if each != folder
    }


def test_a_state_that_is_well_and_a_service_that_is_stopped(doctor: Doctor, state: Path) -> None:
    before = snapshot(state)
    code, found = doctor.findings()
    assert code == 0, found
    assert {found[name]["verdict"] for name in ("platform", "memory", "disk", "port", "open files")} == {"ok"}
    assert "is free" in found["port"]["seen"]
    assert found["database: audit"]["verdict"] == found["permissions: peppers"]["verdict"] == "ok"
    assert snapshot(state) == before
    assert state.stat().st_mode & 0o777 == 0o700


def test_a_service_that_runs_is_seen_and_left_alone(
    doctor: Doctor, state: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    settings = Settings.load(None, {"server.state_dir": state, "server.port": 0})
    with served(settings, FakeBackend()) as service:
        code, found = doctor.findings(server__port=int(service.url.rpartition(":")[2]))
        assert code == 0, found
        assert "mlxd is ready" in found["port"]["seen"]


def test_a_state_in_disorder(doctor: Doctor, state: Path) -> None:
    (state / "pepper.json").chmod(0o644)
    (state / "mlxd.db").chmod(0o640)
    with taken_port() as port:
        code, found = doctor.findings(server__port=port, model__reference="/nowhere")
    assert code == 1
    failed = {name for name, each in found.items() if each["verdict"] == "fail"}
    assert failed == {"permissions: peppers", "permissions: database", "database", "port", "model"}
    assert all(found[name]["mend"] for name in failed)
    assert found["permissions: peppers"]["mend"] == f"chmod 600 {state / 'pepper.json'}"
    assert (state / "pepper.json").stat().st_mode & 0o777 == 0o644, "it mends nothing itself"
    assert (state / "mlxd.db").stat().st_mode & 0o777 == 0o640


def test_people_get_a_table_without_secrets(doctor: Doctor, state: Path) -> None:
    secrets = json.loads((state / "pepper.json").read_text())
    (state / "pepper.json").chmod(0o644)
    result = doctor()
    assert result.exit_code == 1
    assert "FAIL" in result.stdout
    assert "-> chmod 600" in result.stdout
    assert not any(secret in result.stdout for secret in secrets.values())


def test_a_configuration_that_cannot_be_used_is_told_as_by_every_command(doctor: Doctor) -> None:
    doctor()
    doctor.file.write_text("[server]\nprot = 1\n")
    assert CliRunner().invoke(cli.commands(), ["--config", str(doctor.file), "doctor"]).exit_code == 78


def test_speed_is_measured_when_asked_and_kept(doctor: Doctor, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[int] = []
    monkeypatch.setattr("service.serve.leave_now", left.append)
    result = doctor("--speed", "--json", engine__max_rows=2)
    assert left == [0], result.output
    speed = read(state)[Started.SHELL]
    assert speed.model == "tiny"
    assert speed.decode > 1
    assert speed.prefill > 1
    told = next(each for each in json.loads(result.stdout)["findings"] if each["name"] == "speed")
    assert "no supervised start has been measured yet; shell" in told["seen"]


# -- what it looks with -----------------------------------------------------------------------------------


def test_commands_that_are_missing_or_fail_are_no_surprise() -> None:
    assert surroundings.run_command(["no-such-command-anywhere"]) is None
    ran = surroundings.run_command([sys.executable, "-c", "import sys; print('a'); sys.exit('b')"])
    assert ran == surroundings.Ran(1, "a\n", "b\n")


async def test_an_issuers_answer_comes_with_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def loopback(host: str, port: int) -> list[str]:
        return ["127.0.0.1"]

    keys, date = key_set(rsa_jwk(rsa_key())), "Wed, 25 Nov 2026 12:00:00 GMT"
    monkeypatch.setattr(jwks_https.HttpsSource.__init__, "__kwdefaults__", {"resolve": loopback, "timeout": 3.0})
    async with https_server(make_certificates(tmp_path), response(keys, "200 OK", f"Date: {date}")) as server:
        issuer = IssuerSettings(
            name="idp",
            issuer="i",
            audience="a",
            algorithms=("RS256",),
            jwks_url=f"https://{HOST}:{server.port}/",
            jwks_ca_file=server.authorities,
            allow_private_addresses=True,
        )
        answer = await asyncio.to_thread(surroundings.key_set_of, issuer)
        assert answer == surroundings.KeysDocument(keys, date)
        assert answer.date is not None
        assert parsedate_to_datetime(answer.date).timestamp() > 0
        server.behaviour = response(b"", "503 Service Unavailable")
        assert "503" in (await asyncio.to_thread(surroundings.key_set_of, issuer)).problem
    unusable = issuer.model_copy(update={"jwks_ca_file": tmp_path / "none.pem"})
    assert "no certificates" in (await asyncio.to_thread(surroundings.key_set_of, unusable)).problem


# -- the record of speed ----------------------------------------------------------------------------------


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warm-up that takes no time; the costs are those of a pacer that has learnt nothing."""
    monkeypatch.setattr(MlxBackend, "warm_up", lambda *_: None)


def warmed_up(state: Path, started: Started) -> RecordingBackend:
    backend = RecordingBackend(Settings.load(None, {"server.state_dir": state}), started, now=lambda: 5.0)
    backend.info = SimpleNamespace(name="m", device="cpu")  # type: ignore[assignment]
    backend.warm_up(unheard)
    return backend


@pytest.mark.usefixtures("unmeasured")
def test_each_kind_of_start_leaves_its_own_record(tmp_path: Path) -> None:
    for started in Started:
        assert warmed_up(tmp_path, started).speed == read(tmp_path)[started]
    found = read(tmp_path)
    assert set(found) == set(Started)
    assert found[Started.SHELL].comparable(found[Started.SUPERVISED])
    assert (found[Started.SHELL].at, found[Started.SHELL].model) == (5.0, "m")
    assert (tmp_path / FILE_NAME).stat().st_mode & 0o777 == 0o600


@pytest.mark.usefixtures("unmeasured")
def test_a_record_that_cannot_be_written_does_not_stop_the_start(tmp_path: Path) -> None:
    (tmp_path / "a file").touch()
    with capture_logs() as logs:
        warmed_up(tmp_path / "a file" / "state", Started.SHELL)
    assert [(each["event"], each["log_level"]) for each in logs] == [("speed_not_recorded", "warning")]


def test_how_the_service_was_started_reaches_its_backend(tmp_path: Path) -> None:
    settings = Settings.load(None, {"server.state_dir": tmp_path})
    for supervised, started in ((True, Started.SUPERVISED), (False, Started.SHELL)):
        backend = build(settings, start=prepare(settings, supervised=supervised)).engine._backend
        assert isinstance(backend, RecordingBackend)
        assert backend._started is started


@pytest.mark.parametrize("text", ["", "[]", "no JSON", '{"shell": {}}', '{"other": {}}'])
def test_a_record_that_is_not_as_we_wrote_it_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE_NAME).write_text(text)
    assert read(tmp_path) == {}


def test_a_model_that_is_not_there_cannot_be_measured(tmp_path: Path) -> None:
    settings = Settings.load(None, {"model.reference": str(tmp_path / "none"), "server.state_dir": tmp_path})
    with pytest.raises(ModelUnavailable):
        measure(settings)
