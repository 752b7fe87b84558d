"""The queue of log lines and its one writer: over scripted outlets, real pipes and the full device."""

import errno
import io
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from service.observability import log_queue
from service.observability.log_queue import BATCH, Descriptor, LineWriter, Stream

PATIENCE = 10.0


class Outlet:
    """Keeps what it is given. Can be stalled, and can refuse the last lines of each write."""

    def __init__(self, *, refuses: int = 0) -> None:
        self.lines: list[str] = []
        self.writes = 0
        self.refuses = refuses
        self.reached = threading.Event()
        self.flowing = threading.Event()
        self.flowing.set()

    def write(self, lines: Sequence[str]) -> int:
        self.reached.set()
        assert self.flowing.wait(PATIENCE)
        lost = min(self.refuses, len(lines))
        self.lines += lines[: len(lines) - lost]
        self.writes += 1
        return lost

    def stall(self) -> None:
        self.flowing.clear()
        self.reached.clear()


@contextmanager
def writing(outlet: Outlet | Descriptor | Stream, capacity: int = 100) -> Iterator[LineWriter]:
    writer = LineWriter(outlet, capacity=capacity, notice=lambda missing: f"{missing} missing\n")
    try:
        yield writer
    finally:
        assert writer.close()


def put(writer: LineWriter, *lines: str) -> None:
    for line in lines:
        writer.put(line.__str__)


def numbered(count: int) -> list[str]:
    return [f"{number}\n" for number in range(count)]


def test_lines_come_out_whole_and_in_order_whoever_writes_them() -> None:
    outlet = Outlet()
    with writing(outlet, capacity=10_000) as writer:
        threads = [
            threading.Thread(target=put, args=(writer, *(f"{name} {number}\n" for number in range(500))))
            for name in "abcd"
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert writer.flush()
        assert writer.dropped == 0
    for name in "abcd":
        assert [line for line in outlet.lines if line.startswith(name)] == [f"{name} {n}\n" for n in range(500)]


def test_a_stalled_outlet_costs_the_oldest_lines_and_a_notice_says_how_many() -> None:
    outlet = Outlet()
    outlet.stall()
    with writing(outlet, capacity=10) as writer:
        put(writer, "first\n")
        assert outlet.reached.wait(PATIENCE), "the writer is stuck in it"
        put(writer, *numbered(25))
        assert writer.dropped == 15
        outlet.flowing.set()
        assert writer.flush(PATIENCE)
        assert outlet.lines == ["first\n", "15 missing\n", *numbered(25)[15:]]
        put(writer, "later\n")
        assert writer.flush(PATIENCE)
        assert outlet.lines[-1] == "later\n", "it is said once"


def test_a_flush_that_gave_up_costs_no_line() -> None:
    outlet = Outlet()
    outlet.stall()
    with writing(outlet, capacity=10) as writer:
        put(writer, "first\n")
        assert outlet.reached.wait(PATIENCE)
        assert not writer.flush(timeout=0.001)
        put(writer, *numbered(10))
        assert writer.dropped == 0
        outlet.flowing.set()
        assert writer.flush(PATIENCE)
    assert outlet.lines == ["first\n", *numbered(10)]


def test_what_the_system_refuses_is_counted_and_told_when_it_takes_lines_again() -> None:
    outlet = Outlet(refuses=1000)
    with writing(outlet) as writer:
        for line in numbered(5):
            put(writer, line)
            assert writer.flush(PATIENCE)
        assert (outlet.lines, writer.dropped) == ([], 5)
        outlet.refuses = 0
        put(writer, "again\n")
        assert writer.flush(PATIENCE)
        assert outlet.lines == ["5 missing\n", "again\n"]
        assert writer.dropped == 5


def test_many_lines_are_one_write() -> None:
    outlet = Outlet()
    outlet.stall()
    with writing(outlet, capacity=1000) as writer:
        put(writer, "first\n")
        assert outlet.reached.wait(PATIENCE)
        put(writer, *numbered(BATCH))
        outlet.flowing.set()
        assert writer.flush(PATIENCE)
    assert outlet.writes == 2


def test_lines_wait_for_others_but_nobody_waits_for_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_queue, "GATHERING", 10 * PATIENCE)
    outlet = Outlet()
    with writing(outlet) as writer:
        put(writer, *numbered(10))
        assert writer.flush(PATIENCE)
        assert (outlet.lines, outlet.writes) == (numbered(10), 1)
        put(writer, "last\n")
        assert writer.close(PATIENCE)
        assert (outlet.lines[-1], outlet.writes) == ("last\n", 2)


def test_several_outlets_keep_one_order_and_only_the_logs_own_gets_a_notice() -> None:
    said: list[str] = []

    class Named(Outlet):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def write(self, lines: Sequence[str]) -> int:
            said.extend(f"{self.name}: {line}" for line in lines)
            return 0

    log, console = Named("log"), Named("console")
    with writing(log) as writer:
        writer.lose(3)
        for number, outlet in enumerate((console, None, console, log)):
            writer.put(f"{number}\n".__str__, outlet)
        assert writer.flush(PATIENCE)
    assert said == ["console: 0\n", "log: 3 missing\n", "log: 1\n", "console: 2\n", "log: 3\n"]


def test_a_second_close_adds_nothing_and_what_ends_the_queue_may_be_dropped() -> None:
    outlet = Outlet()
    outlet.stall()
    writer = LineWriter(outlet, capacity=1, notice=str)
    put(writer, "first\n")
    assert outlet.reached.wait(PATIENCE)
    writer._drop(None)
    assert writer.dropped == 0
    assert not writer.close(0)
    assert not writer.close(0)
    outlet.flowing.set()
    assert writer.close(PATIENCE)


