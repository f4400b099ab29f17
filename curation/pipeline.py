"""The wiring of curation to Ray: which pieces of work are missing, and doing them side by side.

The only file of curation that imports Ray. A piece is one row of a Ray Data graph; it holds paths
and small records, never frames, and its worker writes the result itself, atomically, under a
content key. So whatever is killed, finished pieces stay, and a re-run does only the others. What a
worker cannot do comes back as failures in the row's own column, for Ray would drop or repeat whole
blocks.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

os.environ.setdefault(
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0"
)  # read at import: do not ship the folder

import numpy as np
import ray
import ray.data
import ray.exceptions
from ray.data import ActorPoolStrategy, DataContext
from ray.util.annotations import RayDeprecationWarning

from curation.defects import defect
from curation.embeddings import Vector, load_embedder, spread_frames, with_absolute_weights
from curation.inputs.downloads import Downloads
from curation.isolation import run_isolated
from curation.scorers import NamedScorer, load_scorer
from curation.vector_cache import vectors_table, write_captions
from curation.video import Frames, ResizeMode
from schemas.config.curation import EmbeddingConfig, ExportConfig, ScorersConfig, ShotsConfig
from schemas.config.root import EngineConfig
from schemas.errors import ConfigError, ExternalToolError, VideoDecodeError
from schemas.rows import Clip, ClipScore
from schemas.storage import write_json
from schemas.tables import CLIP_SCORES, EMBEDDINGS, Table, write_batches, write_table

log = logging.getLogger(__name__)

R = TypeVar("R")

_MAX_BLOCKS = 1000
"""Rows are spread over at most this many Ray tasks; one per row as long as there are fewer."""

_MAX_RESTARTS = 3
"""Of one Ray worker that died. Ray's own default has no end, so a piece that takes its worker along
every time would be tried for ever; to be restarted on another node after one is lost takes one."""

_before_ray: list[Any] = []
"""The SIGTERM handler there was before Ray started."""


@dataclass(frozen=True)
class Piece:
    """One piece of work: what to do, and the file its result goes to."""

    record_id: str
    path: Path
    payload: Mapping[str, Any]


@dataclass(frozen=True)
class Limits:
    """What the decoding of one video may take."""

    timeout_s: float
    memory_mb: int

    @classmethod
    def of(cls, cfg: ShotsConfig) -> Limits:
        """The configured limits; they hold wherever a video is read."""
        return cls(cfg.timeout_s, cfg.memory_mb)


@dataclass(frozen=True)
class Videos:
    """How a worker gets at videos: fetched where they are remote, decoded in a child process."""

    downloads: Downloads
    limits: Limits

    def opened(self, uri: str, source_id: str | None = None) -> AbstractContextManager[Path]:
        """A local path of a video (``Downloads.opened``)."""
        return self.downloads.opened(uri, source_id)

    def isolated(self, job: str, argument: dict[str, Any]) -> Any:
        """Do one of ``curation.jobs`` where a crash, a hang or a flood costs only this video."""
        return run_isolated(
            f"curation.jobs:{job}",
            argument,
            timeout_s=self.limits.timeout_s,
            memory_mb=self.limits.memory_mb,
        )

    def frames(self, clip: Clip, count: int, size: tuple[int, int], mode: ResizeMode) -> Frames:
        """``count`` frames of a clip, evenly spaced, at ``size`` (height, width) in pixels."""
        with self.opened(clip.uri, clip.source_id) as path:
            job = {
                "path": str(path),
                "frame_numbers": spread_frames(clip.start_frame, clip.num_frames, count),
                "height_px": size[0],
                "width_px": size[1],
                "mode": mode,
                "start": [clip.start_frame, clip.start_pts],
            }
            return self.isolated("read_clip", job)


@dataclass(frozen=True)
class Failure:
    """A record that met an unexpected error."""

    record_id: str
    reason: str
    detail: str


def start_ray(engine: EngineConfig) -> None:
    """Connect to the configured Ray cluster, or start a local one; nothing happens if Ray runs.

    Local Ray processes die with the thread that started them (Linux parent-death signal): call this
    from a thread that outlives the work, such as the main thread.

    Raises:
        ExternalToolError: Ray does not start or cannot be reached.
    """
    if ray.is_initialized():
        return
    local: dict[str, Any] = {}
    if engine.ray_address is None:
        local = {
            "num_cpus": engine.num_cpus,
            "object_store_memory": engine.object_store_mb * 1024 * 1024,
            "include_dashboard": False,
        }
    log.info("engine=ray state=starting address=%s", engine.ray_address or "local")
    _before_ray.append(signal.getsignal(signal.SIGTERM))
    try:
        ray.init(
            address=engine.ray_address or "local",
            log_to_driver=False,
            logging_level=logging.ERROR,
            **local,
        )
    except Exception as error:  # a node too slow to start is told with a plain Exception
        raise ExternalToolError(
            "Ray does not start"
            if engine.ray_address is None
            else "the Ray cluster does not answer",
            where=f"engine.ray_address {engine.ray_address!r}",
            found=error,
            do="look at Ray's log files, or check the address",
        ) from error
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False  # pyright: ignore[reportAttributeAccessIssue]
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def stop_ray() -> None:
    """Stop the local Ray, or leave the cluster, and give SIGTERM back to whom it belonged."""
    ray.shutdown()
    # Ray leaves a handler behind that ends the process; training, later in the same process, saves
    # a checkpoint first.
    if _before_ray and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _before_ray[0])
    _before_ray.clear()


def probe_sources(
    pieces: Sequence[Piece], downloads: Downloads, limits: Limits, engine: EngineConfig
) -> list[Failure]:
    """Probe files. Payload: ``uri``. Writes JSON ``{"source": ...}`` or ``{"reject": ...}``."""
    return _run(pieces, _Probe, engine, {"videos": Videos(downloads, limits)})


def find_shots(
    pieces: Sequence[Piece],
    downloads: Downloads,
    cfg: ShotsConfig,
    embedding: EmbeddingConfig,
    engine: EngineConfig,
) -> list[Failure]:
    """Detect shots. Payload: ``source``. JSON ``{"detection"|"reject": ...}``."""
    if cfg.detector == "panda70m":
        log.warning("detector=panda70m model=%s distances_meant_for=imagebind", embedding.model)
    if cfg.transnetv2_weights is not None:  # a worker may run in another folder
        weights = str(Path(cfg.transnetv2_weights).absolute())
        cfg = cfg.model_copy(update={"transnetv2_weights": weights})
    settings = {
        "videos": Videos(downloads, Limits.of(cfg)),
        "cfg": cfg,
        "embedding": with_absolute_weights(embedding),
    }
    return _run(pieces, _FindShots, engine, settings)


def embed_clips(
    pieces: Sequence[Piece],
    downloads: Downloads,
    cfg: EmbeddingConfig,
    limits: Limits,
    engine: EngineConfig,
) -> list[Failure]:
    """Embed clips. Payload: ``clips``, of any sources. Writes an ``embeddings`` table per piece.

    Raises:
        ConfigError: ``num_gpus`` is set, and no node has as many.
    """
    settings = {"videos": Videos(downloads, limits), "cfg": with_absolute_weights(cfg)}
    return _run(pieces, _EmbedClips, engine, settings, cfg.num_gpus)


def embed_captions(
    pieces: Sequence[Piece], cfg: EmbeddingConfig, engine: EngineConfig
) -> list[Failure]:
    """Embed captions. Payload: ``texts``. Writes their vectors by ``vector_cache``.

    Workers do it, too: a caption takes a large text encoder 50 ms on a CPU, so a driver without a
    GPU would need half a day for a million.

    Raises:
        ConfigError: ``num_gpus`` is set, and no node has as many.
        ExternalToolError: The model fails on a caption, which is no clip's fault.
    """
    if cfg.weights is None:  # a look-up of words, done sooner than a worker is started
        work = _EmbedCaptions(cfg)
        for piece in pieces:
            work(_row(piece))
        return []
    return _run(pieces, _EmbedCaptions, engine, {"cfg": with_absolute_weights(cfg)}, cfg.num_gpus)


def score_clips(
    pieces: Sequence[Piece],
    downloads: Downloads,
    cfg: ScorersConfig,
    scorer: NamedScorer,
    limits: Limits,
    engine: EngineConfig,
) -> list[Failure]:
    """Score batches of clips. Payload: ``clips``. Writes a ``clip_scores`` table per batch."""
    weights = {key: getattr(cfg, key) for key in ("clip", "aesthetic_head", "text_detector")}
    absolute = {k: str(Path(path).absolute()) for k, path in weights.items() if path is not None}
    cfg = cfg.model_copy(update=absolute)  # a worker may run in another folder
    settings = {"videos": Videos(downloads, limits), "cfg": cfg, "named": scorer}
    return _run(pieces, _ScoreClips, engine, settings)


def export_clips(
    pieces: Sequence[Piece],
    downloads: Downloads,
    cfg: ExportConfig,
    limits: Limits,
    engine: EngineConfig,
) -> list[Failure]:
    """Write clips as files. Payload: ``clip``, ``folder``. JSON ``{"export"|"reject": ...}``."""
    settings = {"videos": Videos(downloads, limits), "cfg": cfg}
    return _run(pieces, _ExportClip, engine, settings)


def _run(
    pieces: Sequence[Piece],
    work: type[Any],
    engine: EngineConfig,
    settings: Mapping[str, Any],
    num_gpus: float = 0.0,
) -> list[Failure]:
    """Do the pieces in a Ray Data graph. Ray is not started for nothing.

    ``work`` is a class that is made once per actor with ``settings``, and then called with rows.
    Actors are as many as CPUs, or as there is room for on the GPUs, sharing the CPUs evenly.
    """
    if not pieces:
        return []
    start_ray(engine)
    rows = [_row(piece) for piece in pieces]
    workers, cpus = _gpu_workers(num_gpus) if num_gpus else (_num_cpus(), 1)
    size = max(1, min(workers, len(rows)))
    dataset = ray.data.from_items(rows, override_num_blocks=min(len(rows), _MAX_BLOCKS))
    with warnings.catch_warnings():
        # Ray Data 2.60 takes the last two under no other name, and warns that it will (by 2.64).
        warnings.simplefilter("ignore", RayDeprecationWarning)
        results = dataset.map(
            work,
            fn_constructor_kwargs=dict(settings),
            compute=ActorPoolStrategy(min_size=size, max_size=size),
            num_cpus=cpus,
            num_gpus=num_gpus or None,
            max_restarts=_MAX_RESTARTS,
            max_task_retries=-1,  # calls to a lost node spend many; restarts are the limit
        )
    try:
        found = [json.loads(row["failures"]) for row in results.iter_rows()]
    except ray.exceptions.RayError as error:
        raise ExternalToolError(
            "Ray could not finish the work; what is finished is kept",
            where=f"{len(rows)} pieces of {Path(rows[0]['path']).parent.name}",
            found=str(error)[:2000],
            do="run again; if it repeats, look at Ray's log files",
        ) from error
    return sorted(
        (Failure(*failure) for failures in found for failure in failures),
        key=lambda f: f.record_id,
    )


def _row(piece: Piece) -> dict[str, str]:
    payload = json.dumps(piece.payload)
    return {"record_id": piece.record_id, "path": str(piece.path), "payload": payload}


def _num_cpus() -> int:
    return int(ray.cluster_resources().get("CPU", 1))


def _gpu_workers(num_gpus: float) -> tuple[int, int]:
    """How many workers of ``num_gpus`` each there is room for, and the CPUs each can have.

    Raises:
        ConfigError: For none.
    """
    nodes: list[Mapping[str, float]] = [n["Resources"] for n in ray.nodes() if n["Alive"]]
    room = [(int(node.get("GPU", 0) / num_gpus), node.get("CPU", 1)) for node in nodes]
    workers = sum(count for count, _ in room)
    if not workers:
        raise ConfigError(
            "no node of the Ray cluster has the GPUs a worker is to have",
            where="curation.embedding.num_gpus",
            found=f"{num_gpus:g}, and nodes with {[node.get('GPU', 0) for node in nodes]}",
            do="set it to 0 for the CPU, or start Ray on machines with GPUs",
        )
    return workers, max(1, min(int(cpus / count) for count, cpus in room if count))


def _attempt(record_id: str, work: Callable[[], None]) -> list[tuple[str, str, str]]:
    """Run ``work``; an error becomes a failure of that record. Row errors are caught only here."""
    try:
        work()
    except Exception as error:  # any error of one record must leave the others alone
        log.exception("record_id=%s state=failed", record_id)
        reason = str(getattr(error, "reason", "")) or _snake_case(type(error).__name__)
        return [(record_id, reason, " ".join(str(error).split())[:500])]
    return []


def _snake_case(name: str) -> str:
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")


class _Probe:
    """Reads what a file says about itself."""

    def __init__(self, videos: Videos) -> None:
        self.videos = videos

    def __call__(self, row: dict[str, str]) -> dict[str, str]:
        def work() -> None:
            uri = json.loads(row["payload"])["uri"]
            try:
                with self.videos.opened(uri) as path:
                    job = {"path": str(path), "uri": uri}
                    result = self.videos.isolated("probe_source", job)
            except VideoDecodeError as error:
                result = _rejected(error, uri, "sources", uri)
            write_json(Path(row["path"]), result)

        return _failures(_attempt(row["record_id"], work))


class _FindShots:
    """Cuts one source into shots."""

    def __init__(self, videos: Videos, cfg: ShotsConfig, embedding: EmbeddingConfig) -> None:
        self.videos = videos
        self.settings = {
            "config": cfg.model_dump(mode="json"),
            "embedding": embedding.model_dump(mode="json"),
        }

    def __call__(self, row: dict[str, str]) -> dict[str, str]:
        def work() -> None:
            source = json.loads(row["payload"])["source"]
            try:
                with self.videos.opened(source["uri"], source["source_id"]) as path:
                    job = {"path": str(path), "source": source, **self.settings}
                    result = self.videos.isolated("find_shots", job)
            except VideoDecodeError as error:
                result = _rejected(error, source["source_id"], "shots", source["uri"])
            write_json(Path(row["path"]), result)

        return _failures(_attempt(row["record_id"], work))


class _EmbedClips:
    """One similarity model, loaded once per actor."""

    def __init__(self, videos: Videos, cfg: EmbeddingConfig) -> None:
        self.videos = videos
        self.cfg = cfg
        self.embedder = load_embedder(cfg)
        cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
        self.readers = max(1, int(cpus))

    def __call__(self, row: dict[str, str]) -> dict[str, str]:
        clips = [Clip(**values) for values in json.loads(row["payload"])["clips"]]
        done, vectors, failures = embed_in_batches(
            clips, self._read, self.embedder.embed_clips, self.cfg.batch_clips, self.readers
        )
        # Clips that failed are missing in the table, so the next run tries them again. A table that
        # cannot be written (a full disk) is no record's fault and stops the run.
        if done:
            model_id, weights = self.embedder.model_id, self.embedder.weights_sha256
            table = vectors_table(done, vectors, model_id, weights)
            write_batches(Path(row["path"]), EMBEDDINGS, [table])
        return _failures(failures)

    def _read(self, clip: Clip) -> Frames:
        size = (self.embedder.image_px, self.embedder.image_px)
        return self.videos.frames(clip, self.cfg.frames_per_clip, size, self.embedder.mode)


def embed_in_batches(
    clips: Sequence[Clip],
    read: Callable[[Clip], Frames],
    embed: Callable[[Frames], Vector],
    batch_clips: int,
    readers: int = 1,
) -> tuple[list[Clip], Vector, list[tuple[str, str, str]]]:
    """Read clips, ahead of the model, and embed them in batches.

    A clip that cannot be read fails alone, and the batch is filled with the next one. Where the
    model fails, all clips of its batch do.

    Args:
        clips: In the order of the result.
        read: A clip to its frames (T, H, W, 3).
        embed: (B, T, H, W, 3) to (B, D).
        batch_clips: B; only the last batch may be smaller.
        readers: Clips read side by side.

    Returns:
        The clips that have a vector, their vectors (len, D), and failures.
    """
    done: list[Clip] = []
    vectors: list[Vector] = []
    failures: list[tuple[str, str, str]] = []
    waiting: list[tuple[Clip, Frames]] = []

    def finish() -> None:
        ids = [clip.clip_id for clip, _ in waiting]
        found = _attempt(
            ids[0], lambda: vectors.append(embed(np.stack([frames for _, frames in waiting])))
        )
        if found:
            failures.extend((clip_id, *found[0][1:]) for clip_id in ids)
        else:
            done.extend(clip for clip, _ in waiting)
        waiting.clear()

    for clip, frames, failed in _read_ahead(clips, read, batch_clips, readers):
        failures += failed
        if frames is not None:
            waiting.append((clip, frames))
        if len(waiting) == batch_clips:
            finish()
    if waiting:
        finish()
    return done, np.concatenate(vectors) if vectors else np.empty((0, 0), np.float32), failures


def _read_ahead(
    clips: Sequence[Clip], read: Callable[[Clip], Frames], ahead: int, readers: int
) -> Iterator[tuple[Clip, Frames | None, list[tuple[str, str, str]]]]:
    """Frames of clips in order, or what went wrong; while one is used the next are being read."""

    def attempt(clip: Clip) -> tuple[Clip, Frames | None, list[tuple[str, str, str]]]:
        frames: list[Frames] = []
        failed = _attempt(clip.clip_id, lambda: frames.append(read(clip)))
        return clip, frames[0] if frames else None, failed

    with ThreadPoolExecutor(max_workers=readers) as pool:
        reading: deque[Future[Any]] = deque()
        for clip in clips:
            reading.append(pool.submit(attempt, clip))
            if len(reading) > ahead + readers:
                yield reading.popleft().result()
        while reading:
            yield reading.popleft().result()


class _EmbedCaptions:
    """One similarity model, loaded once per actor."""

    def __init__(self, cfg: EmbeddingConfig) -> None:
        self.embedder = load_embedder(cfg)

    def __call__(self, row: dict[str, str]) -> dict[str, str]:
        texts = json.loads(row["payload"])["texts"]
        vectors = self.embedder.embed_texts(texts)
        chunks = [self.embedder.text_chunks(text) for text in texts]
        write_captions(Path(row["path"]), texts, vectors, chunks, self.embedder.dim)
        return _failures([])


class _ScoreClips:
    """One scorer, loaded once per actor."""

    def __init__(self, videos: Videos, cfg: ScorersConfig, named: NamedScorer) -> None:
        self.videos = videos
        self.cfg = cfg
        self.named = named
        self.scorer = load_scorer(named.scorer_id, cfg)

    def __call__(self, row: dict[str, str]) -> dict[str, str]:
        return _describe(row, CLIP_SCORES, self._score)

    def _score(self, clip: Clip) -> ClipScore:
        size = self.scorer.frame_px(clip.width_px, clip.height_px)
        frames = self.videos.frames(clip, self.cfg.frames_per_clip, size, self.scorer.mode)
        value = self.scorer.score(frames)
        return ClipScore(clip.clip_id, self.named.scorer_id, self.named.weights_sha256, value)


def _describe(row: dict[str, str], table: Table[R], work: Callable[[Clip], R]) -> dict[str, str]:
    """Make one row per clip of a batch, and write the table of them."""
    rows: list[R] = []
    failures: list[tuple[str, str, str]] = []
    for values in json.loads(row["payload"])["clips"]:
        clip = Clip(**values)
        failures += _attempt(clip.clip_id, lambda clip=clip: rows.append(work(clip)))
    # Clips that failed are missing in the table, so the next run tries them again. A table that
    # cannot be written (a full disk) is no record's fault and stops the run.
    if rows:
        write_table(Path(row["path"]), table, rows)
    return _failures(failures)


class _ExportClip:
    """Writes one clip as a file."""

    def __init__(self, videos: Videos, cfg: ExportConfig) -> None:
        self.videos = videos
        self.config = cfg.model_dump(mode="json")

    def __call__(self, row: dict[str, str]) -> dict[str, str]:
        def work() -> None:
            payload = json.loads(row["payload"])
            clip = payload["clip"]
            try:
                with self.videos.opened(clip["uri"], clip["source_id"]) as path:
                    job = {**payload, "path": str(path), "config": self.config}
                    result = self.videos.isolated("export", job)
            except VideoDecodeError as error:
                result = _rejected(error, clip["clip_id"], "export", clip["uri"])
            write_json(Path(row["path"]), result)

        return _failures(_attempt(row["record_id"], work))


def _rejected(error: VideoDecodeError, record_id: str, stage: str, uri: str) -> dict[str, Any]:
    """A known defect as a result to keep; what may pass next time is raised, and not kept."""
    reject = defect(error, record_id, stage, uri)
    if reject.failed:
        raise error
    return {"reject": dataclasses.asdict(reject)}


def _failures(failures: list[tuple[str, str, str]]) -> dict[str, str]:
    return {"failures": json.dumps(failures)}
