"""`mlxd bench` against a real service, a process of its own: both count the same tokens. The raw engine beside ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from service.bench.ceiling import BACKEND, BATCH, STREAM
from service.cli import commands
from tests.serving import Running, started


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Iterator[Running]:
    plans = json.dumps({"default": {"requests_per_minute": 100_000, "request_burst": 100_000}})
    state = tmp_path_factory.mktemp("bench")
    with started(state, MLXD_MODEL__REFERENCE=str(tiny_model_dir), MLXD_LIMITS__PLANS=plans) as service:
        yield service


def tokens(url: str) -> tuple[int, int]:
    """(prompt tokens, generated tokens) that the service has counted so far."""
    text = httpx.get(f"{url}/metrics", timeout=30).text
    totals = {s.name: s.value for family in text_string_to_metric_families(text) for s in family.samples}
    return int(totals["mlxd_prompt_tokens_total"]), int(totals["mlxd_generation_tokens_total"])


@pytest.mark.parametrize(
    ("arguments", "requests"),
    [
        (("--streams", "1,6", "--requests", "12", "--sampling", "mixed"), [12, 12]),
        (("--api", "completions", "--tokens", "3:250", "--rate", "30", "--requests", "10"), [10]),
        (("--streams", "3", "--requests", "4", "--turns", "3", "--shared-prefix", "20"), [12]),
    ],
)
def test_client_and_service_count_the_same_tokens(
    running: Running, tmp_path: Path, arguments: Sequence[str], requests: list[int]
) -> None:
    before, file = tokens(running.url), tmp_path / "results.json"
    result = CliRunner().invoke(
        commands(),
        [
            *("bench", "--url", running.url, "--pid", str(running.pid), "--json", str(file), "--warm-up", "0"),
            *("--prompt-words", "2:6", "--output-tokens", "4:24", *arguments),
        ],
    )
    assert result.exit_code == 0, result.output
    loads: list[dict[str, Any]] = json.loads(file.read_text())["loads"]
    after = tokens(running.url)
    assert [(load["requests"], load["errors"]) for load in loads] == [(count, {}) for count in requests]
    assert sum(load["prompt_tokens"] for load in loads) == after[0] - before[0]
    assert sum(load["output_tokens"] for load in loads) == after[1] - before[1]
    assert all(load["tokens_told"] and load["time_to_first_token"]["p50"] > 0 for load in loads)


def test_a_shared_prefix_is_seen_in_the_cached_tokens(running: Running, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    arguments = ["--requests", "6", "--shared-prefix", "60", "--prompt-words", "2", "--output-tokens", "2"]
    result = CliRunner().invoke(commands(), ["bench", "--url", running.url, "--json", str(file), *arguments])
    assert result.exit_code == 0, result.output
    load = json.loads(file.read_text())["loads"][0]
    assert load["cached_tokens"] > load["prompt_tokens"] * 0.7


@pytest.mark.parametrize(
    "mix",
    ["greedy", pytest.param("mixed", marks=[pytest.mark.soak, pytest.mark.timeout(1200)])],  # compiles each row
)
def test_the_raw_engine_and_ours_do_the_same_work_on_the_same_prompts(
    tmp_path: Path, tiny_model_dir: Path, mix: str
) -> None:
    file = tmp_path / "engine.json"
    lengths = ["--prompt-words", "2:5", "--output-tokens", "5:9", "--api", "completions", "--sampling", mix]
    rounds = ["--streams", "1,3", "--requests", "6", "--rounds", "2", "--json", str(file)]
    ended = subprocess.run(
        [sys.executable, "-m", "service", "bench", "engine", *lengths, *rounds],
        env={
            **os.environ,
            "COLUMNS": "160",
            "MLXD_MODEL__REFERENCE": str(tiny_model_dir),
            "MLXD_SERVER__STATE_DIR": str(tmp_path / "state"),
            "MLXD_ENGINE__MAX_ROWS": "4",
            "MLXD_ENGINE__MEMORY_BUDGET": str(1 << 30),
        },
        cwd=tmp_path,
        capture_output=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr.decode()
    value = json.loads(file.read_text())
    found = {(each["streams"], each["contender"]): each for each in value["standings"]}
    assert value["schema"] == "mlxd-bench-engine/1"
    assert set(found) == {(1, BATCH), (1, BACKEND), (1, STREAM), (3, BATCH), (3, BACKEND)}
    assert [each["laps"] for each in found.values()] == [2] * 5
    assert all(each["tokens_per_second"] > 0 and each["cpu_per_token"] > 0 for each in found.values())
    assert all(12 <= each["tokens"] <= 12 * 9 for each in found.values())
    if mix == "greedy":
        assert len({each["tokens"] for (streams, _), each in found.items() if streams == 1}) == 1
        assert len({each["tokens"] for (streams, _), each in found.items() if streams == 3}) == 1
    assert "of mlx-lm's batch" in ended.stdout.decode()
