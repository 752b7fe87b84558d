"""Each check of `mlxd doctor`, with what it looks at in order and out of order."""

import json
import os
import plistlib
import signal
import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from service.doctor import launch, machine, model, network, ownership, storage, surroundings
from service.doctor.checks import CHECKS, examine, healthy
from service.doctor.finding import Finding, Verdict, ok
from service.doctor.surroundings import Holder, KeysDocument, Machine, Ran, Surroundings, here
from service.engine import demo_model
from service.engine.speed_record import Speed, Started, record
from service.launchd.layout import Layout
from service.launchd.plist import Job
from service.settings import Settings, secret_settings, sections
from service.storage.database import Database
from service.supervision.starts import StartLedger
from tests.databases import create
from tests.token_authority import key_set, rsa_jwk, rsa_key

NOW = 1_800_000_000.0
GB = 10**9
MAC = Machine("Darwin", "arm64", "15.1", memory=32 * GB, available=20 * GB, files=2**20)
LINUX = Machine("Linux", "x86_64", "6.1", memory=32 * GB, available=20 * GB, files=2**20)
METAL = Ran(0, json.dumps({"backend": "metal", "name": "Apple M4", "working_set": 24 * GB}))
CPU = Ran(0, json.dumps({"backend": "cpu", "name": "AMD", "working_set": None}))
Check = Callable[[Surroundings], Iterable[Finding]]


def answers(**commands: Ran) -> Callable[[Sequence[str]], Ran | None]:
    """Commands by their program's name; `device` is mlx's. Others are not there."""

    def run(command: Sequence[str]) -> Ran | None:
        name = "device" if command[-1] == "service.engine.device" else Path(command[0]).name
        return commands.get(name)

    return run


def around(tmp_path: Path, values: dict[str, Any] | None = None, /, **changes: Any) -> Surroundings:
    """A Mac on which nothing runs; `values` are settings."""
    state = tmp_path / "state"
    state.mkdir(mode=0o700, exist_ok=True)
    settings = Settings.load(None, {"server.state_dir": state, **(values or {})})
    given: dict[str, Any] = {
        "machine": MAC,
        "run": answers(device=METAL),
        "get": lambda url: None,
        "connects": lambda host, port: False,
        "holder": lambda port: None,
        "key_set": lambda issuer: KeysDocument(problem="is not asked here"),
        "now": lambda: NOW,
        "euid": os.geteuid(),
        **changes,
    }
    return Surroundings(settings=settings, **given)


def only(check: Check, here: Surroundings) -> Finding:
    [finding] = check(here)
    return finding


def says(finding: Finding, verdict: Verdict, seen: str, mend: str = "") -> None:
    assert finding.verdict is verdict, finding
    assert seen in finding.seen, finding
    assert mend in finding.mend, finding
    assert bool(finding.mend) or verdict in {Verdict.OK, Verdict.SKIPPED}, "what is wrong has a mend"


# -- the machine ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("of", "device", "verdict", "seen"),
    [
        (MAC, METAL, Verdict.OK, "macOS 15.1 arm64; mlx on metal (Apple M4)"),
        (LINUX, CPU, Verdict.OK, "Linux 6.1 x86_64; mlx on cpu (AMD)"),
        (MAC, CPU, Verdict.FAIL, "mlx on cpu"),
        (replace(MAC, architecture="x86_64"), METAL, Verdict.FAIL, "x86_64"),
        (replace(MAC, release="13.7.1"), METAL, Verdict.FAIL, "macOS 13.7.1"),
        (MAC, Ran(-signal.SIGABRT, ""), Verdict.FAIL, "cannot be used: signal 6"),
        (LINUX, Ran(1, "", "Traceback\nImportError: libmlx.so"), Verdict.FAIL, "ImportError: libmlx.so"),
        (LINUX, Ran(2, ""), Verdict.FAIL, "exit code 2"),
        (LINUX, Ran(0, "no JSON"), Verdict.FAIL, "not understood"),
        (LINUX, Ran(0, "[]"), Verdict.FAIL, "not understood"),
        (LINUX, None, Verdict.FAIL, "does not answer"),
    ],
)
def test_platform(tmp_path: Path, of: Machine, device: Ran | None, verdict: Verdict, seen: str) -> None:
    run = answers() if device is None else answers(device=device)
    says(only(machine.platform, around(tmp_path, machine=of, run=run)), verdict, seen)


