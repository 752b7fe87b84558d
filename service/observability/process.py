"""The process's own figures under Prometheus' standard names, whose client has them for Linux only; and what is to be
known of the machine and of other processes."""

from __future__ import annotations

import resource
from collections.abc import Iterable

import psutil
from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector


class ProcessCollector(Collector):
    """Memory, files and CPU time of this process, read when it is asked. Any thread."""

    def __init__(self) -> None:
        self._process = psutil.Process()

    def collect(self) -> Iterable[Metric]:
        """The families as of now; a few system calls."""
        process = self._process
        times = process.cpu_times()
        gauges = (
            ("process_resident_memory_bytes", "Resident memory in bytes.", process.memory_info().rss),
            ("process_open_fds", "Open file descriptors.", process.num_fds()),
            ("process_max_fds", "Most open file descriptors.", resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
            ("process_start_time_seconds", "Start of the process since the epoch in seconds.", process.create_time()),
        )
        yield from (GaugeMetricFamily(name, says, value=value) for name, says, value in gauges)
        says = "Total user and system CPU time spent in seconds."
        yield CounterMetricFamily("process_cpu_seconds", says, value=times.user + times.system)


def boot_time() -> float:
    """When this machine came up, in seconds since the epoch. Moves when the clock is set."""
    return float(psutil.boot_time())


def available_memory() -> int:
    """Bytes that a process can have without making another one swap, as far as the system can tell."""
    return int(psutil.virtual_memory().available)


def is_running(pid: int, since: float) -> bool:
    """Whether the process that was `pid` at the moment `since` (seconds since the epoch) still runs.

    A number that was given away anew belongs to a younger process.
    """
    try:
        process = psutil.Process(pid)
        return bool(process.create_time() <= since + 1 and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


class NoSuchProcess(Exception):
    """There is no process with that id, or it may not be looked at."""


def cpu_seconds(pid: int) -> float:
    """User and system CPU time that a process and those it started have taken so far. Raises NoSuchProcess."""
    try:
        process = psutil.Process(pid)
        times = [each.cpu_times() for each in (process, *process.children(recursive=True))]
    except psutil.Error as error:
        raise NoSuchProcess(f"process {pid}: {error}") from None
    return sum(each.user + each.system for each in times)
