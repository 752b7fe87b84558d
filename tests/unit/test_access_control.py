"""The parts behind authentication, together: with a real database, and with one that is not there."""

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog

from service.auth import access_control
from service.auth.access_control import AccessService
from service.auth.development import FILE_NAME
from service.auth.pepper import FILE_NAME as PEPPER_FILE
from service.errors import StorageUnavailable, Unauthorized
from service.observability.metrics import Metrics
from service.settings import ConfigurationError, Settings
from service.storage import audit
from service.storage.database import Database
from tests.fakes import FakeBackend
from tests.serving import Served, bearer, make_key, opened, served
from tests.token_authority import key_set, rsa_jwk, rsa_key

pytestmark = pytest.mark.anyio


def settings_for(folder: Path, **more: Any) -> Settings:
    return Settings.load(None, {"server.port": 0, "server.state_dir": folder / "state", **more})


def audited(settings: Settings) -> list[tuple[str, dict[str, Any]]]:
    with Database.open(settings.storage, settings.server.state_dir) as database:
        found = database.read(lambda connection: audit.entries(connection, limit=100)).result()
    return [(entry.event, json.loads(entry.detail)) for entry in reversed(found)]


async def test_a_key_lets_in_while_it_runs_and_what_is_pending_is_written_at_the_end(tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    key = make_key(settings, "models")
    service = AccessService(settings, Metrics())
    async with opened(service):
        assert service.control.ready()
        headers = [(b"authorization", b"Bearer " + key.text.encode())]
        grant = await service.control.authenticator.authenticate(headers, "127.0.0.1")
        assert grant.principal.key_id == key.record.kid
        with pytest.raises(Unauthorized):
            await service.control.authenticator.authenticate([], "127.0.0.1")
        service.control.failures.note(reason="missing", address="203.0.113.9", request_id="id")
    [*_, configured, failed] = audited(settings)
    assert configured[0] == "configuration_loaded"
    assert configured[1]["authentication"] is True
    assert failed == (
        "authentication_failed",
        {"address": "203.0.113.9", "reason": "missing", "request_id": "id", "unrecorded": 0},
    )
    with Database.open(settings.storage, settings.server.state_dir) as database:
        from service.storage import keys

        used = database.read(lambda connection: keys.find(connection, key.record.kid)).result()
    assert used is not None
    assert used.last_used_at is not None


def test_the_development_key_stays_the_same_and_goes_with_its_setting(tmp_path: Path) -> None:
    file = tmp_path / "state" / FILE_NAME
    kept = []
    for _ in range(2):
        service = AccessService(settings_for(tmp_path, **{"auth.development_key": True}), Metrics())
        assert service.open()
        assert service.open()
        assert service.development_key is not None
        assert service.development_key.file == file
        kept.append(service.development_key.text)
        assert service.development_key.text not in repr(service.development_key)
        service._database.close()
    assert kept == [file.read_text().strip()] * 2
    service = AccessService(settings_for(tmp_path), Metrics())
    service.open()
    service._database.close()
    assert service.development_key is None
    assert not file.exists()


async def test_where_it_is_off_nothing_is_kept(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, **{"auth.enabled": False, "auth.development_key": True})
    service = AccessService(settings, Metrics())
    assert service.open()
    with structlog.testing.capture_logs() as lines:
        async with opened(service):
            assert service.control.ready()
            assert (await service.control.authenticator.authenticate([], "127.0.0.1")).principal.id == "local"
    assert [line["event"] for line in lines] == ["authentication_off"]
    assert not (tmp_path / "state").exists()


def test_a_pepper_that_others_may_read_is_a_configuration_error(tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    make_key(settings, "models")
    (settings.server.state_dir / PEPPER_FILE).chmod(0o644)
    with pytest.raises(ConfigurationError, match=PEPPER_FILE):
        AccessService(settings, Metrics())


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access_control, "RETRY_INTERVAL", 0.02)
    monkeypatch.setattr(access_control, "OPEN_PATIENCE", 0.2)


@pytest.fixture
def damaged(tmp_path: Path, often: None) -> Iterator[tuple[Served, Path]]:
    """A service whose database is no database."""
    settings = settings_for(tmp_path)
    settings.server.state_dir.mkdir(mode=0o700)
    file = settings.server.state_dir / "mlxd.db"
    file.write_bytes(b"this is no database" * 1000)
    file.chmod(0o600)
    with served(settings, FakeBackend()) as service:
        yield service, file


async def test_a_database_that_is_not_there_is_503_and_never_401_until_it_is(
    damaged: tuple[Served, Path], tmp_path: Path
) -> None:
    service, file = damaged
    known = "mlxd_live_" + "0" * 12 + "_" + "0" * 32
    from service.auth.key_format import checksum

    async with httpx.AsyncClient(base_url=service.url) as client:
        health = await client.get("/health")
        assert (health.status_code, health.json()) == (503, {"status": "storage", "model_loaded": True})
        assert "storage" in (await client.get("/readyz")).json()["reasons"][0]
        assert (await client.get("/livez")).status_code == 200
        answer = await client.get("/v1/models", headers=bearer(f"{known}_{checksum(known)}"))
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "storage_unavailable")
        assert int(answer.headers["retry-after"]) >= 1
        assert (await client.get("/v1/models", headers=bearer("nonsense"))).status_code == 401
        file.unlink()  # the operator has understood
        async with asyncio.timeout(30):
            while (await client.get("/health")).status_code != 200:
                await asyncio.sleep(0.01)
        key = make_key(settings_for(tmp_path), "models")
        assert (await client.get("/v1/models", headers=bearer(key))).status_code == 200


