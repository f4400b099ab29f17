"""In which order stories are made, with which others, and what becomes of those that fail.

Rows are numbers; nothing here knows of models, files or Ray. The micro-batches are a function of
the manifest and the config alone, so they are the same for any number of actors.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

log = logging.getLogger(__name__)

IN_FLIGHT = 2
"""Tasks an actor has at a time: one is denoised while the one before is decoded and written."""


@dataclass(frozen=True)
class Task:
    """Rows that are denoised together; ``alone``: with nothing else on their actor meanwhile."""

    rows: tuple[int, ...]
    alone: bool = False


@dataclass(frozen=True)
class Failure:
    """Why a row has no video.

    Attributes:
        kind: ``error`` may pass next time, ``final`` would come again, ``memory`` ran out, and
            ``death`` took the actor along.
        reason: In snake_case, for the rejects.
        detail: For whoever mends it.
    """

    kind: Literal["error", "final", "memory", "death"]
    reason: str
    detail: str


def micro_batches(shapes: Sequence[Hashable], size: int) -> list[tuple[int, ...]]:
    """Rows of equal shape in groups of at most ``size``, in the order of the manifest."""
    by_shape: dict[Hashable, list[int]] = {}
    for row, shape in enumerate(shapes):
        by_shape.setdefault(shape, []).append(row)
    return [
        tuple(rows[i : i + size]) for rows in by_shape.values() for i in range(0, len(rows), size)
    ]


class Queue:
    """The tasks that are still to do, those that cost most first.

    Rows that are finished already leave a gap in their micro-batch, which is not filled up.

    Args:
        shapes: Of every row: rows of equal shape can be denoised together.
        costs: Of every row, in any unit.
        missing: Rows that have no video yet.
        micro_batch: Most rows of a task.
        retries: Further tries of a row that failed.
    """

    def __init__(
        self,
        shapes: Sequence[Hashable],
        costs: Sequence[float],
        missing: Collection[int],
        micro_batch: int,
        retries: int,
    ) -> None:
        wanted = frozenset(missing)
        groups = [tuple(r for r in g if r in wanted) for g in micro_batches(shapes, micro_batch)]
        groups = sorted(filter(None, groups), key=lambda g: (-sum(costs[r] for r in g), g))
        self._waiting = deque(Task(rows) for rows in groups)
        self._shapes = shapes
        self._retries = retries
        self._tries = Counter[int]()
        self._limits: dict[Hashable, int] = {}
        self.halved = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def take(self, busy: Sequence[Task]) -> Task | None:
        """The next task for an actor that has some already; None if it must wait."""
        if len(busy) >= IN_FLIGHT or any(task.alone for task in busy):
            return None
        task = next((t for t in self._waiting if not (busy and t.alone)), None)
        if task is None:
            return None
        self._waiting.remove(task)
        limit = self._limits.get(self._shapes[task.rows[0]], len(task.rows))
        if len(task.rows) > limit:
            self._waiting.appendleft(Task(task.rows[limit:]))
            task = Task(task.rows[:limit])
        return task

    def give_back(self, task: Task, failures: Mapping[int, Failure]) -> dict[int, Failure]:
        """Queue again what may yet succeed.

        Failures of a micro-batch are nobody's in particular, and neither are a death or a lack of
        memory beside another task: those rows are done again one by one, alone in the latter cases,
        and only what then fails counts as a try.

        Returns:
            The rows that have failed for good.
        """
        kinds = {failure.kind for failure in failures.values()}
        if len(task.rows) == 1:
            return self._judge(task, failures)
        rows = tuple(failures)
        if "memory" in kinds:
            half = len(task.rows) // 2
            self.halved += 1
            shape = self._shapes[task.rows[0]]
            self._limits[shape] = min(half, self._limits.get(shape, half))
            log.warning("out_of_memory micro_batch=%d next=%d", len(task.rows), half)
            self._waiting.extendleft(
                Task(rows[i : i + half]) for i in reversed(range(0, len(rows), half))
            )
        else:
            self._waiting.extend(Task((row,), alone="death" in kinds) for row in rows)
        return {}

    def _judge(self, task: Task, failures: Mapping[int, Failure]) -> dict[int, Failure]:
        """The same for a task of a single row."""
        given_up: dict[int, Failure] = {}
        for row, failure in failures.items():
            needs_room = failure.kind in ("memory", "death")
            self._tries[row] += task.alone or not needs_room
            if failure.kind == "final" or self._tries[row] > self._retries:
                given_up[row] = failure
            else:
                log.warning("again row=%d reason=%s detail=%r", row, failure.reason, failure.detail)
                self._waiting.append(Task((row,), alone=needs_room))
        return given_up


class Estimate:
    """How long the rest takes, from the cost of what is done since the first model was ready.

    Args:
        cost: Of all there is to do.
        clock: In seconds.
    """

    def __init__(self, cost: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._left = cost
        self._done = 0.0
        self._clock = clock
        self._started: float | None = None

    def begin(self) -> None:
        """A model is ready; only the first one counts."""
        if self._started is None:
            self._started = self._clock()

    def add(self, cost: float) -> None:
        """Count something as done."""
        self._left -= cost
        self._done += cost

    @property
    def left_s(self) -> float | None:
        """Seconds, or None before anything is done."""
        if not self._done or self._started is None:
            return None
        return max(0.0, self._left * (self._clock() - self._started) / self._done)
