"""PySceneDetect's shot detectors, fed frame by frame.

They get the true timestamps, and a cut is looked up by its PTS among our own frames: the frame
numbers that PySceneDetect gives are estimates on files with a variable frame rate.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from fractions import Fraction

import av
from scenedetect.common import FrameTimecode, Timecode
from scenedetect.detector import SceneDetector
from scenedetect.detectors import (
    AdaptiveDetector,
    ContentDetector,
    HashDetector,
    HistogramDetector,
)

from curation.fast_shots import Transition
from curation.video import scaled
from schemas.config.curation import ShotsConfig
from schemas.rows import Source

USUAL_FPS = 25.0
"""Taken where a file says nothing; only the lengths of shots depend on it."""


class PySceneDetectShots:
    """Takes the frames of one video in order, then tells its hard cuts."""

    def __init__(self, source: Source, cfg: ShotsConfig) -> None:
        self._detector = _detector(cfg)
        self._height_px = cfg.detect_height_px
        self._time_base = Fraction(source.time_base_num, source.time_base_den)
        # Only spacing constants of the detectors depend on it; times come with each frame.
        self._rate = Fraction(source.avg_fps or USUAL_FPS).limit_denominator(100_000)
        self._first: int | None = None
        self._cut_pts: list[int] = []

    def add(self, frame: av.VideoFrame) -> None:
        """Take the next decoded frame."""
        assert frame.pts is not None  # or decoding would have ended
        self._first = frame.pts if self._first is None else self._first
        time = Timecode(pts=frame.pts - self._first, time_base=self._time_base)
        small = scaled(frame, self._height_px)
        cuts = self._detector.process_frame(FrameTimecode(time, fps=self._rate), small)
        self._cut_pts += [self._first + cut.pts for cut in cuts]

    def transitions(self, frame_pts: Sequence[int]) -> list[Transition]:
        """All cuts of the video in order.

        Args:
            frame_pts: PTS of each frame added and the end of the last one.
        """
        numbers = sorted({bisect_left(frame_pts, pts) for pts in self._cut_pts} - {0})
        return [Transition("cut", n, n, n, frame_pts[n], frame_pts[n], 1.0) for n in numbers]


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
