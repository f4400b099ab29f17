"""``metrics.jsonl``: one line per step, written by the first rank, followed by the parent process.

A line holds

- ``step`` (1 after the first), ``seconds``, ``data_seconds`` (of them, waiting for data);
- ``loss`` (mean over the rows), ``conditional`` (whether the last scene was generated from the
  earlier ones) and ``loss_by_timestep``: the mean over the rows of each quarter of the timesteps,
  from the least noise to the most; null where there was none;
- ``lr``, ``grad_norm`` and ``grad_norm_clipped`` (of the gradients the optimizer was given);
- ``samples_per_s``, ``tokens_per_s`` (text and video) and ``mfu``: floating-point operations of the
  model per second, without those done twice for activation checkpointing, over the rate of a large
  matrix product on the same devices, measured at the start;
- ``memory_gb``: most memory on any rank, of the GPU, or resident where there is none;
- ``bad_samples``: samples left out so far, where there were any;
- ``validation_loss`` and ``validation_loss_conditional``, on the steps that have them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from schemas.storage import write_text


def keep_until(path: Path, step: int) -> None:
    """Drop the lines of steps that will be done again, and a half-written last one."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    write_text(path, "".join(line for line in whole if json.loads(line)["step"] <= step))


class MetricsTail:
    """Follows ``metrics.jsonl``, which the child may shorten once at its start."""

    def __init__(self, path: Path, last_step: int) -> None:
        self._path = path
        self._last_step = last_step
        self._inode = -1
        self._offset = 0

    def new_lines(self) -> list[dict[str, Any]]:
        """Whole lines of steps not yet seen."""
        if not self._path.is_file():
            return []
        with self._path.open("rb") as f:
            inode = os.fstat(f.fileno()).st_ino
            if inode != self._inode:
                self._inode, self._offset = inode, 0
            f.seek(self._offset)
            whole, newline, _ = f.read().rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        lines = [json.loads(line) for line in whole.splitlines()]
        fresh = [line for line in lines if line["step"] > self._last_step]
        self._last_step = max((line["step"] for line in fresh), default=self._last_step)
        return fresh
