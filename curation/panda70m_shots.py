"""The ``panda70m`` shot detector: cut too often, then stitch what looks alike.

Stage 1 cuts with PySceneDetect's content detector and parts what is still long every five seconds.
Stage 2 embeds a frame near each end of every piece: a piece whose ends are far apart holds a
transition, neighbours whose meeting ends are close are one shot. Everything happens in one decode
pass; only the frames of the piece at hand are kept, at the similarity model's size.

Panda-70M then drops and trims. Shots hold every frame of a source, so that is said elsewhere:

- a piece that holds a transition is dropped: here it is a ``dissolve`` as long as the piece, which
  clips leave out;
- events shorter than 2.5 s are dropped, longer ones end after 60 s: ``clips.min_frames``,
  ``clips.max_s``;
- still events (first and last frame closer than 0.15) and ones like an earlier one of the video
  (mean frames closer than 0.3) are dropped: ``filters.max_still_ratio``, and
  ``dedup.near_threshold``, where 0.3 is a cosine of 0.955;
- a tenth is trimmed off each end: ``clips.trim_frames``.

The distances are set for ImageBind. With another similarity model they mean something else, so
``Shot.detector`` names the model.

Source: Panda-70M, ``splitting/cutscene_detect.py`` and ``splitting/event_stitching.py``, with the
values of its release. Unlike there, frames come from the decoder and are never sought.

Shape legend: H W height and width of a frame, D vector length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby, pairwise

import av
import cv2
import numpy as np
from scenedetect.common import FrameTimecode
from scenedetect.detectors import ContentDetector
from scenedetect.scene_manager import compute_downscale_factor

from curation.embeddings import Embedder, Vector
from curation.fast_shots import Kind, Transition
from curation.video import Frames, fit, quarter_turns

# Source of all: Panda-70M, splitting/cutscene_detect.py, as its main program sets them.
_THRESHOLD = 25.0
"""Of the content detector."""
_MIN_SCENE_FRAMES = 15
"""Its shortest scene; also how many frames late it may report a cut."""
_PIECE_S = 5
"""What is long is cut into pieces of this length,"""
_SPARE_S = 2
"""as long as more than this is left besides."""


@dataclass(frozen=True)
class Piece:
    """What lies between two cuts of stage 1.

    Attributes:
        start: First frame.
        end: The frame after the last.
        is_forced: Whether it begins where a length rule cut.
        first: (D,) unit vector of the frame at 5 %.
        last: That of the frame at 95 %.
    """

    start: int
    end: int
    is_forced: bool
    first: Vector
    last: Vector

    @property
    def inner_distance(self) -> float:
        """How far apart its ends are."""
        return _distance(self.first, self.last)


class Panda70mShots:
    """Takes the frames of one video in order, then tells its transitions.

    Args:
        embedder: Says how alike two frames look.
        fps: Frames per second, for the length rule.
        threshold: Of the content detector; None takes Panda-70M's.
        stitch_distance: Neighbouring pieces at most this far apart are one shot.
        drop_distance: A piece whose ends are further apart than this is a transition.
    """

    def __init__(
        self,
        embedder: Embedder,
        fps: float,
        *,
        threshold: float | None = None,
        stitch_distance: float,
        drop_distance: float,
    ) -> None:
        self._embedder = embedder
        self._fps = fps
        self._rate = Fraction(fps).limit_denominator(100_000)
        self._detector = ContentDetector(threshold or _THRESHOLD, min_scene_len=_MIN_SCENE_FRAMES)
        self._stitch, self._drop = stitch_distance, drop_distance
        self._pieces: list[Piece] = []
        self._start = 0
        self._start_is_forced = False
        self._num_frames = 0
        self._small: list[Frames] = []  # the frames from self._start on
        self._size: tuple[int, int] | None = None

    def add(self, frame: av.VideoFrame) -> None:
        """Take the next decoded frame."""
        # Where the size changes midstream every picture gets the first one's, as in read_frames.
        self._size = self._size or (frame.width, frame.height)
        rgb = np.asarray(frame.reformat(*self._size).to_ndarray(format="rgb24"), np.uint8)
        turns, px = quarter_turns(frame), self._embedder.image_px
        self._small.append(fit(np.rot90(rgb, turns), px, px, self._embedder.mode))
        # A count, not a time: the shortest scene is given in frames.
        timecode = FrameTimecode(self._num_frames, fps=self._rate)
        for cut in self._detector.process_frame(timecode, _as_pyscenedetect_sees(rgb)):
            self._cut_at(cut.frame_num)
        self._num_frames += 1
        # No cut can come before that any more, so what is long up to there is cut up now.
        self._cut_up(self._num_frames - _MIN_SCENE_FRAMES)

    def transitions(self, frame_pts: Sequence[int]) -> list[Transition]:
        """All transitions of the video, in order and without overlaps; call once, at its end.

        Args:
            frame_pts: PTS of each frame added and the end of the last one.
        """
        self._cut_at(self._num_frames)
        return stitch(self._pieces, frame_pts, self._stitch, self._drop)

    def _cut_at(self, frame: int) -> None:
        self._cut_up(frame)
        self._close(frame)
        self._start_is_forced = False

    def _cut_up(self, end: int) -> None:
        for frame in forced_cuts(self._start, end, self._fps):
            self._close(frame)
            self._start_is_forced = True

    def _close(self, end: int) -> None:
        """End the piece at hand before frame ``end``."""
        start = self._start
        assert end > start, "cuts come in order"
        near_ends = (
            int(0.95 * start + 0.05 * (end - 1)),
            int(0.05 * start + 0.95 * (end - 1)),
        )
        stills = np.stack([self._small[i - start] for i in near_ends])
        first, last = self._embedder.embed_clips(stills[:, None])
        self._pieces.append(Piece(start, end, self._start_is_forced, first, last))
        del self._small[: end - start]
        self._start = end


def forced_cuts(start: int, end: int, fps: float) -> list[int]:
    """Where a span without cuts is cut nevertheless: every 5 s while more than 7 s are left.

    Below a frame in five seconds there is nothing to cut (Panda-70M's loop does not end there).
    """
    step = int(_PIECE_S * fps)
    cuts: list[int] = []
    while step and end - start > (_PIECE_S + _SPARE_S) * fps:
        start += step
        cuts.append(start)
    return cuts


def stitch(
    pieces: Sequence[Piece], frame_pts: Sequence[int], stitch_distance: float, drop_distance: float
) -> list[Transition]:
    """The transitions that are left of the borders of adjoining pieces.

    Where a forced cut stays, the transition's kind is ``forced``: the take goes on.
    """
    found: list[Transition] = []
    for is_dropped, group in groupby(pieces, lambda p: p.inner_distance > drop_distance):
        run = list(group)
        if is_dropped:
            score = max(p.inner_distance for p in run) / drop_distance
            found.append(_transition("dissolve", run[0].start, run[-1].end, frame_pts, score))
            continue
        for before, after in pairwise(run):
            distance = _distance(before.last, after.first)
            if distance > stitch_distance:
                kind = "forced" if after.is_forced else "cut"
                score = distance / stitch_distance
                found.append(_transition(kind, after.start, after.start, frame_pts, score))
    return found


def _distance(a: Vector, b: Vector) -> float:
    return float(np.linalg.norm(a - b))


def _transition(
    kind: Kind, start: int, end: int, frame_pts: Sequence[int], score: float
) -> Transition:
    middle = (start + end) // 2
    return Transition(kind, start, end, middle, frame_pts[start], frame_pts[end], score)


def _as_pyscenedetect_sees(rgb: Frames) -> Frames:
    """(H, W, 3) RGB to smaller BGR, as ``scenedetect.detect`` makes it: at most 256 pixels wide."""
    height, width = rgb.shape[:2]
    factor = compute_downscale_factor(width)
    if factor > 1:
        size = (max(1, round(width / factor)), max(1, round(height / factor)))
        rgb = np.asarray(cv2.resize(rgb, size, interpolation=cv2.INTER_LINEAR), np.uint8)
    return np.ascontiguousarray(rgb[..., ::-1])
