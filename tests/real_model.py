"""Fixtures: the demo model, served; and alone, as mlx-lm runs it. A plugin of every test folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.utils import dequantize_model

from service.settings import Settings
from tests.serving import AMPLE, Served, served

Alone = Callable[..., str]


@pytest.fixture(scope="session")
def demo_settings(state_dir: Path) -> Settings:
    return Settings.load(
        None,
        {
            "model.reference": "demo",
            "server.state_dir": state_dir,
            "server.port": 0,
            "engine.max_rows": 16,
            "auth.enabled": False,
            **AMPLE,
        },
    )


@pytest.fixture(scope="session")
def demo(demo_settings: Settings, demo_model_dir: Path) -> Iterator[Served]:
    """The demo model behind the whole service."""
    with served(demo_settings) as service:
        yield service


@pytest.fixture(scope="session")
def alone(demo_model_dir: Path) -> Alone:
    """`alone(prompt, max_tokens)`: what mlx-lm's own `generate` says, on weights of its own."""
    loaded: tuple[Any, ...] = mlx_lm.load(str(demo_model_dir))
    model, tokenizer = dequantize_model(loaded[0]), loaded[1]
    model.set_dtype(mx.float32)

    def generate(prompt: str, max_tokens: int) -> str:
        return str(mlx_lm.generate(model, tokenizer, prompt, max_tokens=max_tokens))

    return generate


@pytest.fixture
def fresh_demo(demo: Served) -> Served:
    """`demo` that nobody has asked anything yet: tests with it run first, and one in a session."""
    assert "\nmlxd_prompt_tokens_total 0.0\n" in httpx.get(f"{demo.ops_url}/metrics").text
    return demo
