"""`mlxd bench` as it is typed: what it prints and writes, and what it says to what makes no sense."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from service.cli import commands
from tests.scripted_server import (
    DONE,
    END,
    STREAM_HEAD,
    Script,
    Scripted,
    Send,
    chunk,
    plain,
    playing,
    said,
    usage,
)

GOOD: Script = [Send(0, STREAM_HEAD + chunk(said("a") + said("b")) + chunk(usage(3, prompt=5) + DONE) + END)]
REFUSED: Script = [Send(0, plain("429 Too Many Requests", b'{"error": {"code": "quota_exhausted"}}', "Retry-After: 0"))]


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(commands(), list(arguments))


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "mlxd.toml"
    path.write_text(f"[server]\nstate_dir = '{tmp_path}'\n")
    return str(path)


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


@contextmanager
def server(*scripts: Script) -> Iterator[Scripted]:
    """A scripted server on a thread of its own, because the command has its own loop."""
    started, ended = threading.Event(), asyncio.Event()
    found: list[tuple[Scripted, asyncio.AbstractEventLoop]] = []

    async def main() -> None:
        async with playing(*scripts, watched=False) as scripted:
            found.append((scripted, asyncio.get_running_loop()))
            started.set()
            await ended.wait()

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    started.wait(10)
    scripted, loop = found[0]
    try:
        yield scripted
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join()


def test_a_series_of_loads_is_a_table_a_file_and_pictures(config: str, tmp_path: Path) -> None:
    file, folder = tmp_path / "a.json", tmp_path / "plots"
    with server(GOOD) as scripted:
        result = invoke(
            *("--config", config, "bench", "--url", scripted.url, "--streams", "1,2", "--requests", "6"),
            *("--name", "scripted", "--pid", str(os.getpid()), "--json", str(file), "--plot", str(folder)),
            *("--body", '{"ignore_eos": true}', "--sampling", "mixed", "--slo-ttft", "60"),
        )
    assert result.exit_code == 0, result.output
    assert "1 streams" in result.output
    assert "2 streams" in result.output
    value = json.loads(file.read_text())
    assert [(load["streams"], load["requests"], load["output_tokens"]) for load in value["loads"]] == [
        (1, 6, 18),
        (2, 6, 18),
    ]
    assert [load["prompt_tokens"] for load in value["loads"]] == [30, 30]
    assert all(load["good_per_second"] == load["requests_per_second"] > 0 for load in value["loads"])
    assert all(load["client_cpu_per_token"] > 0 for load in value["loads"])
    assert all(load["server_cpu_per_token"] is not None for load in value["loads"])
    assert value["name"] == "scripted"
    assert len(scripted.requests) == 1 + 6 + 2 + 6, "each load is warmed first"
    assert all(request["ignore_eos"] and "seed" in request for request in scripted.requests)
    assert sorted(path.name for path in folder.iterdir()) == ["goodput.png", "inter_token.png", "latency.png"]


def test_an_open_loop_is_asked_for_by_its_rate(config: str, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    with server(GOOD) as scripted:
        result = invoke(
            *("--config", config, "bench", "--url", scripted.url, "--rate", "200", "--requests", "10"),
            *("--api", "completions", "--tokens", "3:9", "--prompt-words", "4", "--json", str(file)),
        )
    assert result.exit_code == 0, result.output
    load = json.loads(file.read_text())["loads"][0]
    assert (load["rate"], load["streams"], load["requests"]) == (200, None, 10)
    assert load["late"]["p50"] < 0.1
    assert all(set(request["prompt"]) <= set(range(3, 10)) for request in scripted.requests)


def test_failures_are_told_and_when_nothing_went_well_the_code_is_69(config: str) -> None:
    with server(GOOD, REFUSED) as scripted:
        some = invoke("--config", config, "bench", "--url", scripted.url, "--requests", "3", "--warm-up", "0")
        none = invoke("--config", config, "bench", "--url", scripted.url, "--requests", "3", "--warm-up", "0")
    assert some.exit_code == 0
    assert "mlxd: 1 streams: 2 x 429 quota_exhausted" in some.output
    assert none.exit_code == os.EX_UNAVAILABLE
    assert "mlxd: 1 streams: 3 x 429 quota_exhausted" in none.output


def test_the_development_key_goes_to_this_machine_and_is_not_printed(config: str, tmp_path: Path) -> None:
    key, file = tmp_path / "development.key", tmp_path / "a.json"
    key.write_text("mlxd_dev_secret\n")
    key.chmod(0o600)
    with server(GOOD) as scripted:
        result = invoke("--config", config, "bench", "--url", scripted.url, "--requests", "1", "--json", str(file))
    assert all("Authorization: Bearer mlxd_dev_secret\r\n" in head for head in scripted.heads)
    assert "mlxd_dev_secret" not in result.output + file.read_text()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--streams", "0"), "--streams"),
        (("--streams", "1,x"), "--streams"),
        (("--streams", ""), "--streams"),
        (("--rate", "-1"), "--rate"),
        (("--rate", "inf"), "--rate"),
        (("--api", "responses"), "--api"),
        (("--sampling", "wild"), "--sampling"),
        (("--prompt-words", "9:1"), "--prompt-words"),
        (("--output-tokens", "0"), "--output-tokens"),
        (("--body", "[1]"), "--body"),
        (("--body", "{"), "--body"),
        (("--tokens", "3:9"), "--tokens"),
        (("--tokens", "3:9", "--api", "completions", "--turns", "2"), "--tokens"),
        (("--url", "localhost:8000"), "--url"),
        (("--key-file", "/nowhere"), "--key-file"),
        (("--pid", "999999999", "--requests", "1", "--warm-up", "0", "--url", "http://127.0.0.1:1"), "--pid"),
        (("--streams", "4", "plot", "a.json"), "--streams"),
        (("engine", "--streams", "1,999"), "--streams"),
        (("plot", "/nowhere.json"), "FILE"),
        (("plot",), "FILE"),
    ],
)
def test_what_makes_no_sense_is_refused_by_its_name(config: str, arguments: tuple[str, ...], told: str) -> None:
    result = invoke("--config", config, "bench", *arguments)
    assert result.exit_code == 2, result.output
    assert told in result.output
    assert "Traceback" not in result.output


def test_a_port_that_nobody_knows_must_be_told(tmp_path: Path) -> None:
    path = tmp_path / "free.toml"
    path.write_text("[server]\nport = 0\n")
    result = invoke("--config", str(path), "bench")
    assert result.exit_code == 2
    assert "--url" in result.output


def test_results_are_drawn_side_by_side(config: str, tmp_path: Path) -> None:
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    with server(GOOD) as scripted:
        for file in files:
            invoke("--config", config, "bench", "--url", scripted.url, "--requests", "2", "--json", str(file))
    result = invoke("bench", "plot", *map(str, files), "--out", str(tmp_path / "both"))
    assert result.exit_code == 0, result.output
    assert (tmp_path / "both" / "latency.png").stat().st_size > 1000


def test_a_file_that_is_no_result_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    result = invoke("bench", "plot", str(tmp_path / "a.json"))
    assert result.exit_code == 2
    assert "mlxd-bench/1" in result.output


def test_without_matplotlib_a_plot_says_what_to_install_before_anything_is_measured(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "service.bench.plots", raising=False)
    monkeypatch.delattr("service.bench.plots", raising=False)
    with server(GOOD) as scripted:
        result = invoke("--config", config, "bench", "--url", scripted.url, "--plot", str(tmp_path / "plots"))
    assert result.exit_code == 2
    assert "pip install 'mlxd[bench]'" in result.output
    assert scripted.requests == []


def test_what_cannot_be_written_is_told(config: str, tmp_path: Path) -> None:
    with server(GOOD) as scripted:
        result = invoke(
            *("--config", config, "bench", "--url", scripted.url, "--requests", "1"),
            *("--json", str(tmp_path / "missing" / "a.json")),
        )
    assert result.exit_code == os.EX_CANTCREAT
    assert "cannot be written" in result.output
