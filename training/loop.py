"""One rank of a training: ``python -m training.loop --job job.json``, started by DeepSpeed.

Resumes from the newest whole checkpoint, at whatever number of ranks and ZeRO stage, trains to the
last step, and exports the model. On SIGTERM, when the stop file appears, or when the process that
started the training is gone, it saves a checkpoint after the current step and exits with
``EXIT_INTERRUPTED``. What it cannot go on from ends it with ``EXIT_GAVE_UP``.
"""

from __future__ import annotations

import argparse
import fcntl
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, cast

import psutil
import torch
from torch import Tensor

from schemas.errors import TrainingFailed, TriptychError
from schemas.layout import Workspace
from training.adapters import choose_trainable
from training.base_model import load_scheduler
from training.batches import Batch, Reading
from training.checkpoints import Saver, StoredState, newest_complete, remove_partial
from training.data import StepPlan, draw_int
from training.datasets import open_dataset
from training.deepspeed_config import deepspeed_config, learning_rate
from training.diffusion import check_scheduler, diffusion_losses
from training.engine import ClippedNorm, Ranks, plain_grad_norm, scaled_loss, start_deepspeed
from training.export import export_checkpoint
from training.job import EXIT_GAVE_UP, EXIT_INTERRUPTED, METRICS, MODEL, Job, ranks_environment
from training.meter import Meter, Monitors
from training.metrics import keep_until
from training.reading import StepReader
from training.validation import Validation
from training.weights import load_transformer
from training.zero_state import MovingAverage, ShardedState

log = logging.getLogger("training.loop")  # __name__ is "__main__" here

LOCK_WAIT_S = 120.0
"""How long to wait for an earlier process of the same run, which stops after its current step."""


class StopRequest:
    """Whether this rank was asked to stop: by SIGTERM, a file, or the death of its parent."""

    def __init__(self, file: Path | None, parent_pid: int | None) -> None:
        self._asked = False
        self._file = file
        self._parent = None
        if parent_pid is not None:
            try:
                self._parent = psutil.Process(parent_pid)
            except psutil.NoSuchProcess:
                self._asked = True
        signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._asked = True

    def __bool__(self) -> bool:
        there = self._file is not None and self._file.exists()
        return self._asked or there or self._parent_is_gone()

    def _parent_is_gone(self) -> bool:
        if self._parent is None:
            return False
        try:
            return not self._parent.is_running() or self._parent.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True


class Trainer:
    """The state of one rank between steps."""

    def __init__(self, job: Job, ranks: Ranks) -> None:
        self.job = job
        self.ranks = ranks
        self.stage = job.settings
        training = job.training
        self.data = open_dataset(
            training, job.manifest, job.init_model, Workspace(job.workspace), sources=job.sources
        )
        if self.data.fingerprint != job.samples:
            raise TrainingFailed(
                "the samples changed since this run was started",
                where=job.manifest,
                found=f"{len(self.data)} samples, fingerprint {self.data.fingerprint}",
                expected=f"fingerprint {job.samples}",
                do="start a new run, or restore the latent cache",
            )
        self.dtype = getattr(torch, training.dtype)
        self.scheduler = check_scheduler(load_scheduler(job.init_model))
        self.num_timesteps = int(cast("Any", self.scheduler.config).num_train_timesteps)
        model = load_transformer(job.init_model, **training.model.scene_settings)
        model.train()
        model.checkpoint_every = training.activation_checkpointing
        model.set_sequence_group(ranks.sequence_group)
        if training.compile_blocks:
            model.compile_blocks()
        trained = choose_trainable(model, training)
        self.model = model
        self.engine = start_deepspeed(
            model, deepspeed_config(training, self.stage, job.run_dir if ranks.is_first else None)
        )
        self.state = ShardedState(self.engine, ranks.rank, ranks.world_size)
        decay = self.stage.ema_decay
        self.average = MovingAverage(self.state, decay) if decay else None
        self.reader = StepReader(self.data, self.stage, ranks, self.num_timesteps)
        self.step = self._resume()
        self.clipped_norm = ClippedNorm(self.engine, ranks)
        self.meter = Meter(model.config, self.stage, training, ranks, self.num_timesteps)
        self.validation = Validation.open(job, self.scheduler, ranks, self.num_timesteps)
        log.info("ready samples=%d trained_values=%d step=%d", len(self.data), trained, self.step)

    def _resume(self) -> int:
        """Load the newest whole checkpoint; returns the number of steps done."""
        found = newest_complete(self.job.checkpoints)
        if found is None:
            return 0
        stored = StoredState(found[1])
        step = stored.load_into(self.state, self.average)
        self.reader.bad = set(stored.record["bad_samples"])
        log.info("resumed step=%d", step)
        return step

    def run_step(self) -> dict[str, Any]:
        """One optimizer step; returns its line of metrics."""
        self.meter.start()
        plan, readings = self.reader.read(self.step)
        # only a model with dropout draws from it; no step depends on what ran before
        torch.manual_seed(draw_int("torch", self.stage.seed, self.step, self.ranks.share))
        lr = learning_rate(self.stage, self.step)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        norm: float | None = None
        for reading in readings:
            self._micro_batch(plan, reading)
            if self.engine.is_gradient_accumulation_boundary():
                norm = plain_grad_norm(self.engine)
            self.engine.step()
        clipped = self.clipped_norm.take()
        self.step += 1
        if self.average is not None:
            self.average.update(self.step)
        zero_norm = self.engine.get_global_grad_norm()
        line: dict[str, Any] = {
            "step": self.step,
            **self.meter.line(plan, self.reader.waited_s),
            "lr": lr,
            "grad_norm": float(zero_norm) if zero_norm is not None else norm,
            "grad_norm_clipped": clipped,
        }
        self._check(line["loss"], plan)
        self.reader.settle(plan)
        if self.reader.bad:
            line["bad_samples"] = len(self.reader.bad)
        if self.validation is not None and self.step % self.stage.validate_every == 0:
            line |= self.validation.losses(self.engine, self.dtype)
        return line

    def _micro_batch(self, plan: StepPlan, reading: Reading) -> None:
        losses: list[Tensor] = []
        for batch in reading.batches:
            losses.append(self._losses(batch))
            self.meter.add(batch, losses[-1])
        if not losses:  # every rank must take part in a backward pass, with whatever can be read
            losses.append(0.0 * self._losses(self.reader.any_batch(plan)))
        self.engine.backward(scaled_loss(losses, self.stage.micro_batch_size))

    def _losses(self, batch: Batch) -> Tensor:
        on_device = batch.to(self.ranks.device, self.dtype)
        return diffusion_losses(
            self.engine,
            self.scheduler,
            on_device.latents,
            on_device.text,
            on_device.noise,
            on_device.timestep,
            batch.scene_frames,
            on_device.generated,
        )

    def _check(self, loss: float, plan: StepPlan) -> None:
        if not math.isfinite(loss):
            ids = sorted({self.data.samples[d.index].sample_id for d in plan.draws})
            raise TrainingFailed(
                "the loss is not finite",
                where=f"step {plan.step + 1}, samples {', '.join(ids)}",
                found=loss,
                expected="a finite number",
                do="lower lr or max_grad_norm; the last checkpoint holds the last good state",
            )

    def record(self) -> dict[str, Any]:
        """What a checkpoint says of itself."""
        return {
            "world_size": self.ranks.world_size,
            "zero_stage": self.job.training.zero_stage,
            "config": self.job.training.hash(),
            "bad_samples": sorted(self.reader.bad),
        }