async def test_a_database_that_is_wrong_in_another_way_while_it_is_mended_is_tried_on(
    damaged: tuple[Served, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    service, file = damaged
    link = file.with_suffix(".link")
    link.symlink_to(tmp_path)
    link.replace(file)  # refused as a configuration error, as is a file that vanishes between two looks at it
    told = ""
    async with httpx.AsyncClient(base_url=service.url) as client, asyncio.timeout(30):
        while "must be a plain file" not in told:
            told += "".join(capfd.readouterr())
            await asyncio.sleep(0.01)
        file.unlink()
        while (await client.get("/health")).status_code != 200:
            await asyncio.sleep(0.01)
    told += "".join(capfd.readouterr())
    assert told.count("must be a plain file") == 1
    assert "access_task_died" not in told


def test_the_reason_is_logged_once_and_not_at_each_attempt(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, **{"storage.url": "postgresql://127.0.0.1:1/nothing"})
    service = AccessService(settings, Metrics())
    with structlog.testing.capture_logs() as lines:
        assert not service.open()
        assert not service.open()
    assert [line["event"] for line in lines if line["event"] == "storage_not_opened"] == ["storage_not_opened"]
    assert not service.control.ready()


async def test_a_part_that_dies_is_logged_and_counted(tmp_path: Path) -> None:
    metrics = Metrics()
    service = AccessService(settings_for(tmp_path), metrics)

    async def broken() -> None:
        raise ZeroDivisionError

    with structlog.testing.capture_logs() as lines:
        await asyncio.wait([service._task("keys", broken())])
        await asyncio.sleep(0)
    assert [(line["event"], line["task"]) for line in lines] == [("access_task_died", "keys")]
    assert metrics.registry.get_sample_value("mlxd_internal_errors_total", {"where": "access"}) == 1


async def test_a_database_that_does_not_close_does_not_keep_the_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access_control, "CLOSE_TIMEOUT", 0.05)
    service = AccessService(settings_for(tmp_path), Metrics())
    go_on = threading.Event()
    with structlog.testing.capture_logs() as lines:
        async with opened(service):
            service._database.write(lambda _: go_on.wait(30))
    go_on.set()
    assert "storage_close_overdue" in [line["event"] for line in lines]


async def test_what_cannot_be_written_into_the_audit_log_waits(tmp_path: Path) -> None:
    service = AccessService(settings_for(tmp_path), Metrics())
    service.control.failures.note(reason="missing", address="", request_id="id")
    await service.control.failures.flush()
    with pytest.raises(StorageUnavailable):
        await service._write_failures([])


def issuer(folder: Path, name: str) -> dict[str, Any]:
    (folder / f"{name}.json").write_bytes(key_set(rsa_jwk(rsa_key(), kid="a")))
    return {
        "name": name,
        "issuer": f"https://{name}.test/",
        "audience": "mlxd",
        "algorithms": ["RS256"],
        "jwks_file": folder / f"{name}.json",
    }


async def test_issuers_that_are_changed_are_there_at_once_and_those_that_are_gone_leave_no_series(
    tmp_path: Path,
) -> None:
    metrics = Metrics()
    before, after = ({"auth.issuers": [issuer(tmp_path, each)]} for each in ("old", "new"))
    service = AccessService(settings_for(tmp_path, **before), metrics)
    metrics.jwks_keys.labels("old").set(1)
    async with opened(service):
        put_in_force = service.prepared(settings_for(tmp_path, **after).auth)
        assert [each.settings.name for each in service.control.issuers] == ["old"]
        put_in_force()
        await service.refresh()
        assert [(each.settings.name, each.keys.health.keys) for each in service.control.issuers] == [("new", 1)]
    assert metrics.registry.get_sample_value("mlxd_jwks_keys", {"issuer": "old"}) is None


async def test_a_new_key_is_known_as_soon_as_everything_is_looked_at(tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    service = AccessService(settings, Metrics())
    async with opened(service):
        key = make_key(settings, "models")
        await service.refresh()
        assert service._keys._snapshot.get(key.record.kid) is not None
    await AccessService(settings_for(tmp_path, **{"auth.enabled": False}), Metrics()).refresh()


async def test_what_was_noted_after_the_end_is_written_when_it_closes(tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    service = AccessService(settings, Metrics())
    async with service.run():
        pass
    service.control.failures.note(reason="missing", address="203.0.113.9", request_id="id")
    for _ in range(2):
        await service.close()
    assert audited(settings)[-1][0] == "authentication_failed"