def test_closing_writes_what_is_queued_and_gives_up_where_nothing_moves() -> None:
    outlet = Outlet()
    outlet.stall()
    writer = LineWriter(outlet, capacity=10, notice=str)
    put(writer, *numbered(3))
    assert not writer.close(timeout=0.001)
    assert not writer.flush()
    put(writer, "too late\n")
    assert writer.dropped == 1
    outlet.flowing.set()
    assert writer.close(PATIENCE)
    assert writer.flush()
    assert outlet.lines == numbered(3)


def test_one_that_never_had_a_line_has_no_thread_to_wait_for() -> None:
    before = threading.active_count()
    writer = LineWriter(Outlet(), capacity=1, notice=str)
    assert threading.active_count() == before
    assert writer.flush()
    assert writer.close()


def test_two_threads_with_a_first_line_start_one_writer() -> None:
    with writing(Outlet()) as writer:
        writer._start()
        before = threading.active_count()
        writer._start()
        assert threading.active_count() == before


@contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    reader, end = os.pipe()
    try:
        yield reader, end
    finally:
        for number in (reader, end):
            try:
                os.close(number)
            except OSError as error:
                assert error.errno == errno.EBADF  # noqa: PT017 -- a test closed it itself


def test_a_pipe_that_nobody_reads_holds_up_the_writer_alone() -> None:
    with pipe() as (reader, end), open(reader, "rb", closefd=False) as taken:
        writer = LineWriter(Descriptor(end), capacity=50, notice=lambda missing: f"{missing} missing\n")
        while writer.flush(timeout=0.05):  # until it is stuck
            put(writer, *["x" * 1000 + "\n"] * 10)
        put(writer, *["x" * 1000 + "\n"] * 100)
        assert writer.dropped >= 50

        def close() -> None:
            assert writer.close(PATIENCE)
            os.close(end)

        ended = threading.Thread(target=close)
        ended.start()
        lines = taken.read().splitlines()
        ended.join(PATIENCE)
    told = [line for line in lines if line.endswith(b"missing")]
    assert told == [b"%d missing" % writer.dropped]
    assert {len(line) for line in lines if line not in told} == {1000}, "no line is torn"


def test_a_closed_pipe_takes_nothing_and_harms_nobody() -> None:
    with pipe() as (reader, end):
        os.close(reader)
        with writing(Descriptor(end)) as writer:
            put(writer, *numbered(3))
            assert writer.flush(PATIENCE)
            assert writer.dropped == 3


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="NOT TESTED HERE: there is no /dev/full")
def test_a_full_disk_takes_nothing_and_harms_nobody() -> None:
    with Path("/dev/full").open("wb", buffering=0) as full, writing(Descriptor(full.fileno())) as writer:
        put(writer, *numbered(3))
        assert writer.flush(PATIENCE)
        assert writer.dropped == 3


def test_a_descriptor_that_others_made_non_blocking_is_waited_for() -> None:
    with pipe() as (reader, end):
        os.set_blocking(end, False)
        size = 300_000  # more than a pipe holds
        writing_it = threading.Thread(target=Descriptor(end).write, args=(["x" * size + "\n"],))
        writing_it.start()
        got = b""
        while not got.endswith(b"\n"):
            got += os.read(reader, 65536)
        writing_it.join(PATIENCE)
        assert len(got) == size + 1


@pytest.mark.parametrize(
    ("takes", "lost", "then"),
    [
        ((4, None), 2, "\n"),  # in the middle of the first line
        ((6, None), 1, ""),  # one line whole
        ((9, None), 1, "\n"),  # in the middle of the second
        ((None,), 2, ""),  # nothing at all
        ((5, 7), 0, ""),
    ],
)
def test_a_line_that_was_cut_off_by_a_full_disk_does_not_spoil_the_next(
    monkeypatch: pytest.MonkeyPatch, takes: Sequence[int | None], lost: int, then: str
) -> None:
    script: list[int | None] = list(takes)
    written: list[bytes] = []

    def write(_: int, data: memoryview) -> int:
        taken = script.pop(0) if script else len(data)
        if taken is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(bytes(data[:taken]))
        return taken

    monkeypatch.setattr("os.write", write)
    outlet = Descriptor(99)
    assert outlet.write(["first\n", "other\n"]) == lost
    del written[:]
    script[:] = [None]
    assert outlet.write(["refused\n"]) == 1
    assert outlet.write(["again\n"]) == 0
    assert b"".join(written).decode() == f"{then}again\n"


def test_text_that_is_no_text_is_written_all_the_same(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb", buffering=0) as file:
        assert Descriptor(file.fileno()).write(["half \udc80 é\n"]) == 0
    assert (tmp_path / "log").read_text("utf-8") == "half \\udc80 é\n"


def test_a_stream_is_looked_up_for_each_write_and_may_be_gone() -> None:
    class Broken(io.StringIO):
        def flush(self) -> None:
            raise BrokenPipeError

    first, second, closed = io.StringIO(), io.StringIO(), io.StringIO()
    closed.close()
    streams: Iterator[io.StringIO] = iter([first, second, closed, Broken()])
    take: Callable[[], io.StringIO] = streams.__next__
    outlet = Stream(take)
    assert [outlet.write(["a\n", "b\n"]) for _ in range(4)] == [0, 0, 2, 2]
    assert first.getvalue() == second.getvalue() == "a\nb\n"
