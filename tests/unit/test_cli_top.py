"""`mlxd top`: from texts of `/metrics` to exact numbers, and what it says when there are none."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console
from typer.testing import CliRunner

from service.cli import commands, reach, top
from service.cli.reach import Unanswered
from service.cli.scrape import Between, NotMetrics, Scrape
from service.cli.top import Pause, Source, pictures
from service.cli.top_frame import CONSUMERS, REASONS, Consumer, Frame, Load, frame
from service.cli.top_view import draw
from tests.conftest import ROOT

URL = "http://127.0.0.1:8001"


def exposition(**values: float) -> str:
    """A text of series without labels, and of those whose name is given with them."""
    return "".join(f"{name} {value}\n" for name, value in values.items())


def scrape(at: float, text: str) -> Scrape:
    return Scrape.parse(text, at)


def buckets(name: str, *counts: int, bounds: Sequence[str] = ("0.1", "0.5", "1.0", "+Inf"), labels: str = "") -> str:
    """A histogram whose buckets hold `counts` each."""
    lines, total = [f"# TYPE {name} histogram"], 0
    for bound, count in zip(bounds, counts, strict=True):
        total += count
        lines.append(f'{name}_bucket{{{labels}le="{bound}"}} {total}')
    return "\n".join([*lines, f"{name}_count{{{labels[:-1]}}} {total}", f"{name}_sum{{{labels[:-1]}}} 1", ""])


# Two looks ----------------------------------------------------------------------------------------------------

TTFT = "mlxd_time_to_first_token_seconds"


@pytest.mark.parametrize(
    ("counts", "share", "expected"),
    [
        ((10, 0, 0, 0), 0.5, 0.05),  # evenly in the first bucket, from 0
        ((10, 10, 0, 0), 0.5, 0.1),
        ((10, 10, 0, 0), 0.75, 0.3),
        ((0, 0, 4, 0), 0.95, 0.975),
        ((0, 0, 0, 5), 0.5, 1.0),  # beyond the last bound: that bound
        ((99, 0, 0, 1), 0.99, 0.1),
        ((99, 0, 0, 1), 1.0, 1.0),
        ((1, 0, 0, 0), 0.0, 0.0),
    ],
)
def test_a_quantile_is_histogram_quantiles(counts: tuple[int, ...], share: float, expected: float) -> None:
    first = scrape(0, "mlxd_x 1\n" + buckets(TTFT, 5, 5, 5, 5))
    last = scrape(1, "mlxd_x 1\n" + buckets(TTFT, *(5 + count for count in counts)))
    assert Between(first, last).quantile(TTFT, share) == pytest.approx(expected)


def test_a_quantile_is_over_all_labels_and_none_where_nothing_was_observed() -> None:
    small, large = 'prompt_size="0-1k",', 'prompt_size="64k+",'
    first = scrape(0, buckets(TTFT, 7, 0, 0, 0, labels=small))
    last = scrape(1, buckets(TTFT, 8, 0, 0, 0, labels=small) + buckets(TTFT, 0, 0, 1, 0, labels=large))
    assert Between(first, last).quantile(TTFT, 0.5) == pytest.approx(0.1)
    assert Between(first, last).quantile(TTFT, 1.0) == pytest.approx(1.0)
    assert Between(first, first).quantile(TTFT, 0.5) is None
    assert Between(first, last).quantile("mlxd_no_such_thing", 0.5) is None


def test_a_scrape_in_which_buckets_were_read_one_after_the_other_gives_a_number_all_the_same() -> None:
    bounds = 'a_bucket{{le="0.1"}} {}\na_bucket{{le="0.5"}} {}\na_bucket{{le="+Inf"}} {}\nmlxd_x 1\n'
    first, last = scrape(0, bounds.format(0, 0, 0)), scrape(1, bounds.format(4, 3, 5))
    assert Between(first, last).quantile("a", 0.9) == 0.5


def test_a_counter_that_was_reset_counts_from_nothing() -> None:
    first, last = scrape(0, exposition(mlxd_a_total=100)), scrape(2, exposition(mlxd_a_total=30))
    assert Between(first, last).increase("mlxd_a_total") == 30
    assert Between(first, last).rate("mlxd_a_total") == 15
    assert Between(last, first).increase("mlxd_a_total") == 70


def test_a_restart_counts_from_nothing_also_what_has_overtaken_itself() -> None:
    first = scrape(0, exposition(mlxd_a_total=10, process_start_time_seconds=1000))
    last = scrape(2, exposition(mlxd_a_total=30, process_start_time_seconds=2000))
    assert Between(first, last).restarted
    assert Between(first, last).increase("mlxd_a_total") == 30
    assert not Between(first, first).restarted
    assert not Between(first, scrape(2, exposition(mlxd_a_total=30))).restarted, "nobody knows"


def test_what_is_not_there_is_none_and_not_0() -> None:
    here = scrape(0, exposition(mlxd_a_total=1, mlxd_lost=float("nan")))
    between = Between(here, here)
    assert between.rate("mlxd_a_total") is None, "no time has passed"
    assert (between.increase("mlxd_b_total"), between.rate("mlxd_b_total")) == (None, None)
    assert (here.value("mlxd_b"), here.value("mlxd_lost"), here.label("mlxd_b", "x")) == (None, None, None)


@pytest.mark.parametrize("text", ["<html>", "", "other_total 1\n", "mlxd_a{ 1\n", 'mlxd_a{b="c 1\n', "mlxd_a x\n"])
def test_a_text_that_is_no_exposition_of_ours_is_told(text: str) -> None:
    with pytest.raises(NotMetrics):
        scrape(0, text)


# A frame ------------------------------------------------------------------------------------------------------

FIRST = (
    exposition(
        mlxd_generation_tokens_total=1000,
        mlxd_prompt_tokens_total=5000,
        mlxd_prefix_cache_queries_total=5000,
        mlxd_prefix_cache_hits_total=100,
        process_start_time_seconds=1_700_000_000,
    )
    + buckets(TTFT, 5, 5, 5, 5, labels='prompt_size="0-1k",')
    + buckets("mlxd_inter_token_latency_seconds", 100, 0, 0, 0)
    + """mlxd_http_requests_total{route="/generate",method="POST",status="200"} 10
