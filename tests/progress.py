"""A `Progress` that remembers what it was told."""


class Recorder:
    def __init__(self) -> None:
        self.steps: list[tuple[str, int, int]] = []

    def advance(self, step: str, done: int, total: int) -> None:
        self.steps.append((step, done, total))
