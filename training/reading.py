"""How a rank gets its rows: one step ahead, and what happens to a sample that cannot be read."""

from __future__ import annotations

import logging
import time

from schemas.config.training import TrainStageConfig
from schemas.errors import TrainingFailed, TriptychError
from training.batches import Batch, Prefetched, Reading
from training.data import StepPlan, plan_step
from training.datasets import SampleDataset
from training.engine import Ranks

log = logging.getLogger(__name__)


class StepReader:
    """Reads rows of global batches.

    A sample that cannot be read is never replaced by another: it fails the run, or, up to
    ``max_bad_samples`` of them, its row is left out of the batch.

    Args:
        data: The samples.
        stage: Steps, batch, and how many samples may be unreadable.
        ranks: All ranks.
        num_timesteps: Diffusion timesteps.

    Attributes:
        bad: Ids of the samples that could not be read so far, on any rank.
        waited_s: Seconds the last step waited for its data.
    """

    def __init__(
        self, data: SampleDataset, stage: TrainStageConfig, ranks: Ranks, num_timesteps: int
    ) -> None:
        self._data = data
        self._stage = stage
        self._ranks = ranks
        self._num_timesteps = num_timesteps
        self._steps = Prefetched(self._read, stage.steps)
        self._fresh: dict[str, str] = {}
        self.bad: set[str] = set()
        self.waited_s = 0.0

    def read(self, step: int) -> tuple[StepPlan, list[Reading]]:
        """A step, and this rank's micro-batches of it, each as batches of equal shape.

        Raises:
            TrainingFailed: A sample cannot be read, and none may be unreadable.
        """
        started = time.perf_counter()
        plan, readings = self._steps(step)
        self.waited_s = time.perf_counter() - started
        for row, error in (item for reading in readings for item in reading.bad.items()):
            sample = self._data.samples[plan.draws[row].index].sample_id
            if self._stage.max_bad_samples == 0:
                raise _failed(plan, {sample: str(error)}, 0) from error
            if sample not in self.bad:
                self._fresh[sample] = str(error)
        return plan, readings

    def _read(self, step: int) -> tuple[StepPlan, list[Reading]]:
        plan = plan_step(step, self._stage, len(self._data), self._num_timesteps)
        readings: list[Reading] = []
        for rows in self._ranks.micro_batches(self._stage):
            reading = self._data.read(plan, rows)
            if self._ranks.device.type == "cuda":
                reading = Reading([b.pinned() for b in reading.batches], reading.bad)
            readings.append(reading)
        return plan, readings

    def any_batch(self, plan: StepPlan) -> Batch:
        """One row of the step that can be read, whichever.

        Raises:
            TrainingFailed: There is none.
        """
        last: TriptychError | None = None
        for row in range(len(plan.draws)):
            reading = self._data.read(plan, [row])
            if reading.batches:
                return reading.batches[0]
            last = reading.bad[row]
        raise TrainingFailed(
            "no sample of a step can be read", where=f"step {plan.step + 1}", found=last
        )

    def settle(self, plan: StepPlan) -> None:
        """After a step: count what could not be read, on all ranks.

        Raises:
            TrainingFailed: More samples than ``max_bad_samples``.
        """
        limit = self._stage.max_bad_samples
        if not limit or not self._ranks.any(bool(self._fresh)):
            return
        fresh = {k: v for part in self._ranks.gather(self._fresh) for k, v in part.items()}
        self._fresh = {}
        self.bad |= set(fresh)
        if self._ranks.is_first:
            for sample, error in fresh.items():
                log.error(
                    "bad_sample step=%d sample=%s left_out=true count=%d of=%d error=%s",
                    plan.step + 1,
                    sample,
                    len(self.bad),
                    limit,
                    error,
                )
        if len(self.bad) > limit:
            raise _failed(plan, fresh, limit)


def _failed(plan: StepPlan, errors: dict[str, str], limit: int) -> TrainingFailed:
    return TrainingFailed(
        "samples cannot be read",
        where=f"step {plan.step + 1}, samples {', '.join(errors)}",
        found="; ".join(errors.values()),
        expected=f"at most {limit} such samples (max_bad_samples)",
        do="encode the manifest again, or raise max_bad_samples to leave them out",
    )
