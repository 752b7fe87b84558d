"""Bringing a model into memory and measuring what its rows cost. Belongs to the generation thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx_lm.models.cache import KVCache, make_prompt_cache
from mlx_lm.utils import dequantize_model, load_config, load_model as load_weights

from service.engine.attention import attend_without_plans
from service.engine.backend import MemoryUse, ModelInfo
from service.engine.memory import KV_STEP, Activations, LayerGroup, MemoryModel
from service.engine.memory_limits import recommended_bytes, weight_bytes, working_set
from service.engine.models import Told, resolve
from service.engine.one_matrix import join_products, multiply_in_one
from service.engine.prefix_cache import PrefixCache
from service.engine.tokenizer import Tokenizer
from service.errors import ModelTooLarge, ModelUnavailable
from service.settings import Settings
from service.supervision.memory import needed

CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length", "n_ctx")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model in memory, with what its configuration says about it."""

    name: str
    model: Any
    tokenizer: Tokenizer
    eos_token_ids: frozenset[int]
    context_length: int
    vocab_size: int

    def info(self, memory: MemoryModel) -> ModelInfo:
        """What the engine asks of it."""
        return ModelInfo(
            name=self.name,
            context_length=self.context_length,
            vocab_size=self.vocab_size,
            eos_token_ids=self.eos_token_ids,
            batchable=all(hasattr(layer, "merge") for layer in make_prompt_cache(self.model)),
            memory=memory,
            tokenizer=self.tokenizer,
            device=mx.default_device().type.name,
        )


Report = Callable[[str, int, int], None]
"""Told (what, done, total), by whichever thread does it; `total` 0 is unknown."""


def unheard(what: str, done: int, total: int) -> None:
    """The `Report` of nobody."""


