"""Keys over time: files that change, sources that fail, and floods of key ids that nobody has."""

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from service.auth.jwks import MAX_BYTES, KeySetError
from service.auth.jwks_https import HttpsSource
from service.auth.jwt import KeysHealth
from service.auth.key_sets import STALE_LIMIT, FileSource, KeySet, SecretKey, open_issuer, read_secret
from service.errors import IssuerUnavailable
from service.settings import ConfigurationError
from tests.token_authority import SECRET, issuer_settings, key_set, rsa_jwk, rsa_key

OLD, NEW = rsa_jwk(rsa_key(), kid="old"), rsa_jwk(rsa_key(1), kid="new")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Script:
    """A source that answers as told, the last answer for ever; `gate` holds it up."""

    answers: Sequence[bytes | KeySetError | None]
    asked: int = 0
    gate: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.gate.set()

    async def load(self) -> bytes | None:
        self.asked += 1
        answer = self.answers[min(self.asked, len(self.answers)) - 1]
        await self.gate.wait()
        if isinstance(answer, KeySetError):
            raise answer
        return answer


def build(*answers: bytes | KeySetError | None) -> tuple[KeySet, Script, Clock]:
    source, clock = Script(answers), Clock()
    keys = KeySet("acme", source, ("RS256",), interval=600, retry=30, clock=clock, jitter=lambda: 0.5)
    return keys, source, clock


FAILURE = KeySetError("is not there")


async def test_the_first_token_brings_the_keys() -> None:
    keys, source, _ = build(key_set(OLD))
    assert keys.health.age is None
    found = await keys.find("old")
    assert found is not None
    assert found.kid == "old"
    assert source.asked == 1
    assert keys.health == KeysHealth(keys=1, skipped=0, age=0.0, error=None)


async def test_old_and_new_keys_overlap_in_a_rotation() -> None:
    keys, source, clock = build(key_set(OLD), key_set(OLD, NEW), key_set(NEW))
    assert await keys.find("old")
    clock.now += 40
    assert await keys.find("new"), "an unknown key id asks again"
    assert await keys.find("old")
    clock.now += 600
    await keys.refresh()
    assert await keys.find("new")
    assert await keys.find("old") is None
    assert source.asked == 3


async def test_a_thousand_unknown_key_ids_are_one_question() -> None:
    keys, source, clock = build(key_set(OLD))
    assert await keys.find("old")
    assert {await keys.find(f"x{number}") for number in range(1000)} == {None}
    assert source.asked == 1, "it was asked a moment ago"
    clock.now += 33.1  # 30 s and the jitter
    together = await asyncio.gather(*(keys.find(f"x{number}") for number in range(1000)))
    assert set(together) == {None}
    assert {await keys.find(f"y{number}") for number in range(1000)} == {None}
    assert source.asked == 2


async def test_how_each_look_ended_is_told() -> None:
    told: list[str] = []
    source = Script([key_set(OLD), None, FAILURE, None, key_set(NEW)])
    keys = KeySet("acme", source, ("RS256",), interval=600, retry=30, on_load=told.append)
    for _ in range(5):
        await keys.refresh()
    # What did not change since it could not be used is still of no use.
    assert told == ["success", "success", "failure", "failure", "success"]


async def test_the_jitter_spreads_the_questions() -> None:
    keys, source, clock = build(key_set(OLD))
    await keys.find("old")
    clock.now += 32.9
    assert await keys.find("x") is None
    assert source.asked == 1


async def test_a_token_without_a_key_id_asks_nobody() -> None:
    keys, source, clock = build(key_set(OLD, NEW))
    await keys.refresh()
    clock.now += 100
    assert await keys.find(None) is None
    assert source.asked == 1


async def test_all_who_wait_share_one_answer_and_one_who_leaves_does_not_end_it() -> None:
    keys, source, _ = build(key_set(OLD))
    source.gate.clear()
    waiting = [asyncio.create_task(keys.find("old")) for _ in range(20)]
    while source.asked == 0:
        await asyncio.sleep(0)
    waiting[0].cancel()
    source.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await waiting[0]
    assert all(await asyncio.gather(*waiting[1:]))
    assert source.asked == 1


async def test_where_no_keys_were_ever_had_the_answer_is_503_and_not_a_guess() -> None:
    keys, source, clock = build(FAILURE, FAILURE, key_set(OLD))
    for _ in range(5):
        with pytest.raises(IssuerUnavailable) as caught:
            await keys.find("old")
        assert (caught.value.status, caught.value.code) == (503, "issuer_unavailable")
        assert caught.value.retry_after == pytest.approx(33.0)
    assert source.asked == 1, "only the first one asks"
    assert keys.health.error == "is not there"
    clock.now += 34
    with pytest.raises(IssuerUnavailable):
        await keys.find("old")
    clock.now += 34
    assert await keys.find("old")
    assert source.asked == 3
    assert keys.health == KeysHealth(keys=1, skipped=0, age=0.0, error=None)


async def test_keys_stay_good_for_a_day_while_their_source_fails() -> None:
    keys, _, clock = build(key_set(OLD), FAILURE)
    await keys.refresh()
    clock.now += STALE_LIMIT
    await keys.refresh()
    assert await keys.find("old")
    assert (keys.health.error, keys.health.age) == ("is not there", STALE_LIMIT)
    clock.now += 1
    with pytest.raises(IssuerUnavailable):
        await keys.find("old")


async def test_a_set_that_is_none_leaves_the_last_good_one() -> None:
    keys, _, _ = build(key_set(OLD), b"<html>", None, key_set(NEW))
    for error in (None, "is not strict JSON", "is not strict JSON"):
        await keys.refresh()
        assert keys.health.error == error
        assert await keys.find("old")
    await keys.refresh()
    assert await keys.find("old") is None
    assert keys.health.error is None


