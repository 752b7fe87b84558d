import io
import json
import logging
from collections.abc import Iterator
from typing import Any, Literal

import pytest
import structlog

from service.observability.logging import configure, get_logger


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers, root.level = handlers, level
    logging.getLogger("uvicorn.access").disabled = False
    structlog.contextvars.clear_contextvars()
    structlog.reset_defaults()


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


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
    assert len(stream.getvalue().splitlines()) == 1


@pytest.mark.parametrize("fmt", ["json", "console"])
def test_a_traceback_shows_no_variables(fmt: Any) -> None:
    stream = io.StringIO()
    configure(fmt=fmt, stream=stream)
    prompt = "a secret" + " prompt"
    try:
        prompt.index("x")
    except ValueError:
        get_logger("x").exception("request_failed")
    assert "ValueError" in stream.getvalue()
    assert "a secret prompt" not in stream.getvalue()


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
        try:
            int(secret)  # whose message repeats it
        except ValueError:
            log.exception("request_failed")
    assert "s" * 32 not in stream.getvalue()
    assert "eyJzdWIiOiJ4In0" not in stream.getvalue()
    assert "c2lnbmF0dXJl" not in stream.getvalue()
    assert "mlxd_live_kkkkkkkkkkkk_[redacted]" in stream.getvalue()  # which key it was can be told
    assert stream.getvalue().count("[redacted]") >= 8


def test_auto_is_json_unless_on_a_terminal() -> None:
    piped, terminal = io.StringIO(), Terminal()
    for stream in (piped, terminal):
        configure(stream=stream)
        get_logger("x").info("event")
    assert lines(piped)[0]["event"] == "event"
    assert not terminal.getvalue().startswith("{")


def test_only_a_terminal_gets_colours() -> None:
    piped, terminal = io.StringIO(), Terminal()
    for stream in (piped, terminal):
        configure(fmt="console", stream=stream)
        get_logger("x").warning("event", number=1)
    assert "\x1b" not in piped.getvalue()
    assert "event" in piped.getvalue()
    assert "\x1b[" in terminal.getvalue()


@pytest.mark.parametrize("first", [Terminal, io.StringIO])
def test_a_line_goes_where_a_spinner_wants_it_but_a_file_keeps_its_lines(
    first: type[io.StringIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, spinner = first(), io.StringIO()
    monkeypatch.setattr("sys.stderr", original)
    configure()
    monkeypatch.setattr("sys.stderr", spinner)
    get_logger("x").info("event")
    heard = {"original": "event" in original.getvalue(), "spinner": "event" in spinner.getvalue()}
    assert heard == {"original": not original.isatty(), "spinner": original.isatty()}


def test_the_level_holds_for_everybody_and_uvicorn_has_no_access_log() -> None:
    stream = io.StringIO()
    configure(level="warning", fmt="json", stream=stream)
    get_logger("x").info("quiet")
    logging.getLogger("uvicorn.error").info("quiet")
    logging.getLogger("uvicorn.access").error("GET /")
    assert stream.getvalue() == ""


def test_without_a_stream_it_is_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    configure(fmt="json")
    get_logger("x").info("event")
    assert json.loads(capsys.readouterr().err)["event"] == "event"
