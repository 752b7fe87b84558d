"""The key ring: who is let in, that every refusal is the same work, and what holds while the store is down."""

from __future__ import annotations

import asyncio
import statistics
import time
from pathlib import Path
from typing import Any

import pytest

from service.auth.grant import Grant, Verifier
from service.auth.key_format import checksum, parse
from service.auth.keyring import KeyRing, Refusal
from service.auth.pepper import Peppers
from service.auth.principal import Scope
from service.errors import CredentialRevoked, StorageUnavailable, Unauthorized
from tests.fake_keys import World

HERE = "192.0.2.7"


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def reason(world: World, text: str, address: str = HERE) -> str:
    with pytest.raises(Unauthorized) as caught:
        await world.ring.verify(text, address)
    return caught.value.reason


def other_secret(text: str) -> str:
    """The same kid with a wrong secret, well-formed."""
    env, kid, secret = parse(text).env, parse(text).kid, text.split("_")[3]
    body = f"mlxd_{env}_{kid}_{'0' if secret[0] != '0' else '1'}{secret[1:]}"
    return f"{body}_{checksum(body)}"


async def test_a_good_key_is_a_principal_with_all_that_its_record_says(world: World) -> None:
    text = world.add(
        principal="key:first", tenant="acme", plan="gold", models=frozenset({"m"}), limits={"rpm": 3},
        scopes=frozenset({"inference", "scope-of-a-newer-release"}),
    )  # fmt: skip
    grant = await world.ring.verify(text, HERE)
    who = grant.principal
    assert (who.id, who.tenant, who.plan, who.key_id) == ("key:first", "acme", "gold", parse(text).kid)
    assert (who.scopes, who.models) == (frozenset({Scope.INFERENCE}), frozenset({"m"}))
    assert who.limits == {"rpm": 3}
    assert grant.refusal() is None
    assert text.split("_")[3] not in repr(grant)


async def test_a_principal_is_made_once_and_anew_when_its_record_has_changed(world: World) -> None:
    text = world.add(plan="silver")
    first, second = [(await world.ring.verify(text, HERE)).principal for _ in range(2)]
    assert first is second
    world.store.change(parse(text).kid, plan="gold")
    await world.ring.refresh()
    assert (await world.ring.verify(text, HERE)).principal.plan == "gold"


def test_the_ring_is_a_verifier_and_its_grant_a_grant(world: World) -> None:
    verifier: Verifier = world.ring
    assert verifier.recognises("mlxd_anything")
    assert not verifier.recognises("eyJhbGciOiJub25lIn0.e30.")

    async def granted() -> Grant:
        return await world.ring.verify("", HERE)

    granted().close()


async def test_what_is_no_key_by_form_costs_neither_query_nor_hash(world: World) -> None:
    text = world.add()
    for bad in (
        "mlxd_",
        text[:-1] + ("0" if text[-1] != "0" else "1"),
        text + "x",
        "mlxd_' OR 1=1 --",
        "mlxd_" + "é" * 60,
    ):
        assert await reason(world, bad) == Refusal.MALFORMED
    assert world.store.trace == []


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({}, Refusal.UNKNOWN),
    "wrong secret": ({}, Refusal.WRONG_SECRET),
    "wrong secret of a revoked key": ({"revoked_at": 5.0}, Refusal.WRONG_SECRET),
    "wrong secret from elsewhere": ({"networks": ("10.0.0.0/8",)}, Refusal.WRONG_SECRET),
    "revoked": ({"revoked_at": 5.0}, Refusal.REVOKED),
    "expired": ({"expires_at": 1_800_000_000.0}, Refusal.EXPIRED),
    "not yet valid": ({"not_before": 1_800_000_000.1}, Refusal.NOT_YET_VALID),
    "wrong network": ({"networks": ("10.0.0.0/8",)}, Refusal.WRONG_NETWORK),
}


def case(world: World, name: str) -> str:
    attributes, _ = CASES[name]
    text = world.add(**attributes)
    if name == "unknown":
        return world.key().text
    return other_secret(text) if name.startswith("wrong secret") else text


