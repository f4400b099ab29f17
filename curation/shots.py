"""Finding shots: one decode pass gives exact frame times, cuts and mechanical measurements.

PySceneDetect's detectors are fed frame by frame with the true timestamps, and a cut is looked up by
its PTS in our own list of frames. PySceneDetect's own frame numbers are estimates on files with a
variable frame rate.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import cv2
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

from curation.sources import defect
from curation.video import iter_frames
from schemas.config.curation import ShotsConfig
from schemas.errors import VideoDecodeError
from schemas.rows import Reject, Shot, Source, stable_id

STAGE = "shots"


@dataclass(frozen=True)
class ShotDetection:
    """What one full decode of a source tells.

    Attributes:
        shots: In order; together they hold every decoded frame exactly once.
        frame_pts: PTS of every frame, and the end of the last one: ``num_frames + 1`` ticks.
        num_frames: Decoded frames.
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
    file's own. ``luminance`` is the mean luma (0 to 1), ``motion`` the mean absolute luma change
    between frames of the shot (0 to 1), ``sharpness`` the mean variance of the Laplacian of 8-bit
    luma at ``detect_height_px``.

    Raises:
        VideoDecodeError: as :func:`curation.video.decode`, and ``no_frames``.
    """
    time_base = Fraction(source.time_base_num, source.time_base_den)
    # Only spacing constants of the detectors depend on it; times come with each frame.
    rate = Fraction(source.avg_fps or 25.0).limit_denominator(100_000)
    detector = _detector(cfg)
    measured = _Measurements()
    pts: list[int] = []
    cut_pts: list[int] = []
    duration = 0
    for frame in iter_frames(path, cfg.detect_height_px):
        pts.append(frame.pts)
        duration = frame.duration
        measured.add(frame.bgr)
        ticks = Timecode(pts=frame.pts - pts[0], time_base=time_base)
        cuts = detector.process_frame(FrameTimecode(ticks, fps=rate), frame.bgr)
        cut_pts += [pts[0] + cut.pts for cut in cuts]
    if not pts:
        raise VideoDecodeError("no frame could be decoded", reason="no_frames", where=path)
    steps = np.diff(pts)
    last_step = duration or (round(float(np.median(steps))) if len(steps) else 1)
    frame_pts = [*pts, pts[-1] + last_step]
    number = {tick: i for i, tick in enumerate(pts)}
    bounds = [0, *sorted({number[p] for p in cut_pts} - {0}), len(pts)]
    duration_s = float((frame_pts[-1] - pts[0]) * time_base)
    return ShotDetection(
        shots=_shots(source.source_id, bounds, frame_pts, time_base, cfg.detector, measured),
        frame_pts=frame_pts,
        num_frames=len(pts),
        duration_s=duration_s,
        avg_fps=len(pts) / duration_s,
        is_vfr=_is_vfr(pts),
    )


def read_shots(path: Path, source: Source, cfg: ShotsConfig) -> ShotDetection | Reject:
    """Like :func:`detect_shots`; a source that cannot be decoded to its end becomes a reject."""
    try:
        return detect_shots(path, source, cfg)
    except VideoDecodeError as error:
        return defect(error, source.source_id, STAGE, source.uri)


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
        case "hash":
            if cfg.threshold is None:
                return HashDetector(min_scene_len=shortest)
            return HashDetector(threshold=cfg.threshold, min_scene_len=shortest)


class _Measurements:
    """Per-frame numbers of one decode pass."""

    def __init__(self) -> None:
        self.luminance: list[float] = []
        self.change: list[float] = []
        self.sharpness: list[float] = []
        self._previous: npt.NDArray[np.uint8] | None = None

    def add(self, bgr: npt.NDArray[np.uint8]) -> None:
        luma = cv2.cvtColor(bgr, cv2.COLOR_BGR2GRAY)
        previous = luma if self._previous is None else self._previous
        self.luminance.append(float(luma.mean()) / 255)
        self.change.append(float(cv2.absdiff(luma, previous).mean()) / 255)
        self.sharpness.append(float(cv2.Laplacian(luma, cv2.CV_32F).var()))
        self._previous = luma  # pyright: ignore[reportAttributeAccessIssue]

    def of(self, start: int, end: int) -> tuple[float, float, float]:
        """Luminance, motion, sharpness of a span; the change at its first frame is the cut's."""
        changes = self.change[start + 1 : end]
        motion = float(np.mean(changes)) if changes else 0.0
        luminance = float(np.mean(self.luminance[start:end]))
        return luminance, motion, float(np.mean(self.sharpness[start:end]))


def _shots(
    source_id: str,
    bounds: list[int],
    frame_pts: list[int],
    time_base: Fraction,
    detector: str,
    measured: _Measurements,
) -> list[Shot]:
    shots: list[Shot] = []
    last = len(bounds) - 2
    for index, (start, end) in enumerate(pairwise(bounds)):
        start_pts, end_pts = frame_pts[start], frame_pts[end]
        luminance, motion, sharpness = measured.of(start, end)
        shots.append(
            Shot(
                shot_id=stable_id(source_id, start_pts, end_pts),
                source_id=source_id,
                index=index,
                start_pts=start_pts,
                end_pts=end_pts,
                start_frame=start,
                end_frame=end,
                start_s=float((start_pts - frame_pts[0]) * time_base),
                end_s=float((end_pts - frame_pts[0]) * time_base),
                transition_in="start" if index == 0 else "cut",
                transition_out="end" if index == last else "cut",
                detector=detector,
                confidence=None,
                luminance=luminance,
                motion=motion,
                sharpness=sharpness,
            )
        )
    return shots


def _is_vfr(pts: list[int]) -> bool:
    """Whether frames lie off an even grid by more than two ticks and a twentieth of a frame.

    A coarse time base (Matroska's milliseconds) rounds every PTS by up to a tick, and the grid's
    ends likewise.
    """
    if len(pts) < 3:
        return False
    grid = np.linspace(pts[0], pts[-1], len(pts))
    step = (pts[-1] - pts[0]) / (len(pts) - 1)
    return bool(np.abs(pts - grid).max() > max(2, 0.05 * step))
