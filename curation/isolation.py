"""Work on one video in a child process: no crash, hang or flood of memory reaches the caller.

Decoders are C code fed with files of strangers. So a Ray worker (or a test) keeps a warm child, a
fresh interpreter connected by pipes, and hands it one video after the other. A child is replaced
after a crash, a timeout, a memory error or ``_JOBS_PER_CHILD`` jobs (decord leaks). It is started
as a program, never forked: Ray's threads and locks do not survive a fork. A child that somebody
else killed (the kernel short of memory, an operator) is no fault of the video: the job is done once
more, and then failed, never rejected.

The memory limit is ``RLIMIT_DATA``, which on Linux counts private writable memory: no polling that
a fast allocation outruns, and not upset by mapped libraries as ``RLIMIT_AS`` would be. It is set
for each job to what the warm child already has plus the job's allowance. A child also carries an
alarm clock (``setitimer``) for each job, so that it dies even where its caller was killed.

Down the pipe goes a JSON line; back come a JSON line and, for an array, its bytes. Nothing is
pickled. Children without work end when the pipe closes, as it does with the caller.
"""

from __future__ import annotations

import importlib
import io
import json
import logging
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import IO, Any

import numpy as np

from schemas.errors import TriptychError, VideoDecodeError

_JOBS_PER_CHILD = 100
"""A new child costs half a second; decord 0.6 leaks (its issues 208 and 279)."""

_START_TIMEOUT_S = 120.0
"""For starting Python and importing the function's module, which are not the video's fault."""

_ALARM_GRACE_S = 5.0
"""The child's own alarm comes this much after the caller's deadline."""

_KILLED_BY = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP)
"""Signals that come from outside; what goes wrong in a decoder raises others."""

_MB = 1024 * 1024

log = logging.getLogger(__name__)


class ChildFailed(TriptychError):
    """The isolated function met an error nobody foresaw; ``reason`` is its snake_case name."""

    def __init__(self, what: str, *, reason: str, **context: Any) -> None:
        super().__init__(what, **context)
        self.reason = reason


class ChildKilled(ChildFailed):
    """The child was ended from outside; the job itself may well pass."""


def run_isolated(function: str, argument: Any, *, timeout_s: float, memory_mb: int) -> Any:
    """Call a function in a warm child process and give its result.

    Args:
        function: ``module:name`` of a function of one JSON value, which gives a JSON value or a
            numpy array.
        argument: What it is called with.
        timeout_s: Wall-clock limit of the call in seconds; starting a child does not count.
        memory_mb: How much memory the call may take beyond the child's own, in MB.

    Raises:
        VideoDecodeError: The one the function raised, or with reason ``timeout``,
            ``out_of_memory`` or ``crashed_<signal>`` (``crashed_sigsegv``, ``crashed_sigabrt``).
        ChildFailed: The function raised anything else, or (reason ``killed``) its child was killed
            from outside, and killed again when the job was done once more.
    """
    where = _name_of(argument)
    try:
        return _call_a_child(function, argument, timeout_s, memory_mb, where)
    except ChildKilled as error:
        log.warning("where=%s state=again error=%s", where, error.found)
        return _call_a_child(function, argument, timeout_s, memory_mb, where)


def _call_a_child(
    function: str, argument: Any, timeout_s: float, memory_mb: int, where: str
) -> Any:
    with _lock:
        child = _idle.pop() if _idle else None
    if child is not None and not child.is_alive():
        child.kill()
        child = None
    child = child or _Child()
    try:
        value = child.call(function, argument, timeout_s, memory_mb, where)
    except (VideoDecodeError, ChildFailed) as error:
        if error.reason == "out_of_memory":
            child.kill()
        _give_back(child)
        raise
    except BaseException:  # a KeyboardInterrupt too must leave no child behind
        child.kill()
        raise
    _give_back(child)
    return value


def close_children() -> None:
    """End the idle children of this process. Else they end with it."""
    with _lock:
        children = list(_idle)
        _idle.clear()
    for child in children:
        child.kill()


_idle: list[_Child] = []
_lock = threading.Lock()


def _give_back(child: _Child) -> None:
    if child.jobs >= _JOBS_PER_CHILD or not child.is_alive():
        child.kill()
        return
    with _lock:
        _idle.append(child)


