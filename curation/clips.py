"""From shots to clips: trimmed, captioned, checked against the trainers' rules; no re-encoding."""

from __future__ import annotations

from collections.abc import Sequence

from curation.captions import CSV_SOURCE, CaptionSpan, caption_for
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

    ``cfg.trim_frames`` are dropped where a shot borders another one, not at the ends of the file,
    where no other picture can leak in. What is then shorter than ``cfg.min_frames`` is rejected as
    ``too_short``. The caption is that of the given span that covers most of the clip and at least
    half; without one it stays empty. ``width_px`` and ``height_px`` are those of the upright
    picture.

    Args:
        source: With ``avg_fps`` as measured by the shot detection.
        shots: The source's shots in order.
        frame_pts: PTS of each frame and the end of the last (``ShotDetection.frame_pts``).
        captions: Given caption spans of this source, maybe none.
        cfg: Trim and shortest length.
        frames: Frames per scene of the model that is to be trained.
        max_stride: Largest frame step with which the trainer reads a scene.

    Returns:
        Clips in order, and one reject per shot that gives none.
    """
    clips: list[Clip] = []
    rejects: list[Reject] = []
    tick_s = source.time_base_num / source.time_base_den
    upright = source.rotation_deg % 180 == 0
    for shot in shots:
        start = shot.start_frame + (cfg.trim_frames if shot.transition_in != "start" else 0)
        end = shot.end_frame - (cfg.trim_frames if shot.transition_out != "end" else 0)
        num_frames = max(0, end - start)
        if num_frames < cfg.min_frames:
            detail = f"{num_frames} frames after trimming, fewer than {cfg.min_frames}"
            rejects.append(
                Reject(shot.shot_id, STAGE, "too_short", detail, source.uri, False, num_frames)
            )
            continue
        start_pts, end_pts = frame_pts[start], frame_pts[end]
        start_s, end_s = (start_pts - frame_pts[0]) * tick_s, (end_pts - frame_pts[0]) * tick_s
        span = caption_for(captions, start_s, end_s)
        clips.append(
            Clip(
                clip_id=stable_id(shot.shot_id, start_pts, end_pts),
                shot_id=shot.shot_id,
                source_id=source.source_id,
                uri=source.uri,
                index=shot.index,
                start_pts=start_pts,
                end_pts=end_pts,
                start_frame=start,
                end_frame=end,
                num_frames=num_frames,
                start_s=start_s,
                end_s=end_s,
                fps=source.avg_fps,
                width_px=source.width_px if upright else source.height_px,
                height_px=source.height_px if upright else source.width_px,
                caption=span.caption if span else "",
                caption_source=CSV_SOURCE if span else "none",
                matching_score=span.matching_score if span else None,
                trainable_pretrain=pretrain_trainable(num_frames, frames, max_stride),
                trainable_sft=sft_trainable(num_frames, frames),
            )
        )
    return clips, rejects
