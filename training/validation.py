"""The validation loss: held-out samples, always with the same noise and timesteps."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.schedulers.scheduling_ddim_cogvideox import CogVideoXDDIMScheduler

from schemas.errors import ManifestError, TrainingFailed
from schemas.layout import Workspace
from training.data import StepPlan, validation_plan
from training.datasets import SampleDataset, open_dataset
from training.diffusion import diffusion_losses
from training.engine import Ranks
from training.job import Job


class Validation:
    """Takes the loss over the manifest's ``val`` split.

    Args:
        data: Held-out samples.
        plans: What is taken, by the name in the metrics.
        scheduler: The base model's.
        ranks: All ranks; they share the rows.
    """

    def __init__(
        self,
        data: SampleDataset,
        plans: dict[str, StepPlan],
        scheduler: CogVideoXDDIMScheduler,
        ranks: Ranks,
    ) -> None:
        self._data = data
        self._plans = plans
        self._scheduler = scheduler
        self._ranks = ranks

    @classmethod
    def open(
        cls, job: Job, scheduler: CogVideoXDDIMScheduler, ranks: Ranks, num_timesteps: int
    ) -> Validation | None:
        """The validation of a run; None where the config asks for none.

        Raises:
            ManifestError: The manifest has no held-out samples.
        """
        stage = job.settings
        if not stage.validate_every:
            return None
        workspace = Workspace(job.workspace)
        data = open_dataset(
            job.training, job.manifest, job.init_model, workspace, "val", job.sources
        )
        if not len(data):
            raise ManifestError(
                "there is nothing to validate on",
                where=job.manifest,
                found="no usable sample in split 'val'",
                do="set validate_every=0, or curation.manifests' share of held-out sources higher",
            )
        plans = {"validation_loss": validation_plan(stage, len(data), num_timesteps, False)}
        if stage.conditional_p:
            conditional = validation_plan(stage, len(data), num_timesteps, True)
            plans["validation_loss_conditional"] = conditional
        return cls(data, plans, scheduler, ranks)

    @torch.no_grad()
    def losses(self, engine: Any, dtype: torch.dtype) -> dict[str, float]:
        """Mean loss of each kind, the same on all ranks.

        Raises:
            TrainingFailed: A held-out sample cannot be read.
        """
        engine.eval()
        found = {name: self._mean(plan, engine, dtype) for name, plan in self._plans.items()}
        engine.train()
        return found

    def _mean(self, plan: StepPlan, engine: Any, dtype: torch.dtype) -> float:
        ranks, count = self._ranks, len(plan.draws)
        total = torch.zeros(())
        # every rank runs the model equally often, or those with parts of it would wait for ever
        for turn in range(-(-count // ranks.shares)):
            row = turn * ranks.shares + ranks.share
            reading = self._data.read(plan, [min(row, count - 1)])
            for error in reading.bad.values():
                raise TrainingFailed(
                    "a held-out sample cannot be read", where="validation", found=error
                ) from error
            batch = reading.batches[0].to(ranks.device, dtype)
            loss = diffusion_losses(
                engine,
                self._scheduler,
                batch.latents,
                batch.text,
                batch.noise,
                batch.timestep,
                batch.scene_frames,
                batch.generated,
            )
            if row < count:
                total += loss.sum().cpu()
        return float(ranks.sum(total)) / ranks.sequence_parallel / count
