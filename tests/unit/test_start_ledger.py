"""The ledger of starts: whole or absent on disk, and never what stops a start."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from service.settings import read_private
from service.supervision.starts import KEPT, History, StartLedger, StartRecord


@pytest.fixture
def ledger(tmp_path: Path) -> StartLedger:
    tmp_path.chmod(0o700)
    return StartLedger(tmp_path, now=lambda: 1000.0)


def test_what_was_put_is_read_by_another_process_and_is_ours_alone(ledger: StartLedger) -> None:
    began = StartRecord(began=1.5, pid=12)
    ledger.put(began)
    ledger.put(StartRecord(began=2.5, pid=13))
    ledger.put(began.model_copy(update={"ready": 3.0}))
    again = StartLedger(ledger.file.parent)
    assert [(each.pid, each.ready) for each in again.read().starts] == [(13, None), (12, 3.0)]
    assert ledger.file.stat().st_mode & 0o777 == 0o600
    assert [each.name for each in ledger.file.parent.iterdir()] == ["starts.json"]


def test_only_the_last_starts_are_kept_and_long_reasons_are_cut(ledger: StartLedger) -> None:
    for number in range(KEPT + 5):
        ledger.put(StartRecord(began=number, pid=1, reason="\U0001f600" * 5000))
    kept = ledger.read().starts
    assert [each.began for each in kept] == list(range(5, KEPT + 5))
    assert len(read_private(ledger.file)) < 64 * 1024, "what may be read of it"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"starts": 1}',
        b'{"starts": [{"pid": "x"}]}',
        b'{"starts": [{"began": NaN, "pid": 1}]}',
        b"\xff\xfe",
        b"[" * 100_000,
    ],
)
def test_a_damaged_ledger_counts_as_empty_and_the_next_start_makes_it_good(ledger: StartLedger, content: bytes) -> None:
    ledger.file.write_bytes(content)
    ledger.file.chmod(0o600)
    assert ledger.read() == History()
    ledger.put(StartRecord(began=1, pid=1))
    assert len(ledger.read().starts) == 1


@given(cut=st.integers(0, 400), flipped=st.integers(0, 255))
def test_no_damage_to_a_single_byte_and_no_short_file_stops_a_start(
    tmp_path_factory: pytest.TempPathFactory, cut: int, flipped: int
) -> None:
    folder = tmp_path_factory.getbasetemp()
    ledger = StartLedger(folder)
    data = bytearray(History(starts=(StartRecord(began=1, pid=1, reason="why"),)).model_dump_json(indent=1).encode())
    place = min(cut, len(data) - 1)
    data[place] = flipped
    for damaged in (bytes(data), bytes(data[:place])):
        ledger.file.write_bytes(damaged)
        ledger.file.chmod(0o600)
        ledger.read()


def test_a_link_in_its_place_is_not_followed(ledger: StartLedger, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text(History(starts=(StartRecord(began=1, pid=1),)).model_dump_json())
    other.chmod(0o600)
    ledger.file.symlink_to(other)
    before = other.read_bytes()
    assert ledger.read() == History()
    ledger.put(StartRecord(began=2, pid=2))
    assert other.read_bytes() == before
    assert [each.pid for each in ledger.read().starts] == [2]


def test_one_that_others_may_write_is_not_believed(ledger: StartLedger) -> None:
    ledger.put(StartRecord(began=1, pid=1))
    ledger.file.chmod(0o666)
    assert ledger.read() == History()


def test_a_ledger_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ledger = StartLedger(tmp_path / "file")
    ledger.put(StartRecord(began=1, pid=1))
    assert ledger.read() == History()


def test_a_crash_while_it_is_written_leaves_the_old_one(ledger: StartLedger, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger.put(StartRecord(began=1, pid=1))
    before = ledger.file.read_bytes()

    def power_cut(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", power_cut)
    with pytest.raises(KeyboardInterrupt):
        ledger.put(StartRecord(began=2, pid=2))
    assert ledger.file.read_bytes() == before


def test_what_a_later_version_wrote_is_read_as_far_as_it_is_known(ledger: StartLedger) -> None:
    ledger.file.write_text(json.dumps({"starts": [{"began": 1, "pid": 2, "mood": "good"}], "version": 9}))
    ledger.file.chmod(0o600)
    assert [each.pid for each in ledger.read().starts] == [2]


def test_a_refusal_ends_this_process_start_where_it_had_begun_one(ledger: StartLedger) -> None:
    ledger.put(StartRecord(began=1, pid=os.getpid()))
    ledger.refuse("configuration: server.port: wrong")
    [record] = ledger.read().starts
    assert (record.began, record.ended, record.exit_code) == (1, 1000.0, 0)
    assert ledger.read().down_because == "configuration: server.port: wrong"


def test_a_refusal_without_a_start_is_one(ledger: StartLedger) -> None:
    assert ledger.read().down_because == ""
    ledger.refuse("why")
    assert ledger.read().down_because == "why"
    ledger.put(StartRecord(began=2000.0, pid=1))
    assert ledger.read().down_because == "", "it runs again"
