"""From shots to clips: trimmed, cut to length, captioned, checked against the trainers' rules.

Nothing is re-encoded: a clip is a span of its source.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from math import floor

from curation.captions import CaptionSpan, caption_for
from curation.probe import display_size
from schemas.config.curation import ClipsConfig
from schemas.rows import Clip, Reject, Shot, Source, stable_id

STAGE = "clips"


def pretrain_trainable(num_frames: int, frames: int, max_stride: int) -> bool:
    """Whether the pre-training loader accepts a clip of ``num_frames``.

    It reads ``frames`` frames at step ``max_stride`` from the middle 90 % of the clip; with the
    paper's 49 frames and step 3 a clip needs 164.
    Source: Mask2DiT training code, ``num_frame * 0.9 // 3 >= 49``; here in exact integers.
    """
    return num_frames * 9 // (10 * max_stride) >= frames


def sft_trainable(num_frames: int, frames: int) -> bool:
    """Whether the SFT loader accepts a scene: it must hold ``frames`` frames at step 1.

    Source: Mask2DiT training code, which needs 49.
    """
    return num_frames >= frames


def make_clips(
    source: Source,
    shots: Sequence[Shot],
    frame_pts: Sequence[int],
    captions: Sequence[CaptionSpan],
    cfg: ClipsConfig,
    *,
    frames: int,
    max_stride: int,
) -> tuple[list[Clip], list[Reject]]:
    """Turn a source's shots into clips.

    A shot loses the frames of its transitions (see :func:`trim`) and is cut where there may be one
    (see :func:`without_doubts`); if what is left is longer than ``cfg.max_s``, ``cfg.long_shots``
    says what becomes of it (see :func:`pieces`). Each of the spans so found becomes a clip or a
    reject: ``too_short`` (fewer than ``cfg.min_frames``) or ``too_long``. The caption is that of
    the given span that covers most of the clip and at least
    half; without one it stays empty.

    Args:
        source: With ``avg_fps`` as measured by the shot detection.
        shots: The source's shots in order.
        frame_pts: PTS of each frame and the end of the last (``ShotDetection.frame_pts``).
        captions: Given caption spans of this source, maybe none.
        cfg: Trim and the limits of length.
        frames: Fewest frames a scene may have in training.
        max_stride: Largest frame step with which the trainer reads a scene.

    Returns:
        Clips in order, and rejects: one of either for every span, and a span or more for every
        shot. A reject carries the id of its shot, or, where the shot was cut into several spans,
        the id that the clip would have had.
    """
    clips: list[Clip] = []
    rejects: list[Reject] = []
    tick_s = source.time_base_num / source.time_base_den
    width_px, height_px = display_size(source)
    limit = _limit_ticks(source, cfg)
    index = -1
    for shot in shots:
        pure = without_doubts(shot, *trim(shot, cfg.trim_frames), cfg)
        spans = [
            piece for span in pure for piece in pieces(*span, frame_pts, limit, cfg.long_shots)
        ]
        for start, end in spans:
            index += 1
            start_pts, end_pts = frame_pts[start], frame_pts[end]
            clip_id = stable_id(shot.shot_id, start_pts, end_pts)
            fault = _fault(start, end, frame_pts, limit, tick_s, cfg)
            if fault is not None:
                reason, detail, score = fault
                record_id = shot.shot_id if len(spans) == 1 else clip_id
                rejects.append(Reject(record_id, STAGE, reason, detail, source.uri, False, score))
                continue
            start_s, end_s = (start_pts - frame_pts[0]) * tick_s, (end_pts - frame_pts[0]) * tick_s
            span = caption_for(captions, start_s, end_s)
            num_frames = end - start
            clips.append(
                Clip(
                    clip_id=clip_id,
                    shot_id=shot.shot_id,
                    source_id=source.source_id,
                    uri=source.uri,
                    index=index,
                    start_pts=start_pts,
                    end_pts=end_pts,
                    start_frame=start,
                    end_frame=end,
                    num_frames=num_frames,
                    start_s=start_s,
                    end_s=end_s,
                    fps=source.avg_fps,
                    width_px=width_px,
                    height_px=height_px,
                    caption=span.caption if span else "",
                    caption_source=span.source if span else "none",
                    matching_score=span.matching_score if span else None,
                    trainable_pretrain=pretrain_trainable(num_frames, frames, max_stride),
                    trainable_sft=sft_trainable(num_frames, frames),
                )
            )
    return clips, rejects


def trim(shot: Shot, trim_frames: int) -> tuple[int, int]:
    """The frames ``[start, end)`` of a shot that show nothing but this shot; empty: start == end.

    The extent of a gradual transition goes, and ``trim_frames`` more at each side that borders
    another shot or a transition: compression smears a cut over the frames next to it, and a
    dissolve's ends are too faint to be seen. Nothing else can leak in at the ends of the file and
    where a length rule cut one take in two (``forced``), so nothing is dropped there.
    """
    start, end = shot.start_frame, shot.end_frame
    if shot.transition_in not in ("start", "forced") or shot.transition_in_frames:
        start += shot.transition_in_frames + trim_frames
    if shot.transition_out not in ("end", "forced") or shot.transition_out_frames:
        end -= shot.transition_out_frames + trim_frames
    # The transitions of a short shot may meet or overlap.
    return (start, end) if start < end else (shot.start_frame, shot.start_frame)


def without_doubts(shot: Shot, start: int, end: int, cfg: ClipsConfig) -> list[tuple[int, int]]:
    """What is left of a span of frames when places that may be transitions are cut out.

    Doubts of at least ``cfg.max_doubt`` go, and ``cfg.trim_frames`` on both sides of each. Nothing
    left: one empty span.
    """
    left: list[tuple[int, int]] = []
    at = start
    for doubt in sorted(shot.doubts, key=lambda d: d.start_frame):
        if cfg.max_doubt is None or doubt.score < cfg.max_doubt:
            continue
        border = min(end, doubt.start_frame - cfg.trim_frames)
        if border > at:
            left.append((at, border))
        at = max(at, doubt.end_frame + cfg.trim_frames)
    if at < end:
        left.append((at, end))
    return left or [(start, start)]


def pieces(
    start: int, end: int, frame_pts: Sequence[int], limit: int | None, long_shots: str
) -> list[tuple[int, int]]:
    """A span of frames, cut up if it lasts longer than ``limit`` ticks; the pieces adjoin.

    ``split`` halves by frame count until every piece fits; ``stride`` takes from the start as many
    frames as fit, again and again, so its last piece is often short. ``keep`` and ``reject`` leave
    the span whole. A single frame that lasts too long cannot be cut.
    """
    if limit is None or frame_pts[end] - frame_pts[start] <= limit or end - start < 2:
        return [(start, end)]
    if long_shots == "split":
        middle = (start + end) // 2
        first = pieces(start, middle, frame_pts, limit, long_shots)
        return first + pieces(middle, end, frame_pts, limit, long_shots)
    if long_shots != "stride":
        return [(start, end)]
    bounds = [start]
    while bounds[-1] < end:
        fits = bisect_right(frame_pts, frame_pts[bounds[-1]] + limit, lo=bounds[-1]) - 1
        bounds.append(min(max(fits, bounds[-1] + 1), end))
    return list(pairwise(bounds))


def _limit_ticks(source: Source, cfg: ClipsConfig) -> int | None:
    """``cfg.max_s`` in ticks, exactly as written (0.7 is 7/10, not the float just below)."""
    if cfg.max_s is None:
        return None
    tick = Fraction(source.time_base_num, source.time_base_den)
    return floor(Fraction(cfg.max_s).limit_denominator(1_000_000) / tick)


def _fault(
    start: int,
    end: int,
    frame_pts: Sequence[int],
    limit: int | None,
    tick_s: float,
    cfg: ClipsConfig,
) -> tuple[str, str, float] | None:
    """Reason, detail and score of a span that is no clip."""
    if end - start < cfg.min_frames:
        detail = f"{end - start} frames, fewer than {cfg.min_frames} (min_frames)"
        return (
            "too_short",
            f"span [{start}, {end}) after trimming and cutting: {detail}",
            end - start,
        )
    ticks = frame_pts[end] - frame_pts[start]
    if limit is not None and ticks > limit and cfg.long_shots != "keep":
        detail = f"{ticks * tick_s:.3f} s, more than {cfg.max_s:g} (max_s)"
        return (
            "too_long",
            f"span [{start}, {end}) with long_shots={cfg.long_shots}: {detail}",
            (ticks * tick_s),
        )
    return None
