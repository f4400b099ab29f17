"""What a worker does: encode texts, load the model once, make videos. Nothing here needs Ray.

Two tasks may be at work at a time, each called in a thread of its own: while one is denoised, the
scenes of the one before are decoded and written. Every thread computes with the configured number
of CPU threads, so a video's bytes do not depend on where it was made.

Legend: B stories, F latent frames of a scene, C channels, H W latent height and width.
"""

from __future__ import annotations

import gc
import logging
import re
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from curation.inputs import uris
from curation.isolation import run_isolated
from inference.extension import generate_scenes
from inference.outputs import VideoWriter
from inference.pipeline import Mask2DiTPipeline
from inference.plan import Job
from inference.prepare import prepare
from inference.schedule import IN_FLIGHT, Failure
from inference.story import Story
from inference.texts import read_texts, text_encoder
from schemas.config import TriptychConfig
from schemas.errors import TriptychError
from training.cache import LatentCache
from training.latents import Encoder
from training.shards import Shards

log = logging.getLogger(__name__)

PACKAGES = ("triptych", "torch", "diffusers", "transformers", "av")
"""Their versions are part of a video's provenance."""

_OUT_OF_MEMORY = re.compile(r"not enough memory|can't allocate memory|out of memory", re.IGNORECASE)
"""What torch says on the CPU, and other libraries on the GPU, in place of OutOfMemoryError."""

Scenes = SimpleQueue[Tensor | Exception | None]
"""Latents (1, F, C, H, W) of a story's scenes as they are done; then None, or what went wrong."""


class Stopped(Exception):
    """The run is being ended."""


class VideoMaker:
    """Makes videos with one copy of the model.

    Args:
        config: The sections generation, training and curation are used.
        model_dir: Model folder.
        cache: Where encoded texts lie.
    """

    def __init__(self, config: TriptychConfig, model_dir: Path, cache: LatentCache) -> None:
        self._config = config
        self._model_dir = model_dir
        self._cache = cache
        self._encoder: Encoder | None = None
        self._denoising: AbstractContextManager[Any] = threading.Lock()
        # Offloading moves the pieces of a model to and fro, so only one may be in use.
        alone = config.generation.offload != "none"
        self._decoding = self._denoising if alone else threading.Lock()
        self._stopping = threading.Event()

    def encode(self, texts: Sequence[str]) -> None:
        """Write a shard of encoded texts."""
        torch.set_num_threads(self._config.generation.threads)
        self._encoder = self._encoder or text_encoder(self._cache, self._config)
        self._encoder.write_captions(texts)

    def load(self) -> None:
        """Load the model, without its text encoder; all texts are encoded.

        Raises:
            CheckpointError: It does not load.
            ConfigError: A setting does not go with this machine or model.
        """
        generation = self._config.generation
        torch.set_num_threads(generation.threads)
        self._encoder = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._shards = Shards(self._cache.caption_folder)
        dtype: torch.dtype = getattr(torch, self._config.training.dtype)
        self._pipeline = Mask2DiTPipeline.from_pretrained(
            self._model_dir, torch_dtype=dtype, text_encoder=False
        )
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        prepare(self._pipeline, generation, device)
        self._writers = ThreadPoolExecutor(
            IN_FLIGHT * generation.micro_batch,
            "writer",
            torch.set_num_threads,
            (generation.threads,),
        )

    def make(self, jobs: Sequence[Job]) -> list[str | Failure]:
        """Make the videos of stories of one shape.

        Returns:
            For each the SHA-256 of its mp4, or why there is none.
        """
        torch.set_num_threads(self._config.generation.threads)
        scenes: list[Scenes] = [SimpleQueue() for _ in jobs]
        with self._denoising:
            started = time.monotonic()
            # here and not where films are written: tokenizers do not bear several threads
            cut = set(self._pipeline.truncated_prompts([t for j in jobs for t in j.story.texts]))
            films = [
                self._writers.submit(self._write, job, queue, cut, started)
                for job, queue in zip(jobs, scenes, strict=True)
            ]
            end: Exception | None = None
            try:
                self._denoise([job.story for job in jobs], scenes)
            except Exception as error:
                end = error
            for queue in scenes:
                queue.put(end)
        outcomes = [_outcome(film) for film in films]
        if any(isinstance(o, Failure) and o.kind == "memory" for o in outcomes):
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return outcomes

    def stop(self) -> None:
        """End what is being made as soon as a denoising step is over."""
        self._stopping.set()

    def _denoise(self, stories: Sequence[Story], scenes: Sequence[Scenes]) -> None:
        shape = self._config.training.model
        given = [
            {i: self._read_given(uri, story.frames[i]) for i, uri in enumerate(story.given) if uri}
            for story in stories
        ]
        for _, latents in generate_scenes(
            self._pipeline,
            stories,
            height=shape.height_px,
            width=shape.width_px,
            texts=read_texts(self._cache, self._shards, stories),
            given=given if any(given) else (),
            kv_cache=self._config.generation.kv_cache,
            on_step=self._on_step,
        ):
            for queue, story in zip(scenes, latents.split(1), strict=True):
                queue.put(story)

    def _on_step(self, done: int, total: int) -> None:
        log.debug("step=%d steps=%d", done, total)
        if self._stopping.is_set():
            raise Stopped

    def _read_given(self, uri: str, frames: int) -> Tensor:
        """Clean latents (F, C, H, W) of a given scene: the first frames of a video file."""
        shape, limits = self._config.training.model, self._config.curation.shots
        size = {"height_px": shape.height_px, "width_px": shape.width_px, "mode": "cover"}
        job = {"path": str(uris.path_of(uri)), "frame_numbers": list(range(frames)), **size}
        pixels = run_isolated(
            "curation.jobs:read_clip",
            job,
            timeout_s=limits.timeout_s,
            memory_mb=limits.memory_mb,
        )
        return self._pipeline.encode_video(pixels)

    def _write(self, job: Job, scenes: Scenes, cut: set[str], started: float) -> str:
        """Decode and write the scenes of one story as they come."""
        generation = self._config.generation
        provenance = {
            **job.key,
            "num_frames": job.planned.num_frames,
            "truncated_prompts": [text for text in job.story.texts if text in cut],
            "versions": {name: version(name) for name in PACKAGES},
        }
        saved = generation.model_dump(include={"save_frames", "save_scenes", "save_latents"})
        with VideoWriter(
            job.files, generation.fps, job.story.prompts, provenance, **saved
        ) as video:
            while (latents := scenes.get()) is not None:
                if isinstance(latents, Exception):
                    raise latents
                with self._decoding:
                    frames = self._pipeline.decode_scene(latents)[0]
                video.add_scene(frames, latents[0])
            return video.finish(time.monotonic() - started)


def _outcome(film: Future[str]) -> str | Failure:
    try:
        return film.result()
    except Exception as error:
        failure = failure_of(error)
        if failure.kind == "error":  # nobody foresaw it, so where it came from matters
            log.exception("video state=failed")
        return failure


def failure_of(error: BaseException) -> Failure:
    """An error as a failure of its row; the reason is the error's own, or its class."""
    name = type(error).__name__
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=.)(?=[A-Z][a-z])", "_", name).lower()
    text = " ".join(f"{name}: {error}".split())[:2000]
    no_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    if no_memory or (isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error))):
        return Failure("memory", "out_of_memory", text)
    if isinstance(error, Stopped):
        return Failure("final", "stopped", "the run was ended")
    if isinstance(error, TriptychError):  # it would come again
        return Failure("final", str(getattr(error, "reason", "")) or snake, str(error))
    return Failure("error", snake, text)
