"""The real backend on tiny random models: the same tokens as mlx-lm alone, isolation, memory, and limits."""

from __future__ import annotations

import gc
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from hypothesis import HealthCheck, given, settings as hypothesis_settings, strategies as st
from mlx import nn
from mlx.utils import tree_flatten, tree_map
from mlx_lm.generate import BatchGenerator
from mlx_lm.models import base, llama
from mlx_lm.models.cache import BatchKVCache, ConcatenateKVCache, RotatingKVCache
from mlx_lm.utils import load_model as load_weights, load_tokenizer

from service.engine import attention, batches, cohorts, demo_model, memory_limits, mlx_backend, warmup
from service.engine.backend import Row, StepResult
from service.engine.batches import LEAST_PLANNED, PrefillBatch, trim_plain
from service.engine.decode_batch import DecodeBatch
from service.engine.generation import FinishReason, SamplingParams
from service.engine.loading import load_model
from service.engine.memory import MemoryModel
from service.engine.mlx_backend import MlxBackend
from service.engine.models import Progress
from service.engine.pacing import StepCosts
from service.engine.row_cache import RowCache, rounded
from service.engine.sampling import RowSampling
from service.settings import Settings
from tests.progress import Recorder
from tests.tiny import make_tiny_llama

GREEDY = SamplingParams(temperature=0)


def loaded(folder: Path, *, ahead: bool | None = None, **engine: Any) -> MlxBackend:
    options: dict[str, Any] = {"max_rows": 8, "memory_budget": 1 << 30, **engine}
    backend = MlxBackend(Settings(model={"reference": str(folder)}, engine=options), ahead=ahead)
    backend.load()
    return backend


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def memory(folder: Path) -> MemoryModel:
    """What rows of this model cost: measured once, which takes most of a load."""
    return loaded(folder).info.memory


@pytest.fixture(params=[False, True], ids=["as on a CPU", "ahead, as on a GPU"])
def backend(
    folder: Path, memory: MemoryModel, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[MlxBackend]:
    with monkeypatch.context() as patched:
        patched.setattr(mlx_backend, "measure_memory", lambda *_: memory)
        made = loaded(folder, ahead=request.param)
    yield made
    made.rebuild()


def row(
    uid: int, prompt: Sequence[int], *, max_tokens: int = 12, sampling: SamplingParams = GREEDY, tenant: str = "t"
) -> Row:
    return Row(uid=uid, prompt=tuple(prompt), max_tokens=max_tokens, sampling=sampling, tenant=tenant)


def finish(backend: MlxBackend, count: int) -> tuple[dict[int, list[int]], list[StepResult]]:
    """Step until `count` rows have ended; returns (tokens by row, all step results)."""
    tokens: dict[int, list[int]] = {}
    results = []
    ended = 0
    while ended < count:
        results.append(backend.step())
        for token in results[-1].tokens:
            tokens.setdefault(token.uid, []).append(token.token)
            ended += token.finish_reason is not None
        ended += len(results[-1].failed)
        assert len(results) < 5000
    return tokens, results


def alone(backend: MlxBackend, folder: Path, prompt: Sequence[int], max_tokens: int = 12) -> list[int]:
    """What mlx-lm's own generation says."""
    tokenizer = load_tokenizer(folder, eos_token_ids=[2])
    replies = mlx_lm.stream_generate(backend.model, tokenizer, list(prompt), max_tokens=max_tokens)
    return [reply.token for reply in replies]


def prompts(count: int, seed: int = 1) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, 259) for _ in range(rng.choice([1, 2, 5, 40, 300, 700]))] for _ in range(count)]


def test_batched_rows_of_mixed_lengths_equal_mlx_lm_alone(backend: MlxBackend, folder: Path) -> None:
    asked = prompts(8)
    for uid, prompt in enumerate(asked):
        backend.insert(row(uid, prompt))
    tokens, _ = finish(backend, len(asked))
    assert tokens == {uid: alone(backend, folder, prompt) for uid, prompt in enumerate(asked)}