def load_model(settings: Settings, progress: Report = unheard, *, room: Callable[[int], object] = bool) -> LoadedModel:
    """Load what `model.reference` means, by mlx-lm's own loader and without remote code.

    `room` is told how many bytes that takes before it is begun, and may raise. Raises ModelUnavailable. On mlx's CPU
    backend quantised weights become dense float32, if so configured.
    """
    files = resolve(
        settings.model.reference,
        state_dir=settings.server.state_dir.expanduser(),
        offline=settings.model.offline,
        progress=Told(progress),
    )
    progress("reading the weights", 0, 0)
    dense = settings.model.dequantize_on_cpu and mx.default_device() == mx.Device(mx.cpu)
    try:
        config = load_config(files.path)
        room(needed(files.path, config, dense=dense, budget=settings.engine.memory_budget))
        model, _ = load_weights(files.path, lazy=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelUnavailable(f"{files.name} cannot be loaded: {error}") from error
    if dense:
        model = dequantize_model(model)
        model.set_dtype(mx.float32)
    elif mx.cuda.is_available():
        multiply_in_one(model)
        join_products(model)
        attend_without_plans(model)
    mx.eval(model.parameters())
    model.eval()
    find_at_once(model)
    tokenizer = Tokenizer.load(files.path)
    return LoadedModel(
        name=files.name,
        model=model,
        tokenizer=tokenizer,
        eos_token_ids=_eos(config),
        context_length=_context_length(config, settings.engine.context_length),
        vocab_size=_vocab_size(model),
    )


def find_at_once(model: Any) -> None:
    """Make a model's layers plain attributes of each other too, for good: none may be replaced afterwards.

    mlx finds them with `__getattr__`, which Python asks after everything else: a seventh of the time in which it builds
    a step's graph, and on a GPU a small model's step may wait for that.
    """
    for module in model.modules():
        vars(module).update({name: part for name, part in module.items() if isinstance(part, (nn.Module, list))})


def _eos(config: dict[str, Any]) -> frozenset[int]:
    eos = config.get("eos_token_id")
    if eos is None:
        raise ModelUnavailable("the model's configuration names no end-of-sequence token")
    return frozenset([eos] if isinstance(eos, int) else eos)


def _context_length(config: dict[str, Any], configured: int) -> int:
    """The model's own limit, or a smaller configured one."""
    scopes = (config, config.get("text_config") or {})
    own = next((scope[key] for scope in scopes for key in CONTEXT_KEYS if isinstance(scope.get(key), int)), 0)
    limits = [limit for limit in (own, configured) if limit]
    if not limits:
        raise ModelUnavailable("the model does not say its context length; set engine.context_length")
    return min(limits)


def _vocab_size(model: Any) -> int:
    """Width of the logits, read off one forward pass (it may be wider than the tokenizer)."""
    logits = model(mx.array([[0]]), cache=make_prompt_cache(model))
    mx.eval(logits)
    return int(logits.shape[-1])


def memory_use(prefixes: PrefixCache, batch: int) -> MemoryUse:
    """mlx's own counters, what the device recommends, and what cached prefixes and `batch`, rows that decode, take."""
    return MemoryUse(
        active=mx.get_active_memory(),
        peak=mx.get_peak_memory(),
        buffer_cache=mx.get_cache_memory(),
        recommended=recommended_bytes(),
        prefix_cache=prefixes.nbytes,
        prefix_capacity=prefixes.capacity,
        prefix_entries=len(prefixes),
        batch=batch,
    )


def measure_memory(settings: Settings, loaded: LoadedModel) -> MemoryModel:
    """What rows cost, measured on the loaded model: caches by their size, activations by mlx's peak counter."""
    mx.clear_cache()
    weights = weight_bytes(loaded.model)
    budget = settings.engine.memory_budget or working_set() - weights
    if budget <= 0:
        raise ModelTooLarge(
            f"{loaded.name} needs {weights} bytes for its weights, more than this device has for it; "
            "choose a smaller model or set engine.memory_budget"
        )
    small, large = make_prompt_cache(loaded.model), make_prompt_cache(loaded.model)
    _forward(loaded, small, 1)
    _forward(loaded, large, PROBE)
    groups, fixed = _layer_costs(small, large)
    largest = min(settings.engine.max_prefill_chunk, loaded.context_length // 2)
    return MemoryModel(
        budget=int(budget * settings.engine.memory_budget_share),
        layers=groups,
        bytes_per_row=fixed,
        prompt=_activations(loaded, largest, masked=False),
        masked=_activations(loaded, largest, masked=True),
        bytes_per_logits=LOGITS_COPIES * 4 * loaded.vocab_size,
        chunk_tokens=settings.engine.max_prefill_chunk,
        prefill_rows=settings.engine.max_prefill_rows,
    )


PROBE = KV_STEP + 1
"""Positions of a measuring chunk: the first number for which a cache needs its second step."""

CPU_PROBE = 65
"""The same for activations on a CPU, where a chunk of `PROBE` takes a second. Overstates them: what a forward pass
takes once is shared by fewer positions (275 kB a position of the demo model, where 257 positions say 175)."""

PROBE_SECONDS = 0.2
"""Measuring goes on to chunks twice as large while two of them take less."""

MARGIN = 1.25
"""Factor on measured activations, for what one measurement did not see."""

LOGITS_COPIES = 10
"""Float32 copies of a row's logits that may be alive while a token is drawn: raw, biased, penalised,
normalised, sorted with their cumulated probabilities, masked, the noise that is added, and the counts of tokens."""


def _forward(loaded: LoadedModel, cache: list[Any], size: int, rows: int = 1) -> int:
    """Prefill a chunk of `size` positions of each row; returns its peak bytes beside what was there before."""
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    loaded.model(mx.zeros((rows, size), dtype=mx.int32), cache=cache)
    mx.eval([layer.state for layer in cache])
    return int(mx.get_peak_memory() - before)


def _layer_costs(small: Sequence[Any], large: Sequence[Any]) -> tuple[tuple[LayerGroup, ...], int]:
    """Cost groups from caches that hold one step and two, and the bytes of a row that never grow."""
    found: dict[tuple[int | None, bool], list[int]] = {}
    fixed = 0
    for one, two in zip(small, large, strict=True):
        growth = max(0, two.nbytes - one.nbytes) // KV_STEP
        fixed += max(0, one.nbytes - growth * KV_STEP)
        if growth:
            window = getattr(one, "max_size", None)
            found.setdefault((window, type(one) is KVCache), []).append(growth)
    groups = (
        LayerGroup(sum(costs), window, layers=len(costs), in_place=in_place)
        for (window, in_place), costs in found.items()
    )
    return tuple(groups), fixed


def _activations(loaded: LoadedModel, largest: int, *, masked: bool) -> Activations:
    """Measured on two chunks in a row, as large as time allows; with a batched cache's mask array or without.

    Small chunks understate: a GPU has several layers' buffers alive at once, and other kernels for them.
    """
    rows = 2 if masked and all(hasattr(layer, "merge") for layer in make_prompt_cache(loaded.model)) else 1
    size = PROBE if mx.default_device() != mx.Device(mx.cpu) else -(-CPU_PROBE // rows)
    first, second, seconds = _two_chunks(loaded, rows, size)
    if mx.default_device() != mx.Device(mx.cpu):  # the first use of a size compiles its kernels
        first, second, seconds = _two_chunks(loaded, rows, size)
    while seconds < PROBE_SECONDS and rows * (size * 2 - 1) <= largest:
        size = size * 2 - 1  # odd, because kernels for aligned sizes may need far less than the others
        _two_chunks(loaded, rows, size)
        first, second, seconds = _two_chunks(loaded, rows, size)
    positions = rows * size
    score = max(0.0, (second - first) / positions / size)
    return Activations(int(MARGIN * max(first / positions - size * score, 0)) + 1, MARGIN * score)


def _two_chunks(loaded: LoadedModel, rows: int, size: int) -> tuple[int, int, float]:
    """(peak bytes of a chunk of so many rows, peak bytes of the next one, seconds of both)."""
    cache = make_prompt_cache(loaded.model)
    if rows > 1:
        cache = [layer.merge([layer] * rows) for layer in cache]
    began = time.perf_counter()
    first = _forward(loaded, cache, size, rows)
    second = _forward(loaded, cache, size, rows)
    return first, second, time.perf_counter() - began
