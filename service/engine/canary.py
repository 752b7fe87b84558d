"""The engine's own token: whether it still generates, asked without a client. Belongs to the generation thread."""

from __future__ import annotations

import structlog

from service.engine.backend import Backend, MemoryUse, ModelInfo, Row
from service.engine.generation import SamplingParams
from service.engine.progress import Phase, Progress
from service.engine.telemetry import Telemetry

CANARY_UID = -1
CANARY_STEPS = 8
"""Steps within which the canary's one token must come."""

OVERGROWN = 1.25
"""Share of the memory budget that live arrays may take beside the weights before something must be leaking: rows are
admitted for the whole of it, estimated at their peak, and nothing is meant to be above."""


class CanaryFailed(Exception):
    """The engine cannot generate a token for itself any more, or not within its memory."""


class Canary:
    """Generates one token for nobody. Made when the model is warm and no row is there yet."""

    def __init__(self, backend: Backend, info: ModelInfo, *, telemetry: Telemetry, progress: Progress) -> None:
        self._backend = backend
        self._prompt = (min(info.eos_token_ids, default=0),)
        self._telemetry = telemetry
        self._progress = progress
        self._log = structlog.get_logger("engine")
        self.most_bytes = backend.memory().active + int(info.memory.budget * OVERGROWN)

    def sing(self) -> None:
        """Generate the token. Raises CanaryFailed when none comes or memory is out of bounds, and whatever the backend
        raises."""
        self._progress.enter(Phase.CANARY)
        greedy = SamplingParams(temperature=0)
        self._backend.insert(Row(uid=CANARY_UID, prompt=self._prompt, max_tokens=1, sampling=greedy, tenant=""))
        steps = (self._backend.step() for _ in range(CANARY_STEPS))
        if not any(token.uid == CANARY_UID for result in steps for token in result.tokens):
            raise CanaryFailed("no token came")
        if self.overgrown(self._backend.memory()):
            raise CanaryFailed("memory is not given back")
        self._progress.made()

    def judge(self) -> None:
        """Rebuild after a lost step, whose rows nobody waits for any more. Raises CanaryFailed: beyond repair."""
        self._progress.enter(Phase.REBUILDING)
        try:
            self._backend.rebuild()
            self.sing()
        except Exception as error:  # the worker step: a canary that fails in any way is final
            self._log.error("canary_failed", exc_info=error)
            self._telemetry.internal_error("canary")
            raise CanaryFailed from error

    def overgrown(self, memory: MemoryUse) -> bool:
        """Whether live arrays take more than anything here asks for; then it is logged."""
        if memory.active <= self.most_bytes:
            return False
        self._log.error("memory_overgrown", active=memory.active, most=self.most_bytes)
        self._telemetry.internal_error("memory")
        return True
