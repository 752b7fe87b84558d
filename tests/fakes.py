"""A scripted backend for the real engine: deterministic tokens, and faults at chosen steps.

It generates bytes of `tests.byte_tokens.byte_tokenizer`. Only for faults and timing; what a user would see is tested
on real models.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache

from service.engine.backend import MemoryUse, ModelInfo, Row, StepResult, Token
from service.engine.generation import FinishReason
from service.engine.memory import LayerGroup, MemoryModel
from service.engine.tokenizer import Tokenizer
from tests.byte_tokens import CONTROL_TOKENS, byte_tokenizer

EOS = CONTROL_TOKENS.index("<|im_end|>")
MEMORY = MemoryModel(budget=1 << 30, layers=(LayerGroup(16),))


def fake_tokenizer() -> Tokenizer:
    return Tokenizer(byte_tokenizer(), special=CONTROL_TOKENS, bos=None, template=None)


def letters(row: Row, index: int) -> int:
    """The default script: the alphabet, from a letter that depends on the prompt, for ever."""
    return byte_tokenizer_id(ord("a") + (sum(row.prompt) + index) % 26)


@cache
def byte_tokenizer_id(byte: int) -> int:
    """The token of an ASCII byte."""
    token = byte_tokenizer().token_to_id(chr(byte))
    assert token is not None, "a symbol of its own only for ASCII"
    return token


def spelling(text: str) -> Callable[[Row, int], int]:
    """A script that says `text` and ends."""
    tokens = [*fake_tokenizer().encode(text), EOS]
    return lambda _row, index: tokens[index]


@dataclass(slots=True)
class _Live:
    row: Row
    prefill: int
    sampled: int = 0


@dataclass
class FakeBackend:
    """`script(row, index)` is the index-th token of a row; `before_step(number)` may wait or raise.

    `gate`, when set, is waited for before every step: release it once for each step a test wants.
    """

    script: Callable[[Row, int], int] = letters
    prefill_steps: int = 1
    batchable: bool = True
    memory_model: MemoryModel = MEMORY
    context_length: int = 4096
    before_step: Callable[[int], None] | None = None
    before_load: Callable[[], object] | None = None
    failing: Callable[[Row], bool] = lambda _row: False
    gate: threading.Semaphore | None = None
    steps: int = 0
    rows: dict[int, _Live] = field(default_factory=dict)
    rebuilds: int = 0
    closed: bool = False
    busy: bool = False
    worth_waiting: float = 0.0
    active: int = 0
    loaded: threading.Event = field(default_factory=threading.Event)
    inserted: threading.Event = field(default_factory=threading.Event)
    threads: set[int] = field(default_factory=set)

    def load(self, progress: Callable[[str, int, int], None] = lambda *_: None) -> ModelInfo:
        self._own()
        progress("fake weights", 1, 4)
        if self.before_load is not None:
            self.before_load()
        self.loaded.set()
        return ModelInfo(
            name="fake",
            context_length=self.context_length,
            vocab_size=259,
            eos_token_ids=frozenset({EOS}),
            batchable=self.batchable,
            memory=self.memory_model,
            tokenizer=fake_tokenizer(),
        )

    def warm_up(self, progress: Callable[[str, int, int], None]) -> None:
        self._own()
        progress("fake", 0, 1)

    def insert(self, row: Row) -> None:
        self._own()
        assert row.uid not in self.rows, "inserted twice"
        self.rows[row.uid] = _Live(row, self.prefill_steps)
        self.inserted.set()

    def make_room(self, nbytes: int) -> None:
        self._own()
        assert nbytes >= 0

    def patience(self, positions: int) -> float:
        return self.worth_waiting

    def do_meanwhile(self, work: Callable[[], object]) -> None:
        """Is not done: steps of this one are not waited for."""

    def step(self) -> StepResult:
        self._own()
        if self.gate is not None:
            self.gate.acquire()
        self.steps += 1
        if self.before_step is not None:
            self.before_step(self.steps)
        result = StepResult()
        for uid, live in list(self.rows.items()):
            if live.prefill > 0:
                if live.prefill == self.prefill_steps:
                    live.row.on_prefill(0)
                live.prefill -= 1
                result.prefill_tokens += len(live.row.prompt) // self.prefill_steps or 1
            elif self.failing(live.row):
                del self.rows[uid]
                result.failed.append((uid, RuntimeError("scripted")))
            else:
                result.tokens.append(self._token(uid, live))
        return result

    def _token(self, uid: int, live: _Live) -> Token:
        token = self.script(live.row, live.sampled)
        live.sampled += 1
        reason = None
        if token == EOS:
            reason = FinishReason.STOP
        elif live.sampled >= live.row.max_tokens:
            reason = FinishReason.LENGTH
        if reason is not None:
            del self.rows[uid]
        return Token(uid, token, reason)

    def remove(self, uids: Iterable[int], *, keep_prefix: bool = False) -> None:
        self._own()
        for uid in uids:
            self.rows.pop(uid, None)

    def rebuild(self) -> None:
        self._own()
        self.rebuilds += 1
        self.rows.clear()

    def memory(self) -> MemoryUse:
        return MemoryUse(active=self.active)

    def release_pool(self) -> None:
        """Of another thread: nothing here belongs to one."""

    def close(self) -> None:
        self._own()
        self.rows.clear()
        self.closed = True

    def _own(self) -> None:
        self.threads.add(threading.get_ident())
        assert len(self.threads) == 1, "a backend belongs to one thread"