mlxd_http_requests_total{route="/metrics",method="GET",status="200"} 50
mlxd_limits_refused_total{code="rate_limit_requests"} 3
mlxd_consumer_tokens_total{tenant="acme",key_id="k1",kind="prompt"} 100
mlxd_consumer_tokens_total{tenant="acme",key_id="k1",kind="completion"} 10
mlxd_consumer_tokens_total{tenant="idle",key_id="k2",kind="prompt"} 9000
"""
)
LAST = (
    exposition(
        mlxd_generation_tokens_total=1250,
        mlxd_prompt_tokens_total=5400,
        mlxd_num_requests_running=7,
        mlxd_rows_capacity=32,
        mlxd_num_requests_waiting=3,
        mlxd_queue_capacity=256,
        mlxd_memory_active_bytes=2.5 * 2**30,
        mlxd_memory_peak_bytes=3 * 2**30,
        mlxd_memory_reserved_bytes=2**29,
        mlxd_memory_budget_bytes=2**30,
        mlxd_prefix_cache_bytes=2**20,
        mlxd_prefix_cache_capacity_bytes=2**28,
        mlxd_prefix_cache_queries_total=5400,
        mlxd_prefix_cache_hits_total=400,
        process_resident_memory_bytes=4 * 2**30,
        process_start_time_seconds=1_700_000_000,
    )
    + buckets(TTFT, 15, 15, 5, 5, labels='prompt_size="0-1k",')
    + buckets("mlxd_inter_token_latency_seconds", 200, 100, 0, 0)
    + """mlxd_http_requests_total{route="/generate",method="POST",status="200"} 30