def test_steps_may_be_brief_or_not_from_one_to_the_next(
    folder: Path, memory: MemoryModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU what a step took decides whether the next one runs ahead."""
    monkeypatch.setattr(mlx_backend, "measure_memory", lambda *_: memory)
    backend, asked, rng, seen = loaded(folder), prompts(8), random.Random(4), set()

    def brief(*_: tuple[int, int]) -> bool:
        seen.add(found := rng.random() < 0.5)
        return found

    monkeypatch.setattr(backend.pacer, "brief", brief)
    for uid, prompt in enumerate(asked[:4]):
        backend.insert(row(uid, prompt))
    early = [token for _ in range(12) for token in backend.step().tokens]
    for uid, prompt in enumerate(asked[4:], 4):
        backend.insert(row(uid, prompt))
    late, _ = finish(backend, len(asked) - sum(token.finish_reason is not None for token in early))
    assert seen == {False, True}
    for uid, prompt in enumerate(asked):
        mine = [token.token for token in early if token.uid == uid] + late.get(uid, [])
        assert mine == alone(backend, folder, prompt)


def test_no_two_steps_with_rows_in_a_row_bring_nothing(backend: MlxBackend) -> None:
    """What the watchdog goes by; the odd one launches a token that the next one hands over."""
    for uid, prompt in enumerate(prompts(8)):
        backend.insert(row(uid, prompt))
    _, results = finish(backend, 8)
    barren = [not result.fruitful for result in results]
    assert not any(both == (True, True) for both in pairwise(barren))
    assert sum(result.copies for result in results) >= len(backend.model.layers)


def test_the_pool_is_given_back_from_another_thread_while_rows_live(backend: MlxBackend, folder: Path) -> None:
    asked = [5, 6, 7]
    backend.insert(row(0, asked))
    for _ in range(3):
        backend.step()
    thread = threading.Thread(target=backend.release_pool)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    tokens, _ = finish(backend, 1)
    assert tokens[0] == alone(backend, folder, asked)[-len(tokens[0]) :]


def test_late_joins_and_cached_prefixes_equal_mlx_lm_alone(backend: MlxBackend, folder: Path) -> None:
    base = prompts(1, seed=5)[0] * 2 + [7] * 60
    backend.insert(row(0, base))
    finish(backend, 1)
    asked = [[*base, 9, 10], base, base[:40], [*base[:30], 200, 201], [50, 51]]
    cached: dict[int, int] = {}
    heard = [
        replace(row(uid, prompt), on_prefill=partial(cached.__setitem__, uid)) for uid, prompt in enumerate(asked, 1)
    ]
    backend.insert(replace(heard[0], max_tokens=12))
    backend.step()
    backend.step()
    for each in heard[1:]:
        backend.insert(each)
    tokens, _ = finish(backend, len(asked))
    assert cached[1] >= len(base)
    assert 0 < cached[2] < len(base)
    assert cached[5] == 0
    for uid, prompt in enumerate(asked, 1):
        assert tokens[uid] == alone(backend, folder, prompt)[-len(tokens[uid]) :]


def test_a_prefix_that_many_share_is_prefilled_once_and_never_across_tenants(backend: MlxBackend, folder: Path) -> None:
    """The first wave, when nothing is in the prefix cache yet."""
    rng = random.Random(8)
    base = [rng.randrange(3, 259) for _ in range(600)]
    asked = [[*base, 3 + uid, 4 + uid] for uid in range(8)]
    cached: dict[int, int] = {}
    for uid, prompt in enumerate(asked):
        each = row(uid, prompt, tenant="t" if uid < 6 else f"t{uid}")
        backend.insert(replace(each, on_prefill=partial(cached.__setitem__, uid)))
    tokens, results = finish(backend, len(asked))
    assert tokens == {uid: alone(backend, folder, prompt) for uid, prompt in enumerate(asked)}
    assert cached == {0: 0, **dict.fromkeys(range(1, 6), 600), 6: 0, 7: 0}
    assert 3 * 601 <= sum(result.prefill_tokens for result in results) < 3 * 601 + 5 * 64


def test_when_the_leader_leaves_a_follower_takes_over(backend: MlxBackend, folder: Path) -> None:
    """In its prefill, when it decodes, and while its prefix is being copied."""
    rng = random.Random(9)
    for number, steps in enumerate(range(12)):
        base = [rng.randrange(3, 259) for _ in range(700)]
        cached: dict[int, int] = {}
        for uid in range(2):
            each = row(uid, [*base, 5 + uid], max_tokens=40 if uid == 0 else 16, tenant=f"t{number}")
            backend.insert(replace(each, on_prefill=partial(cached.__setitem__, uid)))
        early = [token.token for _ in range(steps) for token in backend.step().tokens if token.uid == 1]
        backend.remove([0])
        tokens, _ = finish(backend, 1)
        assert early + tokens[1] == alone(backend, folder, [*base, 6], max_tokens=16)
        while backend.busy:
            backend.step()


def test_who_leaves_while_its_prefix_is_copied_is_not_begun(
    backend: MlxBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = [7 + index % 200 for index in range(600)]
    begun: list[int] = []
    backend.insert(row(0, [*base, 5], max_tokens=60))
    while not backend.step().tokens:
        pass
    for uid in (1, 2):
        backend.insert(replace(row(uid, [*base, 5 + uid]), on_prefill=begun.append))
    monkeypatch.setattr(backend.pacer, "may_join", lambda *_: True)
    backend.pacer.target = 1e-9  # one layer a step
    while not (backend._forming or backend._chore):
        backend.step()
    backend.remove([1])
    while backend._forming:
        backend.step()
    assert backend._chore is not None, "a copy is under way"
    backend.remove([2])
    while backend.busy:
        backend.step()
    assert begun == []
    assert backend._prefill is None


def test_rows_decode_while_others_join_and_their_buffers_grow(backend: MlxBackend, folder: Path) -> None:
    """A long prompt makes the buffers of all rows larger, which took a pause of every stream."""
    asked = [[3 + index % 250 for index in range(length)] for length in (20, 30, 900)]
    for uid in (0, 1):
        backend.insert(row(uid, asked[uid], max_tokens=300))
    tokens: dict[int, list[int]] = {}
    while len(tokens) < 2:
        for token in backend.step().tokens:
            tokens.setdefault(token.uid, []).append(token.token)
    backend.pacer.target = 1e-9  # one layer a step
    backend.insert(row(2, asked[2], max_tokens=8))
    copied = emitted = 0
    while 2 not in tokens:
        result = backend.step()
        copied += result.copies > 0
        emitted += result.copies > 0 and len(result.tokens) > 0
        for token in result.tokens:
            tokens.setdefault(token.uid, []).append(token.token)
    assert copied >= 2 * len(backend.model.layers), "of the prompt's own buffers, and its joining the others'"
    assert emitted >= copied - 2, "but for tokens that were on their way"
    rest, _ = finish(backend, 3)
    assert {uid: tokens[uid] + rest.get(uid, []) for uid in tokens} == {
        uid: alone(backend, folder, asked[uid], max_tokens=8 if uid == 2 else 300) for uid in tokens
    }


def test_rows_that_have_ended_are_not_decoded_while_others_are_copied(backend: MlxBackend, folder: Path) -> None:
    """They were, once for each layer: on a CPU with the demo model five seconds for nothing."""
    asked = [[3 + index % 250 for index in range(length)] for length in (20, 900)]
    backend.insert(row(0, asked[0], max_tokens=300))
    while not backend.step().tokens:
        pass
    backend.pacer.target = 1e-9  # one layer a step
    backend.insert(row(1, asked[1], max_tokens=8))
    while not backend.step().copies:
        pass
    backend.remove([0])
    during = []
    while backend.busy:
        during.append(backend.step())
    assert sum(result.copies for result in during) > 0
    assert [result.decode_rows for result in during] == [0] * len(during)
    tokens, _ = finish(backend, 1)
    assert tokens == {1: alone(backend, folder, asked[1], max_tokens=8)}


@pytest.mark.parametrize("ahead", [False, True])
def test_who_begins_or_ends_is_told_before_others_are_prefilled_or_copied(folder: Path, *, ahead: bool) -> None:
    """An answer's end would wait for the rest of the step, and so would the next request of whoever reads it."""
    backend = loaded(folder, ahead=ahead, max_prefill_chunk=32)
    asked = [3 + index % 250 for index in range(700)]
    backend.insert(row(0, asked[:8], max_tokens=5))
    backend.step()
    backend.insert(row(1, asked, max_tokens=4))
    tokens, results = finish(backend, 2)
    assert tokens == {uid: alone(backend, folder, asked[:n], max_tokens=m) for uid, n, m in [(0, 8, 5), (1, 700, 4)]}
    first, *between, last = (at for at, result in enumerate(results) if result.tokens and result.tokens[0].uid == 0)
    for at in (first, last):
        assert not results[at].prefill_tokens + results[at].copies
        assert not results[at + 1].tokens
        assert results[at + 1].prefill_tokens > 0
    assert all(results[at].prefill_tokens > 0 for at in between), "beside them as ever"
    assert results[last + 1].copies, "of who has left"


def test_a_first_token_does_not_wait_until_the_next_one_is_launched(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = loaded(folder, ahead=True)
    launched: list[int] = []
    launch = DecodeBatch.launch

    def counted(*given: Any) -> None:
        launched.append(1)
        launch(*given)

    monkeypatch.setattr(DecodeBatch, "launch", counted)
    backend.insert(row(0, [5, 6], max_tokens=9))
    results = [backend.step() for _ in range(6)]
    first = next(at for at, result in enumerate(results) if result.tokens)
    launched.clear()
    backend.rebuild()
    backend.insert(row(1, [5, 6], max_tokens=9))
    before = [(len(backend.step().tokens), len(launched)) for _ in range(first + 3)]
    assert before[first:] == [(1, 1), (0, 2), (1, 3)], "told, then launched; from then on one is computed ahead"


def test_a_models_layers_are_found_at_once_and_it_is_the_same_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python asks `__getattr__` last, and mlx's modules have all of their parts there."""
    asked: list[str] = []
    found = nn.Module.__getattr__

    def counted(self: nn.Module, name: str) -> Any:
        asked.append(name)
        return found(self, name)

    monkeypatch.setattr(nn.Module, "__getattr__", counted)
    plain, _ = load_weights(folder)
    tokens = mx.array([[5, 6, 7]])
    expected = plain(tokens)
    assert len(asked) > len(plain.layers)
    model = load_model(Settings(model={"reference": str(folder)})).model
    asked.clear()
    assert mx.array_equal(model(tokens), expected)
    assert set(asked) <= {"weight"}, "arrays alone, which may be replaced"
    assert dict(tree_flatten(model.parameters())).keys() == dict(tree_flatten(plain.parameters())).keys()
    model.update(tree_map(mx.zeros_like, model.parameters()))
    assert not model(tokens).any(), "as its weights are"


def test_keys_and_values_that_are_fetched_as_copies_are_the_same(backend: MlxBackend) -> None:
    """As on CUDA, where cuDNN plans for each stride."""
    kept = []
    for planned in (False, True):
        state = backend.row_state(row(0, [3 + index % 250 for index in range(769)]))
        batch = PrefillBatch(backend.model, [state], [backend.fresh_cache()], planned=planned)
        while not batch.ready:
            batch.advance(256)
        kept.append([layer.state for layer in batch.prompt_cache])
    for one, other in zip(*kept, strict=True):
        assert all(mx.array_equal(a, b) for a, b in zip(one, other, strict=True))


class Forwarded(list[tuple[int, int]]):
    """(context, positions) of each forward pass of a model, whose chunks are those that cuDNN plans for."""

    def __init__(self, patch: pytest.MonkeyPatch, backend: MlxBackend) -> None:
        super().__init__()
        run = type(backend.model).__call__

        def model(itself: Any, inputs: mx.array, cache: list[Any]) -> mx.array:
            at = cache[0]._idx if isinstance(cache[0], BatchKVCache) else int(mx.array(cache[0].offset).max())
            self.append((at, inputs.shape[1]))
            return run(itself, inputs, cache=cache)

        patch.setattr(type(backend.model), "__call__", model)
        for module in (batches, cohorts, warmup):
            patch.setattr(module, "cudnn_plans", lambda: True)


def test_where_cudnn_plans_chunks_begin_at_multiples_of_their_sizes(
    backend: MlxBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = backend.row_state(row(0, [3 + index % 250 for index in range(2000)]))
    with monkeypatch.context() as patch:
        forwarded = Forwarded(patch, backend)
        batch = PrefillBatch(backend.model, [state], [backend.fresh_cache()])
        batch.advance(64)
        list(batch.prepare())
        while not batch.ready:
            batch.advance(512)
    assert forwarded == [(0, 64), (64, 64), (128, 128), (256, 256), (512, 512), (1024, 512), (1536, 512)]


@pytest.mark.parametrize(
    ("common", "length", "expected"),
    [(25, 200, 0), (200, 230, 192), (700, 720, 640), (130, 400, 128), (576, 640, 576), (1236, 1300, 1216)],
)
def test_where_cudnn_plans_a_prefix_is_used_up_to_where_others_began(
    backend: MlxBackend, folder: Path, *, common: int, length: int, expected: int
) -> None:
    """From the prefix cache, and from a row that decodes."""
    rng = random.Random(common)
    base = [rng.randrange(3, 259) for _ in range(common)]
    asked = [*base, *([3] * (length - common))]
    for decoding in (False, True):
        cached: dict[int, int] = {}
        backend.rebuild()
        with pytest.MonkeyPatch.context() as patch:
            Forwarded(patch, backend)
            backend.insert(row(0, [*base, 9], max_tokens=100 if decoding else 1))
            finish(backend, 1) if not decoding else [backend.step() for _ in range(20)]
            backend.insert(replace(row(1, asked), on_prefill=partial(cached.__setitem__, 1)))
            tokens, _ = finish(backend, 1 + decoding)
        assert cached == {1: expected}
        assert tokens[1] == alone(backend, folder, asked)


@pytest.mark.parametrize(
    ("token", "common", "length", "expected"),
    [(1e-5, 1236, 1300, 1024), (1e-5, 1500, 1560, 1472), (1e-3, 1236, 1300, 1216), (1e-5, 576, 640, 576)],
)
def test_where_cudnn_plans_one_chunk_takes_the_place_of_several_where_that_is_quick(
    backend: MlxBackend, monkeypatch: pytest.MonkeyPatch, *, token: float, common: int, length: int, expected: int
) -> None:
    """A chunk of 512 positions after 1,024; none that would do; one that takes too long; and none instead of one."""
    monkeypatch.setattr(backend.pacer, "prefill_seconds", lambda positions, _context: 0.01 + positions * token)
    asked, cached = [5 + index % 200 for index in range(length)], dict[int, int]()
    with pytest.MonkeyPatch.context() as patch:
        Forwarded(patch, backend)
        for uid, prompt in enumerate(([*asked[:common], 3], asked)):
            backend.insert(replace(row(uid, prompt, max_tokens=1), on_prefill=partial(cached.__setitem__, uid)))
            finish(backend, 1)
    assert cached == {0: 0, 1: expected}


def test_a_cache_of_another_kind_is_not_cut(backend: MlxBackend) -> None:
    plain, window = backend.fresh_cache(), [RotatingKVCache(max_size=8)]
    keys = mx.zeros((1, 2, 5, 4))
    for layer in (*plain, *window):
        layer.update_and_fetch(keys, keys)
    assert not trim_plain(window, 2)
    assert trim_plain(plain, 2)
    assert [layer.offset for layer in (*window, *plain)] == [5, *([3] * len(plain))]


def test_where_cudnn_plans_it_has_planned_for_a_long_prompt_before_traffic(
    backend: MlxBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For its chunks, and for its row in buffers of each size: one alone has no mask, and attention is cuDNN's."""
    alone_in: set[int] = set()
    with monkeypatch.context() as patch:
        forwarded = Forwarded(patch, backend)
        run = type(backend.model).__call__

        def model(itself: Any, inputs: mx.array, cache: list[Any]) -> mx.array:
            logits = run(itself, inputs, cache=cache)
            if inputs.shape == (1, 1) and isinstance(cache[0], RowCache):
                alone_in.add(cache[0].capacity[1])
            return logits

        patch.setattr(type(backend.model), "__call__", model)
        backend.warm_up(lambda *_: None)
    longest = backend.info.context_length - 1
    most = max(size for _, size in forwarded)
    for size in (256, 512):
        assert most >= size
        assert {(at, size) for at in range(0, longest // size * size, size)} <= set(forwarded)
    assert set(range(512, backend.info.context_length, 256)) <= alone_in


@pytest.mark.parametrize(("cached", "length"), [(0, 2), (0, 158), (0, 640), (26, 40), (26, 999), (300, 257)])
def test_where_cudnn_plans_chunks_have_few_sizes_and_the_prompt_is_the_same(
    backend: MlxBackend, monkeypatch: pytest.MonkeyPatch, length: int, cached: int
) -> None:
    """Powers of two, by padding or by halves, within the buffers that the prompt needs anyway."""
    asked, forwarded, kept = [3 + index % 250 for index in range(cached + length)], [], []
    run = type(backend.model).__call__

    def model(self: Any, inputs: mx.array, **more: Any) -> mx.array:
        forwarded.append(inputs.shape[1])
        return run(self, inputs, **more)

    for planned in (False, True):
        caches = backend.fresh_cache()
        backend.model(mx.array([asked[:cached]]), cache=caches) if cached else None
        state = backend.row_state(row(0, asked))
        state.cached, state.rest = cached, state.rest[cached:]
        batch = PrefillBatch(backend.model, [state], [caches], planned=planned)
        with monkeypatch.context() as patch:
            patch.setattr(type(backend.model), "__call__", model)
            forwarded.clear()
            done = 0
            while not batch.ready:
                if batch.unprepared:
                    list(batch.prepare())
                done += batch.advance(512)
        assert done == length - 1
        assert batch.context == cached + length - 1
        kept.append([(layer.keys, layer.values) for layer in batch.prompt_cache])
        assert all(layer.keys.shape[2] <= rounded(cached + length) for layer in batch.prompt_cache)
    assert all(size >= LEAST_PLANNED and size & (size - 1) == 0 for size in forwarded)
    for one, other in zip(*kept, strict=True):
        for a, b in zip(one, other, strict=True):
            assert mx.allclose(a[:, :, : cached + length - 1], b[:, :, : cached + length - 1], atol=1e-5)


@pytest.mark.parametrize(
    ("cached", "lengths"), [((0, 0, 0), (40, 100, 7)), ((300, 300, 300), (40, 300, 7)), ((200, 17), (60, 2))]
)
def test_where_cudnn_plans_several_prompts_are_not_padded_and_are_the_same(
    backend: MlxBackend, monkeypatch: pytest.MonkeyPatch, cached: Sequence[int], lengths: Sequence[int]
) -> None:
    """It is not asked about their attention (`attention.py`)."""
    monkeypatch.setattr(llama, attention.NAME, base.scaled_dot_product_attention)  # put back at the end
    totals = [before + length for before, length in zip(cached, lengths, strict=True)]
    asked = [[3 + (uid + index) % 250 for index in range(total)] for uid, total in enumerate(totals)]
    kept = []
    for planned in (False, True):
        states, caches = [backend.row_state(row(uid, each)) for uid, each in enumerate(asked)], []
        for state, length in zip(states, cached, strict=True):
            caches.append(backend.fresh_cache())
            backend.model(mx.array([state.rest[:length]]), cache=caches[-1]) if length else None
            state.cached, state.rest = length, state.rest[length:]
        if planned:
            attention.attend_without_plans(backend.model)
        with pytest.MonkeyPatch.context() as patch:
            forwarded = Forwarded(patch, backend)
            batch = PrefillBatch(backend.model, states, caches, planned=planned)
            while not batch.ready:
                list(batch.prepare()) if batch.unprepared else None
                batch.advance(256)
        assert sum(width for _, width in forwarded) == max(lengths) - 1
        assert all(layer.keys.shape[2] <= rounded(max(cached) + max(lengths)) for layer in batch.prompt_cache)
        kept.append([layer.extract(index) for index in range(len(lengths)) for layer in batch.prompt_cache])
    for one, other in zip(*kept, strict=True):
        assert one.offset == other.offset
        assert mx.allclose(one.keys, other.keys, atol=1e-4)
        assert mx.allclose(one.values, other.values, atol=1e-4)


def test_where_cudnn_plans_a_chunk_has_tokens_rather_than_padding(backend: MlxBackend) -> None:
    """Eight positions that are padded to 64 take as long as 64, and a long prompt took eight times as many chunks."""
    width = LEAST_PLANNED
    state = backend.row_state(row(0, [3 + index % 250 for index in range(200)]))
    batch = PrefillBatch(backend.model, [state], [backend.fresh_cache()], planned=True)
    list(batch.prepare())
    assert batch.advance(8) == width
    assert batch.context == width
    while batch.longest_rest - 1 > width:
        batch.advance(8)
    left = batch.longest_rest - 1
    batch.advance(8)
    assert batch.ready
    assert batch.context == 199
    assert 0 < left < width


@pytest.mark.parametrize(
    ("steps", "lengths", "cost"),
    [
        ([0.010, 0.0099, 0.010, 0.013, 0.019], [32, 64, 128, 256], (0.019 - 0.013) / 128),
        ([0.010, 0.018], [32], 0.008 / 32),
        ([0.010] * 8, [32, 64, 128, 256, 512, 1024, 2048], 0.0),
    ],
)
def test_the_cost_of_context_is_measured_where_it_shows(
    backend: MlxBackend, monkeypatch: pytest.MonkeyPatch, steps: list[float], lengths: list[int], cost: float
) -> None:
    """On a GPU some of it takes no time, because Python takes as long to launch the step."""
    seen: list[int] = []

    def stretch(_: DecodeBatch, length: int) -> bool:
        seen.append(length)
        return True

    assert backend.info.context_length // 2 == 2048
    monkeypatch.setattr(warmup, "DEEP", 32)
    monkeypatch.setattr(DecodeBatch, "stretch", stretch)
    found = warmup.Warmup(backend, Settings().engine, clock=time.perf_counter)
    monkeypatch.setattr(found, "_deep", 16, raising=False)
    scripted = iter(steps)
    monkeypatch.setattr(found, "_steps", lambda _: next(scripted))
    assert found._context_cost(4) == pytest.approx(cost / 4)
    assert seen == lengths


def test_the_first_chunk_of_a_shape_is_no_lesson_where_it_makes_cudnn_plan(
    backend: MlxBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlx_backend, "cudnn_plans", lambda: True)
    lessons: list[bool] = []
    monkeypatch.setattr(backend.pacer, "observe_prefill", lambda *_, typical: lessons.append(typical))
    asked = [3 + index % 250 for index in range(700)]
    backend.insert(row(0, asked, tenant="one"))
    finish(backend, 1)
    chunks = len(lessons)
    backend.insert(row(1, asked, tenant="another"))
    finish(backend, 1)
    assert lessons == [False] * chunks + [True] * chunks
    assert chunks > 0


def test_prompts_of_which_little_is_not_cached_are_prefilled_together(backend: MlxBackend, folder: Path) -> None:
    """Eight of 900 tokens with 20 new ones each: a chunk's memory is that of what is new."""
    shared = [3 + index % 250 for index in range(880)]
    backend.insert(row(100, shared))
    finish(backend, 1)
    while backend.busy:
        backend.step()
    asked = {uid: [*shared, *(5 + (uid + index) % 250 for index in range(20))] for uid in range(8)}
    for uid, prompt in asked.items():
        backend.insert(row(uid, prompt))
    tokens, results = finish(backend, 8)
    assert [result.prefill_tokens for result in results if result.prefill_tokens] == [8 * 19]
    for uid, prompt in asked.items():
        assert tokens[uid] == alone(backend, folder, prompt)


def test_a_long_row_does_not_pad_the_short_ones(backend: MlxBackend, folder: Path) -> None:
    """They decode in batches of their own; each row says what it says alone, and all memory comes back."""
    asked = [[3 + (index * (uid + 1)) % 250 for index in range(30)] for uid in range(6)]
    asked[3] = [3 + index % 250 for index in range(1500)]
    asked[5] = [4 + index % 249 for index in range(1400)]
    costs = StepCosts(decode_base=1e-5, decode_row=1e-5, decode_context=1e-6, prefill_token=1e-7)
    tokens: dict[int, list[int]] = {}
    sizes: set[tuple[int, ...]] = set()
    held = ended = 0
    for uid, prompt in enumerate(asked):
        backend.insert(row(uid, prompt, max_tokens=40))
    while ended < len(asked):
        backend.pacer.calibrate(costs)
        for token in backend.step().tokens:
            tokens.setdefault(token.uid, []).append(token.token)
            ended += token.finish_reason is not None
        sizes.add(tuple(rows for rows, _ in backend._decode.sizes))
        held = max(held, backend._decode.nbytes)
    assert max(map(len, sizes)) == 2
    assert max(map(sum, sizes)) == len(asked), "all of them at once"
    token_bytes = sum(group.bytes_per_token for group in backend.info.memory.layers)
    assert held <= (2 * rounded(1541) + len(asked) * rounded(80)) * token_bytes, "padded it would be six long ones"
    assert tokens == {uid: alone(backend, folder, prompt, max_tokens=40) for uid, prompt in enumerate(asked)}
    while backend.busy:
        backend.step()
    assert (len(backend._decode), backend._decode.nbytes) == (0, 0)


def test_buffers_that_grow_have_no_places_for_who_has_left_where_memory_is_promised(folder: Path) -> None:
    """Seven rows that become long and four that do not: what is there for eleven would grow with the seven."""
    backend = loaded(folder, max_rows=16, max_prefill_rows=16, max_prefill_chunk=8192)
    asked = [row(uid, [10 + uid] * 600, max_tokens=700 if uid < 7 else 300 + 100 * (uid - 7)) for uid in range(11)]
    assert len(watch_growth(backend, asked)) > 2


@given(seed=st.integers(0, 10**9), split=st.sampled_from([0.0, 0.3, 1.0]))
@hypothesis_settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_buffers_never_grow_beyond_what_their_rows_are_promised(
    folder: Path, memory: MemoryModel, seed: int, split: float
) -> None:
    """Whoever comes and leaves, and however they are split into batches."""
    rng = random.Random(seed)

    def home(batches: Sequence[tuple[int, int]], rows: int, context: int) -> int | None:
        chance = random.Random(f"{seed} {batches} {rows} {context}")
        new = not batches or (len(batches) < 4 and chance.random() < split)
        return None if new else chance.randrange(len(batches))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(mlx_backend, "measure_memory", lambda *_: memory)
        backend = loaded(folder, ahead=rng.random() < 0.5)
        patched.setattr(backend.pacer, "home", home)
        patched.setattr(backend.pacer, "may_join", lambda *_: True)
        lengths, outputs = (20, 200, 900), (2, 30, 300)
        asked = [row(uid, [3 + uid] * rng.choice(lengths), max_tokens=rng.choice(outputs)) for uid in range(14)]
        watch_growth(backend, asked)
        backend.rebuild()


def watch_growth(backend: MlxBackend, asked: Sequence[Row]) -> list[int]:
    """Run these rows, as many at a time as there are places, and see that buffers only grow up to what the rows in the
    backend are promised; returns the bytes after each growth."""
    coming, live, grown, held = list(asked), dict[int, Row](), list[int](), 0
    while coming or live:
        while coming and len(live) < backend.max_rows:
            live[coming[0].uid] = coming[0]
            backend.insert(coming.pop(0))
        promised = backend.info.memory.cache_bytes([len(one.prompt) + one.max_tokens for one in live.values()])
        ended = [token.uid for token in backend.step().tokens if token.finish_reason]
        before, held = held, backend.memory().batch
        assert held <= max(before, promised)
        if held > before:
            grown.append(held)
        for uid in ended:
            del live[uid]
    return grown


def test_rows_that_would_make_a_step_too_long_wait_for_one_to_leave(backend: MlxBackend, folder: Path) -> None:
    slow = StepCosts(decode_row=0.3 * backend.pacer.target)  # two at a time fit
    asked = [[3 + uid] * 20 for uid in range(6)]
    for uid, prompt in enumerate(asked):
        backend.insert(row(uid, prompt))
    tokens: dict[int, list[int]] = {}
    most = ended = 0
    while ended < len(asked):
        backend.pacer.calibrate(slow)  # forget that this model is fast
        result = backend.step()
        most = max(most, result.decode_rows)
        for token in result.tokens:
            tokens.setdefault(token.uid, []).append(token.token)
            ended += token.finish_reason is not None
    assert most == 2
    assert tokens == {uid: alone(backend, folder, prompt) for uid, prompt in enumerate(asked)}


def test_removed_rows_leave_no_trace_in_the_others(backend: MlxBackend, folder: Path) -> None:
    asked = prompts(6, seed=3)
    for uid, prompt in enumerate(asked):
        backend.insert(row(uid, prompt))
    gone = {1, 4}
    tokens: dict[int, list[int]] = {}
    for number in range(400):
        for token in backend.step().tokens:
            tokens.setdefault(token.uid, []).append(token.token)
        if number == 4:
            backend.remove(gone)
    kept = {uid: tokens[uid] for uid in range(len(asked)) if uid not in gone}
    assert kept == {uid: alone(backend, folder, asked[uid]) for uid in kept}
    assert backend.memory().prefix_entries <= len(kept)


def test_rows_can_be_removed_before_and_during_prefill(backend: MlxBackend) -> None:
    backend.insert(row(1, [5] * 3000))
    backend.insert(row(2, [6] * 100))
    backend.remove([2])
    backend.step()
    backend.remove([1])
    assert backend.step().tokens == []
    backend.insert(row(3, [5, 6]))
    tokens, _ = finish(backend, 1)
    assert list(tokens) == [3]


def test_a_row_ended_by_the_engine_can_leave_its_prefix(backend: MlxBackend) -> None:
    backend.insert(row(1, [5] * 50))
    while not backend.step().tokens:
        pass
    backend.remove([1], keep_prefix=True)
    steps = 0
    while backend.busy:
        backend.step()
        steps += 1
    assert steps == 1
    assert backend.memory().prefix_entries == 1
    backend.rebuild()
    assert backend.memory().prefix_entries == 0


class Broken(RowSampling):
    """One row that cannot be drawn for, each time that this is tried and `fails` says so."""

    def __init__(self, params: SamplingParams, *, fails: Callable[[], bool]) -> None:
        self._fails = fails
        super().__init__(params)

    @property
    def draw(self) -> float:
        if self._fails():
            raise ValueError("scripted")
        return self._draw

    @draw.setter
    def draw(self, draw: float) -> None:
        self._draw = draw


def test_one_rows_sampling_fails_alone(backend: MlxBackend, folder: Path) -> None:
    asked = prompts(4, seed=9)
    for uid, prompt in enumerate(asked):
        backend.insert(row(uid, prompt, sampling=SamplingParams(temperature=0, presence_penalty=1e-9)))
    for broken in (1, 2):
        backend._waiting[broken].sampling = Broken(SamplingParams(seed=1), fails=lambda: True)
    tokens, results = finish(backend, 4)
    failed = [uid for result in results for uid, _ in result.failed]
    assert sorted(failed) == [1, 2]
    assert tokens.keys() == {0, 3}, "what stood in for the others' tokens is nobody's"
    assert tokens[0] == alone(backend, folder, asked[0])
    assert tokens[3] == alone(backend, folder, asked[3])


def test_a_pass_over_all_rows_that_fails_is_tried_row_by_row_and_nothing_is_drawn_twice(backend: MlxBackend) -> None:
    seeded = [SamplingParams(temperature=1.0, seed=seed, presence_penalty=0.5) for seed in range(3)]

    def run() -> dict[int, list[int]]:
        for uid, params in enumerate(seeded):
            backend.insert(row(uid, [5 + uid], sampling=params))
        backend._waiting[-1].sampling = Broken(seeded[-1], fails=lambda: next(turns, False))
        tokens, results = finish(backend, 3)
        assert not any(result.failed for result in results)
        backend.rebuild()
        return tokens

    turns: Iterator[bool] = iter(())
    undisturbed = run()
    turns = iter((True,))  # the first pass over all of them
    assert run() == undisturbed
    assert next(turns, None) is None


def test_a_seed_repeats_itself_whatever_runs_beside_it(backend: MlxBackend) -> None:
    seeded = SamplingParams(temperature=1.0, seed=7, top_p=0.95, top_k=50, min_p=0.01)
    backend.insert(row(0, [5, 6, 7], sampling=seeded))
    first = finish(backend, 1)[0][0]
    backend.rebuild()
    for uid, prompt in enumerate(prompts(5, seed=2), 10):
        backend.insert(row(uid, prompt, sampling=SamplingParams(temperature=0.9)))
    backend.insert(row(1, [5, 6, 7], sampling=seeded))
    assert finish(backend, 6)[0][1] == first
    backend.insert(
        row(2, [5, 6, 7], sampling=SamplingParams(temperature=1.0, seed=8, top_p=0.95, top_k=50, min_p=0.01))
    )
    assert finish(backend, 1)[0][2] != first


def test_end_of_sequence_ends_a_row(backend: MlxBackend) -> None:
    bias = SamplingParams(temperature=0, logit_bias=((2, 100.0),))
    backend.insert(row(0, [5, 6], sampling=bias))
    _, results = finish(backend, 1)
    (token,) = results[-1].tokens
    assert (token.token, token.finish_reason) == (2, FinishReason.STOP)


class Unmergeable(ConcatenateKVCache):  # type: ignore[misc]
    """mlx-lm has caches without `merge`; this is one of them."""


def test_caches_that_cannot_be_merged_still_work_one_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = prompts(3, seed=4)
    reference = loaded(folder, max_prefill_chunk=64)  # which is soon measured, and warmed up below
    expected = [alone(reference, folder, prompt) for prompt in asked]
    monkeypatch.setattr(llama.Model, "make_cache", lambda self: [Unmergeable() for _ in self.layers], raising=False)
    backend = loaded(folder, max_prefill_chunk=64)
    assert not backend.info.batchable
    assert backend.max_rows == 1
    backend.warm_up(lambda *_: None)
    for uid, prompt in enumerate(asked):
        backend.insert(row(uid, prompt))
        tokens, _ = finish(backend, 1)
        assert tokens[uid] == expected[uid]


def test_warm_up_reports_progress_and_leaves_nothing_behind(backend: MlxBackend) -> None:
    seen: list[tuple[str, int, int]] = []
    before = backend.memory().active
    backend.warm_up(lambda what, done, total: seen.append((what, done, total)))
    assert [done for _, done, _ in seen] == list(range(len(seen)))
    assert backend.pacer.costs.prefill_token > 0
    mx.clear_cache()
    assert backend.memory().active <= before * 1.01


@pytest.mark.parametrize("device", [mx.cpu, mx.gpu], ids=["cpu", "gpu"])
def test_on_a_gpu_a_prompt_of_several_chunks_is_rehearsed_and_leaves_its_buffers(
    folder: Path, monkeypatch: pytest.MonkeyPatch, device: mx.DeviceType
) -> None:
    """The first long prompt waited for kernels and memory: 1.13 to 1.48 times as long as the second on an H100."""
    chunk = 256
    backend = loaded(folder, max_prefill_chunk=chunk, max_rows=2)
    longest, contexts = 0, {0}
    insert, prefill_once = backend.insert, backend._prefill_once

    def inserted(asked: Row) -> None:
        nonlocal longest
        longest = max(longest, len(asked.prompt))
        insert(asked)

    def prefilled(batch: PrefillBatch, size: int, result: StepResult) -> None:
        contexts.add(batch.context)
        prefill_once(batch, size, result)

    monkeypatch.setattr(backend, "insert", inserted)
    monkeypatch.setattr(backend, "_prefill_once", prefilled)
    gc.collect()
    mx.synchronize()
    mx.clear_cache()
    with monkeypatch.context() as patch:
        patch.setattr(mx, "default_device", lambda: mx.Device(device))
        backend.warm_up(lambda *_: None)
    memory_limits._of_device.cache_clear()
    assert (max(contexts) >= chunk) == (device == mx.gpu)
    assert (mx.get_cache_memory() >= backend.info.memory.cache_bytes([longest])) == (device == mx.gpu)
    assert backend.memory().batch == backend.memory().prefix_entries == 0


@pytest.mark.parametrize("configured", [0, 123456789])
def test_the_wired_limit_is_never_raised_unless_configured(
    folder: Path, monkeypatch: pytest.MonkeyPatch, configured: int
) -> None:
    calls: list[int] = []

    def set_wired_limit(limit: int) -> int:
        calls.append(limit)
        return 0

    device = {"max_recommended_working_set_size": 1 << 34, "memory_size": 1 << 34}
    monkeypatch.setattr(mx, "set_wired_limit", set_wired_limit)
    monkeypatch.setattr(mx, "device_info", lambda *_: device)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    backend = loaded(folder, wired_limit=configured, max_prefill_chunk=64)
    backend.warm_up(lambda *_: None)
    backend.insert(row(0, [5, 6]))
    finish(backend, 1)
    reference_model = backend.model
    backend.rebuild()
    assert calls == ([configured] if configured else [])
    BatchGenerator(reference_model).close()
    assert len(calls) > bool(configured), "the recorder sees what mlx-lm's own generator does"


def test_the_prefix_cache_keeps_its_bytes_of_real_memory(folder: Path) -> None:
    backend = loaded(folder, memory_budget=64 << 20, prefix_cache_fraction=0.05)
    limit = int((64 << 20) * 0.05)
    mx.clear_cache()
    before = mx.get_active_memory()
    for uid in range(40):
        backend.insert(row(uid, [3 + uid] * 300, max_tokens=3))
        finish(backend, 1)
        assert backend.memory().prefix_cache <= limit
    backend._decode.clear()
    backend._prefill = None
    assert backend.memory().prefix_entries > 1
    assert mx.get_active_memory() - before <= limit * 1.1
    backend.make_room(0)
    assert backend.memory().prefix_cache == 0


@given(
    lengths=st.lists(st.integers(1, 900), min_size=1, max_size=8),
    outputs=st.integers(1, 300),
    chunk=st.sampled_from([64, 256, 1024]),
    shared=st.sampled_from([0, 0, 500, 900]),
)
@hypothesis_settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_measured_peak_never_exceeds_the_estimate(
    folder: Path, lengths: list[int], outputs: int, chunk: int, shared: int
) -> None:
    """Also of prompts that share a prefix which is cached, of which then only a few tokens each are new."""
    backend = loaded(folder, max_prefill_chunk=chunk)
    asked = [
        row(uid, [9] * shared + [10 + uid] * (1 + length % 40 if shared else length), max_tokens=outputs)
        for uid, length in enumerate(lengths)
    ]
    if shared:
        backend.insert(row(100, [9] * shared))
        finish(backend, 1)
        while backend.busy:
            backend.step()
    else:
        backend.make_room(0)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for one in asked:
        backend.insert(one)
    ended = 0
    while ended < len(asked):
        ended += sum(token.finish_reason is not None for token in backend.step().tokens)
    estimate = backend.info.memory.peak_bytes([len(one.prompt) + one.max_tokens for one in asked])
    assert mx.get_peak_memory() - before <= estimate
    backend.rebuild()


def test_loading_a_model_tells_of_its_download_and_conversion(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ensure(state_dir: Path, *, offline: bool, progress: Progress) -> Path:
        assert (state_dir, offline) == (tmp_path, True)
        progress.advance("convert", 2, 3)
        return folder

    monkeypatch.setattr(demo_model, "ensure", ensure)
    settings = Settings.load(None, {"model.reference": "demo", "model.offline": True, "server.state_dir": tmp_path})
    recorder = Recorder()
    assert load_model(settings, recorder.advance).name == demo_model.NAME
    assert recorder.steps == [("convert", 2, 3), ("reading the weights", 0, 0)]
    assert load_model(settings).context_length == 4096, "nobody has to listen"
