"""`mlxd` with 40 microseconds of busy work more for each token: what the guard of cost must find."""

from __future__ import annotations

import time
from typing import Any

from service.cli import main
from service.engine.jobs import Job

BUSY = 40e-6


def costly(advance: Any) -> Any:
    def busy(*arguments: Any) -> Any:
        ends = time.thread_time() + BUSY
        while time.thread_time() < ends:
            pass
        return advance(*arguments)

    return busy


if __name__ == "__main__":
    Job.advance = costly(Job.advance)  # type: ignore[method-assign]
    main()
