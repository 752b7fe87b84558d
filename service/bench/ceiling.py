"""What the engine alone can do in this process, with the prompts of a workload: the ceiling of any service around it.

Three contenders take turns, so that a machine that warms up or is shared favours none: mlx-lm's `BatchGenerator` (and
`stream_generate` for one stream), and mlxd's own backend without admission, text or HTTP. Everything belongs to the
thread that made the `Ceiling`. Only this module of `bench` imports the engine and mlx, and it alone in the project
knows `BatchGenerator`, whose constructor raises Metal's wired limit until it is closed.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
from mlx_lm.generate import BatchGenerator, stream_generate
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from mlx_lm.utils import load_tokenizer

from service.bench.client import Api
from service.bench.workload import Conversation, Workload
from service.engine.backend import ModelInfo, Row
from service.engine.generation import SamplingParams
from service.engine.mlx_backend import MlxBackend
from service.engine.models import resolve
from service.settings import Settings

BATCH, STREAM, BACKEND = "BatchGenerator", "stream_generate", "mlxd's backend"


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One row: token ids, how many to generate at most, and OpenAI's sampling fields."""

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lap:
    """One pass of one contender over its rows. Seconds of the clock and of the processor, and tokens generated."""

    contender: str
    streams: int
    tokens: int
    seconds: float
    cpu: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """A contender's laps at one number of streams together: medians, and the speed as a share of `BatchGenerator`'s."""

    contender: str
    streams: int
    laps: int
    tokens: int
    """Of all laps. Where outputs end by themselves contenders may differ."""
    tokens_per_second: float
    cpu_per_token: float
    ratio: float


class Rows(Protocol):
    """What rows are put into."""

    def insert(self, uid: int, asked: Asked) -> None: ...

    def step(self) -> tuple[int, int]:
        """(tokens that came, rows that ended)."""

    def close(self) -> None: ...


class RawRows:
    """mlx-lm's `BatchGenerator` as it is."""

    def __init__(self, model: Any, info: ModelInfo, streams: int) -> None:
        self._batch = BatchGenerator(
            model, stop_tokens=[[token] for token in sorted(info.eos_token_ids)], completion_batch_size=streams
        )

    def insert(self, uid: int, asked: Asked) -> None:  # noqa: ARG002 - it numbers its rows itself
        sampler, processors = _raw_sampling(asked.sampling)
        more = {} if sampler is None else {"samplers": [sampler], "logits_processors": [processors]}
        self._batch.insert([list(asked.prompt)], [asked.max_tokens], **more)

    def step(self) -> tuple[int, int]:
        _, tokens = self._batch.next()
        return len(tokens), sum(token.finish_reason is not None for token in tokens)

    def close(self) -> None:
        self._batch.close()


class BackendRows:
    """mlxd's backend, driven as its generation thread does."""

    def __init__(self, backend: MlxBackend) -> None:
        self._backend = backend

    def insert(self, uid: int, asked: Asked) -> None:
        sampling = SamplingParams(**asked.sampling)
        row = Row(uid=uid, prompt=asked.prompt, max_tokens=asked.max_tokens, sampling=sampling, tenant="bench")
        self._backend.insert(row)

    def step(self) -> tuple[int, int]:
        result = self._backend.step()
        if result.failed:
            raise result.failed[0][1]
        return len(result.tokens), sum(token.finish_reason is not None for token in result.tokens)

    def close(self) -> None:
        self._backend.rebuild()


