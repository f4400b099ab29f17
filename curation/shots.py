"""Finding shots: one decode pass gives frame times, typed transitions and measurements.

The default detector is ours (``curation.fast_shots``). PySceneDetect's detectors are fed frame by
frame with the true timestamps, and a cut is looked up by its PTS in our own list of frames:
PySceneDetect's own frame numbers are estimates on files with a variable frame rate.

Shape legend: N thumbnails.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scenedetect.common import FrameTimecode, Timecode
from scenedetect.detector import SceneDetector
from scenedetect.detectors import (
    AdaptiveDetector,
    ContentDetector,
    HashDetector,
    HistogramDetector,
)

from curation.defects import defect
from curation.fast_shots import Transition, find_transitions
from curation.measure import Look, Measured, measure
from curation.thumbs import Sampler, Thumbs
from curation.video import decode, scaled
from schemas.config.curation import ShotsConfig
from schemas.errors import VideoDecodeError
from schemas.rows import Reject, Shot, Source, stable_id

STAGE = "shots"


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


def detect_shots(path: Path, source: Source, cfg: ShotsConfig) -> ShotDetection:
    """Decode a source once and cut it into shots.

    ``start_s`` and ``end_s`` count from the first frame, as players and captions do; PTS are the
    file's own. A gradual transition is parted in its middle: each of the two shots holds its half
    and says how many frames it is.

    Raises:
        VideoDecodeError: as :func:`curation.video.decode`, and ``no_frames``.
    """
    if cfg.detector == "fast":
        transitions, thumbs = find_transitions(path)
    else:
        transitions, thumbs = _by_pyscenedetect(path, source, cfg)
    pts = thumbs.all_pts
    steps = np.diff(pts)
    last_step = thumbs.last_duration or (round(float(np.median(steps))) if len(steps) else 1)
    frame_pts = [*map(int, pts), int(pts[-1]) + last_step]
    time_base = Fraction(source.time_base_num, source.time_base_den)
    duration_s = float((frame_pts[-1] - frame_pts[0]) * time_base)
    return ShotDetection(
        shots=list(_shots(source.source_id, cfg.detector, transitions, thumbs, frame_pts)),
        frame_pts=frame_pts,
        num_frames=len(pts),
        duration_s=duration_s,
        avg_fps=len(pts) / duration_s,
        is_vfr=_is_vfr(frame_pts[:-1]),
    )


def read_shots(path: Path, source: Source, cfg: ShotsConfig) -> ShotDetection | Reject:
    """Like :func:`detect_shots`; a source that cannot be decoded to its end becomes a reject."""
    try:
        return detect_shots(path, source, cfg)
    except VideoDecodeError as error:
        return defect(error, source.source_id, STAGE, source.uri)


def _by_pyscenedetect(
    path: Path, source: Source, cfg: ShotsConfig
) -> tuple[list[Transition], Thumbs]:
    """Hard cuts by one of PySceneDetect's detectors, every frame decoded."""
    time_base = Fraction(source.time_base_num, source.time_base_den)
    # Only spacing constants of the detectors depend on it; times come with each frame.
    rate = Fraction(source.avg_fps or 25.0).limit_denominator(100_000)
    detector = _detector(cfg)
    sampler = Sampler(path, time_base)
    first: int | None = None
    cut_pts: list[int] = []
    duration = 0
    for frame in decode(path):
        sampler.add([frame])
        assert frame.pts is not None  # or the sampler would have refused it
        first = frame.pts if first is None else first
        duration = frame.duration or 0
        timecode = FrameTimecode(Timecode(pts=frame.pts - first, time_base=time_base), fps=rate)
        cuts = detector.process_frame(timecode, scaled(frame, cfg.detect_height_px))
        cut_pts += [first + cut.pts for cut in cuts]
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
    numbers = sorted({int(np.searchsorted(pts, p)) for p in cut_pts} - {0})
    return [Transition("cut", n, n, n, int(pts[n]), int(pts[n]), 1.0) for n in numbers], thumbs


def _detector(cfg: ShotsConfig) -> SceneDetector:
    """The configured detector with PySceneDetect's own defaults where no threshold is given."""
    shortest = float(cfg.min_shot_s)  # a float means seconds to PySceneDetect, an int frames
    match cfg.detector:
        case "adaptive":
            if cfg.threshold is None:
                return AdaptiveDetector(min_scene_len=shortest)
            return AdaptiveDetector(adaptive_threshold=cfg.threshold, min_scene_len=shortest)
        case "content":
            if cfg.threshold is None:
                return ContentDetector(min_scene_len=shortest)
            return ContentDetector(threshold=cfg.threshold, min_scene_len=shortest)
        case "histogram":
            if cfg.threshold is None:
                return HistogramDetector(min_scene_len=shortest)
            return HistogramDetector(threshold=cfg.threshold, min_scene_len=shortest)
        case _:
            if cfg.threshold is None:
                return HashDetector(min_scene_len=shortest)
            return HashDetector(threshold=cfg.threshold, min_scene_len=shortest)


def _shots(
    source_id: str,
    detector: str,
    transitions: Sequence[Transition],
    thumbs: Thumbs,
    frame_pts: Sequence[int],
) -> Iterator[Shot]:
    end_of_file = len(frame_pts) - 1
    # Half of a transition at the very start or end of the file has no other shot to belong to.
    inner = [t for t in transitions if t.start_frame > 0 and t.end_frame < end_of_file]
    opening = max((t.end_frame for t in transitions if t.start_frame == 0), default=0)
    closing = min(
        (t.start_frame for t in transitions if t.end_frame >= end_of_file and t.start_frame > 0),
        default=end_of_file,
    )
    middles = [min(max(t.middle_frame, 1), end_of_file - 1) for t in inner]
    bounds = [0, *middles, end_of_file]
    for index, (start, end) in enumerate(pairwise(bounds)):
        before = inner[index - 1] if index else None
        after = inner[index] if index < len(inner) else None
        pure_start = before.end_frame if before else opening
        pure_end = after.start_frame if after else closing
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
            transition_in=before.kind if before else "fade" if opening else "start",
            transition_out=after.kind if after else "fade" if closing < end_of_file else "end",
            transition_in_frames=max(0, min(pure_start, end) - start),
            transition_out_frames=max(0, end - max(pure_end, start)),
            detector=detector,
            confidence=before.score if before else None,
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
