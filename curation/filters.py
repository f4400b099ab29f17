"""Filters named after what they reject. Scores are measured elsewhere; thresholds apply here.

A filter looks at one stored score, so another threshold costs one pass over a table: those of
:data:`FILTERS` at what the shot pass measured, those of :data:`SCORE_FILTERS` at what the optional
scorers (``curation.scorers``) gave. A clip that several filters reject counts for the first of them
in this order; its detail names all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from curation.scorers import AESTHETIC, TEXT_AREA
from schemas.config.curation import FiltersConfig
from schemas.rows import Clip, ClipScore, Reject, Shot, Source

STAGE = "filters"
SCORES_STAGE = "scores"

_JUMP = 0.03
"""Mean luma change (0 to 1) of the frames that are not still, from which a still shot counts as a
slideshow. Ours: on the films in assets/samples the median frame changes by 0.003 to 0.012, the
faintest cut by 0.047. It decides between two names for a rejected clip, never whether it is kept.
"""


@dataclass(frozen=True)
class Measured:
    """A clip with the shot it was cut from, which holds the scores, and its source."""

    clip: Clip
    shot: Shot
    source: Source


@dataclass(frozen=True)
class Finding:
    """A score on the wrong side of its threshold, and both in words."""

    score: float
    words: str


Findings = Mapping[str, Finding | None]
"""By filter, None where it has nothing against the clip."""


def filter_clips(
    clips: Iterable[Clip], shots: Iterable[Shot], sources: Iterable[Source], cfg: FiltersConfig
) -> tuple[list[Clip], list[Reject]]:
    """Sort out the clips whose scores pass a threshold.

    Args:
        clips: Any clips, in any order.
        shots: Theirs at least.
        sources: Theirs at least.
        cfg: Thresholds; None switches a filter off.

    Returns:
        The clips kept, in the order given, and one reject per other clip. Its reason is the name
        of the first filter that rejects it, its score what that filter looked at; its detail names
        every filter that rejects it, with score and threshold.
    """
    shot_by_id = {s.shot_id: s for s in shots}
    source_by_id = {s.source_id: s for s in sources}

    def judge_clip(clip: Clip) -> Findings:
        measured = Measured(clip, shot_by_id[clip.shot_id], source_by_id[clip.source_id])
        return {name: judge(measured, cfg) for name, judge in FILTERS.items()}

    return _sort_out(clips, judge_clip, STAGE)


def filter_scored(
    clips: Iterable[Clip], scores: Iterable[ClipScore], cfg: FiltersConfig
) -> tuple[list[Clip], list[Reject]]:
    """As :func:`filter_clips`, by what the optional scorers gave.

    Args:
        clips: Any clips, in any order.
        scores: Theirs at least: of each one that a threshold is set for.
        cfg: Thresholds; None switches a filter off.
    """
    by_clip: dict[str, dict[str, float]] = defaultdict(dict)
    for score in scores:
        by_clip[score.clip_id][score.scorer_id] = score.value

    def judge_clip(clip: Clip) -> Findings:
        return {name: judge(by_clip[clip.clip_id], cfg) for name, judge in SCORE_FILTERS.items()}

    return _sort_out(clips, judge_clip, SCORES_STAGE)


def _sort_out(
    clips: Iterable[Clip], judge: Callable[[Clip], Findings], stage: str
) -> tuple[list[Clip], list[Reject]]:
    kept: list[Clip] = []
    rejects: list[Reject] = []
    for clip in clips:
        found = {name: finding for name, finding in judge(clip).items() if finding}
        if not found:
            kept.append(clip)
            continue
        reason, first = next(iter(found.items()))
        detail = "; ".join(f"{name}: {finding.words}" for name, finding in found.items())
        rejects.append(Reject(clip.clip_id, stage, reason, detail, clip.uri, False, first.score))
    return kept, rejects


def reject_small(measured: Measured, cfg: FiltersConfig) -> Finding | None:
    """Fewer pixels than wanted, of the upright picture with square pixels."""
    clip = measured.clip
    return _below("width_px", clip.width_px, cfg.min_width_px) or _below(
        "height_px", clip.height_px, cfg.min_height_px
    )


def reject_black(measured: Measured, cfg: FiltersConfig) -> Finding | None:
    """Too many black frames."""
    return _above("black_ratio", measured.shot.black_ratio, cfg.max_black_ratio)


def reject_dark(measured: Measured, cfg: FiltersConfig) -> Finding | None:
    """Too dark on the whole."""
    return _below("luminance", measured.shot.luminance, cfg.min_luminance)


def reject_bright(measured: Measured, cfg: FiltersConfig) -> Finding | None:
    """Too bright on the whole."""
    return _above("luminance", measured.shot.luminance, cfg.max_luminance)


def reject_static(measured: Measured, cfg: FiltersConfig) -> Finding | None:
    """A still picture, or one in which hardly anything moves."""
    return None if _jumps(measured.shot) else _still(measured.shot, cfg)


def reject_slideshow(measured: Measured, cfg: FiltersConfig) -> Finding | None:
    """Still pictures that give way to one another at once."""
    return _still(measured.shot, cfg) if _jumps(measured.shot) else None


def reject_duplicate_frames(measured: Measured, cfg: FiltersConfig) -> Finding | None:
    """Too many frames that repeat the one before (a low rate blown up, a stalling recording)."""
    return _above("duplicate_ratio", measured.shot.duplicate_ratio, cfg.max_duplicate_ratio)


def reject_slow_motion(measured: Measured, cfg: FiltersConfig) -> Finding | None:
    """Too little changes from frame to frame."""
    return _below("motion", measured.shot.motion, cfg.min_motion)


def reject_fast_motion(measured: Measured, cfg: FiltersConfig) -> Finding | None:
    """Too much changes from frame to frame."""
    return _above("motion", measured.shot.motion, cfg.max_motion)


def reject_interlaced(measured: Measured, cfg: FiltersConfig) -> Finding | None:
    """Too many combed frames."""
    return _above("comb_ratio", measured.shot.comb_ratio, cfg.max_comb_ratio)


def reject_flickering(measured: Measured, cfg: FiltersConfig) -> Finding | None:
    """Brightness goes up and down from frame to frame."""
    return _above("flicker", measured.shot.flicker, cfg.max_flicker)


def reject_letterboxed(measured: Measured, cfg: FiltersConfig) -> Finding | None:
    """Black bars (of any side) take too much of the picture."""
    shot, source = measured.shot, measured.source
    inside = shot.crop_width_px * shot.crop_height_px
    crop_ratio = inside / (source.width_px * source.height_px)
    return _below("crop_ratio", crop_ratio, cfg.min_crop_ratio)


def reject_blurry(measured: Measured, cfg: FiltersConfig) -> Finding | None:
    """Out of focus, smeared, or blown up from a smaller picture."""
    return _below("sharpness", measured.shot.sharpness, cfg.min_sharpness)


def reject_unaesthetic(scores: Mapping[str, float], cfg: FiltersConfig) -> Finding | None:
    """It does not look good enough."""
    if cfg.min_aesthetic is None:
        return None
    return _below(AESTHETIC, scores[AESTHETIC], cfg.min_aesthetic)


def reject_text(scores: Mapping[str, float], cfg: FiltersConfig) -> Finding | None:
    """Too much of the picture is text: titles, subtitles, watermarks."""
    if cfg.max_text_ratio is None:
        return None
    return _above(TEXT_AREA, scores[TEXT_AREA], cfg.max_text_ratio)


FILTERS: dict[str, Callable[[Measured, FiltersConfig], Finding | None]] = {
    judge.__name__.removeprefix("reject_"): judge
    for judge in (
        reject_small,
        reject_black,
        reject_dark,
        reject_bright,
        reject_static,
        reject_slideshow,
        reject_duplicate_frames,
        reject_slow_motion,
        reject_fast_motion,
        reject_interlaced,
        reject_flickering,
        reject_letterboxed,
        reject_blurry,
    )
}
"""By reason, in the order in which they give it. A cause comes before what follows from it: a black
picture is also dark and static, a static one also repeats frames and is slow."""

SCORE_FILTERS: dict[str, Callable[[Mapping[str, float], FiltersConfig], Finding | None]] = {
    judge.__name__.removeprefix("reject_"): judge for judge in (reject_unaesthetic, reject_text)
}


def _still(shot: Shot, cfg: FiltersConfig) -> Finding | None:
    return _above("still_ratio", shot.still_ratio, cfg.max_still_ratio)


def _jumps(shot: Shot) -> bool:
    """Whether the few frames of a still shot that do change, change like a cut."""
    changing = 1 - shot.still_ratio
    return changing > 0 and shot.motion / changing >= _JUMP


def _above(name: str, score: float, limit: float | None) -> Finding | None:
    # Not `score > limit`: a score that is not a number must not pass.
    if limit is None or score <= limit:
        return None
    return Finding(score, f"{name} {score:g} is above {limit:g}")


def _below(name: str, score: float, limit: float | None) -> Finding | None:
    if limit is None or score >= limit:
        return None
    return Finding(score, f"{name} {score:g} is below {limit:g}")
