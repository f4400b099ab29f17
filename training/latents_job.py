"""Encode a manifest once: every distinct scene through the VAE, every distinct caption through T5.

Training then reads latents and never touches video, VAE or text encoder. Runs are incremental: what
is in the cache is reused, what failed is tried again. A scene that cannot be read ends as a reject,
with its id and reason.

The only file of training that imports Ray, and only for several workers. Each is given one shard at
a time and writes it itself, so whatever is killed, finished shards stay. What is in a shard does
not depend on who wrote it.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from schemas.config.root import EngineConfig
from schemas.config.training import TrainingConfig
from schemas.counts import StageCount, count_reasons
from schemas.errors import ConfigError, ExternalToolError, TriptychError
from schemas.layout import Workspace
from schemas.rows import Reject, Scene
from training.cache import LatentCache, training_samples
from training.latents import Encoder, FrameReader
from training.shards import Shards

log = logging.getLogger(__name__)

STAGE = "latents"

MAX_RESTARTS = 3
"""Of one Ray worker that died, and tries again of the shard it was at: as in curation, a shard that
takes its worker along every time must come to an end."""

Kind = Literal["write_scenes", "write_captions"]
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Encoded:
    """What :func:`encode_manifest` did.

    Attributes:
        scenes: Distinct scenes: kept, rejected (too short), failed (unreadable), reused from the
            cache.
        captions: Distinct captions, the empty one included.
        rejects: One row per rejected or failed scene; the record id is the clip's.
    """

    scenes: StageCount
    captions: StageCount
    rejects: list[Reject]


def encode_manifest(
    config: TrainingConfig,
    manifest: Path,
    model: Path,
    workspace: Workspace,
    read: FrameReader,
    on_progress: OnProgress | None = None,
    engine: EngineConfig | None = None,
) -> Encoded:
    """Fill the cache with all that training on ``manifest`` and validating on it reads.

    Args:
        config: Shapes, the type of the stored tensors, workers and shard size.
        manifest: SAMPLES table; its trainable samples of the splits ``train`` and ``val`` are
            encoded.
        model: Model folder with ``vae``, ``tokenizer`` and ``text_encoder``.
        workspace: Whose ``latents`` and ``texts`` caches are filled.
        read: Reads the frames of a scene (:func:`training.latents.scene_reader`).
        on_progress: Called with (scenes done, scenes in all) at the start and after every shard.
        engine: The Ray to use where ``config.latents.workers`` > 1; None = a local one.

    Raises:
        ManifestError: The manifest has nothing to train on.
        CheckpointError: The model folder cannot be loaded.
        ConfigError: Ray has no room for the workers.
        ExternalToolError: Ray does not start, or workers died again and again.
    """
    cache = LatentCache.of(config, model.absolute(), Workspace(workspace.root.absolute()))
    samples = training_samples(manifest, config.model.scenes)
    samples += training_samples(manifest, config.model.scenes, "val")
    scenes = {s.clip_id: s for sample in samples for s in sample.scenes}
    captions = {"", *(s.caption for sample in samples for s in sample.scenes)}
    engine = engine or EngineConfig(num_cpus=config.latents.workers)
    with ExitStack() as at_end:
        work = _Work(config, cache, read, engine, at_end)
        scene_count, rejects = _encode_scenes(work, list(scenes.values()), on_progress)
        caption_count = _encode_captions(work, sorted(captions))
    log.info(
        "encoded scenes=%d rejected=%d failed=%d reused=%d captions=%d captions_reused=%d",
        scene_count.input,
        scene_count.rejected,
        scene_count.failed,
        scene_count.reused,
        caption_count.input,
        caption_count.reused,
    )
    return Encoded(scene_count, caption_count, rejects)


@dataclass(frozen=True)
class _Work:
    config: TrainingConfig
    cache: LatentCache
    read: FrameReader
    engine: EngineConfig
    at_end: ExitStack


def _encode_scenes(
    work: _Work, scenes: list[Scene], on_progress: OnProgress | None
) -> tuple[StageCount, list[Reject]]:
    started = time.monotonic()
    cache = work.cache
    shards = Shards(cache.scene_folder)
    shards.remove_leftovers()
    long_enough = [s for s in scenes if cache.frames(s) is not None]
    missing = [s for s in long_enough if cache.scene_key(s) not in shards]
    missing.sort(key=lambda s: (s.source_id, s.start_pts, s.clip_id))  # neighbours in a file
    done = len(scenes) - len(missing)

    def on_done(count: int) -> None:
        nonlocal done
        done += count
        if on_progress is not None:
            on_progress(done, len(scenes))

    on_done(0)
    _run(work, "write_scenes", missing, on_done)
    shards.look()
    rejects: list[Reject] = []
    for scene in scenes:
        failure = shards.failure(cache.scene_key(scene))
        if cache.frames(scene) is None:
            detail = f"{scene.num_frames} frames, {min(cache.shape.lengths)} needed"
            rejects.append(_reject(scene, "too_few_frames", detail, failed=False))
        elif failure is not None:
            rejects.append(_reject(scene, *failure, failed=True))
    count = StageCount(
        stage=STAGE,
        unit="scene",
        input=len(scenes),
        kept=sum(cache.scene_key(s) in shards for s in long_enough),
        rejected=len(scenes) - len(long_enough),
        failed=sum(r.failed for r in rejects),
        reused=len(long_enough) - len(missing),
        seconds=time.monotonic() - started,
        reasons=count_reasons(r.reason for r in rejects),
    )
    return count.check(), rejects


def _reject(scene: Scene, reason: str, detail: str, *, failed: bool) -> Reject:
    return Reject(
        record_id=scene.clip_id,
        stage=STAGE,
        reason=reason,
        detail=detail,
        uri=scene.uri,
        failed=failed,
    )


def _encode_captions(work: _Work, captions: list[str]) -> StageCount:
    started = time.monotonic()
    cache = work.cache
    shards = Shards(cache.caption_folder)
    shards.remove_leftovers()
    missing = [c for c in captions if cache.caption_key(c) not in shards]
    _run(work, "write_captions", missing, lambda _: None)
    shards.look()
    count = StageCount(
        stage="captions",
        unit="caption",
        input=len(captions),
        kept=sum(cache.caption_key(c) in shards for c in captions),
        reused=len(captions) - len(missing),
        seconds=time.monotonic() - started,
    )
    return count.check()


def _run(
    work: _Work, kind: Kind, items: Sequence[Scene | str], on_done: Callable[[int], None]
) -> None:
    """Write the shards of some items, here or on Ray's workers."""
    size = work.config.latents.shard_scenes
    pieces = [items[i : i + size] for i in range(0, len(items), size)]
    workers = min(work.config.latents.workers, len(pieces))
    if workers > 1:
        _run_on_ray(work, kind, pieces, workers, on_done)
        return
    encoder = Encoder(work.cache, work.read)
    for piece in pieces:
        getattr(encoder, kind)(piece)
        on_done(len(piece))


