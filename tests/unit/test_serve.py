"""The process's life over real sockets and signals, with an engine that only pretends."""

import asyncio
import io
import os
import pty
import re
import shlex
import signal
import socket
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from service import serve
from service.console import OWN_KEY, Console, Credential, url
from service.engine.backend import MemoryUse
from service.engine.engine import EngineState, EngineStatus
from service.listening import Listeners, listen
from service.settings import Settings
from tests.conftest import ROOT
from tests.fake_service import FakeApp, FakeEngine

Start = Callable[..., "Running"]


class Running:
    """A fake service in a process of its own."""

    def __init__(self, state_dir: Path, options: tuple[str, ...]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.fake_service", str(state_dir), *options],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []

    def until(self, text: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if text in line:
                return line
        raise AssertionError(f"{text!r} never came: {self.lines} {self.end()}")

    def ready(self) -> str:
        return self.until("ready on").split("ready on ")[1].split(";")[0]

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=20)
        return self.process.returncode, "".join(self.lines) + out, err


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[Running] = []

    def begin(*options: str) -> Running:
        started.append(Running(tmp_path, options))
        return started[-1]

    yield begin
    for running in started:
        if running.process.poll() is None:
            running.process.kill()
        running.process.communicate()


@contextmanager
def streaming(url: str) -> Iterator[Iterator[str]]:
    """An answer whose first frame has arrived."""
    with httpx.stream("POST", f"{url}/generate", timeout=20) as response:
        lines = (line for line in response.iter_lines() if line)
        assert next(lines) == "data: 0"
        yield lines


def test_the_banner_names_the_real_port_and_its_curl_line_works_as_printed(start: Start) -> None:
    service = start("frames=3")
    url = service.ready()
    command = shlex.split(service.until("curl"))
    assert command[:3] == ["curl", "-s", f"{url}/generate"]
    assert command[3:5] == ["-H", "content-type: application/json"]
    answer = httpx.post(command[2], headers={"content-type": "application/json"}, content=command[-1])
    assert answer.status_code == 200
    assert "data: 2" in answer.text


def test_progress_is_printed_line_by_line_where_there_is_no_terminal(start: Start) -> None:
    service = start("load=0.4")  # longer than the interval at which the console looks
    service.ready()
    assert "mlxd: starting: reading [weights]\n" in service.lines
    assert "mlxd: warming: reading [weights]\n" in service.lines


def test_the_port_answers_503_while_the_model_loads(start: Start) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    service = start(f"port={port}", "load=0.5")
    service.until("starting")
    assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 503
    url = service.ready()
    assert httpx.get(f"{url}/health").status_code == 200


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_when_idle_ends_with_code_0(start: Start, number: signal.Signals) -> None:
    service = start()
    service.ready()
    service.process.send_signal(number)
    code, out, _ = service.end()
    assert code == 0
    assert "mlxd: stopping; 0 running" in out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_mid_stream_lets_the_stream_finish_and_refuses_new_work(
    start: Start, number: signal.Signals
) -> None:
    service = start("frames=40")
    url = service.ready()
    with streaming(url) as lines:
        service.process.send_signal(number)
        service.until("stopping; 1 running")
        assert httpx.post(f"{url}/generate").status_code == 503
        assert list(lines)[-1] == "data: 39"
    assert service.end()[0] == 0


def test_what_outlives_the_drain_timeout_ends_with_an_error_frame(start: Start) -> None:
    service = start("frames=100000", "drain_timeout=0.2")
    with streaming(service.ready()) as lines:
        service.process.terminate()
        assert list(lines)[-1] == "data: error"
    assert service.end()[0] == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_leaves_at_once_with_the_signals_code(start: Start, number: signal.Signals) -> None:
    service = start("frames=100000")
    with streaming(service.ready()) as lines:
        service.process.send_signal(number)
        service.until("stopping")
        service.process.send_signal(number)
        with pytest.raises(httpx.HTTPError):
            list(lines)
    code, _, err = service.end()
    assert code == 128 + number
    assert "forced_exit" in err


def test_a_signal_while_loading_ends_with_code_0(start: Start) -> None:
    service = start("load=30")
    service.until("starting")
    service.process.terminate()
    assert service.end()[0] == 0


def test_a_failed_engine_answers_its_clients_and_ends_with_code_70(start: Start) -> None:
    service = start("frames=100000", "fails=engine", "fail_after=0.5")
    with streaming(service.ready()) as lines:
        assert list(lines)[-1] == "data: error"
    code, out, _ = service.end()
    assert code == os.EX_SOFTWARE
    assert "mlxd: the engine failed: the canary died" in out


def test_a_missing_model_ends_with_code_69(start: Start) -> None:
    code, out, _ = start("fails=model").end()
    assert code == os.EX_UNAVAILABLE
    assert "no such model" in out


def test_an_application_that_cannot_start_ends_with_code_70(start: Start) -> None:
    code, _, err = start("lifespan_fails=yes").end()
    assert code == os.EX_SOFTWARE
    assert "no start-up today" in err


def test_a_taken_port_is_one_clear_line_and_code_1(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, out, err = start(f"port={port}").end()
    assert (code, out) == (1, "")
    assert err.splitlines() == [f"mlxd: cannot listen on 127.0.0.1:{port}: Address already in use"]


def test_the_operators_listener_is_told_and_ends_last(start: Start) -> None:
    service = start("frames=40")
    url = service.ready()
    operators = service.until("/admin also on").split()[-1]
    assert operators != url
    assert httpx.get(f"{operators}/health").status_code == 200
    with streaming(url) as lines:
        service.process.terminate()
        service.until("stopping; 1 running")
        assert httpx.get(f"{operators}/health").status_code == 503, "it answers, and not that it is ready"
        assert list(lines)[-1] == "data: 39"
    assert service.end()[0] == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{operators}/health")


def test_it_answers_while_the_model_loads(start: Start) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    service = start(f"ops=127.0.0.1:{port}", "load=0.5")
    service.until("starting")
    assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 503
    service.ready()
    assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200


def test_a_taken_port_of_the_operators_is_one_clear_line_and_code_1(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, out, err = start(f"ops=127.0.0.1:{port}").end()
    assert (code, out) == (1, "")
    assert err.splitlines() == [f"mlxd: cannot listen on 127.0.0.1:{port}: Address already in use"]


def test_without_an_address_there_is_no_second_listener(start: Start) -> None:
    service = start("ops=")
    url = service.ready()
    service.until("curl")
    assert httpx.get(f"{url}/health").status_code == 200
    service.process.terminate()
    code, out, _ = service.end()
    assert code == 0
    assert "also on" not in out


def test_serve_can_be_imported_without_mlx() -> None:
    program = (
        "import sys, service.serve, service.listening, service.cli; "
        "sys.exit(any(name.split('.')[0] == 'mlx' for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


def in_process(
    engine: FakeEngine, tmp_path: Path, *, leave: Callable[[int], object], drain_timeout: float = 1.0
) -> serve.Process:
    settings = free_ports(tmp_path)
    listeners = Listeners(settings, FakeApp(engine), listen(settings))
    console = Console(io.StringIO(), url="http://127.0.0.1:0")
    return serve.Process(listeners, engine, console, drain_timeout=drain_timeout, leave=leave)


def free_ports(state_dir: Path) -> Settings:
    return Settings.load(None, {"server.port": 0, "ops.bind": "127.0.0.1:0", "server.state_dir": state_dir})


def test_a_generation_thread_that_does_not_end_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wedged(FakeEngine):
        async def stop(self) -> None:
            await asyncio.Event().wait()

    async def scenario() -> list[int]:
        left: list[int] = []
        engine = Wedged()
        process = in_process(engine, tmp_path, leave=left.append)
        running = asyncio.create_task(process.run())
        await engine.wait(EngineState.READY)
        process._on_signal(signal.SIGTERM)
        await running
        return left

    monkeypatch.setattr(serve, "STOP_TIMEOUT", 0.05)
    assert asyncio.run(scenario()) == [0]


def test_a_drain_that_hangs_is_overdue_and_the_process_goes_on_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> tuple[int, list[int]]:
        left: list[int] = []
        engine = FakeEngine(drain_hangs=True)
        process = in_process(engine, tmp_path, leave=left.append, drain_timeout=0.05)
        running = asyncio.create_task(process.run())
        await engine.wait(EngineState.READY)
        process._on_signal(signal.SIGTERM)
        process._on_signal(signal.SIGINT)
        code = await running
        assert engine.stopped
        return code, left

    monkeypatch.setattr(serve, "FLUSH_TIMEOUT", 0)
    assert asyncio.run(scenario()) == (0, [130])


def test_without_a_builder_the_applications_own_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    engine = FakeEngine(fails="model")
    monkeypatch.setattr(serve, "_build", lambda _, supervised: FakeApp(engine))
    assert serve.run(free_ports(tmp_path)) == os.EX_UNAVAILABLE
    assert engine.stopped


def read_screen(screen: int) -> bytes:
    try:
        return os.read(screen, 4096)
    except OSError:  # Linux's way to say that the other side has closed
        return b""


def on_a_terminal(command: list[str], until: str, **environment: str) -> str:
    """What a pseudo-terminal of 100 columns shows of `command` up to some text; then the command is ended."""
    screen, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    shown = b""
    with subprocess.Popen(
        command, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=subprocess.DEVNULL, env={**os.environ, **environment}
    ) as process:
        os.close(theirs)
        while until.encode() not in shown:
            piece = read_screen(screen)
            assert piece, shown
            shown += piece
        process.terminate()
        while read_screen(screen):
            pass
    os.close(screen)
    assert process.returncode == 0
    return shown.decode()


@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_a_real_terminal_sees_a_bar_and_one_that_cannot_move_its_cursor_sees_lines(tmp_path: Path, term: str) -> None:
    command = [sys.executable, "-m", "tests.fake_service", str(tmp_path), "load=0.4", "total=4"]
    shown = on_a_terminal(command, "ready on", TERM=term)
    if term == "dumb":
        assert "mlxd: starting: reading [weights]\r\nmlxd: warming: reading [weights]\r\n" in shown
        assert "━" not in shown
        return
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert re.search(r"mlxd: starting: reading \[weights\] ━{30} 0%", plain), "to the width of the bar"
    assert re.search(r"mlxd: warming: reading \[weights\] ━{15}[━╸╺]{15} 50%", plain)
    ready = next(line for line in plain.splitlines() if "ready on" in line)
    assert ready.strip().startswith("mlxd: ready on "), "the bar is gone"


def test_a_stage_is_told_once_though_others_report_in_between() -> None:
    async def scenario() -> None:
        files = ("a.safetensors", "b.safetensors") * 3
        steps = [status_of(EngineState.STARTING, name, done, 6) for done, name in enumerate(files)]
        seen = iter([*steps, status_of(EngineState.READY, "ready")])
        await Console(stream, url=url("127.0.0.1", 8000)).follow(lambda: next(seen))

    stream = io.StringIO()
    asyncio.run(scenario())
    assert stream.getvalue().splitlines()[:3] == [
        "mlxd: starting: a.safetensors",
        "mlxd: starting: b.safetensors",
        "mlxd: ready on http://127.0.0.1:8000; try",
    ]


def status_of(state: EngineState, detail: str, done: int = 0, total: int = 0) -> EngineStatus:
    return EngineStatus(
        state=state,
        detail=detail,
        done=done,
        total=total,
        waiting=0,
        running=0,
        step_age=None,
        memory=MemoryUse(),
    )


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def follow(
    stream: io.StringIO,
    host: str = "127.0.0.1",
    *,
    tls: bool = False,
    credential: Credential | None = None,
    ops: str | None = None,
) -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        await engine.start()
        console = Console(stream, url=url(host, 8000, tls=tls), credential=credential, ops=ops)
        await console.follow(engine.status)

    asyncio.run(scenario())


def test_a_terminal_sees_a_spinner_and_then_the_banner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    follow(stream)
    assert "warming" in stream.getvalue()
    assert "ready on http://127.0.0.1:8000" in stream.getvalue()


def test_an_ipv6_address_is_bracketed_in_the_url() -> None:
    stream = io.StringIO()
    follow(stream, host="::1")
    assert "curl -s http://[::1]:8000/generate" in stream.getvalue()


KEPT = Credential("mlxd_dev_secret", "$(cat /state/development.key)")


@pytest.mark.parametrize(
    ("stream", "credential", "shown"),
    [
        (Terminal(), KEPT, ' -H "authorization: Bearer mlxd_dev_secret" '),
        (io.StringIO(), KEPT, ' -H "authorization: Bearer $(cat /state/development.key)" '),
        (io.StringIO(), OWN_KEY, ' -H "authorization: Bearer $KEY" '),
        (io.StringIO(), None, "/generate -H 'content-type"),
    ],
)
def test_the_banner_shows_the_key_to_a_person_and_to_a_file_only_where_it_is(
    stream: io.StringIO, credential: Credential | None, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    follow(stream, tls=True, credential=credential)
    told = stream.getvalue()
    assert f"curl -s https://127.0.0.1:8000/generate{shown if shown[0] == ' ' else ''}" in told
    assert shown in told
    assert ("mlxd_dev_secret" in told) is (stream.isatty() and credential is KEPT)
    assert ("mlxd keys create" in told) is (credential is OWN_KEY)
    assert "mlxd_dev_secret" not in repr(credential)


def test_a_reader_that_went_away_does_not_stop_the_service() -> None:
    class Closed(io.StringIO):
        def write(self, _: str) -> int:
            raise BrokenPipeError

    follow(Closed())