async def test_a_withdrawn_set_is_withdrawn() -> None:
    keys, _, _ = build(key_set(OLD), key_set())
    await keys.refresh()
    await keys.refresh()
    assert await keys.find("old") is None


async def test_a_follower_asks_every_interval_and_sooner_while_that_fails() -> None:
    keys, source, _ = build(key_set(OLD), FAILURE, None, key_set(NEW))
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 4:
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await keys.follow(sleep)
    assert pauses == [570.0, 28.5, 28.5, 570.0]
    assert source.asked == 4


async def test_a_follower_that_is_stopped_takes_its_question_along() -> None:
    keys, source, _ = build(key_set(OLD))
    source.gate.clear()
    task = asyncio.create_task(keys.follow())
    while source.asked == 0:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [each for each in asyncio.all_tasks() if each.get_name() == "keys-acme" and not each.cancelling()] == []


def file_set(path: Path) -> tuple[KeySet, Clock]:
    clock = Clock()
    return KeySet("acme", FileSource(path), ("RS256",), interval=1, retry=1, clock=clock), clock


def put(path: Path, data: bytes) -> None:
    draft = path.with_suffix(".draft")
    draft.write_bytes(data)
    draft.replace(path)


async def test_a_file_that_is_replaced_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    put(path, key_set(OLD))
    keys, clock = file_set(path)
    assert await keys.find("old")
    put(path, key_set(NEW))
    clock.now += 1
    await keys.refresh()
    assert await keys.find("old") is None
    assert await keys.find("new")
    assert keys.health.age == 0


async def test_a_file_that_has_not_changed_is_not_read_but_stays_fresh(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    put(path, key_set(OLD))
    source = FileSource(path)
    assert await source.load() == key_set(OLD)
    assert await source.load() is None
    keys, clock = file_set(path)
    await keys.refresh()
    clock.now += 100
    await keys.refresh()
    assert keys.health.age == 0


async def test_a_file_of_the_same_size_and_time_is_known_by_its_inode(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    put(path, b'{"keys": [1]}')
    before = path.stat()
    source = FileSource(path)
    await source.load()
    put(path, b'{"keys": [2]}')
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert await source.load() == b'{"keys": [2]}'


async def test_a_file_that_goes_away_leaves_the_last_keys_and_is_found_when_it_comes_back(tmp_path: Path) -> None:
    path, away = tmp_path / "keys.json", tmp_path / "away"
    put(path, key_set(OLD))
    keys, _ = file_set(path)
    await keys.refresh()
    path.rename(away)
    await keys.refresh()
    assert keys.health.error == "cannot be read: No such file or directory"
    assert await keys.find("old")
    away.rename(path)
    await keys.refresh()
    assert keys.health.error is None


@pytest.mark.parametrize("kind", ["huge", "folder", "fifo"])
async def test_a_file_that_is_none_is_told(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    if kind == "huge":
        path.write_bytes(b" " * (MAX_BYTES + 1))
    elif kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(path)
    keys, _ = file_set(path)
    with pytest.raises(IssuerUnavailable):
        await keys.find("old")
    assert keys.health.error == (f"has more than {MAX_BYTES} bytes" if kind == "huge" else "is not a file")


def secret_settings(path: Path) -> dict[str, object]:
    return {"name": "dev", "algorithms": ("HS256",), "jwks_file": None, "secret_file": path}


def test_a_secret_is_read_without_the_newline_at_its_end(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(SECRET + b"\n")
    path.chmod(0o600)
    assert read_secret(issuer_settings(**secret_settings(path))) == SECRET


@pytest.mark.parametrize(
    ("content", "mode", "problem"),
    [
        (b"", 0o600, "must hold 32 bytes or more"),
        (SECRET[:-1] + b"\n", 0o600, "must hold 32 bytes or more"),
        (SECRET, 0o640, "chmod 600"),
        (None, 0o600, "there is no such file"),
    ],
)
def test_a_secret_that_is_short_open_or_absent_refuses_to_start(
    content: bytes | None, mode: int, problem: str, tmp_path: Path
) -> None:
    path = tmp_path / "secret"
    if content is not None:
        path.write_bytes(content)
        path.chmod(mode)
    with pytest.raises(ConfigurationError, match=problem):
        open_issuer(issuer_settings(**secret_settings(path)))


async def test_a_secret_has_no_key_id(tmp_path: Path) -> None:
    keys = SecretKey(SECRET)
    assert await keys.find(None) is keys.key
    assert await keys.find("x") is None
    assert keys.health.keys == 1


def test_each_kind_of_issuer_gets_its_source(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(SECRET)
    path.chmod(0o600)
    assert isinstance(open_issuer(issuer_settings(**secret_settings(path))).keys, SecretKey)
    by_file = open_issuer(issuer_settings(jwks_file=tmp_path / "keys.json")).keys
    by_url = open_issuer(issuer_settings(jwks_file=None, jwks_url="https://acme.test/keys")).keys
    assert isinstance(by_file, KeySet)
    assert isinstance(by_url, KeySet)
    assert isinstance(by_file._source, FileSource)
    assert isinstance(by_url._source, HttpsSource)


@pytest.mark.parametrize("content", [None, b"", b"no certificate"])
def test_authorities_that_cannot_be_used_refuse_to_start(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_bytes(content)
    settings = issuer_settings(jwks_file=None, jwks_url="https://acme.test/keys", jwks_ca_file=path)
    with pytest.raises(ConfigurationError, match="holds no certificates"):
        open_issuer(settings)