def train(job: Job, stop: StopRequest) -> int:
    """Train to the end or until asked to stop; returns the exit code."""
    joined = Ranks.joined(job.training.sequence_parallel)
    with joined as ranks, _only_one(job.run_dir, ranks):
        if ranks.is_first:
            remove_partial(job.checkpoints)
            newest = newest_complete(job.checkpoints)
            keep_until(job.run_dir / METRICS, newest[0] if newest else 0)
        ranks.barrier()
        trainer = Trainer(job, ranks)
        stage = trainer.stage
        saver = Saver(
            job.checkpoints,
            ranks.rank,
            ranks.world_size,
            stage.keep_checkpoints,
            stage.keep_every,
        )
        log.info("start stage=%s step=%d of=%d", job.stage, trainer.step, stage.steps)
        with Monitors(job, trainer.engine, ranks) as monitors, _saved_whole(saver):
            while trainer.step < stage.steps:
                line = trainer.run_step()
                monitors.write(line)
                stopping = ranks.any(bool(stop)) and trainer.step < stage.steps
                due = trainer.step % stage.checkpoint_every == 0
                if due or stopping or trainer.step == stage.steps:
                    saver.start(trainer.step, trainer.state, trainer.average, trainer.record())
                if stopping:
                    saver.wait()
                    ranks.barrier()
                    log.info("interrupted step=%d", trainer.step)
                    return EXIT_INTERRUPTED
            saver.wait()
        ranks.barrier()
        if ranks.is_first:
            newest = newest_complete(job.checkpoints)
            assert newest is not None, "the last step was saved"
            export_checkpoint(job, newest[1], job.run_dir / MODEL)
        ranks.barrier()
        log.info("end stage=%s step=%d", job.stage, trainer.step)
    return 0


@contextmanager
def _saved_whole(saver: Saver) -> Generator[None]:
    """Leave no thread waiting for other ranks when this one fails."""
    try:
        yield
    except BaseException:
        saver.abandon()
        raise


@contextmanager
def _only_one(run_dir: Path, ranks: Ranks) -> Generator[None]:
    """Hold the run's lock, so that two processes never write the same run."""
    with (run_dir / "lock").open("w") as lock:
        deadline = time.monotonic() + LOCK_WAIT_S
        while ranks.is_first:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise TrainingFailed(
                        "another process is training this run",
                        where=run_dir,
                        do="wait for it to end, or stop it",
                    ) from error
                time.sleep(0.5)
        ranks.barrier()
        yield


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the child process."""
    parser = argparse.ArgumentParser(description="One rank of a training run.")
    parser.add_argument("--job", type=Path, required=True)
    parser.add_argument("--parent-pid", type=int, default=None)
    parser.add_argument("--stop-file", type=Path, default=None)
    parser.add_argument("--local_rank", type=int, default=0, help="given by the launcher")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    job = Job.model_validate_json(args.job.read_text(encoding="utf-8"))
    stop = StopRequest(args.stop_file, args.parent_pid)
    try:
        os.environ.update(ranks_environment(os.environ))
        return train(job, stop)
    except TriptychError as error:
        log.error("failed rank=%s error=%s", os.environ.get("RANK", "0"), error)
        return EXIT_GAVE_UP


if __name__ == "__main__":
    sys.exit(main())