def test_the_device_is_asked_once_and_in_a_process_of_its_own(tmp_path: Path) -> None:
    asked = []

    def run(command: Sequence[str]) -> Ran | None:
        asked.append(command)
        return surroundings.run_command(command)

    here = around(tmp_path, machine=LINUX, run=run)
    [finding] = machine.platform(here)
    says(finding, Verdict.OK, "mlx on ")
    machine.working_set(here)
    assert len(asked) == 1


PMSET = """System-wide power settings:
Currently in use:
 standby              {standby}
 Sleep On Power Button 1
 sleep                {sleep} (sleep prevented by powerd)
 autorestart          {autorestart}
 displaysleep         10
"""


@pytest.mark.parametrize(
    ("sleep", "restart", "seen", "mend"),
    [
        (0, 1, "never sleeps", ""),
        (10, 1, "sleeps after 10 minutes", "pmset -a sleep 0"),
        (0, 0, "stays off after a power failure", "autorestart 1"),
    ],
)
def test_sleep(tmp_path: Path, sleep: int, restart: int, seen: str, mend: str) -> None:
    run = answers(pmset=Ran(0, PMSET.format(standby=0, sleep=sleep, autorestart=restart)))
    says(only(machine.sleep, around(tmp_path, run=run)), Verdict.WARN if mend else Verdict.OK, seen, mend)


def test_sleep_that_is_disabled_as_a_whole_is_well(tmp_path: Path) -> None:
    run = answers(pmset=Ran(0, " SleepDisabled 1\n sleep 10\n"))
    says(only(machine.sleep, around(tmp_path, run=run)), Verdict.OK, "never sleeps")


def test_sleep_is_skipped_where_nobody_can_say(tmp_path: Path) -> None:
    says(only(machine.sleep, around(tmp_path, machine=LINUX)), Verdict.SKIPPED, "on macOS only")
    says(only(machine.sleep, around(tmp_path)), Verdict.SKIPPED, "pmset does not say")
    says(only(machine.sleep, around(tmp_path, run=answers(pmset=Ran(1, " sleep 1")))), Verdict.SKIPPED, "does not say")


@pytest.mark.parametrize(
    ("connections", "limit", "verdict", "mend"),
    [
        (2048, 2**63, Verdict.OK, ""),
        (2048, 1024, Verdict.WARN, "ulimit -Hn 2176"),
        (5000, 2**20, Verdict.WARN, "at most 3968"),
    ],
)
def test_open_files(tmp_path: Path, connections: int, limit: int, verdict: Verdict, mend: str) -> None:
    here = around(tmp_path, {"server.max_connections": connections}, machine=replace(MAC, files=limit))
    says(only(machine.files, here), verdict, f"{connections + 128} are wanted", mend)


def issuer(**more: Any) -> dict[str, Any]:
    return {"name": "idp", "issuer": "i", "audience": "a", "algorithms": ["RS256"], **more}


@pytest.mark.parametrize(
    ("ahead", "leeway", "verdict", "seen"),
    [
        (0.2, 30, Verdict.OK, "right to the second"),
        (-3.0, 30, Verdict.OK, "-3.0 s against idp"),
        (20.0, 30, Verdict.WARN, "+20.0 s against idp"),
        (-40.0, 30, Verdict.FAIL, "-40.0 s against idp; tokens allow 30 s"),
    ],
)
def test_clock_against_an_issuer(tmp_path: Path, ahead: float, leeway: int, verdict: Verdict, seen: str) -> None:
    values = {"auth.issuers": [issuer(jwks_url="https://i.test/k", leeway=leeway)]}
    document = KeysDocument(b"", formatdate(NOW, usegmt=True))
    here = around(tmp_path, values, now=lambda: NOW + ahead, key_set=lambda _: document)
    says(only(machine.clock, here), verdict, seen, "" if verdict is Verdict.OK else "set by the network")


@pytest.mark.parametrize(
    ("said", "verdict", "seen"),
    [
        ("+0.004417 +/- 0.034511 time.apple.com 17.253.34.123\n", Verdict.OK, "right to the second"),
        ("-61.500000 +/- 0.034511 time.apple.com 17.253.34.123\n", Verdict.WARN, "+61.5 s against time.apple.com"),
        ("sntp: Exchange failed: Timeout\n", Verdict.SKIPPED, "nothing here to compare it with"),
    ],
)
def test_clock_against_apples(tmp_path: Path, said: str, verdict: Verdict, seen: str) -> None:
    says(only(machine.clock, around(tmp_path, run=answers(sntp=Ran(0, said)))), verdict, seen)