class _Child:
    """One child process, seen from the caller."""

    def __init__(self) -> None:
        self.jobs = 0
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the child
        path = os.pathsep.join(p or str(Path.cwd()) for p in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "curation.isolation"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            pipesize=_MB,  # arrays go over: fewer turns than with the usual 64 KiB
            env=os.environ | {"PYTHONPATH": path},
        )

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        """End the process, whatever it is doing, and free what belongs to it."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            assert stream is not None
            try:
                stream.close()
            except BrokenPipeError:  # an unsent job
                continue

    def call(
        self, function: str, argument: Any, timeout_s: float, memory_mb: int, where: str
    ) -> Any:
        self.jobs += 1
        self._stderr.seek(0)  # the child writes at the same place: one open file, two descriptors
        self._stderr.truncate()
        job = [function, argument, timeout_s + _ALARM_GRACE_S, memory_mb]
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            self._process.stdin.flush()
            deadline = time.monotonic() + _START_TIMEOUT_S
            head = self._read_head(deadline)
            if head["kind"] == "started":  # else there is no such function
                deadline = time.monotonic() + timeout_s
                head = self._read_head(deadline)
            body = self._read(head["size"], deadline)
        except TimeoutError as error:
            self.kill()
            raise VideoDecodeError(
                "the work on the video took too long",
                reason="timeout",
                where=where,
                expected=f"at most {timeout_s:g} s",
                do="raise curation.shots.timeout_s if the video is long and sound",
            ) from error
        except (EOFError, BrokenPipeError) as error:
            raise self._crash(where) from error
        return _result(head, body, where, memory_mb)

    def _read_head(self, deadline: float) -> dict[str, Any]:
        size = int.from_bytes(self._read(4, deadline), "big")
        return json.loads(self._read(size, deadline))

    def _read(self, size: int, deadline: float) -> bytearray:
        assert self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        poll = select.poll()  # select() fails on descriptors above 1023
        poll.register(pipe, select.POLLIN)
        data = bytearray(size)
        got = 0
        while got < size:
            left_ms = (deadline - time.monotonic()) * 1000
            if left_ms <= 0 or not poll.poll(left_ms):
                raise TimeoutError
            count = os.readv(pipe, [memoryview(data)[got:]])
            if not count:
                raise EOFError
            got += count
        return data

    def _crash(self, where: str) -> VideoDecodeError | ChildKilled:
        code = self._process.wait()
        if -code in _KILLED_BY:
            return ChildKilled(
                "the process working on the video was killed from outside",
                reason="killed",
                where=where,
                found=signal.Signals(-code).name,
                do="look in the system's log whether memory ran out: fewer workers need less of it "
                "(engine.num_cpus), and a lower curation.shots.memory_mb rejects such a video",
            )
        self._stderr.seek(0)
        said = self._stderr.read()[-2000:].decode(errors="replace")
        reason = f"crashed_{signal.Signals(-code).name.lower()}" if code < 0 else "crashed"
        if "bad_alloc" in said:
            reason = "out_of_memory"
        if code == -signal.SIGALRM:
            reason = "timeout"
        return VideoDecodeError(
            "the decoder ended its process",
            reason=reason,
            where=where,
            found=" ".join(said.split())[-300:] or f"exit code {code}",
            do="leave the file out, or get an undamaged copy",
        )


def _result(head: dict[str, Any], body: bytearray, where: str, memory_mb: int) -> Any:
    """The value a child sent, or the error it met."""
    match head["kind"]:
        case "json":
            return json.loads(body)
        case "array":
            return np.load(io.BytesIO(body), allow_pickle=False)
        case "out_of_memory":
            raise VideoDecodeError(
                "the work on the video took too much memory",
                reason="out_of_memory",
                where=where,
                expected=f"at most {memory_mb} MB",
                do="raise curation.shots.memory_mb if the video is sound",
            )
        case "video_decode_error":
            raise VideoDecodeError(**json.loads(body))
        case _:
            error = json.loads(body)
            raise ChildFailed(
                "the work on the video failed",
                reason=error["reason"],
                where=where,
                found=error["found"],
            )


def _name_of(argument: Any) -> str:
    """What the argument is about, for messages."""
    if isinstance(argument, dict):
        named = argument.get("source", argument)
        return str(named.get("uri") or named.get("path") or list(named))
    return str(argument)[:200]


def _serve() -> None:
    """The child: do jobs until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's to handle
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process even inside C code
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get between the replies
    for line in sys.stdin.buffer:
        function, argument, alarm_s, memory_mb = json.loads(line)
        try:
            module, name = function.split(":")
            call = getattr(importlib.import_module(module), name)
            _reply(replies, "started", b"")
            signal.setitimer(signal.ITIMER_REAL, alarm_s)
            resource.setrlimit(
                resource.RLIMIT_DATA, (_data_bytes() + memory_mb * _MB, resource.RLIM_INFINITY)
            )
            kind, body = _encode(call(argument))
        except BaseException as error:  # whatever it is, the caller must hear of it
            kind, body = _describe(error)
        resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        signal.setitimer(signal.ITIMER_REAL, 0)
        _reply(replies, kind, body)


def _reply(replies: IO[bytes], kind: str, body: bytes) -> None:
    head = json.dumps({"kind": kind, "size": len(body)}).encode()
    replies.write(len(head).to_bytes(4, "big") + head + body)
    replies.flush()


def _encode(value: Any) -> tuple[str, bytes]:
    if isinstance(value, np.ndarray):
        file = io.BytesIO()
        np.save(file, value, allow_pickle=False)
        return "array", file.getvalue()
    return "json", json.dumps(value).encode()


def _describe(error: BaseException) -> tuple[str, bytes]:
    # OpenCV has an error of its own for it: cv2.error, code -4 (StsNoMem).
    if isinstance(error, MemoryError) or getattr(error, "code", None) == -4:
        return "out_of_memory", b""
    if isinstance(error, VideoDecodeError):
        context = {k: getattr(error, k) for k in ("where", "found", "expected", "do")}
        texts = {k: None if v is None else str(v) for k, v in context.items()}
        values = {"what": error.what, "reason": error.reason} | texts
        return "video_decode_error", json.dumps(values).encode()
    name = "".join(f"_{c.lower()}" if c.isupper() else c for c in type(error).__name__).lstrip("_")
    found = "".join(traceback.format_exception(error))[-2000:]
    return "failed", json.dumps({"reason": name, "found": found}).encode()


def _data_bytes() -> int:
    """Private writable memory of this process, as RLIMIT_DATA counts it. Linux only."""
    with Path("/proc/self/statm").open() as file:
        return int(file.read().split()[5]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    _serve()
