"""The house rules of the design, as tests without an allow-list.

That the detectors find what they look for is shown in test_architecture_detectors.py.
"""

import re
from collections.abc import Iterable
from pathlib import Path

import pytest
from fastapi import FastAPI

from service.app import build
from service.settings import Settings, keys
from tests import architecture
from tests.conftest import ROOT

SOURCES = architecture.read_sources(ROOT / "service")

LAYERS = (  # from top to bottom; a module imports only from lower lines and from its own package
    {"__main__"},
    {"cli"},
    {"doctor"},
    {"serve"},
    {"process"},
    {"app", "console", "hangup", "leaving", "listening", "reload"},
    {"api"},
    {"inference"},
    {"engine", "auth", "limits", "launchd", "bench"},
    {"storage", "supervision"},
    {"errors", "settings", "observability"},
)
CEILING = {("bench", f"engine.{name}") for name in ("backend", "generation", "mlx_backend", "models")}
"""What the raw engine is measured with, beside a load client that knows nothing of the service."""
ALLOWED_SIBLINGS = {("limits", "auth.principal"), *CEILING}

ENGINE_ON_MLX = [
    f"engine/{name}.py"
    for name in (
        *("mlx_backend", "batches", "decode_batch", "decode_groups", "row_cache", "sampling", "prefix_cache"),
        *("models", "demo_model", "loading", "memory_limits", "one_matrix", "attention", "warmup", "device"),
    )
]
FENCES = {
    "mlx": [*ENGINE_ON_MLX, "bench/ceiling.py"],
    "mlx_lm": [*ENGINE_ON_MLX, "bench/ceiling.py"],
    "matplotlib": ["bench/plots.py"],
    "fastapi": ["api/", "app.py"],
    "starlette": ["api/", "app.py"],
    "uvicorn": ["listening.py", "api/protocol.py"],
    "httptools": ["api/protocol.py"],
    "slowapi": ["limits/"],
    "limits": ["limits/"],
    "redis": ["limits/redis_store.py"],
    "prometheus_client": ["observability/", "cli/scrape.py"],
    "psutil": ["doctor/surroundings.py", "observability/process.py"],
    "opentelemetry": ["observability/otlp.py", "observability/otlp_metrics.py", "observability/tracing.py"],
    "requests": ["observability/otlp.py"],
    "jose": ["auth/jwt.py"],
    "sqlalchemy": ["storage/"],
    "sqlite3": ["storage/"],
}

BROAD_EXCEPTS = {
    "engine/worker.py": 1,  # the step
    "engine/canary.py": 1,  # the canary that judges after it
    "engine/decode_batch.py": 1,  # one row's processors
    "api/middleware/context.py": 1,  # the last resort
    "auth/jwt.py": 1,  # verification of what a stranger sent
    "engine/watchdog.py": 1,  # the dump before the end
    "storage/": 1,  # the storage thread, which hands over to who waits
}
HAND_OVER = {"engine/decode_batch.py"}  # the worker logs and counts what the batch collected

PUBLIC = {"/", "/health", "/livez", "/readyz"}


ONE_PLACE = {  # what a reader finds in exactly one file or folder; None where that file is not written yet
    r"data: \[DONE\]": "api/sse.py",
    r"(?<!data: )\[DONE\]": "bench/answer.py",  # the load client, which reads it
    r"class \w+\(PromptProcessingBatch\)": "engine/batches.py",
    r"BatchGenerator\b": "bench/ceiling.py",  # to be measured beside ours
    r"[\"']error[\"']: \{": "api/errors.py",
    r"^(?:from|import) jose\b": "auth/jwt.py",
    r"slowapi": "limits/request_rate.py",
    r"sqlite3": "storage/",
    r"os\.environ": "settings/",
}


def check(findings: Iterable[str]) -> None:
    found = list(findings)
    assert not found, "\n" + "\n".join(found)


def test_imports_point_down_only() -> None:
    check(architecture.layer_violations(SOURCES, LAYERS, ALLOWED_SIBLINGS))


def test_of_the_load_client_only_the_ceiling_knows_the_engine() -> None:
    client = [source for source in SOURCES if source.layer == "bench" and source.path != "bench/ceiling.py"]
    found = [source.at(node, name) for source in client for node, name in architecture.imported(source)]
    assert client
    check(each for each in found if " service.engine" in each)


def test_third_parties_stay_inside_their_fences() -> None:
    check(architecture.fence_violations(SOURCES, FENCES))


def test_only_settings_reads_the_environment() -> None:
    check(architecture.environment_readers(SOURCES, ["settings/"]))


def test_files_have_at_most_300_lines_and_functions_40() -> None:
    check(architecture.oversized(SOURCES, lines=300, function=40))


def test_no_module_or_class_holds_mutable_state() -> None:
    check(architecture.shared_state(SOURCES))


def test_broad_excepts_are_only_in_the_named_places_and_honest() -> None:
    check(architecture.broad_excepts(SOURCES, BROAD_EXCEPTS, HAND_OVER))


@pytest.mark.parametrize(("pattern", "place"), ONE_PLACE.items())
def test_what_belongs_into_one_file_is_in_that_file(pattern: str, place: str | None) -> None:
    found = {source.path for source in SOURCES if re.search(pattern, architecture.code(source), re.MULTILINE)}
    if place is not None and place.endswith("/"):
        assert found
        assert all(path.startswith(place) for path in found)
    else:
        assert found == ({place} if place else set())


def test_every_route_declares_exactly_one_scope_or_is_public(tmp_path: Path) -> None:
    app = build(Settings.load(None, {"server.state_dir": tmp_path}))
    assert isinstance(app.asgi, FastAPI)
    assert list(architecture.open_routes(app.asgi.routes, PUBLIC)) == []


def test_every_metric_is_documented() -> None:
    names = set(re.findall(r'"(mlxd_[a-z_]+)"', (ROOT / "service/observability/metrics.py").read_text("utf-8")))
    documented = (ROOT / "docs/metrics.md").read_text("utf-8")
    assert names
    assert [name for name in sorted(names) if name not in documented] == []


def test_every_setting_is_documented() -> None:
    documented = (ROOT / "docs/configuration.md").read_text("utf-8")
    assert [name for name in keys() if f"| `{name}` |" not in documented] == []