@pytest.mark.parametrize(("said", "verdict"), [("yes\n", Verdict.OK), ("no\n", Verdict.SKIPPED)])
def test_clock_that_linux_keeps(tmp_path: Path, said: str, verdict: Verdict) -> None:
    here = around(tmp_path, machine=LINUX, run=answers(timedatectl=Ran(0, said)))
    assert only(machine.clock, here).verdict is verdict


def test_a_clock_that_was_put_back_is_found_without_a_network(tmp_path: Path) -> None:
    here = around(tmp_path)
    newest = here.state_dir / "mlxd.db"
    newest.touch()
    os.utime(newest, (NOW + 3600, NOW + 3600))
    says(only(machine.clock, here), Verdict.FAIL, "mlxd.db was written 3600 s in the future", "set by the network")
    os.utime(newest, (NOW, NOW))
    says(only(machine.clock, here), Verdict.SKIPPED, "nothing here to compare")


def test_a_date_that_is_none_is_not_compared(tmp_path: Path) -> None:
    values = {"auth.issuers": [issuer(jwks_url="https://i.test/k")]}
    here = around(tmp_path, values, key_set=lambda _: KeysDocument(b"", "some day"))
    says(only(machine.clock, here), Verdict.SKIPPED, "nothing here to compare")


@pytest.mark.parametrize(
    ("free", "verdict", "mend"),
    [(50 * GB, Verdict.OK, ""), (GB // 2, Verdict.WARN, "make room soon"), (GB // 20, Verdict.FAIL, "make room")],
)
def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, verdict: Verdict, mend: str) -> None:
    here = around(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    says(only(machine.disk, here), verdict, "free for", mend)


def test_a_state_directory_that_cannot_be_written_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = around(tmp_path)
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write anywhere
    says(only(machine.disk, here), Verdict.FAIL, "cannot be written", "mount it read-write")


def test_a_state_directory_is_made_at_the_first_start_where_that_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = around(tmp_path)
    here.state_dir.rmdir()
    says(only(machine.disk, here), Verdict.OK, "made at the first start")
    monkeypatch.setattr("os.access", lambda *_: False)
    says(only(machine.disk, here), Verdict.FAIL, "cannot be written", "install -d -m 700")
    assert not here.state_dir.exists()


# -- secrets and state ------------------------------------------------------------------------------------


def test_every_setting_that_names_a_secrets_file_is_marked() -> None:
    """By what their descriptions say, which the documentation repeats."""
    from service.settings import Group, IssuerSettings
    from service.settings.base import Secret

    groups: dict[str, type[Group]] = {**sections(), "issuer": IssuerSettings}
    for group, kind in groups.items():
        for key, field in kind.model_fields.items():
            said = "(0600)" in str(field.description) or "private key" in str(field.description)
            marked = any(isinstance(mark, Secret) for mark in field.metadata)
            assert said == marked, f"{group}.{key}"


def secret(path: Path, mode: int = 0o600) -> Path:
    path.write_bytes(b"a canary of a secret, 32 bytes long")
    path.chmod(mode)
    return path


@pytest.fixture
def secrets_of(tmp_path: Path) -> dict[str, Any]:
    """Settings that name a secret of every kind, all as they should be."""
    files = {name: str(secret(tmp_path / name)) for name in ("tls", "url", "pepper", "redis", "headers", "shared")}
    (tmp_path / "certificate").touch()
    return {
        "server.tls_certificate": str(tmp_path / "certificate"),
        "server.tls_key": files["tls"],
        "storage.url_file": files["url"],
        "auth.pepper_file": files["pepper"],
        "auth.issuers": [issuer(algorithms=["HS256"], secret_file=files["shared"])],
        "limits.redis_url_file": files["redis"],
        "tracing.endpoint": "https://c.test",
        "tracing.headers_file": files["headers"],
    }


SECRETS = {
    "permissions: server.tls_key": "tls",
    "permissions: storage.url_file": "url",
    "permissions: peppers": "pepper",
    "permissions: auth.issuers[0].secret_file": "shared",
    "permissions: limits.redis_url_file": "redis",
    "permissions: tracing.headers_file": "headers",
}


def by_name(findings: Iterable[Finding]) -> dict[str, Finding]:
    return {each.name: each for each in findings}


def test_secrets_that_are_ours_alone_are_well(tmp_path: Path, secrets_of: dict[str, Any]) -> None:
    here = around(tmp_path, secrets_of)
    found = by_name(ownership.permissions(here))
    assert set(SECRETS) < set(found)
    assert {each.verdict for name, each in found.items() if name in SECRETS} == {Verdict.OK}
    assert {each.key for each in secret_settings(here.settings)} == {
        *("server.tls_key", "storage.url_file", "auth.pepper_file", "auth.issuers[0].secret_file"),
        *("limits.redis_url_file", "tracing.headers_file"),
    }
    assert "canary" not in repr(found)


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_that_others_may_read_is_found(tmp_path: Path, secrets_of: dict[str, Any], name: str) -> None:
    path = tmp_path / SECRETS[name]
    path.chmod(0o640)
    finding = by_name(ownership.permissions(around(tmp_path, secrets_of)))[name]
    expected = Verdict.WARN if name.endswith("tls_key") else Verdict.FAIL  # what the service itself refuses
    says(finding, expected, "open to others (0640)", f"chmod 600 {path}")


def test_a_link_to_a_secret_is_found(tmp_path: Path, secrets_of: dict[str, Any]) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "redis")
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    (state / "pepper.json").symlink_to(tmp_path / "pepper")
    del secrets_of["auth.pepper_file"]
    finding = by_name(ownership.permissions(around(tmp_path, secrets_of)))["permissions: peppers"]
    says(finding, Verdict.FAIL, "is a link", "not a link")


def test_a_secret_that_is_not_there_is_found(tmp_path: Path, secrets_of: dict[str, Any]) -> None:
    (tmp_path / "redis").unlink()
    finding = by_name(ownership.permissions(around(tmp_path, secrets_of)))["permissions: limits.redis_url_file"]
    says(finding, Verdict.FAIL, "No such file", "0600")


def test_a_folder_in_which_others_may_replace_a_secret_is_found(tmp_path: Path, secrets_of: dict[str, Any]) -> None:
    tmp_path.chmod(0o777)
    finding = by_name(ownership.permissions(around(tmp_path, secrets_of)))["permissions: tracing.headers_file"]
    says(finding, Verdict.FAIL, "others may write to", f"chmod go-w {tmp_path}")


def test_the_state_of_another_user_is_found(tmp_path: Path) -> None:
    here = around(tmp_path, euid=os.geteuid() + 12345)
    found = by_name(ownership.permissions(here))
    says(found["user"], Verdict.FAIL, f"you are {os.geteuid() + 12345}", "sudo -u")
    says(found["permissions: server.state_dir"], Verdict.FAIL, "belongs to", "chown")


@pytest.mark.skipif(os.geteuid() != 0, reason="NOT TESTED HERE: only root may give files away")
def test_root_judges_as_the_owner_of_the_state_would(tmp_path: Path) -> None:
    here = around(tmp_path)
    (here.state_dir / "pepper.json").touch(0o600)
    os.chown(here.state_dir, 12345, -1)
    found = by_name(ownership.permissions(here))
    assert found["permissions: server.state_dir"].verdict is Verdict.OK
    says(found["permissions: peppers"], Verdict.FAIL, "belongs to root, not to 12345", "chown 12345")


def test_what_is_made_at_a_start_may_be_missing(tmp_path: Path) -> None:
    found = by_name(ownership.permissions(around(tmp_path, {"auth.development_key": True})))
    says(found["permissions"], Verdict.SKIPPED, "compiled kernels, peppers, database, development key")
    assert found["permissions: server.state_dir"].verdict is Verdict.OK


def test_without_authentication_there_are_no_keys_to_guard(tmp_path: Path) -> None:
    found = by_name(ownership.permissions(around(tmp_path, {"auth.enabled": False})))
    says(found["permissions"], Verdict.SKIPPED, "made when needed: compiled kernels")
    assert "peppers" not in found["permissions"].seen


# -- the database -----------------------------------------------------------------------------------------


def filled(here: Surroundings) -> Path:
    with Database.open(here.settings.storage, here.state_dir, migrate=True) as database:
        database.write(create(1)).result()
    return here.state_dir / "mlxd.db"


def test_a_sound_database(tmp_path: Path) -> None:
    here = around(tmp_path)
    filled(here)
    found = by_name(storage.database(here))
    assert list(found) == ["database: file", "database: schema", "database: keys", "database: audit"]
    assert healthy(found.values())
    assert "1 keys" in found["database: keys"].seen


def test_a_damaged_database(tmp_path: Path) -> None:
    here = around(tmp_path)
    filled(here)
    with Database.open(here.settings.storage, here.state_dir) as database:
        database.write(lambda c: c.exec_driver_sql("UPDATE audit SET actor = 'x'")).result()
    says(by_name(storage.database(here))["database: audit"], Verdict.FAIL, "altered", "restore a backup")


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    here = around(tmp_path)
    (here.state_dir / "mlxd.db").write_bytes(b"this is none " * 200)
    (here.state_dir / "mlxd.db").chmod(0o600)
    found = list(storage.database(here))
    assert not healthy(found)


def test_a_database_that_is_open_to_others_is_told_and_left_as_it_is(tmp_path: Path) -> None:
    here = around(tmp_path)
    file = filled(here)
    file.chmod(0o644)
    says(only(storage.database, here), Verdict.FAIL, "is open to others; chmod 600 it", "docs/storage.md")
    assert file.stat().st_mode & 0o777 == 0o644
    file.chmod(0o600)
    here.state_dir.chmod(0o755)
    says(only(storage.database, here), Verdict.FAIL, "chmod 700 it")
    assert here.state_dir.stat().st_mode & 0o777 == 0o755


def test_no_database_is_no_fault(tmp_path: Path) -> None:
    says(only(storage.database, around(tmp_path)), Verdict.SKIPPED, "made at the first start")
    says(only(storage.database, around(tmp_path, {"auth.enabled": False})), Verdict.SKIPPED, "authentication is off")


def test_a_database_elsewhere_that_is_not_there_is_a_fault(tmp_path: Path) -> None:
    here = around(tmp_path, {"storage.url": f"sqlite:///{tmp_path / 'other.db'}"})
    says(only(storage.database, here), Verdict.FAIL, "There is no database at", "docs/storage.md")


# -- the network ------------------------------------------------------------------------------------------

READY = {"ready": True, "state": "ready", "model_loaded": True, "reasons": []}
LOADING = {"ready": False, "state": "starting", "model_loaded": False, "reasons": ["the engine is starting", "1/2"]}


@pytest.mark.parametrize(
    ("answer", "verdict", "seen"),
    [
        (READY, Verdict.OK, "mlxd is ready (python, pid 7, of ann)"),
        (LOADING, Verdict.WARN, "not ready: the engine is starting; 1/2"),
        ({**LOADING, "reasons": None}, Verdict.WARN, "not ready: starting"),
        ({"other": "program"}, Verdict.FAIL, "held by python, pid 7, of ann, which is no mlxd"),
        (None, Verdict.FAIL, "which is no mlxd"),
    ],
)
def test_a_port_that_is_held(tmp_path: Path, answer: object, verdict: Verdict, seen: str) -> None:
    holder = Holder(7, "python", "ann")
    here = around(tmp_path, connects=lambda *_: True, get=lambda _: answer, holder=lambda _: holder)
    public, ops = network.ports(here)
    says(public, verdict, seen)
    says(ops, verdict, seen)


def test_the_holder_may_be_nobody_we_may_see(tmp_path: Path) -> None:
    public, _ = network.ports(around(tmp_path, connects=lambda *_: True))
    says(public, Verdict.FAIL, "another user's process", "server.port")


def test_ports_that_are_free_or_none(tmp_path: Path) -> None:
    public, ops = network.ports(around(tmp_path))
    says(public, Verdict.OK, "127.0.0.1:8000 is free")
    says(ops, Verdict.OK, "127.0.0.1:8001 is free")
    says(only(network.ports, around(tmp_path, {"server.port": 0, "ops.bind": ""})), Verdict.SKIPPED, "a free one")


def test_an_address_of_another_machine_is_a_fault(tmp_path: Path) -> None:
    here = around(tmp_path, {"ops.bind": ""}, connects=surroundings.connects)
    settings = here.settings.model_copy(
        update={"server": here.settings.server.model_copy(update={"host": "192.0.2.1", "port": 9})}
    )
    finding = only(network.ports, replace(here, settings=settings))
    says(finding, Verdict.FAIL, "192.0.2.1:9: ", "an address of this machine")


def test_probes_go_where_a_service_would_listen(tmp_path: Path, secrets_of: dict[str, Any]) -> None:
    assert around(tmp_path).urls == ["http://127.0.0.1:8001", "http://127.0.0.1:8000"]
    secrets_of |= {"server.host": "::", "ops.bind": "[::1]:9"}
    assert around(tmp_path, secrets_of).urls == ["http://[::1]:9", "https://[::1]:8000"]


def test_a_real_listener_is_seen_with_its_process() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert surroundings.connects("127.0.0.1", port)
        holder = surroundings.holder_of(port)
        if holder is not None:  # macOS tells root only
            assert holder.pid == os.getpid()
    assert not surroundings.connects("127.0.0.1", port)
    assert surroundings.holder_of(port) is None


KEYS = key_set(rsa_jwk(rsa_key(), kid="r"))
URL = "https://i.test/keys"


@pytest.mark.parametrize(
    ("answer", "verdict", "seen"),
    [
        (KeysDocument(KEYS), Verdict.OK, "1 usable keys"),
        (KeysDocument(problem="no answer within 3 s"), Verdict.FAIL, "no answer within 3 s"),
        (KeysDocument(b"<html>"), Verdict.FAIL, "is not strict JSON"),
        (KeysDocument(key_set({"kty": "oct", "k": "c2VjcmV0"})), Verdict.FAIL, "no usable key, 1 left out (symmetric)"),
    ],
)
def test_an_issuer_with_an_address(tmp_path: Path, answer: KeysDocument, verdict: Verdict, seen: str) -> None:
    here = around(tmp_path, {"auth.issuers": [issuer(jwks_url=URL)]}, key_set=lambda _: answer)
    says(only(network.issuers, here), verdict, seen)


def test_an_issuer_with_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    here = around(tmp_path, {"auth.issuers": [issuer(jwks_file=str(file))]})
    says(only(network.issuers, here), Verdict.FAIL, "No such file", "readable")
    file.write_bytes(KEYS)
    says(only(network.issuers, here), Verdict.OK, "1 usable keys")


def test_an_issuer_with_a_secret(tmp_path: Path) -> None:
    file = secret(tmp_path / "shared")
    here = around(tmp_path, {"auth.issuers": [issuer(algorithms=["HS256"], secret_file=str(file))]})
    says(only(network.issuers, here), Verdict.OK, "long enough")
    file.write_bytes(b"short")
    says(only(network.issuers, here), Verdict.FAIL, "32 bytes or more", "docs/jwt.md")


def test_without_issuers_there_is_nothing_to_reach(tmp_path: Path) -> None:
    says(only(network.issuers, around(tmp_path)), Verdict.SKIPPED, "no issuer")


# -- the model --------------------------------------------------------------------------------------------


def folder_of(tmp_path: Path, weights: int = 1000, config: dict[str, Any] | None = None) -> Path:
    """What passes for a model; the weights are a hole of that size."""
    folder = tmp_path / "model"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or {}))
    with (folder / "model.safetensors").open("wb") as file:
        file.truncate(weights)
    return folder


