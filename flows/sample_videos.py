"""Sample videos while a stage trains: held-out stories, always the same, from its checkpoints."""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path

import torch

from inference.outputs import VideoFiles, VideoWriter
from inference.pipeline import Mask2DiTPipeline
from inference.prepare import prepare
from schemas.config import TriptychConfig
from schemas.rows import Sample
from schemas.storage import mark_done, read_done
from schemas.tables import SAMPLES, read_table
from training.export import export_checkpoint
from training.job import Job

log = logging.getLogger(__name__)

STORIES = 2
"""Stories per checkpoint; their frames, size and steps are the config's."""
FOLDER = "samples"


class SampleVideos:
    """Makes the sample videos of one run, beside its training.

    A checkpoint becomes whole some time after its step, so :meth:`catch_up` is called now and then
    and makes what is missing. Where the training has the only GPU, both share it. What goes wrong
    here (memory, a checkpoint removed meanwhile) is logged and costs that step's videos, never the
    training.

    Args:
        config: ``generation`` says how videos are made.
        run_dir: Folder of the run.
        every: Steps between videos; 0 = none.
    """

    def __init__(self, config: TriptychConfig, run_dir: Path, every: int) -> None:
        self._config = config
        self._run_dir = run_dir
        self._every = every
        self._given_up: set[Path] = set()

    def catch_up(self) -> list[Path]:
        """Make the videos of every whole checkpoint that is due and has none; returns folders."""
        job_file = self._run_dir / "job.json"
        if not self._every or not job_file.is_file():
            return []
        job = Job.model_validate_json(job_file.read_text(encoding="utf-8"))
        made: list[Path] = []
        for checkpoint in sorted(job.checkpoints.glob("step_*")):
            record = read_done(checkpoint)
            target = self._run_dir / FOLDER / checkpoint.name
            if record is None or int(record["step"]) % self._every or target in self._given_up:
                continue
            if read_done(target) is not None:
                continue
            try:
                self._make(job, checkpoint, int(record["step"]), target)
                made.append(target)
            except Exception:
                self._given_up.add(target)
                log.exception("sample_videos failed=true folder=%s", target)
        return made

    def _make(self, job: Job, checkpoint: Path, step: int, target: Path) -> None:
        started = time.monotonic()
        target.mkdir(parents=True, exist_ok=True)
        model = export_checkpoint(job, checkpoint, target / ".model")
        dtype = getattr(torch, job.training.dtype)
        pipeline = Mask2DiTPipeline.from_pretrained(model, torch_dtype=dtype)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        prepare(pipeline, self._config.generation, device)
        for number, sample in enumerate(held_out(job.manifest)):
            self._story(pipeline, job, number, sample, step, target)
        shutil.rmtree(model)
        mark_done(target, {"step": step, "seconds": round(time.monotonic() - started, 3)})
        log.info("sample_videos step=%d folder=%s", step, target)

    def _story(
        self,
        pipeline: Mask2DiTPipeline,
        job: Job,
        number: int,
        sample: Sample,
        step: int,
        target: Path,
    ) -> None:
        begun = time.monotonic()
        sampling, shape = self._config.generation, job.training.model
        prompts = [scene.caption for scene in sample.scenes]
        output = pipeline(
            prompts,
            frames=shape.frames,
            height=shape.height_px,
            width=shape.width_px,
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance,
            use_dynamic_cfg=sampling.dynamic_guidance,
            guidance_rescale=sampling.guidance_rescale,
            scene_guidance=sampling.scene_guidance,
            seed=number,
        )
        assert output.frames is not None, "frames were asked for"
        provenance = {
            "prompt_id": sample.sample_id,
            "run": job.run_dir.name,
            "step": step,
            "prompts": prompts,
            "seed": number,
        }
        files = VideoFiles(target, f"story_{number}")
        with VideoWriter(files, sampling.fps, prompts, provenance) as out:
            for frames in output.frames:
                out.add_scene(frames[0])
            out.finish(time.monotonic() - begun)


def held_out(manifest: Path) -> list[Sample]:
    """The first stories of the manifest's ``val`` split, or of ``train`` where that is empty."""
    samples = read_table(manifest, SAMPLES)
    split = "val" if any(s.split == "val" for s in samples) else "train"
    return [s for s in samples if s.split == split][:STORIES]
