"""The generation thread, and native threads that nobody in Python has, go after the event loop."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

PROGRAM = """
import os, threading
import numpy  # whose OpenBLAS starts its workers when it is loaded
from service.engine.priority import NICENESS, give_way

def niceness():
    return {int(task): os.getpriority(os.PRIO_PROCESS, int(task)) for task in os.listdir("/proc/self/task")}

found = {}

def generation():
    give_way()
    found.update(niceness(), me=threading.get_native_id())

waiting = threading.Thread(target=threading.Event().wait, daemon=True)
waiting.start()
before = niceness()
thread = threading.Thread(target=generation)
thread.start()
thread.join()
me, ours = found.pop("me"), {threading.get_native_id(), waiting.native_id}
native = before.keys() - ours
assert native, "there is a native thread to look at"
assert {found[task] for task in ours} == {0}
assert {found[task] for task in {me, *native & found.keys()}} == {NICENESS}
os._exit(0)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="NOT TESTED HERE: niceness belongs to a thread on Linux only")
def test_the_caller_and_native_threads_are_niced_and_pythons_own_are_not() -> None:
    outside = {**os.environ, "OPENBLAS_NUM_THREADS": "2"}
    outside.pop("LD_PRELOAD", None)
    subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, env=outside, check=True, timeout=60)