mlxd_http_requests_total{route="/generate",method="POST",status="429"} 5
mlxd_http_requests_total{route="/metrics",method="GET",status="200"} 51
mlxd_limits_refused_total{code="rate_limit_requests"} 8
mlxd_admission_rejections_total{reason="queue_full"} 2
mlxd_auth_failures_total{reason="missing"} 1
mlxd_consumer_tokens_total{tenant="acme",key_id="k1",kind="prompt"} 300
mlxd_consumer_tokens_total{tenant="acme",key_id="k1",kind="cached"} 150
mlxd_consumer_tokens_total{tenant="acme",key_id="k1",kind="completion"} 60
mlxd_consumer_tokens_total{tenant="idle",key_id="k2",kind="prompt"} 9000
mlxd_consumer_tokens_total{tenant="[b]x",key_id="",kind="prompt"} 200
mlxd_build_info{version="1.2",python="3.11",mlx="a",mlx_lm="b",model="Tiny",device="gpu"} 1
mlxd_engine_state{state="ready"} 1
mlxd_engine_state{state="failed"} 0
"""
)


def example() -> Frame:
    first, last = scrape(100, FIRST), scrape(110, LAST)
    return frame(first, first, last, now=1_700_000_075.0)


def test_two_looks_make_a_frame_of_exact_numbers() -> None:
    found = example()
    assert (found.interval_seconds, found.window_seconds) == (10, 10)
    assert asdict(found.service) == {
        "version": "1.2",
        "model": "Tiny",
        "device": "gpu",
        "state": "ready",
        "uptime_seconds": 75.0,
        "restarted": False,
    }
    assert found.load == Load(
        generation_tokens_per_second=25.0,
        prompt_tokens_per_second=40.0,
        running=7,
        max_running=32,
        waiting=3,
        max_waiting=256,
    )
    assert tuple(asdict(found.latency).values()) == pytest.approx((0.1, 0.46, 0.492, 0.46))
    assert (found.memory.prefix_hit_rate, found.memory.recommended) == (0.75, None)
    assert (found.memory.reserved, found.memory.budget) == (2**29, 2**30)
    assert found.requests == {"200": 2.0, "429": 0.5}, "the looks themselves are no traffic"
    assert found.refusals == {"rate_limit_requests": 5, "queue_full": 2, "missing": 1}
    assert found.consumers[:2] == (
        Consumer(
            tenant="acme",
            key_id="k1",
            prompt_tokens=200.0,
            cached_tokens=150.0,
            completion_tokens=50.0,
            total_tokens=360.0,
        ),
        Consumer(
            tenant="[b]x", key_id="", prompt_tokens=200.0, cached_tokens=0.0, completion_tokens=0.0, total_tokens=200.0
        ),
    )
    assert [one.tenant for one in found.consumers] == ["acme", "[b]x", "idle"]


def test_rates_are_of_the_last_interval_and_the_rest_of_the_window() -> None:
    window, before, last = (
        scrape(at, exposition(mlxd_generation_tokens_total=tokens) + buckets(TTFT, count, 0, 0, 0))
        for at, tokens, count in ((0, 0, 0), (28, 0, 4), (30, 50, 4))
    )
    found = frame(window, before, last, now=0)
    assert (found.load.generation_tokens_per_second, found.latency.first_token_p50) == (25.0, 0.05)
    assert (found.interval_seconds, found.window_seconds) == (2, 30)


def test_an_older_service_has_dashes_where_it_has_no_series() -> None:
    here = scrape(0, exposition(mlxd_num_requests_running=1))
    found = frame(here, here, scrape(2, exposition(mlxd_num_requests_running=2)), now=0)
    assert found.load.running == 2
    rest = {**asdict(found.load), **asdict(found.latency), **asdict(found.memory)}
    del rest["running"]
    assert set(rest.values()) == {None}
    assert (found.requests, found.refusals, found.consumers) == ({}, {}, ())
    shown = drawn(found, 80)
    assert "generated" in shown
    assert "  -" in shown


def test_of_many_consumers_and_reasons_the_largest_are_shown() -> None:
    lines = [f'mlxd_consumer_tokens_total{{tenant="t{n:03}",key_id="k",kind="prompt"}} {n}' for n in range(300)]
    lines += [f'mlxd_limits_refused_total{{code="c{n}"}} {n}' for n in range(50)]
    empty = scrape(0, exposition(mlxd_a=1))
    found = frame(empty, empty, scrape(2, "\n".join(lines) + "\n"), now=0)
    assert [one.tenant for one in found.consumers] == [f"t{n}" for n in range(299, 299 - CONSUMERS, -1)]
    assert list(found.refusals) == [f"c{n}" for n in range(49, 49 - REASONS, -1)]


def test_in_no_time_there_are_no_rates() -> None:
    first, last = scrape(5, FIRST), scrape(5, LAST)
    found = frame(first, first, last, now=0)
    assert (found.requests, found.load.generation_tokens_per_second, found.service.uptime_seconds) == ({}, None, 0.0)


# How it looks -------------------------------------------------------------------------------------------------


def drawn(found: Frame, width: int) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width, force_terminal=False).print(draw(found, URL))
    return stream.getvalue()


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_a_picture_fits_its_terminal_and_shows_the_numbers(width: int) -> None:
    shown = drawn(example(), width)
    assert max(map(len, shown.splitlines())) <= width
    if width >= 80:
        for text in ("Tiny (gpu)", "ready", "up 00:01:15", "25", "7/32", "3/256", "460 ms", "492 ms", "75%"):
            assert text in shown
        for text in ("200 2.0/s", "429 0.5/s", "rate_limit_requests 5", "acme", "[b]x", "2.5 GiB", "3.0 GiB"):
            assert text in shown
        assert "512 MiB/1.0 GiB" in shown


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"service": {"restarted": True}}, "restarted"),
        ({"service": {"uptime_seconds": 90_061.0}}, "up 1 d 01:01:01"),
        ({"service": {"uptime_seconds": None}}, "up -"),
        ({"memory": {"active": 5.0 * 2**40, "recommended": 6.0 * 2**40}}, "5.0 TiB/6.0 TiB"),
        ({"memory": {"peak": 12.0}}, "12 B"),
        ({"latency": {"first_token_p99": 12.34}}, "12.3 s"),
        ({"load": {"running": 30.0}}, "30/32"),
        ({"load": {"generation_tokens_per_second": 1234.5}}, "1,234"),
        ({"load": {"generation_tokens_per_second": 12.34}}, "12.3"),
    ],
)
def test_numbers_are_written_for_people(changes: dict[str, dict[str, Any]], expected: str) -> None:
    found = example()
    for part, values in changes.items():
        found = replace(found, **{part: replace(getattr(found, part), **values)})
    assert expected in drawn(found, 120)


# One look after the other -------------------------------------------------------------------------------------


class Script:
    """Gives what it was told to, one look at a time; time passes while it sleeps."""

    def __init__(self, *answers: str | Unanswered) -> None:
        self._answers = list(answers)
        self.now = 0.0

    def look(self) -> Scrape:
        answer = self._answers.pop(0)
        if isinstance(answer, Unanswered):
            raise answer
        return scrape(self.now, answer)

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def tokens(count: float, started: float = 1.0) -> str:
    return exposition(mlxd_generation_tokens_total=count, process_start_time_seconds=started)


def take(script: Script, count: int, interval: float = 2.0) -> list[Frame | Unanswered]:
    found = pictures(script.look, interval, sleep=script.sleep, now=lambda: 0.0)
    return [next(found) for _ in range(count)]


def rates(found: Sequence[Frame | Unanswered]) -> list[float | str | None]:
    return [str(each) if isinstance(each, Unanswered) else each.load.generation_tokens_per_second for each in found]


def test_the_first_picture_is_of_two_looks() -> None:
    assert rates(take(Script(tokens(0), tokens(10), tokens(40)), 2)) == [5.0, 15.0]


def test_the_window_goes_back_30_seconds() -> None:
    found = take(Script(*(tokens(n) for n in range(40))), 30)
    windows = [each.window_seconds for each in found if isinstance(each, Frame)]
    assert windows[:3] == [2, 4, 6]
    assert set(windows[14:]) == {30}


def test_with_looks_far_apart_there_are_two_in_the_window() -> None:
    found = take(Script(*(tokens(n) for n in range(5))), 3, interval=100)
    assert [each.window_seconds for each in found if isinstance(each, Frame)] == [100, 100, 100]


def test_who_goes_away_and_comes_back_is_told_and_counted_from_nothing() -> None:
    gone = Unanswered("cannot be reached")
    found = take(Script(tokens(0), tokens(10), gone, gone, tokens(60, started=50.0), tokens(80, started=50.0)), 5)
    assert rates(found) == [5.0, "cannot be reached", "cannot be reached", 10.0, 10.0]
    assert [each.service.restarted for each in found if isinstance(each, Frame)] == [False, True, False]
    last = found[-1]
    assert isinstance(last, Frame)
    assert last.window_seconds == 8, "back to the look before the restart, after which it all counts"


def test_what_is_for_good_ends_it() -> None:
    with pytest.raises(Unanswered, match="refused"):
        take(Script(tokens(0), Unanswered("refused", for_good=True)), 1)


# What is there instead of metrics -----------------------------------------------------------------------------


def source(answer: Callable[[httpx.Request], httpx.Response], key: str | None = "k") -> Source:
    return Source(URL, key, clock=lambda: 0.0, transport=httpx.MockTransport(answer))


@pytest.mark.parametrize(
    ("status", "text", "for_good"),
    [
        (401, "a key is needed, or this one is refused (401): --key-file FILE", True),
        (403, "the key lacks the scope `metrics` (403)", True),
        (404, "there is no /metrics (404); is it mlxd?", True),
        (429, "too many requests with this key (429)", False),
        (500, "answers 500", False),
        (503, "answers 503", False),
        (302, "answers 302", False),
    ],
)
def test_a_refusal_is_a_clear_line(status: int, text: str, for_good: bool) -> None:
    with pytest.raises(Unanswered) as caught:
        source(lambda _: httpx.Response(status, headers={"location": "http://elsewhere"})).look()
    assert (str(caught.value), caught.value.for_good) == (text, for_good)


def raising(error: Exception) -> Callable[[httpx.Request], httpx.Response]:
    def answer(_: httpx.Request) -> httpx.Response:
        raise error

    return answer


@pytest.mark.parametrize(
    ("error", "text", "for_good"),
    [
        (httpx.ConnectError("refused"), "cannot be reached: refused", False),
        (httpx.ReadTimeout(""), "no answer in 5 s", False),
        (httpx.ConnectTimeout(""), "no answer in 5 s", False),
        (httpx.RemoteProtocolError("cut"), "the answer broke off: cut", False),
        (httpx.UnsupportedProtocol("no such protocol"), "no such protocol", True),
    ],
)
def test_a_broken_connection_is_a_clear_line(error: Exception, text: str, for_good: bool) -> None:
    with pytest.raises(Unanswered) as caught:
        source(raising(error)).look()
    assert (str(caught.value), caught.value.for_good) == (text, for_good)


def test_what_is_no_mlxd_is_told() -> None:
    with pytest.raises(Unanswered, match=r"has no series of mlxd; is it mlxd\?"):
        source(lambda _: httpx.Response(200, text="up 1\n")).look()


def test_an_endless_answer_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(top, "MAX_BYTES", 10)
    with pytest.raises(Unanswered, match="more than 10 bytes"):
        source(lambda _: httpx.Response(200, text="mlxd_a 1\n" * 100)).look()


def test_a_drop_now_and_then_is_not_an_answer() -> None:
    times = iter([0.0, 1.0, 6.0])

    def drops() -> Iterator[bytes]:
        yield from (b"mlxd_a", b" 1\n")

    slow = Source(
        URL,
        None,
        clock=lambda: next(times),
        transport=httpx.MockTransport(lambda _: httpx.Response(200, content=drops())),
    )
    with pytest.raises(Unanswered, match="no answer in 5 s"):
        slow.look()


def test_the_key_is_shown_and_a_proxy_of_the_environment_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers.get("authorization"))
        return httpx.Response(200, text="mlxd_a 1\n")

    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    source(answer, "secret").look()
    source(answer, None).look()
    assert seen == ["Bearer secret", None]


# The command --------------------------------------------------------------------------------------------------


@contextmanager
def answering(*, status: int = 200) -> Iterator[tuple[str, list[str | None]]]:
    """A real socket with metrics that grow; gives its URL and the credentials it was shown."""
    shown: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            shown.append(self.headers["authorization"])
            self.send_response(status)
            self.end_headers()
            self.wfile.write((FIRST if len(shown) == 1 else LAST).encode())

        def log_message(self, *_: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", shown
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(commands(), arguments)


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "mlxd.toml"
    path.write_text(f'[server]\nstate_dir = "{tmp_path}"\n')
    return str(path)


def test_one_picture_for_scripts(config: str) -> None:
    with answering() as (url, _):
        result = invoke("--config", config, "top", "--url", url, "--once", "--interval", "0.2")
    assert result.exit_code == 0
    assert "Tiny" in result.output
    assert "\x1b" not in result.output


def test_one_picture_as_json(config: str) -> None:
    with answering() as (url, _):
        result = invoke("--config", config, "top", "--url", url, "--once", "--json", "--interval", "0.2")
    found = json.loads(result.output)
    assert found["load"]["running"] == 7
    assert found["consumers"][0]["tenant"] == "acme"
    assert found["interval_seconds"] >= 0.2


def test_the_development_key_is_found_and_shown_to_this_machine_only(config: str, tmp_path: Path) -> None:
    key = tmp_path / "development.key"
    key.write_text("mlxd_dev_x\n")
    key.chmod(0o600)
    with answering() as (url, shown):
        assert invoke("--config", config, "top", "--url", url, "--once", "--interval", "0.2").exit_code == 0
    assert set(shown) == {"Bearer mlxd_dev_x"}


def test_another_key_is_read_from_its_file(config: str, tmp_path: Path) -> None:
    key = tmp_path / "scrape.key"
    key.write_text("mlxd_live_y\n")
    key.chmod(0o600)
    command = ("--config", config, "top", "--once", "--interval", "0.2", "--key-file", str(key), "--url")
    with answering() as (url, shown):
        assert invoke(*command, url).exit_code == 0
    assert set(shown) == {"Bearer mlxd_live_y"}
    key.chmod(0o644)
    open_to_all = invoke(*command, url)
    assert (open_to_all.exit_code, open_to_all.exception.__class__) == (os.EX_CONFIG, SystemExit)
    assert str(key) in open_to_all.output
    key.unlink()
    assert "there is no" in invoke(*command, url).output
    key.write_bytes(b"\xff\n")
    key.chmod(0o600)
    assert "is no key" in invoke(*command, url).output


@pytest.mark.parametrize(
    ("lines", "url"),
    [
        ("", "http://127.0.0.1:8001"),
        ('[ops]\nbind = "0.0.0.0:9"\n[server]\ntrusted_proxies = ["10.0.0.0/8"]', "http://127.0.0.1:9"),
        ('[ops]\nbind = "[::1]:9"', "http://[::1]:9"),
        ('[ops]\nbind = ""', "http://127.0.0.1:8000"),
        ('[ops]\nbind = "127.0.0.1:0"\n[server]\nhost = "::1"\nport = 77', "http://[::1]:77"),
    ],
)
def test_the_address_is_the_configured_one(tmp_path: Path, lines: str, url: str) -> None:
    from service.settings import Settings

    path = tmp_path / "mlxd.toml"
    path.write_text(lines)
    assert reach.configured(Settings.load(path)) == url


def test_ports_that_nobody_knows_must_be_told(tmp_path: Path) -> None:
    path = tmp_path / "mlxd.toml"
    path.write_text('[ops]\nbind = ""\n[server]\nport = 0\n')
    result = invoke("--config", str(path), "top", "--once")
    assert result.exit_code == 2
    assert "--url" in result.output


@pytest.mark.parametrize(
    ("url", "code", "text"),
    [
        ("http://127.0.0.1:1", os.EX_UNAVAILABLE, "cannot be reached"),
        ("ftp://127.0.0.1:1", 1, "protocol"),
        ("http://x:y", 2, "--url"),
    ],
)
def test_a_service_that_is_not_there_is_one_line_and_a_code(config: str, url: str, code: int, text: str) -> None:
    result = invoke("--config", config, "top", "--once", "--url", url)
    assert result.exit_code == code
    assert text in result.output
    assert "Traceback" not in result.output


def test_a_refused_key_is_one_line_and_code_1(config: str) -> None:
    with answering(status=401) as (url, shown):
        result = invoke("--config", config, "top", "--url", url)
    assert (result.exit_code, shown) == (1, [None])
    assert result.output == f"mlxd: {url}: a key is needed, or this one is refused (401): --key-file FILE\n"


def test_a_stranger_is_not_shown_the_development_key(config: str, tmp_path: Path) -> None:
    from service.settings import Settings

    key = tmp_path / "development.key"
    key.write_text("mlxd_dev_x\n")
    key.chmod(0o600)
    settings = Settings.load(Path(config))
    assert reach.credential(settings, None, None) == "mlxd_dev_x"
    assert reach.credential(settings, "https://mlxd.example.org", None) is None
    key.unlink()
    assert reach.credential(settings, None, None) is None


def test_ctrl_c_during_a_look_is_raised_when_that_is_over() -> None:
    """Raised in the middle of it, it left httpx's pool with a lock taken, for which its `close` waited for ever."""
    script, done = Script(tokens(0), tokens(10)), []

    def look() -> Scrape:
        signal.raise_signal(signal.SIGINT)
        done.append(found := script.look())
        return found

    with Pause(script.sleep) as pause, pytest.raises(KeyboardInterrupt):
        list(pictures(look, 2.0, sleep=pause))
    assert len(done) == 1
    assert script.now == 0.0, "and nothing is waited for"


