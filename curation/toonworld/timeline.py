"""Where in a video's frames its shots and transitions lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from curation.toonworld.world import Join, TransitionKind, Video

Floats = npt.NDArray[np.floating[Any]]

_SHORTEST_SOFT = 6
"""Frames of a soft transition at least: with fewer it is a cut with a smear."""


@dataclass(frozen=True)
class ShotFrames:
    """Frames of one shot; all spans half-open.

    Attributes:
        start: First frame that is more of this shot than of the one before.
        end: The next shot's ``start``, or the end of the file.
        pure_start: First frame that shows nothing but this shot.
        pure_end: First frame after that which does not.
        first: First frame with any of it; its own clock starts there.
        last: End of the frames with any of it.
    """

    start: int
    end: int
    pure_start: int
    pure_end: int
    first: int
    last: int


@dataclass(frozen=True)
class TransitionFrames:
    """Frames ``[start, end)`` that are of no shot alone; none in a cut, which lies at ``start``.

    ``middle`` is the first frame that counts as the new shot's.
    """

    kind: TransitionKind
    start: int
    end: int

    @property
    def middle(self) -> int:
        """First frame of the new shot, by the rule of ``Shot``: transitions part in the middle."""
        return (self.start + self.end + 1) // 2


@dataclass(frozen=True)
class Timeline:
    """All frames of a video."""

    shots: tuple[ShotFrames, ...]
    transitions: tuple[TransitionFrames, ...]
    num_frames: int


def timeline(video: Video, fps: float) -> Timeline:
    """Lay a video out on frames, ``fps`` of them a second."""
    pure: list[tuple[int, int]] = []
    transitions: list[TransitionFrames] = []
    at = 0
    for k, shot in enumerate(video.shots):
        end = at + round(shot.seconds * fps)
        pure.append((at, end))
        if k < len(video.joins):
            join = video.joins[k]
            at = end + _length(join, fps)
            transitions.append(TransitionFrames(join.kind, end, at))
    shots = [
        _shot(
            span,
            transitions[k - 1] if k else TransitionFrames("cut", 0, 0),
            transitions[k]
            if k < len(transitions)
            else TransitionFrames("cut", pure[-1][1], pure[-1][1]),
        )
        for k, span in enumerate(pure)
    ]
    return Timeline(tuple(shots), tuple(transitions), pure[-1][1])


def weights(
    shot: ShotFrames, before: TransitionFrames | None, after: TransitionFrames | None
) -> Floats:
    """How much of the picture is this shot's, in each of its frames ``[first, last)``.

    The two sides of a dissolve add up to one; a fade is black for one frame in its middle.
    """
    share = np.ones(shot.last - shot.first, np.float32)
    rise, fall = shot.pure_start - shot.first, shot.last - shot.pure_end
    if before is not None and rise:
        share[:rise] = np.arange(1, rise + 1) / (rise + 1)
    if after is not None and fall:
        steps = fall + 1 if after.kind == "dissolve" else fall
        share[len(share) - fall :] = 1 - np.arange(1, fall + 1) / steps
    return share


def _length(join: Join, fps: float) -> int:
    if join.kind == "cut":
        return 0
    # Even, so that the two halves of a fade are equally long.
    return max(_SHORTEST_SOFT, 2 * round(join.seconds * fps / 2))


def _shot(pure: tuple[int, int], before: TransitionFrames, after: TransitionFrames) -> ShotFrames:
    return ShotFrames(
        start=before.middle,
        end=after.middle,
        pure_start=pure[0],
        pure_end=pure[1],
        first=before.start if before.kind == "dissolve" else before.middle,
        last=after.end if after.kind == "dissolve" else after.middle,
    )