@pytest.mark.parametrize("name", CASES)
async def test_every_refusal_takes_the_same_steps_in_the_same_order(world: World, name: str) -> None:
    await world.ring.verify(world.add(), HERE)
    text = case(world, name)
    assert await reason(world, text) == CASES[name][1]
    world.store.trace.clear()
    assert await reason(world, text) == CASES[name][1]
    once = ["hmac of 62", "compare 32 with 32"]
    assert world.store.trace == [*once, "revision", *once]


async def test_the_time_of_refusals_is_printed(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    """Advisory: a loaded machine decides nothing here. The steps above are what is guaranteed."""
    texts = {name: case(world, name) for name in CASES}
    for text in texts.values():
        await reason(world, text)
    took: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in range(200):
        for name, text in texts.items():
            began = time.perf_counter()
            await reason(world, text)
            took[name].append(time.perf_counter() - began)
    with capsys.disabled():
        print("\nmedian microseconds to refuse, fake store:", end=" ")
        print(", ".join(f"{name} {statistics.median(each) * 1e6:.0f}" for name, each in took.items()))


async def test_a_key_works_at_once_after_it_was_created(world: World) -> None:
    await world.ring.verify(world.add(), HERE)
    assert (await world.ring.verify(world.add(), HERE)).refusal() is None


async def test_a_key_is_valid_from_its_not_before_up_to_but_not_at_its_expiry(world: World) -> None:
    text = world.add(not_before=world.wall + 10, expires_at=world.wall + 20)
    assert await reason(world, text) == Refusal.NOT_YET_VALID
    world.wall += 10
    await world.ring.verify(text, HERE)
    world.wall += 10
    assert await reason(world, text) == Refusal.EXPIRED


@pytest.mark.parametrize(
    ("networks", "address", "allowed"),
    [
        (("192.0.2.0/24",), "192.0.2.7", True),
        (("192.0.2.0/24",), "192.0.3.7", False),
        (("192.0.2.0/24",), "::ffff:192.0.2.7", True),
        (("192.0.2.0/24",), "::ffff:192.0.3.7", False),
        (("198.51.100.0/24", "192.0.2.7/32"), "192.0.2.7", True),
        (("2001:db8::/32",), "2001:db8::1", True),
        (("2001:db8::/32",), "2001:db9::1", False),
        (("2001:db8::/32",), "192.0.2.7", False),
        (("0.0.0.0/0",), "2001:db8::1", False),
        (("::1/128",), "::1", True),
        (("fe80::/10",), "fe80::1%eth0", True),
        (("0.0.0.0/0", "::/0"), "", False),
        (("0.0.0.0/0", "::/0"), "unix", False),
        ((), "192.0.2.7", False),
    ],
)
async def test_a_key_works_from_its_networks_only(
    world: World, networks: tuple[str, ...], address: str, *, allowed: bool
) -> None:
    text = world.add(networks=networks)
    if allowed:
        await world.ring.verify(text, address)
    else:
        assert await reason(world, text, address) == Refusal.WRONG_NETWORK


async def test_a_thousand_unknown_keys_at_once_are_two_queries_at_most_and_one_at_a_time(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    await world.ring.verify(world.add(), HERE)
    world.store.trace.clear()
    hold = world.store.hold = asyncio.Event()
    asked = [asyncio.create_task(reason(world, world.key().text)) for _ in range(1000)]
    while "revision" not in world.store.trace:
        await asyncio.sleep(0)
    hold.set()
    assert set(await asyncio.gather(*asked)) == {Refusal.UNKNOWN}
    assert world.store.trace.count("revision") <= 2
    assert world.store.most_together == 1
    with capsys.disabled():
        print("\nqueries for 1,000 unknown keys at once:", world.store.trace.count("revision"))


async def test_a_poll_that_was_under_way_does_not_answer_for_a_later_key(world: World) -> None:
    await world.ring.verify(world.add(), HERE)
    hold = world.store.hold = asyncio.Event()
    early = asyncio.create_task(reason(world, world.key().text))
    while world.store.trace.count("revision") < 2:
        await asyncio.sleep(0)
    late = asyncio.create_task(world.ring.verify(world.add(), HERE))
    await asyncio.sleep(0)
    hold.set()
    assert await early == Refusal.UNKNOWN
    assert (await late).refusal() is None
    assert world.store.most_together == 1


async def test_a_client_that_leaves_does_not_take_the_poll_of_the_others_with_it(world: World) -> None:
    hold = world.store.hold = asyncio.Event()
    text = world.add()
    leaving = asyncio.create_task(world.ring.verify(text, HERE))
    staying = asyncio.create_task(world.ring.verify(text, HERE))
    while not world.store.together:
        await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.wait([leaving])
    hold.set()
    assert (await staying).principal.key_id == parse(text).kid
    assert leaving.cancelled()


# The store is down.


async def test_known_keys_stay_valid_for_stale_for_and_then_it_is_503(world: World) -> None:
    text = world.add()
    await world.ring.verify(text, HERE)
    world.store.broken = True
    world.monotonic += 60
    await world.ring.verify(text, HERE)
    world.monotonic += 0.1
    with pytest.raises(StorageUnavailable) as caught:
        await world.ring.verify(text, HERE)
    assert caught.value.retry_after is not None
    world.store.broken = False
    await world.ring.verify(text, HERE)


@pytest.mark.parametrize("name", [name for name in CASES if name != "revoked"])
async def test_while_the_store_is_down_what_may_have_changed_is_503_and_never_401(world: World, name: str) -> None:
    text = case(world, name)
    assert await reason(world, text) == CASES[name][1]
    world.store.broken = True
    for _ in range(2):
        with pytest.raises(StorageUnavailable):
            await world.ring.verify(text, HERE)
        world.monotonic += 100


async def test_a_revoked_key_stays_refused_while_the_store_is_down(world: World) -> None:
    text = world.add(revoked_at=1.0)
    assert await reason(world, text) == Refusal.REVOKED
    world.store.broken = True
    world.monotonic += 1000
    assert await reason(world, text) == Refusal.REVOKED


async def test_before_the_store_was_ever_read_every_key_is_503(world: World) -> None:
    text = world.add()
    world.store.broken = True
    with pytest.raises(StorageUnavailable):
        await world.ring.verify(text, HERE)


async def test_with_nothing_stale_allowed_each_request_asks_the_store(tmp_path: Path) -> None:
    world = World(tmp_path, stale_for=0.0)
    text = world.add()
    for number in range(1, 4):
        world.monotonic += 0.001
        await world.ring.verify(text, HERE)
        assert world.store.trace.count("revision") == number
    world.monotonic += 0.001
    world.store.broken = True
    with pytest.raises(StorageUnavailable):
        await world.ring.verify(text, HERE)


async def test_a_store_that_hangs_is_a_store_that_is_down(world: World) -> None:
    text = world.add()
    await world.ring.verify(text, HERE)
    world.store.hold = asyncio.Event()
    world.ring._snapshot._poll_timeout = 0.0
    await world.ring.verify(text, HERE)
    with pytest.raises(StorageUnavailable):
        await world.ring.verify(world.key().text, HERE)


# Changes while requests run.


async def refresh(world: World) -> None:
    await world.ring._snapshot.refresh()


@pytest.mark.parametrize(
    ("changes", "ends"),
    [
        ({"revoked_at": 1.0}, True),
        ({"scopes": frozenset({"models"})}, True),
        ({"scopes": frozenset({"inference", "models", "usage"})}, False),
        ({"models": frozenset({"another"})}, True),
        ({"models": frozenset({"mine", "another"})}, False),
        ({"models": None}, False),
        ({"tenant": "another"}, True),
        ({"networks": ("10.0.0.0/8",)}, True),
        ({"networks": ("192.0.2.0/28",)}, False),
        ({"networks": None}, False),
        ({"not_before": 1_800_000_001.0}, True),
        ({"expires_at": 1_800_000_000.0}, True),
        ({"expires_at": 1_900_000_000.0}, False),
        ({"plan": "silver"}, False),
        ({"limits": {"rpm": 1}}, False),
        ({"name": "another"}, False),
        ({"last_used_at": 7.0}, False),
    ],
)
async def test_a_running_request_ends_when_its_key_loses_something_it_had(
    world: World, changes: dict[str, Any], *, ends: bool
) -> None:
    text = world.add(models=frozenset({"mine"}), networks=("192.0.2.0/24",))
    grant = await world.ring.verify(text, HERE)
    world.store.change(parse(text).kid, **changes)
    assert grant.refusal() is None, "not seen yet"
    await refresh(world)
    assert isinstance(grant.refusal(), CredentialRevoked) is ends


async def test_a_key_that_was_limited_to_models_later_ends_what_could_use_all(world: World) -> None:
    text = world.add()
    grant = await world.ring.verify(text, HERE)
    world.store.change(parse(text).kid, models=frozenset({"m"}))
    await refresh(world)
    assert isinstance(grant.refusal(), CredentialRevoked)


async def test_a_key_that_was_deleted_ends_its_requests(world: World) -> None:
    text = world.add()
    grant = await world.ring.verify(text, HERE)
    world.store.remove(parse(text).kid)
    await refresh(world)
    assert isinstance(grant.refusal(), CredentialRevoked)


async def test_a_key_that_expires_while_its_request_runs_does_not_end_it(world: World) -> None:
    text = world.add(expires_at=world.wall + 10)
    grant = await world.ring.verify(text, HERE)
    world.wall += 20
    world.store.change(parse(text).kid, name="reloaded")
    await refresh(world)
    assert grant.refusal() is None
    world.store.change(parse(text).kid, scopes=frozenset())
    await refresh(world)
    assert isinstance(grant.refusal(), CredentialRevoked), "a change still counts"


async def test_a_store_that_goes_down_ends_no_running_request(world: World) -> None:
    grant = await world.ring.verify(world.add(), HERE)
    world.store.broken = True
    world.monotonic += 1000
    await refresh(world)
    assert grant.refusal() is None


class Ticks:
    """A `sleep` that returns when the test says so."""

    def __init__(self) -> None:
        self.asked: list[float] = []
        self.waiting: dict[float, asyncio.Event] = {}

    async def sleep(self, seconds: float) -> None:
        self.asked.append(seconds)
        await self.waiting.setdefault(seconds, asyncio.Event()).wait()
        self.waiting[seconds].clear()

    async def tick(self, seconds: float) -> None:
        """Let one sleep of `seconds` end; returns when the next one began."""
        seen = self.asked.count(seconds)
        self.waiting.setdefault(seconds, asyncio.Event()).set()
        while self.asked.count(seconds) == seen:
            await asyncio.sleep(0)


async def test_changes_are_seen_within_a_poll_and_listeners_are_told(world: World) -> None:
    ticks = Ticks()
    world.ring._sleep = ticks.sleep
    running = asyncio.create_task(world.ring.run())
    while 0.25 not in ticks.asked:
        await asyncio.sleep(0)
    told: list[bool] = []
    text = world.add()
    await ticks.tick(0.25)
    grant = await world.ring.verify(text, HERE)
    world.ring.on_change(lambda: told.append(grant.refusal() is not None))
    await ticks.tick(0.25)
    assert told == [], "nothing changed"
    world.store.change(parse(text).kid, revoked_at=world.wall)
    await ticks.tick(0.25)
    assert told == [True]
    running.cancel()
    await asyncio.wait([running])
    assert running.cancelled()


async def test_each_poll_tells_which_revision_it_read_and_when_it_began(world: World) -> None:
    told: list[tuple[int | None, float]] = []

    async def follower(revision: int | None, began: float) -> None:
        told.append((revision, began))

    world.ring.on_poll(follower)
    began = world.monotonic
    await world.ring.refresh()
    world.add()
    world.monotonic += 1
    await world.ring.refresh()
    world.store.broken = True
    await world.ring.refresh()
    [(first, _), (second, _), _] = told
    assert first is not None
    assert second is not None
    assert second > first
    assert told == [(first, began), (second, began + 1), (None, began + 1)]


async def test_last_uses_are_written_every_30_seconds_and_at_the_close(world: World) -> None:
    ticks = Ticks()
    world.ring._sleep = ticks.sleep
    running = asyncio.create_task(world.ring.run())
    texts = [world.add() for _ in range(2)]
    kids = [parse(text).kid for text in texts]
    for text in [*texts, texts[0]]:
        world.wall += 1
        await world.ring.verify(text, HERE)
    await reason(world, world.key().text)
    assert world.store.touched == [], "not on the request's path"
    await ticks.tick(30.0)
    assert world.store.touched == [{kids[0]: world.wall, kids[1]: world.wall - 1}]
    await ticks.tick(30.0)
    assert len(world.store.touched) == 1, "nothing new"
    await world.ring.verify(texts[1], HERE)
    running.cancel()
    await asyncio.wait([running])
    await world.ring.close()
    assert world.store.touched[1:] == [{kids[1]: world.wall}]


async def test_last_uses_wait_for_a_store_that_is_down_and_newer_ones_win(world: World) -> None:
    text = world.add()
    await world.ring.verify(text, HERE)
    world.store.broken = True
    await world.ring.close()
    world.wall += 5
    await world.ring.verify(text, HERE)
    world.store.broken = False
    await world.ring.close()
    assert world.store.touched == [{parse(text).kid: world.wall}]


async def test_a_write_of_last_uses_that_is_cancelled_loses_nothing(world: World) -> None:
    text = world.add()
    await world.ring.verify(text, HERE)
    ring = world.ring
    started = asyncio.Event()

    async def stuck(_: object) -> None:
        started.set()
        await asyncio.Event().wait()

    ring._last_used._touch = stuck
    closing = asyncio.create_task(ring.close())
    await started.wait()
    closing.cancel()
    await asyncio.wait([closing])
    ring._last_used._touch = world.store.touch
    await ring.close()
    assert world.store.touched == [{parse(text).kid: world.wall}]


# Peppers.


async def test_a_pepper_that_another_process_added_is_read_with_the_keys_it_hashed(world: World) -> None:
    old = world.add()
    await world.ring.verify(old, HERE)
    elsewhere = Peppers.open(world.pepper_path)
    elsewhere.rotate()
    new = world.add(peppers=elsewhere)
    for text in (new, old):
        await world.ring.verify(text, HERE)


async def test_a_key_whose_pepper_is_lost_is_refused_with_that_reason(world: World) -> None:
    good = world.add()
    lost = world.add(pepper_version=9)
    assert await reason(world, lost) == Refusal.PEPPER_MISSING
    world.pepper_path.unlink()
    world.store.change(parse(lost).kid, name="reloaded")
    assert await reason(world, lost) == Refusal.PEPPER_MISSING
    await world.ring.verify(good, HERE)


async def test_the_cost_of_a_good_key_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = World(tmp_path)
    peppers = Peppers.open(world.pepper_path)
    ring = KeyRing(world.store, peppers, touch=world.store.touch, stale_for=60.0)
    figures = {}
    for name, networks in (("any network", None), ("one network", ("192.0.2.0/24",))):
        text = world.add(networks=networks)
        await ring.verify(text, HERE)
        rounds = []
        for _ in range(20):
            began = time.perf_counter()
            for _ in range(200):
                await ring.verify(text, HERE)
            rounds.append((time.perf_counter() - began) / 200)
        figures[name] = f"{name} {min(rounds) * 1e6:.1f} best, {statistics.median(rounds) * 1e6:.1f} median"
    with capsys.disabled():
        print("\nmicroseconds to verify a good key:", "; ".join(figures.values()))
