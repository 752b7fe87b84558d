import asyncio
import gc
import io
import json
import logging
import os
import re
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any, Literal

import pytest
import structlog

from service.observability.logging import (
    MAX_LINE,
    QueuedHandler,
    configure,
    current_level,
    flush,
    get_logger,
    line_writer,
    lines_dropped,
    log_uncaught,
    set_level,
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    yield
    logging.getLogger("uvicorn.access").disabled = False
    structlog.contextvars.clear_contextvars()


def written(stream: io.StringIO) -> str:
    """What was logged so far, as it came out."""
    flush()
    return stream.getvalue()


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in written(stream).splitlines()]


def test_every_source_speaks_the_same_json() -> None:
    stream = io.StringIO()
    configure(fmt="json", stream=stream)
    structlog.contextvars.bind_contextvars(request_id="r1")
    get_logger("service.x").info("model_loaded", seconds=1.5)
    logging.getLogger("uvicorn.error").warning("Started %s", "it", extra={"color_message": "coloured"})
    logging.getLogger("huggingface_hub").error("no such file")
    found = lines(stream)
    assert [line["event"] for line in found] == ["model_loaded", "Started it", "no such file"]
    assert [line["level"] for line in found] == ["info", "warning", "error"]
    assert [line["logger"] for line in found] == ["service.x", "uvicorn.error", "huggingface_hub"]
    assert found[0]["seconds"] == 1.5
    assert {line["request_id"] for line in found} == {"r1"}
    assert all("timestamp" in line and "color_message" not in line for line in found)


def test_line_breaks_cannot_forge_a_line() -> None:
    stream = io.StringIO()
    configure(fmt="json", stream=stream)
    get_logger("x").info("event", value='a\n{"event": "forged"}\x1b[0m\u2028')
    assert len(written(stream).splitlines()) == 1


@pytest.mark.parametrize("fmt", ["json", "console"])
def test_a_traceback_shows_no_variables(fmt: Any) -> None:
    stream = io.StringIO()
    configure(fmt=fmt, stream=stream)
    prompt = "a secret" + " prompt"
    try:
        prompt.index("x")
    except ValueError:
        get_logger("x").exception("request_failed")
    assert "ValueError" in written(stream)
    assert "a secret prompt" not in written(stream)


KEY = "mlxd_live_" + "k" * 12 + "_" + "s" * 32 + "_" + "c" * 6
TOKEN = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJ4In0.c2lnbmF0dXJl"


@pytest.mark.parametrize("fmt", ["json", "console"])
def test_a_credential_is_in_no_line_wherever_it_was_put(fmt: Literal["json", "console"]) -> None:
    stream = io.StringIO()
    configure(fmt=fmt, stream=stream)
    log = get_logger("x")
    for secret in (KEY, TOKEN):
        log.info("event", hash=secret, headers={"authorization": [f"Bearer {secret}"]})
        logging.getLogger("library").error("failed with %r", secret)
        log.error("request_failed", exc_info=RuntimeError(secret))
    assert "s" * 32 not in written(stream)
    assert "eyJzdWIiOiJ4In0" not in written(stream)
    assert "c2lnbmF0dXJl" not in written(stream)
    assert "mlxd_live_kkkkkkkkkkkk_[redacted]" in written(stream)  # which key it was can be told
    assert written(stream).count("[redacted]") >= 8


def test_auto_is_json_unless_on_a_terminal() -> None:
    piped, terminal = io.StringIO(), Terminal()
    for stream in (piped, terminal):
        configure(stream=stream)
        get_logger("x").info("event")
    assert lines(piped)[0]["event"] == "event"
    assert not written(terminal).startswith("{")


def test_only_a_terminal_gets_colours() -> None:
    piped, terminal = io.StringIO(), Terminal()
    for stream in (piped, terminal):
        configure(fmt="console", stream=stream)
        get_logger("x").warning("event", number=1)
    assert "\x1b" not in written(piped)
    assert "event" in written(piped)
    assert "\x1b[" in written(terminal)