def with_model(tmp_path: Path, folder: Path, values: dict[str, Any] | None = None, **changes: Any) -> Surroundings:
    return around(tmp_path, {"model.reference": str(folder), **(values or {})}, **changes)


def test_a_model_with_its_sums(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    here = with_model(tmp_path, folder)
    says(only(model.model, here), Verdict.SKIPPED, "no hashes", "shasum -a 256 *.safetensors *.json > SHA256SUMS")
    names = ("model.safetensors", "config.json")
    (folder / "SHA256SUMS").write_text("".join(f"{model._sha256(folder / name)}  {name}\n" for name in names))
    says(only(model.model, here), Verdict.OK, "2 files have their hash")
    (folder / "model.safetensors").write_bytes(b"other")
    says(only(model.model, here), Verdict.FAIL, "not as they were: model.safetensors", "fetch")
    (folder / "SHA256SUMS").write_text(f"{'0' * 64}  gone.safetensors\n")
    says(only(model.model, here), Verdict.FAIL, "gone.safetensors")


def test_a_model_of_the_hubs_cache_is_named_by_its_hash(tmp_path: Path) -> None:
    folder, blobs = folder_of(tmp_path), tmp_path / "blobs"
    blobs.mkdir()
    weights = folder / "model.safetensors"
    blob = blobs / model._sha256(weights)
    weights.rename(blob)
    weights.symlink_to(blob)
    here = with_model(tmp_path, folder)
    says(only(model.model, here), Verdict.OK, "1 files have their hash")
    blob.write_bytes(b"half of it")
    says(only(model.model, here), Verdict.FAIL, "model.safetensors")


def test_the_demo_model_by_its_manifest(tmp_path: Path) -> None:
    here = around(tmp_path, {"model.reference": "demo"})
    says(only(model.model, here), Verdict.FAIL, "not in", "mlxd model fetch")
    folder = here.state_dir / "models" / demo_model.NAME
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    says(only(model.model, here), Verdict.FAIL, "not as its manifest says", "mlxd model fetch")
    files = {"model.safetensors": demo_model._measure(folder / "model.safetensors")}
    manifest = {"format": demo_model.FORMAT, "gguf_sha256": demo_model.RECIPE.gguf_sha256, "files": files}
    (folder / demo_model.MANIFEST).write_text(json.dumps(manifest))
    says(only(model.model, here), Verdict.OK, "as its manifest says")


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    here = with_model(tmp_path, tmp_path / "nowhere")
    says(only(model.model, here), Verdict.FAIL, "does not exist", "model fetch")
    says(only(model.memory, here), Verdict.SKIPPED, "without the model", "model fetch")


@pytest.mark.parametrize(
    ("weights", "budget", "verdict", "mend"),
    [
        (10 * GB, 0, Verdict.OK, ""),  # 19.2 GB of 24 may be used
        (10 * GB, 5 * GB, Verdict.OK, ""),
        (10 * GB, 11 * GB, Verdict.WARN, "at most 9200000000"),
        (10 * GB, 20 * GB, Verdict.FAIL, "engine.memory_budget"),
        (18 * GB, 0, Verdict.WARN, "smaller model"),
        (20 * GB, 0, Verdict.FAIL, "smaller model"),
    ],
)
def test_memory_of_a_mac(tmp_path: Path, weights: int, budget: int, verdict: Verdict, mend: str) -> None:
    here = with_model(tmp_path, folder_of(tmp_path, weights), {"engine.memory_budget": budget})
    says(only(model.memory, here), verdict, "of 24 GB: the GPU's working set", mend)


def test_memory_that_others_use_is_told_before_a_start_only(tmp_path: Path) -> None:
    few = replace(MAC, available=GB)
    here = with_model(tmp_path, folder_of(tmp_path, 10 * GB), machine=few)
    says(only(model.memory, here), Verdict.WARN, "free now: 1 GB", "end other programs")
    running = with_model(tmp_path, folder_of(tmp_path, 10 * GB), machine=few, get=lambda _: READY)
    says(only(model.memory, running), Verdict.OK, "weights 10 GB")


@pytest.mark.parametrize(
    ("config", "dense", "weights"),
    [
        ({"quantization": {"bits": 4, "group_size": 64}}, True, "7.11 GB"),  # 4.5 bits to 32
        ({"quantization": {"bits": 4, "group_size": 64}}, False, "1 GB"),
        ({}, True, "2 GB"),
        ({"quantization": {"bits": 0}}, True, "2 GB"),
    ],
)
def test_weights_that_become_dense_on_a_cpu_are_counted_so(
    tmp_path: Path, config: dict[str, Any], dense: bool, weights: str
) -> None:
    folder = folder_of(tmp_path, GB, config)
    here = with_model(tmp_path, folder, {"model.dequantize_on_cpu": dense}, machine=LINUX, run=answers(device=CPU))
    says(only(model.memory, here), Verdict.OK, f"weights {weights}, ")
    assert "this machine's memory" in only(model.memory, here).seen


# -- launchd and speed ------------------------------------------------------------------------------------


def test_property_lists_that_are_installed_are_linted_and_must_fit_the_settings(tmp_path: Path) -> None:
    file = tmp_path / "mlxd.plist"
    says(only(launch.plists, around(tmp_path, plists=[file])), Verdict.SKIPPED, "nothing is installed")
    layout = Layout.daemon(root=tmp_path)
    of_it = {"server.state_dir": layout.state}
    layout.state.mkdir(parents=True)
    mac = around(tmp_path, of_it, plists=[file])
    file.write_bytes(Job.of(layout, mac.settings).render())
    says(only(launch.plists, mac), Verdict.OK, "is sound")
    longer = around(tmp_path, {**of_it, "engine.drain_timeout": 500}, plists=[file])
    says(only(launch.plists, longer), Verdict.FAIL, "ExitTimeOut", "mlxd service install")
    another = around(tmp_path, {"engine.drain_timeout": 500}, plists=[file])
    says(only(launch.plists, another), Verdict.OK, "is sound")
    file.write_bytes(plistlib.dumps({"KeepAlive": True}))
    says(only(launch.plists, mac), Verdict.FAIL, "KeepAlive", "mlxd service install")


def test_the_last_start_is_told(tmp_path: Path) -> None:
    says(only(launch.last_start, around(tmp_path)), Verdict.OK, "no trouble")
    told = around(tmp_path, start_trouble="server.port: must be a number")
    says(only(launch.last_start, told), Verdict.WARN, "server.port", "service status")


def test_what_the_ledger_of_starts_says_is_what_the_doctor_sees(tmp_path: Path) -> None:
    settings = Settings.load(None, {"server.state_dir": tmp_path})
    assert here(settings).start_trouble == ""
    StartLedger(tmp_path).refuse("configuration: wrong")
    assert here(settings).start_trouble == "configuration: wrong"


def a_speed(decode: float, prefill: float = 1000.0, name: str = "m") -> Speed:
    return Speed(at=NOW, model=name, device="gpu", mlx="1", decode=decode, prefill=prefill)


@pytest.mark.parametrize(
    ("supervised", "shell", "verdict", "seen"),
    [
        (a_speed(87), a_speed(90), Verdict.OK, "supervised 87 tokens/s (prompt 1e+03); shell 90 tokens/s"),
        (a_speed(11), a_speed(87), Verdict.WARN, "7.9 times slower"),
        (a_speed(87, prefill=10), a_speed(87), Verdict.WARN, "100.0 times slower"),
        (a_speed(200), a_speed(87), Verdict.OK, "supervised 200"),
        (a_speed(11), a_speed(87, name="other"), Verdict.SKIPPED, "another model"),
        (None, a_speed(87), Verdict.SKIPPED, "no supervised start has been measured yet; shell 87"),
        (a_speed(87), None, Verdict.SKIPPED, "no start in a shell has been measured yet; supervised 87"),
        (None, None, Verdict.SKIPPED, "no supervised start has been measured yet"),
    ],
)
def test_speed_by_records(
    tmp_path: Path, supervised: Speed | None, shell: Speed | None, verdict: Verdict, seen: str
) -> None:
    here = around(tmp_path)
    for kind, speed in ((Started.SUPERVISED, supervised), (Started.SHELL, shell)):
        if speed is not None:
            record(here.state_dir, kind, speed)
    says(only(model.speed, here), verdict, seen)


def test_speed_that_is_measured_now(tmp_path: Path) -> None:
    here = around(tmp_path, measure=lambda: a_speed(87))
    record(here.state_dir, Started.SUPERVISED, a_speed(11))
    says(only(model.speed, here), Verdict.WARN, "shell 87", "ProcessType Interactive")
    running = replace(here, get=lambda _: READY)
    says(only(model.speed, running), Verdict.SKIPPED, "the service runs", "stop it")


def test_speed_without_a_model(tmp_path: Path) -> None:
    from service.errors import ModelUnavailable

    def measure() -> Speed:
        raise ModelUnavailable("there is no model")

    says(only(model.speed, around(tmp_path, measure=measure)), Verdict.FAIL, "there is no model", "model fetch")


# -- all together -----------------------------------------------------------------------------------------


def test_all_checks_on_a_mac_that_is_well(tmp_path: Path) -> None:
    run = answers(device=METAL, pmset=Ran(0, " sleep 0\n"), sntp=Ran(0, "+0.1 +/- 0.0 time.apple.com\n"))
    found = examine(with_model(tmp_path, folder_of(tmp_path), run=run))
    assert healthy(found)
    assert not [each for each in found if each.verdict is Verdict.WARN]
    assert len({each.name for each in found}) == len(found), "each is told once"
    assert len(found) >= len(CHECKS)


def test_one_that_fails_is_enough() -> None:
    well = ok("a", "b")
    assert healthy([well, replace(well, verdict=Verdict.WARN), replace(well, verdict=Verdict.SKIPPED)])
    assert not healthy([well, replace(well, verdict=Verdict.FAIL)])
