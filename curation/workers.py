"""What a worker does with one row of a Ray Data graph: each class is one kind of work.

Made once per worker with its settings, then called with rows. A row holds paths and small records;
its result is written under the row's path, and what could not be done comes back in its column
``failures``. Nothing here needs Ray.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from curation.defects import defect
from curation.embeddings import Vector, load_embedder, spread_frames
from curation.inputs.downloads import Downloads
from curation.isolation import run_isolated
from curation.scorers import NamedScorer, load_scorer
from curation.vector_cache import vectors_table, write_captions
from curation.video import Frames, ResizeMode
from schemas.config.curation import EmbeddingConfig, ExportConfig, ScorersConfig, ShotsConfig
from schemas.errors import VideoDecodeError
from schemas.rows import Clip, ClipScore
from schemas.storage import write_json
from schemas.tables import CLIP_SCORES, EMBEDDINGS, write_batches, write_table

log = logging.getLogger(__name__)


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


class Probe:
    """Reads what a file says about itself."""

    def __init__(self, videos: Videos) -> None:
        self.videos = videos

    def __call__(self, row: dict[str, str]) -> dict[str, str]:
        """Payload: ``uri``. Writes JSON ``{"source"|"reject": ...}``."""

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


class FindShots:
    """Cuts one source into shots."""

    def __init__(self, videos: Videos, cfg: ShotsConfig, embedding: EmbeddingConfig) -> None:
        self.videos = videos
        self.settings = {
            "config": cfg.model_dump(mode="json"),
            "embedding": embedding.model_dump(mode="json"),
        }

    def __call__(self, row: dict[str, str]) -> dict[str, str]:
        """Payload: ``source``. Writes JSON ``{"detection"|"reject": ...}``."""

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


class EmbedClips:
    """One similarity model, loaded once per actor."""

    def __init__(self, videos: Videos, cfg: EmbeddingConfig, readers: int) -> None:
        self.videos = videos
        self.cfg = cfg
        self.embedder = load_embedder(cfg)
        self.readers = readers

    def __call__(self, row: dict[str, str]) -> dict[str, str]:
        """Payload: ``clips``. Writes a table ``embeddings``."""
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


class EmbedCaptions:
    """One similarity model, loaded once per actor."""

    def __init__(self, cfg: EmbeddingConfig) -> None:
        self.embedder = load_embedder(cfg)

    def __call__(self, row: dict[str, str]) -> dict[str, str]:
        """Payload: ``texts``. Writes their vectors (``vector_cache``)."""
        texts = json.loads(row["payload"])["texts"]
        vectors = self.embedder.embed_texts(texts)
        chunks = [self.embedder.text_chunks(text) for text in texts]
        write_captions(Path(row["path"]), texts, vectors, chunks, self.embedder.dim)
        return _failures([])


class ScoreClips:
    """One scorer, loaded once per actor."""

    def __init__(self, videos: Videos, cfg: ScorersConfig, named: NamedScorer) -> None:
        self.videos = videos
        self.cfg = cfg
        self.named = named
        self.scorer = load_scorer(named.scorer_id, cfg)

    def __call__(self, row: dict[str, str]) -> dict[str, str]:
        """Payload: ``clips``. Writes a table ``clip_scores``."""
        rows: list[ClipScore] = []
        failures: list[tuple[str, str, str]] = []
        for values in json.loads(row["payload"])["clips"]:
            clip = Clip(**values)
            failures += _attempt(clip.clip_id, lambda clip=clip: rows.append(self._score(clip)))
        # As with vectors: clips that failed are missing.
        if rows:
            write_table(Path(row["path"]), CLIP_SCORES, rows)
        return _failures(failures)

    def _score(self, clip: Clip) -> ClipScore:
        size = self.scorer.frame_px(clip.width_px, clip.height_px)
        frames = self.videos.frames(clip, self.cfg.frames_per_clip, size, self.scorer.mode)
        value = self.scorer.score(frames)
        return ClipScore(clip.clip_id, self.named.scorer_id, self.named.weights_sha256, value)


class ExportClip:
    """Writes one clip as a file."""

    def __init__(self, videos: Videos, cfg: ExportConfig) -> None:
        self.videos = videos
        self.config = cfg.model_dump(mode="json")

    def __call__(self, row: dict[str, str]) -> dict[str, str]:
        """Payload: ``clip``, ``folder``. Writes JSON ``{"export"|"reject": ...}``."""

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
