"""The log as a file that is renamed under the writer: no line lost, none cut in two, and no reason to end."""

import json
import os
import stat
import threading
from pathlib import Path

import pytest

from service.observability.log_file import LogFile
from service.observability.log_queue import LineWriter
from service.observability.logging import configure, flush, get_logger, lines_dropped, reopen


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_it_is_made_for_us_alone_and_one_that_is_there_is_kept_as_it_is(tmp_path: Path) -> None:
    made, there = tmp_path / "made", tmp_path / "there"
    there.write_text("first\n")
    there.chmod(0o640)
    former = os.umask(0)
    try:
        for path in (made, there):
            LogFile(path).write(["line\n"])
    finally:
        os.umask(former)
    assert (mode(made), made.read_text()) == (0o600, "line\n")
    assert (mode(there), there.read_text()) == (0o640, "first\nline\n")


def test_after_a_rename_lines_follow_the_file_until_it_is_opened_anew(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = LogFile(path)
    log.write(["a\n"])
    rotated = path.rename(tmp_path / "log.0")
    log.write(["b\n"])
    assert not path.exists()
    log.reopen()
    log.reopen()
    log.write(["c\n"])
    log.write(["d\n"])
    assert (rotated.read_text(), path.read_text(), mode(path)) == ("a\nb\n", "c\nd\n", 0o600)


def test_a_file_that_takes_its_place_is_written_to_though_nobody_told(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = LogFile(path)
    log.write(["a\n"])
    rotated = path.rename(tmp_path / "log.0")
    (tmp_path / "new").write_text("made by newsyslog\n")
    (tmp_path / "new").rename(path)
    log.write(["b\n"])
    log.write(["c\n"])
    assert (rotated.read_text(), path.read_text()) == ("a\n", "made by newsyslog\nb\nc\n")


def test_what_takes_its_place_and_is_no_plain_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = LogFile(path)
    rotated = path.rename(tmp_path / "log.0")
    os.mkfifo(path)
    assert log.write(["a\n"]) == 0
    assert rotated.read_text() == "a\n"


def test_one_that_cannot_be_opened_anew_goes_on_in_the_former(tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    log = LogFile(folder / "log")
    gone = folder.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError):
        log.reopen()
    assert log.write(["still here\n"]) == 0
    assert (gone / "log").read_text() == "still here\n"


def test_no_descriptor_is_left_open_however_often_it_is_opened_anew(tmp_path: Path) -> None:
    def open_files() -> int:
        return len(list(Path("/dev/fd").iterdir()))

    log = LogFile(tmp_path / "log")
    before = open_files()
    for _ in range(20):
        log.reopen()
        log.reopen()
        log.write(["x\n"])
    assert open_files() == before


@pytest.mark.parametrize("kind", ["folder", "fifo", "missing folder"])
def test_what_is_no_plain_file_is_refused_and_not_waited_for(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "log"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path = tmp_path / "nowhere" / "log"
    with pytest.raises(OSError):  # noqa: PT011 -- each kind has its own
        LogFile(path)


def test_a_fifo_with_a_reader_is_refused_too(tmp_path: Path) -> None:
    path = tmp_path / "log"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(OSError, match="not a plain file"):
        LogFile(path)
    os.close(reader)


def test_threads_that_log_while_it_is_rotated_lose_no_line_and_tear_none(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = LogFile(path)
    writer = LineWriter(log, capacity=100_000, notice=str)
    lines = [[f"{name} {number} {'x' * 200}\n" for number in range(2000)] for name in "abcd"]

    def put(those: list[str]) -> None:
        for line in those:
            writer.put(line.__str__)

    threads = [threading.Thread(target=put, args=(those,)) for those in lines]
    for thread in threads:
        thread.start()
    rotations = 0
    while any(thread.is_alive() for thread in threads):
        path.rename(tmp_path / f"log.{rotations}")
        log.reopen()
        rotations += 1
    assert writer.flush()
    assert writer.close()
    assert writer.dropped == 0
    files = [*(tmp_path / f"log.{number}" for number in range(rotations)), path]
    found = "".join(file.read_text() for file in files).splitlines(keepends=True)
    for those in lines:
        assert [line for line in found if line[0] == those[0][0]] == those, "whole, and in order"


def test_the_log_of_the_process_is_json_in_its_file_and_is_opened_anew_by_one_call(tmp_path: Path) -> None:
    path = tmp_path / "log"
    configure(file=path)
    get_logger("service.x").info("before")
    flush()
    rotated = path.rename(tmp_path / "log.0")
    reopen()
    get_logger("service.x").info("after")
    flush()
    assert [json.loads(file.read_text())["event"] for file in (rotated, path)] == ["before", "after"]
    assert lines_dropped() == 0


def test_where_the_log_is_no_file_there_is_nothing_to_open(capsys: pytest.CaptureFixture[str]) -> None:
    configure(fmt="json")
    reopen()
    get_logger("service.x").info("event")
    flush()
    assert "event" in capsys.readouterr().err
