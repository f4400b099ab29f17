"""What a batch is to make: every good prompt row with its content key, and what it costs.

The key holds all that decides a video's pixels. How it is computed (actors, threads, micro-batch,
offload, caches that are exact) is not in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curation.inputs import uris
from inference.outputs import VideoFiles, finished_sha256
from inference.prompts import read_prompts
from inference.story import Story
from inference.texts import text_cache
from schemas.config import TriptychConfig
from schemas.errors import CheckpointError, InputError, ManifestError
from schemas.layout import Workspace
from schemas.rows import Generation, Prompt, Reject, stable_id
from schemas.storage import fingerprint, fingerprint_file
from training.base_model import model_sha256
from training.cache import LatentCache
from training.cost import Tokens, layer_flops, outside_flops, read_skeleton

STAGE = "generate"
SAMPLER_VERSION = "2"
"""Part of every content key. Raise it when a change of code changes the videos."""


@dataclass(frozen=True)
class Job:
    """One good prompt row with all that decides its video.

    Attributes:
        story: What is to be made.
        key: All that decides the pixels, JSON-able: the video's provenance.
        files: Where the video goes.
        planned: The row it will have if all goes well, but for ``video_sha256``.
    """

    story: Story
    key: dict[str, Any]
    files: VideoFiles
    planned: Generation


@dataclass(frozen=True)
class Plan:
    """A batch before anything is loaded.

    Attributes:
        jobs: In the order of the manifest.
        rejects: Bad rows.
        finished: SHA-256 of the videos that are there already, by number of the job.
        flops: What each job costs to denoise.
        cache: Where encoded texts lie.
        model_sha256: Fingerprint of the model folder.
    """

    jobs: list[Job]
    rejects: list[Reject]
    finished: dict[int, str]
    flops: list[float]
    cache: LatentCache
    model_sha256: str

    @property
    def missing(self) -> list[int]:
        """Numbers of the jobs that have no video yet."""
        return [i for i in range(len(self.jobs)) if i not in self.finished]


def plan_batch(config: TriptychConfig, model_dir: Path, workspace: Workspace) -> Plan:
    """Check every row of the manifest, and look what is there already.

    Raises:
        InputError: The manifest cannot be read.
        ManifestError: None of its rows is usable.
        CheckpointError: The model folder is missing, or is none.
    """
    manifest = Path(config.generation.prompts)
    prompts, rejects = read_prompts(manifest, config)
    if not prompts:
        lines = "; ".join(f"{r.detail} ({r.reason})" for r in rejects[:5]) or "no rows"
        raise ManifestError("no row of the prompt manifest is usable", where=manifest, found=lines)
    if not (model_dir / "model_index.json").is_file():
        raise CheckpointError(
            "the model folder is not there",
            where=model_dir,
            expected="a folder with model_index.json",
            do="train a model first, or give its folder in generation.model",
        )
    transformer = dict(read_skeleton(model_dir).config)
    sha256 = model_sha256(model_dir)
    jobs = [_job(prompt, config, sha256, workspace) for prompt in prompts]
    absolute = Workspace(workspace.root.absolute())
    cache = text_cache(config, model_dir.absolute(), absolute, transformer)
    _, height, width = cache.frame_shape
    costs: dict[Any, float] = {}
    for job in jobs:
        if job.story.shape not in costs:
            kv_cache = config.generation.kv_cache
            frames = [cache.encoded_frames(n) for n in job.story.frames]
            costs[job.story.shape] = story_flops(
                transformer, job.story, frames, height, width, kv_cache
            )
    flops = [costs[job.story.shape] for job in jobs]
    return Plan(jobs, rejects, _finished(jobs, config), flops, cache, sha256)


def story_flops(
    transformer_config: Mapping[str, Any],
    story: Story,
    frames: Sequence[int],
    height: int,
    width: int,
    kv_cache: bool,
) -> float:
    """FLOPs of denoising a story: all passes, steps and both sides of guidance.

    Args:
        transformer_config: The transformer's.
        story: What is made.
        frames: Latent frames of each scene.
        height: Of latents.
        width: Of latents.
        kv_cache: Whether keys and values of clean scenes are kept.
    """

    def forward(scenes: Sequence[int]) -> float:
        text_tokens = transformer_config["max_text_seq_length"]
        tokens = Tokens.of(transformer_config, scenes, height, width, text_tokens)
        layers = layer_flops(transformer_config, tokens) * transformer_config["num_layers"]
        return (layers + outside_flops(transformer_config, tokens)).total

    # Clean scenes see only each other there, so a pass with their keys and values at hand is one
    # over all scenes less one over them.
    cached = kv_cache and transformer_config["mask"] == "scene_causal"
    step = 0.0 if all(story.given[: story.together]) else forward(frames[: story.together])
    for scene in range(story.together, len(frames)):
        context = frames[max(0, scene - story.sampling.context_scenes) : scene]
        step += forward([*context, frames[scene]]) - (forward(context) if cached else 0.0)
    return step * story.sampling.steps * (2 if story.sampling.guidance > 1 else 1)


def _job(prompt: Prompt, config: TriptychConfig, sha256: str, workspace: Workspace) -> Job:
    story = Story.of(prompt, config)
    key = _key(story, config, sha256)
    generation_id = stable_id("generation", fingerprint(key))
    shape, sampling = config.training.model, story.sampling
    planned = Generation(
        generation_id=generation_id,
        prompt_id=story.prompt_id,
        status="done",
        video_uri=str(VideoFiles.of(workspace, generation_id).video),
        video_sha256="",
        prompts=list(story.prompts),
        negative_prompts=list(story.negative_prompts),
        seeds=list(story.seeds),
        num_scenes=len(story.prompts),
        given_scenes=sum(map(bool, story.given)),
        extended_scenes=len(story.prompts) - story.together,
        scene_frames=list(story.frames),
        num_frames=sum(story.frames),
        width_px=shape.width_px,
        height_px=shape.height_px,
        fps=config.generation.fps,
        scheduler=sampling.scheduler,
        steps=sampling.steps,
        guidance=sampling.guidance,
        model_sha256=sha256,
        error="",
    )
    files = VideoFiles.of(Workspace(workspace.root.absolute()), generation_id)
    return Job(story, {"generation_id": generation_id, **key}, files, planned)


def _key(story: Story, config: TriptychConfig, sha256: str) -> dict[str, Any]:
    shape, generation = config.training.model, config.generation
    extended = len(story.prompts) > story.together
    sampling = story.sampling.model_dump()
    # Settings that cannot matter to this story are not part of it.
    if not extended:
        del sampling["context_scenes"]
    if not extended and not any(story.given):
        del sampling["condition_noise"]
    if sampling["guidance"] <= 1 or len(story.prompts) == 1 or not sampling["scene_guidance"]:
        del sampling["scene_guidance"]
    return {
        "prompt_id": story.prompt_id,
        "prompts": story.prompts,
        "negative_prompts": story.negative_prompts,
        "seeds": story.seeds,
        "frames": story.frames,
        "together": story.together,
        "given": [uri and _content(uri) for uri in story.given],
        **sampling,
        "fps": generation.fps,
        "width_px": shape.width_px,
        "height_px": shape.height_px,
        "dtype": config.training.dtype,
        "quantize": generation.quantize,
        "vae_tiling": generation.vae_tiling,
        "step_cache": generation.step_cache,
        "model_sha256": sha256,
        "sampler_version": SAMPLER_VERSION,
    }


def _content(uri: str) -> str:
    """What a given video is known by: its bytes, wherever they lie."""
    try:
        return fingerprint_file(uris.path_of(uri) or Path(uri))
    except OSError as error:
        raise InputError(
            "a given video cannot be read",
            where=uri,
            found=error.strerror,
            do="run again: rows whose videos are missing are then rejected",
        ) from error


def _finished(jobs: Sequence[Job], config: TriptychConfig) -> dict[int, str]:
    """SHA-256 of every video that is there and whole, by number of its job."""
    with ThreadPoolExecutor() as pool:  # hashing leaves Python alone
        found = list(pool.map(lambda job: is_finished(job, config), jobs))
    return {number: sha256 for number, sha256 in enumerate(found) if sha256 is not None}


def is_finished(job: Job, config: TriptychConfig) -> str | None:
    """SHA-256 of a job's video if it is there with all that is asked for, else None."""
    asked = config.generation.model_dump(include={"save_frames", "save_scenes", "save_latents"})
    return finished_sha256(job.files, **asked)
