"""What mlx's CUDA backend is told: only where it is installed, and never against the environment."""

from __future__ import annotations

import os
from importlib import metadata

import pytest

from service.settings import prefer_for_cuda
from service.settings.cuda import DISTRIBUTIONS, PREFERRED


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PREFERRED:
        monkeypatch.setenv(name, "")  # what the test sets is taken back
        monkeypatch.delenv(name)


def installed(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    def distribution(name: str) -> object:
        if name not in names:
            raise metadata.PackageNotFoundError(name)
        return object()

    monkeypatch.setattr(metadata, "distribution", distribution)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_where_the_backend_is_installed_its_graphs_are_larger_and_their_number_no_reason_to_fail(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    installed(monkeypatch, name)
    prefer_for_cuda()
    assert {key: os.environ[key] for key in PREFERRED} == dict(PREFERRED)


def test_elsewhere_nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "mlx", "mlx-cpu", "mlx-metal")
    prefer_for_cuda()
    assert not PREFERRED.keys() & os.environ.keys()


def test_the_environment_is_stronger(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, *DISTRIBUTIONS)
    monkeypatch.setenv("MLX_CUDA_GRAPH_CACHE_SIZE", "7")
    prefer_for_cuda()
    assert os.environ["MLX_CUDA_GRAPH_CACHE_SIZE"] == "7"
    assert os.environ["MLX_MAX_OPS_PER_BUFFER"] == PREFERRED["MLX_MAX_OPS_PER_BUFFER"]