class Ceiling:
    """The configured model in this process, loaded and warmed when it is made. Raises ModelUnavailable."""

    def __init__(self, settings: Settings, workload: Workload, api: Api = Api.CHAT) -> None:
        self._backend = MlxBackend(settings)
        self.info = self._backend.load()
        self._backend.warm_up(lambda *_: None)
        model = settings.model
        files = resolve(model.reference, state_dir=settings.server.state_dir.expanduser(), offline=True)
        self._tokenizer = load_tokenizer(files.path, eos_token_ids=self.info.eos_token_ids)
        self._workload = workload
        self._api = api
        self._numbers = itertools.count()

    def laps(self, streams: int, rows: int, rounds: int) -> Iterator[Lap]:
        """`rounds` times each contender in turn, over the same `rows` prompts within a round and others in the next.

        A first round, of `streams` rows, is for compiling and is not told.
        """
        contenders: dict[str, Callable[[Sequence[Asked]], tuple[int, float, float]]] = {
            BATCH: lambda asked: measured(RawRows(self._backend.model, self.info, streams), streams, asked),
            BACKEND: lambda asked: measured(BackendRows(self._backend), streams, asked),
        }
        if streams == 1:
            contenders[STREAM] = self._streamed
        for number in range(rounds + 1):
            asked = [self._asked(next(self._numbers)) for _ in range(rows if number else streams)]
            self._compile_samplers(asked)
            for name, lap in contenders.items():
                tokens, seconds, cpu = lap(asked)
                if number:
                    yield Lap(contender=name, streams=streams, tokens=tokens, seconds=seconds, cpu=cpu)

    def close(self) -> None:
        """Free the model."""
        self._backend.close()

    def _asked(self, number: int) -> Asked:
        """The first turn of a conversation, as tokens."""
        conversation = self._workload.conversation(number)
        turn = conversation.turns[0]
        return Asked(prompt=self._encoded(conversation), max_tokens=turn.max_tokens, sampling=turn.sampling)

    def _encoded(self, conversation: Conversation) -> tuple[int, ...]:
        tokenizer = self.info.tokenizer
        if self._api is Api.CHAT:
            return tuple(tokenizer.encode_chat(conversation.messages([])))
        prompt = conversation.prompt([])
        return tuple(tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)

    def _compile_samplers(self, asked: Sequence[Asked]) -> None:
        """Before the clock runs: mlx-lm's filters compile their parameters in, which takes seconds for each new one."""
        for each in asked:
            sampler, _ = _raw_sampling(each.sampling)
            if sampler is not None:
                mx.eval(sampler(mx.zeros((1, self.info.vocab_size))))

    def _streamed(self, asked: Sequence[Asked]) -> tuple[int, float, float]:
        """`stream_generate`, one prompt after the other; with its text, which it cannot leave out."""
        tokens, began, cpu = 0, time.perf_counter(), time.process_time()
        for each in asked:
            sampler, processors = _raw_sampling(each.sampling)
            found = stream_generate(
                self._backend.model,
                self._tokenizer,
                list(each.prompt),
                max_tokens=each.max_tokens,
                sampler=sampler,
                logits_processors=processors,
            )
            tokens += sum(1 for _ in found)
        return tokens, time.perf_counter() - began, time.process_time() - cpu


def measured(rows: Rows, streams: int, asked: Sequence[Asked]) -> tuple[int, float, float]:
    """A closed loop over `asked`, `streams` at a time: (tokens, seconds, seconds of CPU). Closes `rows`."""
    waiting, running, tokens = list(enumerate(asked))[::-1], 0, 0
    began, cpu = time.perf_counter(), time.process_time()
    try:
        while waiting or running:
            while waiting and running < streams:
                rows.insert(*waiting.pop())
                running += 1
            came, ended = rows.step()
            tokens += came
            running -= ended
        return tokens, time.perf_counter() - began, time.process_time() - cpu
    finally:
        rows.close()
        mx.clear_cache()


def standings(laps: Sequence[Lap]) -> list[Standing]:
    """What the laps say, by streams and contender. There must be laps of `BatchGenerator` for each."""
    found: dict[tuple[int, str], list[Lap]] = {}
    for lap in laps:
        found.setdefault((lap.streams, lap.contender), []).append(lap)
    speeds = {key: statistics.median(lap.tokens / lap.seconds for lap in group) for key, group in found.items()}
    return [
        Standing(
            contender=name,
            streams=streams,
            laps=len(group),
            tokens=sum(lap.tokens for lap in group),
            tokens_per_second=speeds[streams, name],
            cpu_per_token=statistics.median(lap.cpu / lap.tokens for lap in group),
            ratio=speeds[streams, name] / speeds[streams, BATCH],
        )
        for (streams, name), group in found.items()
    ]


def _raw_sampling(sampling: Mapping[str, Any]) -> tuple[Any, list[Any]]:
    """mlx-lm's sampler (None: greedy) and processors. A seed is nothing to it, and its penalties see 20 tokens."""
    if not sampling["temperature"]:
        return None, []
    penalties = {name: sampling[name] for name in ("presence_penalty", "frequency_penalty")}
    return make_sampler(sampling["temperature"], sampling["top_p"]), make_logits_processors(**penalties)
