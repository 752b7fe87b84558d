"""Who runs first where the generation thread and the event loop both want the CPU."""

from __future__ import annotations

import os
import sys
import threading

LOOP_WAITS = 0.001
"""Seconds for which Python code on the generation thread may keep the interpreter from the event loop."""

NICENESS = 10
"""Of the generation thread and those that mlx starts from it (Linux, where niceness belongs to a thread)."""


def give_way() -> None:
    """Let the event loop run first where both want the CPU: on mlx's CPU backend the caller takes all it gets."""
    sys.setswitchinterval(LOOP_WAITS)
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
