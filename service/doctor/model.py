"""The model: whether it is whole, whether it fits, and how fast it is under supervision."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from service.doctor.finding import Finding, fail, ok, size, skipped, warn
from service.doctor.machine import working_set
from service.doctor.surroundings import Surroundings
from service.engine import demo_model
from service.engine.memory import BUDGET_SHARE, HOST_SHARE
from service.engine.models import DEMO, resolve
from service.engine.speed_record import Speed, Started, read
from service.errors import ModelUnavailable

ROOM = 0.1
"""Share of what weights and caches together may use that should be left for the caches."""

SLOWER = 1.5
"""Times that a supervised start may be slower than one in a shell; two measurements differ by less."""

SUMS = "SHA256SUMS"
"""What `sha256sum` and `shasum -a 256` write, beside the files."""

SUM_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")
SHA256 = re.compile(r"[0-9a-f]{64}")


def model(around: Surroundings) -> Iterator[Finding]:
    """The files against their hashes: the demo model's manifest, the names in the hub's cache, or SHA256SUMS."""
    name, reference = "model", around.settings.model.reference
    try:
        folder = find(around)
    except ModelUnavailable as unavailable:
        yield fail(name, unavailable.message, "mlxd model fetch")
        return
    if reference == DEMO:
        whole = demo_model.is_complete(folder)
        yield (
            ok(name, f"{folder}: as its manifest says")
            if whole
            else fail(name, f"{folder} is not as its manifest says", "mlxd model fetch makes it anew")
        )
        return
    expected = _expected(folder)
    if not expected:
        mend = f"cd {folder} && shasum -a 256 *.safetensors *.json > {SUMS}"
        yield skipped(name, f"{folder}: there are no hashes to compare it with", mend)
        return
    wrong = [each for each, digest in expected.items() if _sha256(folder / each) != digest]
    if wrong:
        yield fail(name, f"{folder}: not as they were: {', '.join(wrong[:3])}", "fetch the model again")
    else:
        yield ok(name, f"{folder}: {len(expected)} files have their hash")


def find(around: Surroundings) -> Path:
    """The folder of the model as it is on this machine. Raises ModelUnavailable; fetches and builds nothing."""
    settings = around.settings
    if settings.model.reference != DEMO:
        return resolve(settings.model.reference, state_dir=around.state_dir, offline=True).path
    folder = around.state_dir / "models" / demo_model.NAME
    if not folder.is_dir():
        raise ModelUnavailable(f"the demo model is not in {folder} yet; the first start fetches it")
    return folder


def _expected(folder: Path) -> Mapping[str, str]:
    """SHA-256 by file: as SHA256SUMS says, or as the hub's cache names the large files that its links lead to."""
    sums = folder / SUMS
    if sums.is_file():
        lines = (SUM_LINE.fullmatch(line) for line in sums.read_text("utf-8", "replace").splitlines())
        return {match[2]: match[1] for match in lines if match is not None}
    links = {file.name: file.resolve().name for file in sorted(folder.glob("*.safetensors")) if file.is_symlink()}
    return {name: blob for name, blob in links.items() if SHA256.fullmatch(blob)}


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""


def memory(around: Surroundings) -> Iterator[Finding]:
    """Weights as they will be in memory, and the budget for caches, against what the device may use."""
    name = "memory"
    try:
        folder = find(around)
    except ModelUnavailable:
        yield skipped(name, "without the model its size is not known", "mlxd model fetch")
        return
    limit = working_set(around)
    weights = weights_bytes(folder, dense=limit is None and around.settings.model.dequantize_on_cpu)
    usable = limit * BUDGET_SHARE if limit is not None else around.machine.memory * HOST_SHARE
    given = around.settings.engine.memory_budget
    budget = given or max(0.0, usable - weights)
    of = "the GPU's working set" if limit is not None else "this machine's memory"
    seen = f"weights {size(weights)}, budget {size(budget)}, of {size(limit or around.machine.memory)}: {of}"
    smaller = "choose a smaller model, or one with fewer bits"
    if weights >= usable or weights + budget > (limit or around.machine.memory):
        yield fail(name, seen, f"{smaller}; engine.memory_budget must leave room for the weights" if given else smaller)
    elif weights + budget > usable * (1 + 1e-6):
        yield warn(name, seen, f"engine.memory_budget: at most {int(usable - weights)}, or 0 to have it chosen")
    elif budget < usable * ROOM:
        yield warn(name, f"{seen}; little is left for requests", smaller)
    elif around.readiness is None and around.machine.available < weights:
        yield warn(name, f"{seen}; free now: {size(around.machine.available)}", "end other programs before the start")
    else:
        yield ok(name, seen)


def weights_bytes(folder: Path, *, dense: bool) -> int:
    """Bytes of the weights in memory: as in their files, or as float32 where they are made `dense`."""
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return int(stored * (_expansion(folder) if dense else 1))


def _expansion(folder: Path) -> float:
    """How many times larger float32 is than what is stored: quantised weights with their scales and biases, or 16 bits.

    An upper bound: layers that are not quantised grow less.
    """
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        quantised = config.get("quantization") or {}
        if quantised:
            return 32 / (float(quantised["bits"]) + 32 / float(quantised["group_size"]))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError):
        pass
    return 2.0


def speed(around: Surroundings) -> Iterator[Finding]:
    """Tokens a second of a supervised start against those of one in a shell, each as its warm-up measured them."""
    name, found = "speed", read(around.state_dir)
    supervised, shell = found.get(Started.SUPERVISED), found.get(Started.SHELL)
    if around.measure is not None and around.readiness is not None:
        yield skipped(name, "not measured: the service runs, and both would be slower", "stop it, then ask again")
        return
    if around.measure is not None:
        try:
            shell = around.measure()
        except ModelUnavailable as unavailable:
            yield fail(name, unavailable.message, "mlxd model fetch")
            return
    yield _compared(name, supervised, shell)


def _compared(name: str, supervised: Speed | None, shell: Speed | None) -> Finding:
    ask = "mlxd doctor --speed"
    if supervised is None or shell is None:
        told = "; ".join(_told(kind, each) for kind, each in (("shell", shell), ("supervised", supervised)) if each)
        missing = "no supervised start" if supervised is None else "no start in a shell"
        return skipped(name, f"{missing} has been measured yet{f'; {told}' if told else ''}", "" if shell else ask)
    if not supervised.comparable(shell):
        return skipped(name, "measured with another model, device or mlx: nothing to compare", ask)
    seen = f"{_told('supervised', supervised)}; {_told('shell', shell)}"
    factor = max(shell.decode / supervised.decode, shell.prefill / supervised.prefill)
    if factor > SLOWER:
        mend = "the job needs ProcessType Interactive, and no Nice or LowPriorityBackgroundIO; docs/operations.md"
        return warn(name, f"{seen}: {factor:.1f} times slower", mend)
    return ok(name, seen)


def _told(kind: str, speed: Speed) -> str:
    return f"{kind} {speed.decode:.3g} tokens/s (prompt {speed.prefill:.3g})"