def test_ctrl_c_ends_the_wait_between_two_looks() -> None:
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        signal.raise_signal(signal.SIGINT)
        waited.append(seconds)

    with Pause(sleep) as pause, pytest.raises(KeyboardInterrupt):
        pause(2.0)
    assert waited == []


def test_a_second_ctrl_c_ends_the_look_itself() -> None:
    with Pause():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("former", [signal.default_int_handler, signal.SIG_IGN], ids=["as usual", "nohup"])
def test_ctrl_c_is_afterwards_what_it_was_and_stays_ignored_where_it_is(former: Any) -> None:
    ours = signal.signal(signal.SIGINT, former)
    try:
        with Pause():
            assert (signal.getsignal(signal.SIGINT) is former) == (former is signal.SIG_IGN)
        assert signal.getsignal(signal.SIGINT) is former
    finally:
        signal.signal(signal.SIGINT, ours)


def read(screen: int) -> bytes:
    try:
        return os.read(screen, 65536)
    except OSError:  # Linux's way to say that the other side has closed
        return b""


@contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that does not outlive a test that fails, which would wait for it for ever."""
    with process:
        try:
            yield process
        finally:
            process.kill()


def test_ctrl_c_leaves_the_terminal_as_it_was(config: str) -> None:
    screen, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, 120))
    before = termios.tcgetattr(theirs)
    with answering() as (url, _):
        command = [sys.executable, "-m", "service", "--config", config, "top", "--url", url, "--interval", "0.2"]
        with ended(
            subprocess.Popen(
                command, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "xterm"}
            )
        ) as process:
            shown = b""
            while b"Tiny" not in shown:
                piece = read(screen)
                assert piece, shown
                shown += piece
            process.send_signal(signal.SIGINT)
            while process.poll() is None:  # a terminal that nobody reads would hold up its last words
                if select.select([screen], [], [], 0.1)[0]:
                    shown += read(screen)
            assert process.returncode == 0
            after = termios.tcgetattr(theirs)
            os.close(theirs)
            while piece := read(screen):
                shown += piece
    os.close(screen)
    assert b"\x1b[?1049h" in shown, "a screen of its own"
    assert shown.rindex(b"\x1b[?1049l") > shown.rindex(b"\x1b[?1049h"), "which is gone"
    assert shown.rindex(b"\x1b[?25h") > shown.rindex(b"\x1b[?25l"), "the cursor is back"
    assert b"Traceback" not in shown
    assert after == before


def test_in_a_terminal_who_goes_away_is_a_line_over_the_last_picture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def found() -> Iterator[Frame | Unanswered]:
        yield Unanswered("cannot be reached")
        yield example()
        yield Unanswered("answers 503")
        raise KeyboardInterrupt

    stream = io.StringIO()
    monkeypatch.setattr("rich.console.Console", lambda: Console(file=stream, width=120, height=50, force_terminal=True))
    with pytest.raises(KeyboardInterrupt):
        top._live(found(), URL)
    shown = stream.getvalue()
    assert shown.index("cannot be reached; asking again") < shown.index("Tiny") < shown.index("answers 503; asking")
    assert shown.rindex("Tiny") > shown.index("answers 503"), "the last picture stays"


def test_where_there_is_no_terminal_pictures_follow_each_other(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(*_: Any, sleep: Pause) -> Iterator[Frame | Unanswered]:
        yield example()
        yield Unanswered("answers 503")
        yield example()
        raise KeyboardInterrupt

    monkeypatch.setattr(top, "pictures", found)
    result = invoke("--config", config, "top", "--json", "--url", URL)
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert [line for line in lines if line[0] != "{"] == [f"mlxd: {URL}: answers 503"]
    assert [json.loads(line)["load"]["running"] for line in lines if line[0] == "{"] == [7, 7]
    assert invoke("--config", config, "top", "--url", URL).output.count("Tiny") == 2
