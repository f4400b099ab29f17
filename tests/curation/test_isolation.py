"""Real children that really crash, hang and run out of memory. Built-in functions do the work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from curation import isolation
from curation.isolation import ChildFailed, close_children, run_isolated
from schemas.errors import VideoDecodeError

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _no_children_left() -> Iterator[None]:
    close_children()
    yield
    close_children()


def run(function: str, argument: Any, timeout_s: float = 60.0, memory_mb: int = 500) -> Any:
    return run_isolated(function, argument, timeout_s=timeout_s, memory_mb=memory_mb)


def reason_of(function: str, argument: Any, **limits: Any) -> str:
    with pytest.raises(VideoDecodeError) as caught:
        run(function, argument, **limits)
    return caught.value.reason


def test_values_and_arrays_come_back_and_the_child_stays_warm() -> None:
    assert run("operator:neg", 5) == -5
    child = isolation._idle[-1]
    assert run("builtins:sorted", [3, 1, 2]) == [1, 2, 3]
    # More than the pipe holds at once, and exact.
    assert np.array_equal(run("numpy:arange", 1_000_000), np.arange(1_000_000))
    assert isolation._idle == [child]
    assert child.jobs == 3


@pytest.mark.parametrize(
    ("function", "argument", "reason"),
    [
        ("signal:raise_signal", signal.SIGSEGV, "crashed_sigsegv"),
        ("signal:raise_signal", signal.SIGABRT, "crashed_sigabrt"),
        ("signal:raise_signal", signal.SIGALRM, "timeout"),  # its own alarm clock
        ("os:_exit", 3, "crashed"),
        ("builtins:bytearray", 2_000_000_000, "out_of_memory"),
    ],
)
def test_whatever_happens_in_a_child_is_a_reason_and_the_next_job_works(
    function: str, argument: int, reason: str
) -> None:
    run("operator:neg", 1)
    old = isolation._idle[-1]
    assert reason_of(function, int(argument)) == reason
    assert run("operator:neg", 2) == -2
    assert isolation._idle[-1] is not old
    assert not old.is_alive()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_child_killed_from_outside_is_no_fault_of_the_video(number: int) -> None:
    with pytest.raises(ChildFailed, match="killed from outside") as caught:
        run("signal:raise_signal", int(number))
    assert caught.value.reason == "killed"
    assert isolation._idle == []
    assert run("operator:neg", 2) == -2


def test_the_job_of_a_killed_child_is_done_once_more() -> None:
    run("operator:neg", 1)
    child = isolation._idle[-1]._process
    killer = threading.Timer(0.5, child.kill)
    killer.start()
    assert run("time:sleep", 2) is None  # longer than until the kill
    killer.join()
    assert child.poll() == -signal.SIGKILL
    assert isolation._idle[-1]._process is not child


def test_a_hanging_job_ends_at_its_limit() -> None:
    started = time.monotonic()
    assert reason_of("time:sleep", 60, timeout_s=0.3) == "timeout"
    assert time.monotonic() - started < 20
    assert run("operator:neg", 2, timeout_s=0.5) == -2  # starting a child does not count


def test_the_memory_limit_is_each_jobs_own() -> None:
    run("numpy:arange", 1)
    child = isolation._idle[-1]
    assert reason_of("numpy:arange", 8_000_000, memory_mb=4) == "out_of_memory"
    assert not child.is_alive()
    assert len(run("numpy:arange", 8_000_000, memory_mb=500)) == 8_000_000
    assert reason_of("numpy:arange", 8_000_000, memory_mb=4) == "out_of_memory"


def test_unforeseen_errors_are_told_with_their_name_and_cost_no_child() -> None:
    run("operator:neg", 1)
    child = isolation._idle[-1]
    with pytest.raises(ChildFailed, match="invalid literal") as caught:
        run("builtins:int", "x")
    assert caught.value.reason == "value_error"
    with pytest.raises(ChildFailed) as caught:
        run("no_such_module:x", 1)
    assert caught.value.reason == "module_not_found_error"
    assert isolation._idle == [child]


def test_known_defects_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "empty.mp4"
    path.touch()
    with pytest.raises(VideoDecodeError, match="the file is empty") as caught:
        run(
            "curation.jobs:read_clip",
            {"path": str(path), "frame_numbers": [0], "height_px": 8, "width_px": 8},
        )
    assert (caught.value.reason, caught.value.where) == ("empty_file", str(path))


def test_what_a_library_prints_does_not_get_between_the_replies() -> None:
    assert run("builtins:print", "noise on standard output") is None
    assert run("operator:neg", 3) == -3


def test_a_child_is_replaced_after_its_share_of_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "_JOBS_PER_CHILD", 3)
    for _ in range(3):
        run("operator:neg", 1)
    assert isolation._idle == []
    assert run("operator:neg", 4) == -4


def test_threads_have_children_of_their_own() -> None:
    run("operator:neg", 1)
    found: list[Any] = []
    threads = [
        threading.Thread(target=lambda i=i: found.append(run("operator:neg", i))) for i in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [-2, -1, 0]


def test_children_end_with_the_process_that_was_killed() -> None:
    code = (
        "from curation import isolation; import sys, time;"
        "isolation.run_isolated('operator:neg', 1, timeout_s=9, memory_mb=100);"
        "print(isolation._idle[0]._process.pid, flush=True); time.sleep(60)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert is_running(child)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 20
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(child)


def is_running(pid: int) -> bool:
    """Not gone, and not a zombie that nobody has asked about."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rsplit(")", 1)[1].split()[0] != "Z"