@pytest.mark.parametrize("first", [Terminal, io.StringIO])
def test_a_line_goes_where_a_spinner_wants_it_but_a_file_keeps_its_lines(
    first: type[io.StringIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, spinner = first(), io.StringIO()
    monkeypatch.setattr("sys.stderr", original)
    configure()
    monkeypatch.setattr("sys.stderr", spinner)
    get_logger("x").info("event")
    heard = {"original": "event" in written(original), "spinner": "event" in written(spinner)}
    assert heard == {"original": not original.isatty(), "spinner": original.isatty()}


def test_the_level_holds_for_everybody_and_uvicorn_has_no_access_log() -> None:
    stream = io.StringIO()
    configure(level="warning", fmt="json", stream=stream)
    get_logger("x").info("quiet")
    logging.getLogger("uvicorn.error").info("quiet")
    logging.getLogger("uvicorn.access").error("GET /")
    assert written(stream) == ""


def test_without_a_stream_it_is_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    configure(fmt="json")
    get_logger("x").info("event")
    flush()
    assert json.loads(capsys.readouterr().err)["event"] == "event"


def test_libraries_are_heard_from_warning_up_whatever_the_level() -> None:
    stream = io.StringIO()
    configure(level="debug", fmt="json", stream=stream)
    get_logger("service.x").debug("ours")
    for level in (logging.DEBUG, logging.INFO, logging.WARNING):
        logging.getLogger("httpcore").log(level, "level %d", level)
    assert [line["event"] for line in lines(stream)] == ["ours", "level 30"]


def test_the_level_can_be_changed_at_any_time() -> None:
    stream = io.StringIO()
    configure(level="warning", fmt="json", stream=stream)
    log = get_logger("x")
    log.info("before")
    assert current_level() == "warning"
    set_level("debug")
    assert current_level() == "debug"
    log.debug("after")
    assert [line["event"] for line in lines(stream)] == ["after"]


def test_no_field_can_pass_for_the_lines_own() -> None:
    stream = io.StringIO()
    configure(fmt="json", stream=stream)
    get_logger("x").warning("event", level="debug", logger="y", timestamp="yesterday")
    [line] = lines(stream)
    assert (line["event"], line["level"], line["logger"]) == ("event", "warning", "x")
    assert line["timestamp"].endswith("Z")


def test_the_line_says_what_was_true_when_it_was_logged() -> None:
    stream = io.StringIO()
    configure(fmt="json", stream=stream)
    structlog.contextvars.bind_contextvars(request_id="r1")
    said = ["a"]
    get_logger("x").info("event", said=said)
    logging.getLogger("library").error("of %s", said)
    said.append("b")
    structlog.contextvars.bind_contextvars(request_id="r2")
    assert [(line["event"], line["request_id"], line.get("said")) for line in lines(stream)] == [
        ("event", "r1", ["a"]),
        ("of ['a']", "r1", None),
    ]


def test_a_line_is_bounded_and_still_one_of_its_format() -> None:
    stream = io.StringIO()
    configure(fmt="json", stream=stream)
    structlog.contextvars.bind_contextvars(request_id="r1")
    get_logger("x").info("event", **{f"field_{number}": "\u2028" * 5000 for number in range(60)})
    logging.getLogger("library").error("\U0001f600" * 1_000_000)
    get_logger("y" * 100_000).error("z" * 100_000, **{"f" * 100_000: 1})
    found = lines(stream)
    assert [line["level"] for line in found] == ["info", "error", "error"]
    assert found[0]["request_id"] == "r1"
    assert found[0]["cut"].startswith('{"timestamp"')
    assert max(map(len, written(stream).splitlines())) <= MAX_LINE


@pytest.mark.parametrize("fmt", ["json", "console"])
def test_an_exception_says_what_the_system_said_and_no_client(fmt: Any) -> None:
    stream = io.StringIO()
    configure(fmt=fmt, stream=stream)
    prompt = "a secret" + " prompt"
    try:
        try:
            try:
                os.environ[prompt]
            except KeyError as error:
                error.add_note(prompt)
                raise OSError(28, "No space left on device") from error
        except OSError as error:
            raise ExceptionGroup(prompt, [ValueError(prompt), TypeError(prompt)]) from error
    except ExceptionGroup as error:
        get_logger("x").error("request_failed", exc_info=error)
        logging.getLogger("uvicorn.error").exception("Exception in ASGI application")
        get_logger("x").error("task_died", error=error)
    told = written(stream)
    assert "secret" not in told
    assert told.count("No space left on device") == 2
    assert told.count("KeyError") == told.count("ValueError") == 2
    assert told.count("ExceptionGroup") == 3
    assert told.count(__file__) >= 4


def test_what_is_no_exception_is_none() -> None:
    stream = io.StringIO()
    configure(fmt="json", stream=stream)
    get_logger("x").error("event", exc_info=True)
    get_logger("x").error("event", exc_info=(None, None, None))
    assert not any("exception" in line or "exc_info" in line for line in lines(stream))


async def _fails(text: str) -> None:
    raise ValueError(text)


def test_a_task_that_nobody_asked_for_its_end_does_not_say_what_it_died_of() -> None:
    async def scenario() -> None:
        task = asyncio.create_task(_fails("a secret prompt"))
        await asyncio.wait([task])
        del task
        gc.collect()

    stream = io.StringIO()
    configure(fmt="json", stream=stream)
    asyncio.run(scenario())
    [line] = lines(stream)
    assert line["event"] == "Task exception was never retrieved"
    assert "ValueError" in str(line["exception"])
    assert "secret" not in written(stream)


def test_control_characters_do_not_reach_a_terminal() -> None:
    stream = Terminal()
    configure(fmt="console", stream=stream)
    get_logger("x").warning("event\x1b]0;title\x07", value="a\nb\x9b31m", other="\u2028")
    shown = re.sub("\x1b\\[[0-9;]*m", "", written(stream))
    assert shown.count("\n") == 1
    assert not set(shown) & {"\x1b", "\x07", "\x9b", "\u2028"}


def test_a_line_that_cannot_be_put_together_is_counted_and_harms_nobody() -> None:
    class Sulking:
        def __repr__(self) -> str:
            raise ZeroDivisionError

    stream = io.StringIO()
    configure(fmt="json", stream=stream)
    logging.getLogger("library").error("%d", "x")
    get_logger("x").error("event", value=Sulking())
    get_logger("x").error("event")
    assert [line["event"] for line in lines(stream)] == ["log_lines_dropped", "event"]
    assert lines(stream)[0]["lines"] == 2
    assert lines_dropped() == 2


def test_the_console_and_the_log_keep_one_order() -> None:
    stream = Terminal()
    say = line_writer(stream)
    say("at once")
    assert stream.getvalue() == "at once\n"
    configure(fmt="json", stream=stream)
    for number in range(3):
        get_logger("x").info("event", number=number)
        say(f"console {number}")
    shown = written(stream).splitlines()
    assert [line if line.startswith("console") else json.loads(line)["number"] for line in shown[1:]] == [
        *(0, "console 0", 1, "console 1", 2, "console 2"),
    ]


def test_a_reader_that_went_away_is_no_matter_for_the_console() -> None:
    stream = io.StringIO()
    say = line_writer(stream)
    stream.close()
    say("anybody?")


def test_to_configure_again_ends_the_writer_of_before() -> None:
    first, second = io.StringIO(), io.StringIO()
    configure(fmt="json", stream=first)
    get_logger("x").info("event")
    [handler] = logging.getLogger().handlers
    assert isinstance(handler, QueuedHandler)
    configure(fmt="json", stream=second, queue_lines=7)
    assert handler.writer.close(0)
    assert len(first.getvalue().splitlines()) == 1


def test_shutting_logging_down_writes_what_is_queued() -> None:
    stream = io.StringIO()
    configure(fmt="json", stream=stream)
    get_logger("x").critical("crash")
    [handler] = logging.getLogger().handlers
    logging.shutdown([lambda: handler])
    assert '"crash"' in stream.getvalue()
    get_logger("x").critical("too late")
    assert lines_dropped() == 1


@pytest.fixture
def _hooks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for where, name in ((sys, "excepthook"), (sys, "unraisablehook"), (threading, "excepthook")):
        monkeypatch.setattr(where, name, getattr(where, name))
    with warnings.catch_warnings():
        yield
        logging.captureWarnings(capture=False)


@pytest.mark.usefixtures("_hooks")
def test_what_nobody_caught_and_warnings_are_lines_too() -> None:
    class Last:
        def __del__(self) -> None:
            raise ValueError("a secret prompt")

    def fail() -> None:
        raise ValueError("a secret prompt")

    stream = io.StringIO()
    configure(fmt="json", stream=stream)
    log_uncaught()
    thread = threading.Thread(target=fail, name="some-thread")
    thread.start()
    thread.join()
    Last()
    gc.collect()
    try:
        fail()
    except ValueError as error:
        sys.excepthook(ValueError, error, error.__traceback__)
    warnings.simplefilter("always")
    warnings.warn("deprecated", DeprecationWarning, stacklevel=1)
    found = lines(stream)
    assert [(line["event"][:20], line["level"]) for line in found[:3]] == [
        ("uncaught_exception", "error"),
        ("unraisable_exception", "error"),
        ("uncaught_exception", "critical"),
    ]
    assert found[0]["thread"] == "some-thread"
    assert "DeprecationWarning: deprecated" in found[3]["event"]
    assert "secret" not in written(stream)
