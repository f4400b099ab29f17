"""Finding shots: one decode pass gives frame times, typed transitions and measurements.

The default detector is ours (``curation.fast_shots``) and leaves out frames where it can. The
others are fed every frame.

Shape legend: N thumbnails.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import av
import numpy as np
import numpy.typing as npt

from curation.defects import defect
from curation.embeddings import Embedder, load_embedder, name_model
from curation.fast_shots import Transition, find_transitions
from curation.measure import Look, Measured, measure
from curation.panda70m_shots import Panda70mShots
from curation.pyscenedetect_shots import USUAL_FPS, PySceneDetectShots
from curation.thumbs import Sampler, Thumbs
from curation.video import decode
from schemas.config.curation import EmbeddingConfig, ShotsConfig
from schemas.errors import ConfigError, VideoDecodeError
from schemas.rows import Doubt, Reject, Shot, Source, stable_id
from schemas.storage import fingerprint_file

STAGE = "shots"
_EMBEDDING = EmbeddingConfig()


@dataclass(frozen=True)
class ShotDetection:
    """What one decode pass over a source tells.

    Attributes:
        shots: In order; together they hold every frame exactly once.
        frame_pts: PTS of every frame, and the end of the last one: ``num_frames + 1`` ticks.
        num_frames: Frames of the source.
        duration_s: From the first frame to the end of the last.
        avg_fps: Frames per second over that time.
        is_vfr: Whether frames leave an even grid by more than the time base's rounding.
    """

    shots: list[Shot]
    frame_pts: list[int]
    num_frames: int
    duration_s: float
    avg_fps: float
    is_vfr: bool


class Detector(Protocol):
    """Finds the transitions of one video whose frames it is given one by one."""

    def add(self, frame: av.VideoFrame) -> None:
        """Take the next decoded frame."""
        ...

    def transitions(self, frame_pts: Sequence[int]) -> list[Transition]:
        """Transitions in order, without overlaps; ``frame_pts`` as in :class:`ShotDetection`."""
        ...


def detect_shots(
    path: Path, source: Source, cfg: ShotsConfig, embedding: EmbeddingConfig = _EMBEDDING
) -> ShotDetection:
    """Decode a source once and cut it into shots.

    ``start_s`` and ``end_s`` count from the first frame, as players and captions do; PTS are the
    file's own. A gradual transition is parted in its middle: each of the two shots holds its half
    and says how many frames it is.

    Args:
        path: Video file.
        source: What probing it has told.
        cfg: The detector and its settings.
        embedding: The similarity model by which ``panda70m`` stitches.

    Raises:
        VideoDecodeError: as :func:`curation.video.decode`, and ``no_frames``.
        CheckpointError: The detector's weights cannot be loaded.
    """
    name = cfg.detector
    if name == "fast":
        transitions, thumbs = find_transitions(path)
    elif name == "panda70m":
        embedder = _embedder(embedding.model_dump_json())
        name = f"panda70m:{embedder.model_id}"
        transitions, thumbs = _fed(_panda70m(source, cfg, embedder), path, source)
    else:
        detector = _transnetv2(cfg) if name == "transnetv2" else PySceneDetectShots(source, cfg)
        transitions, thumbs = _fed(detector, path, source)
    frame_pts = _frame_pts(thumbs)
    num_frames = len(frame_pts) - 1
    time_base = Fraction(source.time_base_num, source.time_base_den)
    duration_s = float((frame_pts[-1] - frame_pts[0]) * time_base)
    return ShotDetection(
        shots=list(_shots(source.source_id, name, transitions, thumbs, frame_pts)),
        frame_pts=frame_pts,
        num_frames=num_frames,
        duration_s=duration_s,
        avg_fps=num_frames / duration_s,
        is_vfr=_is_vfr(frame_pts[:-1]),
    )


def read_shots(
    path: Path, source: Source, cfg: ShotsConfig, embedding: EmbeddingConfig = _EMBEDDING
) -> ShotDetection | Reject:
    """Like :func:`detect_shots`; a source that cannot be decoded to its end becomes a reject."""
    try:
        return detect_shots(path, source, cfg, embedding)
    except VideoDecodeError as error:
        return defect(error, source.source_id, STAGE, source.uri)


def models_behind(cfg: ShotsConfig, embedding: EmbeddingConfig) -> list[str]:
    """What a detector's results depend on besides ``cfg``: models and hashes of weights.

    Raises:
        ConfigError: A file with weights is not there.
    """
    if cfg.detector == "panda70m":
        model = name_model(embedding)
        return [model.model_id, model.weights_sha256, str(model.image_px)]
    if cfg.detector == "transnetv2":
        weights = _weights(cfg)
        if not weights.is_file():
            raise ConfigError(
                "the weights of a shot detector are missing",
                where="curation.shots.transnetv2_weights",
                found=weights,
                do="name a file in the official PyTorch layout",
            )
        return [fingerprint_file(weights)]
    return []


@lru_cache(maxsize=1)
def _embedder(config: str) -> Embedder:
    """Loaded once by a process that looks for shots in many videos."""
    return load_embedder(EmbeddingConfig.model_validate_json(config))


def _panda70m(source: Source, cfg: ShotsConfig, embedder: Embedder) -> Detector:
    return Panda70mShots(
        embedder,
        source.avg_fps or USUAL_FPS,
        threshold=cfg.threshold,
        stitch_distance=cfg.stitch_distance,
        drop_distance=cfg.drop_distance,
    )


def _transnetv2(cfg: ShotsConfig) -> Detector:
    # torch takes seconds to import, in every child process that decodes for any detector.
    from curation.transnetv2 import TransNetV2Shots, load_transnetv2

    return TransNetV2Shots(load_transnetv2(_weights(cfg)), cfg.threshold)


def _weights(cfg: ShotsConfig) -> Path:
    assert cfg.transnetv2_weights is not None, "ShotsConfig sees to it"
    return Path(cfg.transnetv2_weights)


def _fed(detector: Detector, path: Path, source: Source) -> tuple[list[Transition], Thumbs]:
    """What a detector finds in a file, every frame decoded."""
    time_base = Fraction(source.time_base_num, source.time_base_den)
    sampler = Sampler(path, time_base)
    duration = 0
    for frame in decode(path):
        sampler.add([frame])
        detector.add(frame)
        duration = frame.duration or 0
    pts, luma, chroma = sampler.arrays()
    if not len(pts):
        raise VideoDecodeError("no frame could be decoded", reason="no_frames", where=path)
    thumbs = Thumbs(
        frames=np.arange(len(pts)),
        pts=pts,
        luma=luma,
        chroma=chroma,
        all_pts=pts,
        keys=pts[:0],
        time_base=time_base,
        last_duration=duration,
        looks=tuple(sampler.looks),
    )
    return detector.transitions(_frame_pts(thumbs)), thumbs


def _frame_pts(thumbs: Thumbs) -> list[int]:
    """PTS of every frame, and the end of the last one."""
    pts = thumbs.all_pts
    steps = np.diff(pts)
    last_step = thumbs.last_duration or (round(float(np.median(steps))) if len(steps) else 1)
    return [*map(int, pts), int(pts[-1]) + last_step]


def _shots(
    source_id: str,
    detector: str,
    transitions: Sequence[Transition],
    thumbs: Thumbs,
    frame_pts: Sequence[int],
) -> Iterator[Shot]:
    end_of_file = len(frame_pts) - 1
    doubts = [t for t in transitions if t.kind == "doubt"]
    transitions = [t for t in transitions if t.kind != "doubt"]
    # Half of a transition at the very start or end of the file has no other shot to belong to.
    inner = [t for t in transitions if t.start_frame > 0 and t.end_frame < end_of_file]
    opening = next((t for t in transitions if t.start_frame == 0), None)
    closing = next((t for t in transitions if t.end_frame >= end_of_file > t.start_frame > 0), None)
    middles = [min(max(t.middle_frame, 1), end_of_file - 1) for t in inner]
    bounds = [0, *middles, end_of_file]
    for index, (start, end) in enumerate(pairwise(bounds)):
        before = inner[index - 1] if index else opening
        after = inner[index] if index < len(inner) else closing
        pure_start = before.end_frame if before else start
        pure_end = after.start_frame if after else end
        start_pts, end_pts = frame_pts[start], frame_pts[end]
        measured = _measure(thumbs, (start, end), (pure_start, pure_end), frame_pts)
        yield Shot(
            shot_id=stable_id(source_id, start_pts, end_pts),
            source_id=source_id,
            index=index,
            start_pts=start_pts,
            end_pts=end_pts,
            start_frame=start,
            end_frame=end,
            start_s=float((start_pts - frame_pts[0]) * thumbs.time_base),
            end_s=float((end_pts - frame_pts[0]) * thumbs.time_base),
            transition_in=before.kind if before else "start",
            transition_out=after.kind if after else "end",
            transition_in_frames=max(0, min(pure_start, end) - start),
            transition_out_frames=max(0, end - max(pure_end, start)),
            detector=detector,
            confidence=inner[index - 1].score if index else None,
            doubts=[
                Doubt(max(start, t.start_frame), min(end, t.end_frame), t.score)
                for t in doubts
                if t.start_frame < end and start < t.end_frame
            ],
            **dataclasses.asdict(measured),
        )


def _measure(
    thumbs: Thumbs, whole: tuple[int, int], pure: tuple[int, int], frame_pts: Sequence[int]
) -> Measured:
    """Measure a shot without its transitions; with them if nothing else of it was decoded."""
    inside = _decoded(thumbs, *pure)
    inside = inside if len(inside) else _decoded(thumbs, *whole)
    inside = inside if len(inside) else np.array([_nearest(thumbs.frames, whole[0])])
    first, last = (frame_pts[int(thumbs.frames[inside[i]])] for i in (0, -1))
    looks = [look for look in thumbs.looks if first <= look.pts <= last]
    looks = looks or [min(thumbs.looks, key=lambda look: _distance(look, first, last))]
    return measure(thumbs.frames[inside], thumbs.luma[inside], looks)


def _decoded(thumbs: Thumbs, start: int, end: int) -> npt.NDArray[np.int64]:
    """Positions of the thumbnails of frames in ``[start, end)``."""
    low, high = np.searchsorted(thumbs.frames, [start, end])
    return np.arange(low, high)


def _nearest(frames: npt.NDArray[np.int64], frame: int) -> int:
    return int(np.abs(frames - frame).argmin())


def _distance(look: Look, first_pts: int, last_pts: int) -> int:
    return max(first_pts - look.pts, look.pts - last_pts)


def _is_vfr(pts: Sequence[int]) -> bool:
    """Whether frames lie off an even grid by more than two ticks and a twentieth of a frame.

    A coarse time base (Matroska's milliseconds) rounds every PTS by up to a tick, and the grid's
    ends likewise.
    """
    if len(pts) < 3:
        return False
    grid = np.linspace(pts[0], pts[-1], len(pts))
    step = (pts[-1] - pts[0]) / (len(pts) - 1)
    return bool(np.abs(pts - grid).max() > max(2, 0.05 * step))
