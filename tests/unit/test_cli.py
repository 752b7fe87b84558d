"""The command line: what it prints, how it ends, and what it does not import."""

import io
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from service import __version__, cli, serve
from service.errors import ModelUnavailable
from tests.conftest import ROOT


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli.commands(), list(arguments))


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "mine.toml"
    path.write_text("[server]\nport = 1234\nstate_dir = 'state'\n")
    return str(path)


@pytest.fixture
def _untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands that prepare the process leave it as it was."""
    monkeypatch.setattr("service.settings.private_tmpdir", lambda _: None)
    monkeypatch.setattr("service.observability.logging.configure", lambda **_: None)
    monkeypatch.setattr("service.observability.logging.log_uncaught", lambda: None)


def test_config_show_prints_the_effective_settings_as_toml(config: str) -> None:
    shown = tomllib.loads(invoke("--config", config, "config", "show").stdout)
    assert shown["server"]["port"] == 1234
    assert shown["server"]["state_dir"] == str(Path(config).parent / "state")
    assert shown["engine"]["max_rows"] == 32


def test_config_show_prints_json(config: str) -> None:
    shown = json.loads(invoke("--config", config, "config", "show", "--format", "json").stdout)
    assert shown["server"]["port"] == 1234


def test_in_a_checkout_the_development_configuration_is_the_default(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(ROOT / "tests")
    assert tomllib.loads(invoke("config", "show").stdout)["model"]["reference"] == "demo"
    monkeypatch.chdir(tmp_path)
    assert tomllib.loads(invoke("config", "show").stdout)["model"]["reference"] != "demo"


def test_a_bad_configuration_is_one_line_per_problem_and_code_78(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text("[server]\nport = 'x'\nprot = 1\n")
    result = invoke("--config", str(path), "serve")
    assert result.exit_code == os.EX_CONFIG
    assert result.stdout == ""
    lines = sorted(result.stderr.splitlines())
    assert [line[:35] for line in lines] == [
        "mlxd: configuration: server.port: I",
        "mlxd: configuration: server.prot: u",
    ]


def test_a_state_folder_that_cannot_be_private_is_code_78(tmp_path: Path, config: str) -> None:
    (tmp_path / "state").write_text("a file")
    result = invoke("--config", config, "serve")
    assert result.exit_code == os.EX_CONFIG
    assert "state/tmp: cannot be used as a private folder" in result.stderr


@pytest.mark.usefixtures("_untouched")
def test_serve_passes_host_and_port_on_and_ends_with_the_services_code(
    config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def run(settings: Any, *, supervised: bool, load: Any) -> int:
        assert load() == settings, "a reload reads what the start has read"
        seen.append((settings.server.host, settings.server.port, supervised))
        return 70

    monkeypatch.setattr(serve, "run", run)
    monkeypatch.setattr(serve, "leave_now", sys.exit)
    assert invoke("--config", config, "serve", "--host", "::1", "--port", "0").exit_code == 70
    assert invoke("--config", config, "serve", "--supervised").exit_code == 70
    assert seen == [("::1", 0, False), ("127.0.0.1", 1234, True)]


@contextmanager
def bar() -> Iterator[str]:
    yield "a bar"


def fake_models(monkeypatch: pytest.MonkeyPatch, resolve: Any) -> None:
    module = ModuleType("service.engine.models")
    module.__dict__.update(resolve=resolve, rich_progress=bar)
    monkeypatch.setitem(sys.modules, "service.engine.models", module)


@pytest.mark.usefixtures("_untouched")
def test_model_fetch_brings_the_model_even_where_serving_is_offline(
    config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def resolve(reference: str, *, state_dir: Path, offline: bool, progress: Any) -> Any:
        assert (reference, offline) == ("mlx-community/Llama-3.2-1B-Instruct-4bit", False)
        assert progress is None, "nobody could see it"
        return SimpleNamespace(name="llama", path=state_dir / "models" / "llama")

    fake_models(monkeypatch, resolve)
    monkeypatch.setenv("MLXD_MODEL__OFFLINE", "true")
    result = invoke("--config", config, "model", "fetch")
    assert result.exit_code == 0
    assert result.stdout == f"llama: {Path(config).parent / 'state/models/llama'}\n"


@pytest.mark.usefixtures("_untouched")
def test_model_fetch_shows_its_progress_on_a_terminal(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def resolve(*_: Any, progress: Any, **__: Any) -> Any:
        seen.append(progress)
        return SimpleNamespace(name="llama", path="x")

    fake_models(monkeypatch, resolve)
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    cli.commands()(["--config", config, "model", "fetch"], standalone_mode=False)
    assert seen == ["a bar"]


@pytest.mark.usefixtures("_untouched")
def test_a_model_that_cannot_be_had_is_one_line_and_code_69(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(*_: Any, **__: Any) -> Any:
        raise ModelUnavailable("there is no such model")

    fake_models(monkeypatch, resolve)
    result = invoke("--config", config, "model", "fetch")
    assert (result.exit_code, result.stderr) == (os.EX_UNAVAILABLE, "mlxd: there is no such model\n")


def test_version_names_what_matters() -> None:
    text = invoke("version").stdout
    assert text.startswith(f"mlxd {__version__} (Python {sys.version.split()[0]}, mlx 0.")
    assert "mlx-lm" in text


def test_the_command_is_a_module_too() -> None:
    result = subprocess.run([sys.executable, "-m", "service", "--help"], cwd=ROOT, check=True, capture_output=True)
    assert b"serve" in result.stdout


def test_help_imports_nothing_heavy() -> None:
    heavy = {"mlx", "fastapi", "uvicorn", "pydantic", "structlog", "transformers"}
    program = (
        "import sys\nfrom service.cli import commands\n"
        "try:\n    commands()(['--help'])\nexcept SystemExit:\n    pass\n"
        f"sys.exit(str({heavy!r} & set(sys.modules)) if {heavy!r} & set(sys.modules) else 0)"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_the_entry_point_exits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["mlxd", "nonsense"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2


def test_the_command_tree_is_built_anew_each_time() -> None:
    assert isinstance(cli.commands(), typer.Typer)
    assert cli.commands() is not cli.commands()
