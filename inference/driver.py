"""Hands out the missing videos of a batch to actors, and takes in what becomes of them."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import Any

from inference.plan import STAGE, Plan, is_finished
from inference.pool import Actor, Pool, open_pool
from inference.schedule import IN_FLIGHT, Estimate, Failure, Queue, Task
from inference.texts import missing_texts
from schemas.config import TriptychConfig
from schemas.errors import ExternalToolError

log = logging.getLogger(__name__)

MAX_DEATHS = 3
"""Of actors that encode texts or load the model, where no row is to blame."""

OnProgress = Callable[[int, int, str, float | None], None]
"""Called at the start and after every row with (rows done, rows in all, what happened, seconds
left or None); the estimate goes by what rows cost, not by their number."""

Outcome = str | Failure
"""SHA-256 of a row's video, or why there is none."""


def make_missing(
    plan: Plan, config: TriptychConfig, model_dir: Path, tell: OnProgress
) -> dict[int, Outcome]:
    """Make every video of a plan that is not there; what becomes of each row.

    Raises:
        TriptychError: The model does not load or a setting does not go with it or the machine,
            which is no row's fault.
        ExternalToolError: Ray does not start, or actors die before they begin.
    """
    queue = Queue(
        [job.story.shape for job in plan.jobs],
        plan.flops,
        plan.missing,
        config.generation.micro_batch,
        config.generation.retries,
    )
    # before the actors, which so get the text encoder's fingerprint with the cache
    texts = missing_texts(plan.cache, [plan.jobs[row].story for row in plan.missing])
    flops = sum(plan.flops[row] for row in plan.missing)
    with open_pool(config, model_dir, plan.cache, len(queue), flops) as pool:
        _encode_texts(pool, plan, texts, tell)
        outcomes = _Making(plan, config, pool, queue, tell).run()
    if queue.halved:
        log.warning("micro_batches_halved=%d", queue.halved)
    return outcomes


def _encode_texts(pool: Pool, plan: Plan, shards: list[list[str]], tell: OnProgress) -> None:
    """Fill the cache with the texts of the missing videos, a shard at a time on every actor."""
    waiting = deque(shards)
    total = sum(map(len, waiting))
    if total:
        log.info("stage=%s texts=%d", STAGE, total)
        tell(len(plan.finished), len(plan.jobs), f"encoding {total} texts", None)
    idle, deaths = list(pool.actors), 0
    running: dict[Future[Any], tuple[Actor, list[str]]] = {}
    while waiting or running:
        while waiting and idle:
            actor, texts = idle.pop(), waiting.popleft()
            running[actor.call("encode", texts)] = (actor, texts)
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            actor, texts = running.pop(future)
            if (error := future.exception()) is not None:
                deaths += 1
                actor = _replaced(pool, actor, error, deaths, "encode texts")
                waiting.append(texts)
            idle.append(actor)


def _replaced(pool: Pool, actor: Actor, error: BaseException, deaths: int, doing: str) -> Actor:
    """A fresh actor for one that died, unless that was an error, or there were too many deaths."""
    cause = actor.cause(error)
    if cause is not None:
        raise cause
    if deaths > MAX_DEATHS:
        raise ExternalToolError(
            f"actors die when they {doing}; videos that are finished are kept",
            found=" ".join(str(error).split())[:1000],
            do="look at the memory of the machine: fewer generation.actors, or generation.offload "
            "and generation.quantize, need less of it",
        ) from error
    log.warning("actor_died while=%r deaths=%d", doing, deaths)
    return pool.replace(actor)


class _Making:
    """The missing videos of a plan, being made."""

    def __init__(
        self, plan: Plan, config: TriptychConfig, pool: Pool, queue: Queue, tell: OnProgress
    ) -> None:
        self._plan = plan
        self._config = config
        self._pool = pool
        self._queue = queue
        self._tell = tell
        self._estimate = Estimate(sum(plan.flops[row] for row in plan.missing))
        self._deaths = 0
        self._outcomes: dict[int, Outcome] = {}
        self._at: dict[Actor, list[Task]] = {}
        self._running: dict[Future[Any], tuple[Actor, Task | None]] = {}

    def run(self) -> dict[int, Outcome]:
        """Make them all; what becomes of each row."""
        self._report("loading the model", None)
        for actor in self._pool.actors:
            self._load(actor)
        while len(self._outcomes) < len(self._plan.missing):
            self._hand_out()
            done = wait(self._running, return_when=FIRST_COMPLETED).done
            # Results before deaths: what an actor finished before it died counts.
            for future in sorted(done, key=lambda f: f.exception() is not None):
                if future in self._running:
                    self._take_in(future)
        return self._outcomes

    def _load(self, actor: Actor) -> None:
        self._running[actor.call("load")] = (actor, None)

    def _hand_out(self) -> None:
        """One task for every actor that has loaded the model, then a second one."""
        for held in range(IN_FLIGHT):
            for actor, tasks in self._at.items():
                task = self._queue.take(tasks) if len(tasks) == held else None
                if task is not None:
                    tasks.append(task)
                    jobs = [self._plan.jobs[row] for row in task.rows]
                    self._running[actor.call("make", jobs)] = (actor, task)

    def _take_in(self, future: Future[Any]) -> None:
        actor, task = self._running[future]
        error = future.exception()
        if error is not None:
            self._bury(actor, error)
            return
        del self._running[future]
        if task is None:
            self._at[actor] = []
            self._estimate.begin()
        else:
            self._at[actor].remove(task)
            self._settle(task, dict(zip(task.rows, future.result(), strict=True)))

    def _bury(self, actor: Actor, error: BaseException) -> None:
        """Put a fresh actor in the place of one that died, and its tasks back into the queue."""
        mine = [future for future, (owner, _) in self._running.items() if owner is actor]
        for future in mine:
            if future.done() and future.exception() is None:
                self._take_in(future)
        doing = "make videos" if actor in self._at else "load the model"
        self._deaths += actor not in self._at
        fresh = _replaced(self._pool, actor, error, self._deaths, doing)
        tasks = self._at.pop(actor, [])
        self._running = {f: held for f, held in self._running.items() if held[0] is not actor}
        detail = f"the actor died: {' '.join(str(error).split())[:1000]}"
        for task in tasks:
            # Some of its videos may have been finished all the same.
            found = {row: is_finished(self._plan.jobs[row], self._config) for row in task.rows}
            death = Failure("death", "actor_died", detail)
            self._settle(task, {row: sha256 or death for row, sha256 in found.items()})
        self._load(fresh)

    def _settle(self, task: Task, outcomes: dict[int, Outcome]) -> None:
        failures = {r: o for r, o in outcomes.items() if isinstance(o, Failure)}
        given_up = self._queue.give_back(task, failures)
        made = {r: o for r, o in outcomes.items() if r not in failures}
        for row, outcome in (made | given_up).items():
            self._outcomes[row] = outcome
            self._estimate.add(self._plan.flops[row])
            happened = "failed" if isinstance(outcome, Failure) else "generated"
            left_s, name = self._estimate.left_s, self._plan.jobs[row].story.prompt_id
            log.info(
                "stage=%s prompt_id=%s result=%s left_s=%.0f", STAGE, name, happened, left_s or 0
            )
            if isinstance(outcome, Failure):
                log.error("prompt_id=%s reason=%s %s", name, outcome.reason, outcome.detail)
            self._report(f"{name}: {happened}", left_s)

    def _report(self, what: str, left_s: float | None) -> None:
        done = len(self._plan.finished) + len(self._outcomes)
        self._tell(done, len(self._plan.jobs), what, left_s)
