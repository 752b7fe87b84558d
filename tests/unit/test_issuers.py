"""Issuers that are replaced while the service runs: whose keys stay, whose are read anew, and who is still followed."""

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from service.auth.issuers import Issuers
from service.auth.jwt import BoundKey
from service.auth.key_sets import KeySet, SecretKey
from service.settings import ConfigurationError, IssuerSettings
from tests.token_authority import key_set, rsa_jwk, rsa_key

pytestmark = pytest.mark.anyio

SECRET = b"s" * 32


class World:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.looks: list[tuple[str, str]] = []
        self.tasks: list[asyncio.Task[None]] = []
        for name in ("acme", "other"):
            (folder / f"{name}.json").write_bytes(key_set(rsa_jwk(rsa_key(), kid=name)))

    def start(self, name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        self.tasks.append(asyncio.create_task(work, name=name))
        return self.tasks[-1]

    def issuer(self, name: str, **more: Any) -> IssuerSettings:
        values = {"name": name, "issuer": f"https://{name}/", "audience": "mlxd", "algorithms": ("RS256",)}
        return IssuerSettings(**{**values, "jwks_file": self.folder / f"{name}.json", **more})

    def shared(self, name: str, secret: bytes) -> IssuerSettings:
        path = self.folder / f"{name}.secret"
        path.write_bytes(secret)
        path.chmod(0o600)
        return self.issuer(name, algorithms=("HS256",), jwks_file=None, secret_file=path)

    def open(self, *settings: IssuerSettings) -> Issuers:
        return Issuers(settings, lambda name, outcome: self.looks.append((name, outcome)))


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def named(issuers: Issuers) -> dict[str, Any]:
    return {each.settings.name: each for each in issuers}


async def test_other_settings_over_the_same_keys_keep_them(world: World) -> None:
    issuers = world.open(world.issuer("acme"))
    await issuers.refresh()
    [before] = issuers
    issuers.replace(issuers.opened([world.issuer("acme", leeway=5, audience="other")]))
    [after] = issuers
    assert (after.settings.leeway, after.settings.audience) == (5, "other")
    assert after.keys is before.keys
    assert after.keys.health.keys == 1


@pytest.mark.parametrize("change", [{"algorithms": ("RS256", "RS384")}, {"jwks_file": Path("/nowhere")}])
async def test_keys_from_elsewhere_are_asked_for_anew(world: World, change: dict[str, Any]) -> None:
    issuers = world.open(world.issuer("acme"))
    await issuers.refresh()
    issuers.replace(issuers.opened([world.issuer("acme", **change)]))
    [after] = issuers
    assert after.keys.health.keys == 0


async def test_a_shared_secret_is_read_anew_and_one_that_cannot_be_changes_nothing(world: World) -> None:
    settings = world.shared("acme", SECRET)
    issuers = world.open(settings)
    [before] = issuers
    world.shared("acme", b"t" * 32)
    issuers.replace(issuers.opened([settings]))
    [after] = issuers
    assert isinstance(after.keys, SecretKey)
    assert secret_of(after.keys.key) == b"t" * 32 != secret_of(before.keys.key)  # type: ignore[attr-defined]
    world.shared("acme", b"short")
    with pytest.raises(ConfigurationError, match="32 bytes"):
        issuers.opened([settings])
    assert list(issuers) == [after]


def secret_of(key: BoundKey) -> object:
    return key.material.prepared_key


async def test_while_it_runs_a_new_one_is_followed_and_one_that_is_gone_is_not(world: World) -> None:
    issuers = world.open(world.issuer("acme"))
    issuers.run(world.start)
    issuers.replace(issuers.opened([world.issuer("acme"), world.issuer("other")]))
    async with asyncio.timeout(10):
        while {name for name, _ in world.looks} != {"acme", "other"}:
            await asyncio.sleep(0.001)
    assert len(world.tasks) == 2
    issuers.replace(issuers.opened([world.issuer("other")]))
    await asyncio.wait(world.tasks[:1])
    assert [task.cancelled() for task in world.tasks] == [True, False]
    assert list(named(issuers)) == ["other"]
    await asyncio.gather(*issuers.stop(), return_exceptions=True)
    assert all(task.cancelled() for task in world.tasks)
    issuers.replace(issuers.opened([world.issuer("acme")]))
    assert len(world.tasks) == 2, "nobody follows when it is over"


async def test_all_are_asked_at_once_and_one_that_fails_harms_nobody(world: World) -> None:
    issuers = world.open(world.issuer("acme"), world.issuer("gone"), world.shared("hmac", SECRET))
    await issuers.refresh()
    assert sorted(world.looks) == [("acme", "success"), ("gone", "failure")]
    assert isinstance(named(issuers)["gone"].keys, KeySet)
