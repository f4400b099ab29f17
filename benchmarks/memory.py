"""Memory of a running refresh and of everything it started, for benchmarks. Linux only."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

MB = 1024 * 1024


@dataclass(frozen=True)
class Sample:
    """Memory at one moment, in MB, by whose it is."""

    at: float
    driver: float
    ray: float
    workers: float
    children: float
    object_store: float

    @property
    def total(self) -> float:
        """Of all processes; the object store is part of Ray's."""
        return self.driver + self.ray + self.workers + self.children


def sample(driver: int) -> Sample:
    """Resident memory of a refresh and everything it started."""
    sums = {"driver": 0.0, "ray": 0.0, "workers": 0.0, "children": 0.0, "object_store": 0.0}
    try:
        processes = [psutil.Process(driver), *psutil.Process(driver).children(recursive=True)]
    except psutil.NoSuchProcess:
        processes = []
    for process in processes:
        try:
            command, memory = process.cmdline(), process.memory_info()
        except psutil.NoSuchProcess:
            continue
        if process.pid == driver:
            who = "driver"
        elif "curation.isolation" in command:
            who = "children"
        elif command and command[0].startswith("ray::"):
            who = "workers"
        else:
            who = "ray"
        sums[who] += memory.rss / MB
        if command and Path(command[0]).name == "raylet":
            sums["object_store"] = shared_mb(process.pid)
    return Sample(time.time(), **sums)


def shared_mb(pid: int) -> float:
    """Shared memory a process has touched; of a raylet, its object store."""
    try:
        return _status(str(pid), "RssShmem:")
    except (FileNotFoundError, ProcessLookupError):
        return 0.0


def peak_mb() -> float:
    """The most memory this process has had at once since its program began."""
    return _status("self", "VmHWM:")


def _status(pid: str, key: str) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def line(at: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """First and last value of the straight line that fits best."""
    slope, middle = np.polyfit(np.asarray(at) - np.mean(at), values, 1)
    first, last = (float(middle + slope * (end - np.mean(at))) for end in (at[0], at[-1]))
    return first, last
