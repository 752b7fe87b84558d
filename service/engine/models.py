"""What a model reference means: the demo model, a local folder, or a repository on the Hugging Face hub.

Turns the reference of the configuration into a folder that `mlx_lm.load` can read. Blocks (download, conversion); any
thread may call it, never the event loop. Only safetensors and text files count: pickled weights are never loaded, and
a folder that wants its own Python code run is refused. Imports huggingface_hub and rich inside functions only.
"""

# ruff: noqa: PLC0415

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from service.engine import demo_model
from service.errors import ModelUnavailable

DEMO = "demo"  # the reference that means the embedded demo model
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
# what mlx-lm itself downloads, less its "*.py"
ALLOW_PATTERNS = (
    "*.json",
    "model*.safetensors",
    "tokenizer.model",
    "*.tiktoken",
    "tiktoken.model",
    "*.txt",
    "*.jsonl",
    "*.jinja",
)


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A complete MLX model folder on disk, and the name by which clients call it."""

    name: str
    path: Path


class Progress(Protocol):
    """Told how far a long step is. `done` and `total` share a unit (bytes, files or stages); `total` 0 is unknown."""

    def advance(self, step: str, done: int, total: int) -> None:
        """Take note; quick, and called from whichever thread does the step."""


@dataclass(frozen=True, slots=True)
class Told:
    """`Progress` by a plain call."""

    report: Callable[[str, int, int], None]

    def advance(self, step: str, done: int, total: int) -> None:
        self.report(step, done, total)


def resolve(reference: str, *, state_dir: Path, offline: bool, progress: Progress | None = None) -> ModelFiles:
    """Turn `reference` into a checked model folder: "demo", a path (absolute, or from "." or "~"), or "org/name".

    May download, unless `offline`. Prints nothing. Raises `ModelUnavailable` with one sentence for the operator.
    """
    if reference == DEMO:
        files = ModelFiles(demo_model.NAME, demo_model.ensure(state_dir, offline=offline, progress=progress))
    elif reference.startswith(("/", ".", "~")):
        path = _local_folder(reference)
        files = ModelFiles(path.name, path)
    elif HUB_ID.fullmatch(reference):
        files = ModelFiles(reference, _snapshot(reference, offline=offline, progress=progress))
    else:
        raise ModelUnavailable(
            f"{reference!r} names no model: use {DEMO!r}, a hub id like 'org/name', or a path that starts with / . or ~"
        )
    _check(files.path)
    return files


@contextmanager
def rich_progress() -> Iterator[Progress]:
    """Draw a bar per step on stderr while the context lasts."""
    from rich.console import Console
    from rich.progress import Progress as Bars

    with Bars(console=Console(stderr=True)) as bars:
        yield _RichProgress(bars)


class _RichProgress:
    """`Progress` on rich's bars, which are safe to update from several threads."""

    def __init__(self, bars: Any) -> None:
        self._bars = bars
        self._tasks: dict[str, Any] = {}

    def advance(self, step: str, done: int, total: int) -> None:
        if step not in self._tasks:
            self._tasks[step] = self._bars.add_task(step)
        self._bars.update(self._tasks[step], completed=done, total=total or None)


def _local_folder(reference: str) -> Path:
    try:
        path = Path(reference).expanduser().resolve()
    except (RuntimeError, ValueError) as error:  # "~nobody", or a NUL byte
        raise ModelUnavailable(f"the model path {reference!r} cannot be read ({error}): check it") from error
    if not path.is_dir():
        raise ModelUnavailable(f"the model folder {path} does not exist: check the path")
    return path


def _snapshot(repository: str, *, offline: bool, progress: Progress | None) -> Path:
    """Return the folder of `repository` in the hub's cache, after fetching what is missing (unless `offline`)."""
    import httpx2
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        path = snapshot_download(
            repository,
            allow_patterns=list(ALLOW_PATTERNS),
            local_files_only=offline,
            tqdm_class=_bars(progress),
        )
    except GatedRepoError as error:
        raise ModelUnavailable(f"{repository} is gated: accept its terms on the hub and log in with a token") from error
    except RepositoryNotFoundError as error:
        raise ModelUnavailable(f"the hub has no model {repository}, or it is private: check the name") from error
    except LocalEntryNotFoundError as error:
        advice = "start once with the network allowed" if offline else "check the connection to the hub and start again"
        raise ModelUnavailable(f"{repository} is not complete in the local hub cache: {advice}") from error
    except (OSError, ValueError, httpx2.HTTPError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelUnavailable(f"{repository} could not be downloaded ({reason}): start again") from error
    return Path(path)


def _bars(progress: Progress | None) -> Any:
    """A tqdm class for huggingface_hub that draws nothing and tells `progress`."""
    tqdm: Any = import_module("tqdm.auto").tqdm  # untyped

    class Bars(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)  # huggingface_hub's own
            kwargs |= {"file": io.StringIO(), "disable": progress is None, "leave": False}
            super().__init__(*args, **kwargs)

        def display(self, msg: str | None = None, pos: int | None = None) -> bool:  # noqa: ARG002
            if progress is not None and msg is None:
                progress.advance(str(self.desc or "download").rstrip(": "), int(self.n), int(self.total or 0))
            return True

    return Bars


def _check(path: Path) -> None:
    """Refuse a folder that is not a whole model in safetensors, or that wants code of its own run."""
    if not (path / "config.json").is_file():
        raise ModelUnavailable(f"{path} has no config.json: give the folder of an MLX model")
    config, tokenizer = _read_json(path / "config.json"), {}
    if (path / "tokenizer_config.json").is_file():
        tokenizer = _read_json(path / "tokenizer_config.json")
    # mlx-lm imports `model_file` when told to trust it; transformers imports `auto_map`, or asks on the terminal
    if config.get("model_file") is not None or config.get("auto_map") or tokenizer.get("auto_map"):
        raise ModelUnavailable(
            f"{path} asks to run Python code of its own (model_file or auto_map), which is never done: "
            "choose a model without it, or remove those keys in a copy of the folder"
        )
    wanted = {"model*.safetensors"}
    if (path / "model.safetensors.index.json").is_file():
        index = _read_json(path / "model.safetensors.index.json").get("weight_map")
        wanted |= {Path(str(name)).name for name in index.values()} if isinstance(index, dict) else set()
    if missing := sorted(pattern for pattern in wanted if not any(path.glob(pattern))):
        raise ModelUnavailable(f"{path} lacks {missing[0]}: download the model again (pickled weights are not loaded)")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelUnavailable(f"{path} cannot be read ({error}): download the model again") from error
    if not isinstance(value, dict):
        raise ModelUnavailable(f"{path} holds no JSON object: download the model again")
    return value
