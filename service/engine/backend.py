"""What the engine asks of a model runtime: the `Backend` protocol and the values that cross it.

Every method of a backend belongs to the generation thread, but for those that say so. `mlx_backend.py` is the real
one; tests script another. Nothing here imports mlx.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from service.engine.generation import FinishReason, SamplingParams
from service.engine.memory import MemoryModel
from service.engine.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What was loaded. `batchable` is False when the model's caches cannot be merged: one row at a time."""

    name: str
    context_length: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    batchable: bool
    memory: MemoryModel
    tokenizer: Tokenizer
    device: str = "cpu"


def unnoticed(cached: int) -> None:
    """Nobody wants to know when a prefill begins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One sequence for the batch. `uid` is the engine's; `tenant` names its prefix-cache namespace.

    `on_prefill` is called with the number of cached tokens when its prefill begins, on the generation thread and
    before anything is computed, so that who is cancelled in that very step is known to have begun.
    """

    uid: int
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: SamplingParams
    tenant: str
    on_prefill: Callable[[int], None] = unnoticed


@dataclass(frozen=True, slots=True)
class Token:
    """One sampled token of one row. With a `finish_reason` the row has left the batch."""

    uid: int
    token: int
    finish_reason: FinishReason | None = None


@dataclass(slots=True)
class StepResult:
    """What one step did. Rows in `failed` have left the batch; their exception is theirs alone.

    `copies`: pieces of work between steps (a layer joined, moved or grown) that were done. `overlaps`: if no row is
    inserted or removed, the next step decodes at once, and calls what is to be done meanwhile.
    """

    tokens: list[Token] = field(default_factory=list)
    failed: list[tuple[int, Exception]] = field(default_factory=list)
    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_rows: int = 0
    decode_seconds: float = 0.0
    copies: int = 0
    overlaps: bool = False

    @property
    def fruitful(self) -> bool:
        """Whether anything came of it that brings a row nearer to its end."""
        return bool(self.tokens or self.failed or self.prefill_tokens or self.copies)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """Bytes, as mlx counts them; of `active`, finished prompts keep `prefix_cache` (of `prefix_capacity` at most), and
    the buffers of the rows that decode have `batch`, spare places included. The device recommends to stay below
    `recommended`; None where none says so."""

    active: int = 0
    peak: int = 0
    buffer_cache: int = 0
    recommended: int | None = None
    prefix_cache: int = 0
    prefix_capacity: int = 0
    prefix_entries: int = 0
    batch: int = 0


def nothing() -> None:
    """Is what is done meanwhile when there is nothing to do."""


class Backend(Protocol):
    """A model runtime with continuous batching. One thread calls it; a call may take a whole step's time."""

    def load(self, progress: Callable[[str, int, int], None] = ...) -> ModelInfo:
        """Bring the model into memory. Raises ModelUnavailable with what to do about it.

        Calls `progress(what, done, total)` while it downloads and converts, from any thread; `total` 0 is unknown.
        """

    def warm_up(self, progress: Callable[[str, int, int], None]) -> None:
        """Run the shapes of traffic whose first use costs more; call `progress(what, done, total)` between them."""

    def insert(self, row: Row) -> None:
        """Take a row in; its prefill starts in a later step. The prompt is not empty."""

    def make_room(self, nbytes: int) -> None:
        """Shrink the prefix cache until at most `nbytes` remain in it."""

    def patience(self, positions: int) -> float:
        """Seconds that it is worth it for a prompt, of which so many are to be computed, to wait for others that are
        prefilled with it: those that a prefill takes however much it computes, less those of its own. Any thread."""

    @property
    def busy(self) -> bool:
        """Whether a step is due even without rows: a prefix to keep, memory to give back."""

    def step(self) -> StepResult:
        """Decode one token for every live row and prefill at most one chunk. Does nothing without rows.

        Raises only when the whole step is lost; then no row is usable until `rebuild`.
        """

    def do_meanwhile(self, work: Callable[[], object]) -> None:
        """Have steps call `work` when they are about to wait for the device without the interpreter: what other threads
        have to do takes no time from the generation thread then."""

    def remove(self, uids: Iterable[int], *, keep_prefix: bool = False) -> None:
        """Take rows out, with the next step at the latest; unknown uids are ignored. `keep_prefix` stores what they
        computed."""

    def rebuild(self) -> None:
        """Drop every row and all their memory, and start again with empty batches; the model stays loaded."""

    def memory(self) -> MemoryUse:
        """Current memory figures; cheap."""

    def release_pool(self) -> None:
        """Give freed buffers back to the system while the generation thread is lost. Any thread; may block."""

    def close(self) -> None:
        """Free the model and every array, whatever state they are in. The backend is not used afterwards."""
