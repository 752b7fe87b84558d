"""Memory before a load: what it takes, and that it is waited for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from service.errors import NotEnoughMemory
from service.observability.process import available_memory
from service.supervision.attempts import Attempts
from service.supervision.memory import LEAST_BUDGET, dense_factor, needed, require


@pytest.mark.parametrize(
    ("config", "factor"),
    [
        ({"dtype": "float32"}, 1),
        ({"torch_dtype": "float16"}, 2),
        ({"torch_dtype": "torch.bfloat16"}, 2),
        ({}, 1),
        ({"quantization": {"bits": 4, "group_size": 64}, "dtype": "bfloat16"}, 32 / 4.5),
        ({"quantization": {"bits": 8, "group_size": 32}}, 32 / 9),
        ({"quantization": {"bits": 4}}, 32 / 4.5),
        ({"quantization": "strange", "torch_dtype": "bfloat16"}, 2),
        ({"quantization": {"bits": 0}}, 1),
    ],
)
def test_how_much_larger_dense_weights_are(config: dict[str, Any], factor: float) -> None:
    assert dense_factor(config) == factor


def test_the_need_is_the_weights_on_disk_as_they_will_be_and_a_little_budget(tmp_path: Path) -> None:
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(bytes(1000))
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(bytes(500))
    (tmp_path / "other.bin").write_bytes(bytes(9999))
    half = {"dtype": "float16"}
    assert needed(tmp_path, half, dense=False, budget=0) == 1500 + LEAST_BUDGET
    assert needed(tmp_path, half, dense=True, budget=0) == 3000 + LEAST_BUDGET
    assert needed(tmp_path, half, dense=False, budget=10) == 1510
    assert needed(tmp_path, half, dense=False, budget=2**40) == 1500 + LEAST_BUDGET


def test_the_demo_model_takes_what_is_said(demo_model_dir: Path) -> None:
    config = json.loads((demo_model_dir / "config.json").read_text("utf-8"))
    dense = needed(demo_model_dir, config, dense=True, budget=1) - 1
    parameters = 4 * 134_515_008
    assert parameters <= dense <= 1.5 * parameters


def test_less_than_the_need_is_refused_with_both_figures() -> None:
    with pytest.raises(
        NotEnoughMemory, match=r"loading the model takes 3\.0 GiB, and 2\.0 GiB are free of \d+\.\d GiB"
    ):
        require(3 * 2**30, free=lambda: 2 * 2**30)
    require(2 * 2**30, free=lambda: 2 * 2**30)
    require(1)


def test_what_the_system_says_is_free_is_sensible() -> None:
    assert 2**20 < available_memory() < 2**50


def test_memory_is_waited_for_as_long_as_it_takes_and_then_it_loads() -> None:
    free = iter([1, 1, 1, 10])
    clock = [0.0]
    told: list[str] = []

    def load() -> str:
        require(5, free=lambda: next(free))
        return "a model"

    def pause(seconds: float) -> None:
        clock[0] += seconds + 1_000_000

    attempts = Attempts(patience=600, clock=lambda: clock[0])
    assert attempts.run(load, tell=told.append, pause=pause) == "a model"
    assert len(told) == 3
    assert all(line.startswith("not enough memory: ") for line in told)