def _start_ray(work: _Work) -> Any:
    """Ray, stopped in the end if it was started here; training, which comes next, needs the room.

    Raises:
        ExternalToolError: Ray does not start or cannot be reached.
    """
    import ray  # takes seconds; one worker does without

    from curation.pipeline import start_ray, stop_ray

    if not ray.is_initialized():
        work.at_end.callback(stop_ray)
        start_ray(work.engine)
    return ray


def _run_on_ray(
    work: _Work,
    kind: Kind,
    pieces: Sequence[Sequence[Scene | str]],
    workers: int,
    on_done: Callable[[int], None],
) -> None:
    """Give every worker one shard at a time; a dead worker costs the shard it was at."""
    ray = _start_ray(work)
    gpus = _gpus_per_worker(ray.cluster_resources(), workers)
    make = ray.remote(
        num_cpus=1, num_gpus=gpus, max_restarts=MAX_RESTARTS, max_task_retries=MAX_RESTARTS
    )(Encoder)
    actors: list[Any] = [make.remote(work.cache, work.read) for _ in range(workers)]
    idle, waiting, running = deque(actors), deque(pieces), dict[Any, tuple[Any, Any]]()
    try:
        while waiting or running:
            while waiting and idle:
                actor, piece = idle.popleft(), waiting.popleft()
                running[getattr(actor, kind).remote(piece)] = (actor, piece)
            ready, _ = ray.wait(list(running))
            for task in ready:
                actor, piece = running.pop(task)
                try:
                    ray.get(task)
                except ray.exceptions.RayError as error:
                    raise _error(error, piece) from error
                idle.append(actor)
                on_done(len(piece))
    finally:
        for actor in actors:
            ray.kill(actor)


def _gpus_per_worker(found: Mapping[str, float], workers: int) -> int:
    """1 where the cluster has GPUs, else 0.

    Raises:
        ConfigError: There are fewer GPUs, or fewer CPUs, than workers, which would wait for ever.
    """
    kind = "GPU" if found.get("GPU", 0) >= 1 else "CPU"
    if found.get(kind, 0) < workers:
        raise ConfigError(
            f"Ray has fewer {kind}s than there are to be workers that encode",
            where="training.latents.workers",
            found=f"{workers} workers, {found.get(kind, 0):g} {kind}s",
            do="set fewer workers, or give Ray more (engine.num_cpus, engine.ray_address)",
        )
    return int(kind == "GPU")


def _error(error: Exception, piece: Sequence[Scene | str]) -> TriptychError:
    """What a worker's error means: our own as it is, anything else as Ray's."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, TriptychError):
        return cause
    first = piece[0] if isinstance(piece[0], str) else f"clip {piece[0].clip_id}"
    return ExternalToolError(
        "a worker could not encode a shard; what is finished is kept",
        where=f"{len(piece)} items from {first!r} on",
        found=str(error)[:2000],
        do="run again; if it repeats, look at Ray's log files",
    )
