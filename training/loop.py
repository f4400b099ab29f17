"""One rank of a training: ``python -m training.loop --job job.json``, started by DeepSpeed.

Resumes from the newest whole checkpoint, trains to the last step, and exports the model. On
SIGTERM, or when the process that started the training is gone, it saves a checkpoint after the
current step and exits with ``EXIT_INTERRUPTED``.
"""

from __future__ import annotations

import argparse
import fcntl
import json
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
from training.base_model import load_scheduler
from training.cache import LatentCache
from training.checkpoints import (
    STATE,
    commit,
    export_model,
    newest_complete,
    partial_folder,
    remove_partial,
)
from training.data import LatentDataset, StepPlan, plan_step
from training.deepspeed_config import deepspeed_config, learning_rate
from training.diffusion import check_scheduler, diffusion_loss
from training.engine import Ranks, full_weights, load_checkpoint, start_deepspeed
from training.job import EXIT_INTERRUPTED, METRICS, MODEL, Job
from training.metrics import keep_until
from training.weights import load_transformer

log = logging.getLogger("training.loop")  # __name__ is "__main__" here

LOCK_WAIT_S = 120.0
"""How long to wait for an earlier process of the same run, which stops after its current step."""


class StopRequest:
    """Whether this rank was asked to stop: by SIGTERM, or by the death of its parent."""

    def __init__(self, parent_pid: int | None) -> None:
        self._asked = False
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
        return self._asked or self._parent_is_gone()

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
        cache = LatentCache(
            Workspace(job.workspace), job.init_model, job.training.model, job.training.dtype
        )
        self.data = LatentDataset.open(job.manifest, cache)
        if self.data.fingerprint != job.samples:
            raise TrainingFailed(
                "the samples changed since this run was started",
                where=job.manifest,
                found=f"{len(self.data)} samples, fingerprint {self.data.fingerprint}",
                expected=f"fingerprint {job.samples}",
                do="start a new run, or restore the latent cache",
            )
        self.dtype = getattr(torch, job.training.dtype)
        self.scheduler = check_scheduler(load_scheduler(job.init_model))
        self.transformer = load_transformer(job.init_model, **job.training.model.scene_settings)
        self.transformer.train()
        if job.training.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        self.engine = start_deepspeed(
            self.transformer, deepspeed_config(job.training, self.stage, ranks.world_size)
        )
        self.step = self._resume()

    def _resume(self) -> int:
        """Load the newest whole checkpoint; returns the number of steps done."""
        found = newest_complete(self.job.checkpoints)
        if found is None:
            return 0
        step, folder = found
        load_checkpoint(self.engine, folder, STATE)
        log.info("resumed step=%d", step)
        return step

    def run_step(self) -> dict[str, Any]:
        """One optimizer step; returns its line of metrics."""
        started = time.monotonic()
        num_timesteps = int(cast("Any", self.scheduler.config).num_train_timesteps)
        plan = plan_step(self.step, self.stage, len(self.data), num_timesteps)
        lr = learning_rate(self.stage, self.step)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        losses: list[Tensor] = []
        grad_norm: float | None = None
        for rows in self.ranks.micro_batches(self.stage):
            loss = self._loss(plan, rows)
            losses.append(loss.detach())
            self.engine.backward(loss)
            grad_norm = self.ranks.plain_grad_norm(self.engine)
            self.engine.step()
        loss = self.ranks.mean(torch.stack(losses).mean())
        self._check(loss, plan)
        norm = self.engine.get_global_grad_norm()
        self.step += 1
        seconds = time.monotonic() - started
        return {
            "step": self.step,
            "loss": loss,
            "conditional": plan.conditional,
            "lr": lr,
            "grad_norm": float(norm) if norm is not None else grad_norm,
            "samples_per_s": round(self.stage.batch_size / seconds, 4),
            "seconds": round(seconds, 4),
        }

    def _loss(self, plan: StepPlan, rows: Sequence[int]) -> Tensor:
        batch = self.data.batch(plan, rows).to(self.ranks.device, self.dtype)
        return diffusion_loss(
            self.engine,
            self.scheduler,
            batch.latents,
            batch.text,
            batch.noise,
            batch.timestep,
            self.data.scene_frames,
            batch.generated,
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

    def save(self) -> None:
        """Write a checkpoint of the current step, whole or not at all."""
        partial = partial_folder(self.job.checkpoints, self.step)
        self.engine.save_checkpoint(str(partial), tag=STATE, save_latest=False)
        self.ranks.barrier()
        if self.ranks.is_first:
            record = {"world_size": self.ranks.world_size, "config": self.job.training.hash()}
            commit(self.job.checkpoints, self.step, record, self.stage.keep_checkpoints)
        self.ranks.barrier()

    def export(self) -> None:
        """Write the trained model folder."""
        weights = full_weights(self.transformer)
        if self.ranks.is_first:
            target = self.job.run_dir / MODEL
            export_model(self.transformer, weights, self.job.init_model, target)
        self.ranks.barrier()


def train(job: Job, stop: StopRequest) -> int:
    """Train to the end or until asked to stop; returns the exit code."""
    with Ranks.joined() as ranks, _only_one(job.run_dir, ranks):
        if ranks.is_first:
            remove_partial(job.checkpoints)
            newest = newest_complete(job.checkpoints)
            keep_until(job.run_dir / METRICS, newest[0] if newest else 0)
        ranks.barrier()
        trainer = Trainer(job, ranks)
        steps = trainer.stage.steps
        log.info("start stage=%s step=%d of=%d", job.stage, trainer.step, steps)
        with (job.run_dir / METRICS).open("a", encoding="utf-8") as metrics:
            while trainer.step < steps:
                line = trainer.run_step()
                if ranks.is_first:
                    metrics.write(json.dumps(line) + "\n")
                    metrics.flush()
                stopping = ranks.any(bool(stop)) and trainer.step < steps
                due = trainer.step % trainer.stage.checkpoint_every == 0
                if due or stopping or trainer.step == steps:
                    trainer.save()
                if stopping:
                    log.info("interrupted step=%d", trainer.step)
                    return EXIT_INTERRUPTED
        trainer.export()
        log.info("end stage=%s step=%d", job.stage, trainer.step)
    return 0


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
    parser.add_argument("--local_rank", type=int, default=0, help="given by the launcher")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    stop = StopRequest(args.parent_pid)
    try:
        return train(Job.model_validate_json(args.job.read_text(encoding="utf-8")), stop)
    except TriptychError as error:
        log.error("failed rank=%s error=%s", os.environ.get("RANK", "0"), error)
        return 1


if __name__ == "__main__":
    sys.exit(main())
