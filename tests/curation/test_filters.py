from __future__ import annotations

import dataclasses
import inspect
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curation import filters
from curation.filters import FILTERS, SCORE_FILTERS, filter_clips, filter_scored
from schemas.config.curation import FiltersConfig
from schemas.rows import Clip, ClipScore, Shot, Source

SOURCE = Source(
    source_id="s", uri="/films/s.mp4", size_bytes=1, packet_sha256="p", container="mp4",
    codec="h264", pix_fmt="yuv420p", bit_depth=8, width_px=640, height_px=360, rotation_deg=0,
    sar_num=4, sar_den=3, time_base_num=1, time_base_den=100, start_pts=0, avg_fps=25.0,
    is_vfr=False, is_interlaced=False, has_edit_list=False, duration_s=4.0, num_frames=100,
    has_audio=False,
)  # fmt: skip
SHOT = Shot(
    shot_id="shot", source_id="s", index=0, start_pts=0, end_pts=400, start_frame=0, end_frame=100,
    start_s=0, end_s=4, transition_in="start", transition_out="end", transition_in_frames=0,
    transition_out_frames=0, detector="fast", confidence=None, doubts=[], luminance=0.5,
    motion=0.02, sharpness=100.0, black_ratio=0.0, duplicate_ratio=0.0, still_ratio=0.1,
    comb_ratio=0.0, flicker=0.0, crop_x_px=0, crop_y_px=0, crop_width_px=640, crop_height_px=360,
)  # fmt: skip
CLIP = Clip(
    clip_id="clip", shot_id="shot", source_id="s", uri="/films/s.mp4", index=0, start_pts=0,
    end_pts=400, start_frame=0, end_frame=100, num_frames=100, start_s=0, end_s=4, fps=25,
    width_px=853, height_px=360, caption="", caption_source="none", matching_score=None,
    trainable_pretrain=False, trainable_sft=True,
)  # fmt: skip
OFF = FiltersConfig(max_black_ratio=None, max_still_ratio=None, max_comb_ratio=None)


def verdict(cfg: FiltersConfig, **scores: float) -> tuple[str, float | None, str] | None:
    kept, rejects = filter_clips([CLIP], [dataclasses.replace(SHOT, **scores)], [SOURCE], cfg)
    assert len(kept) + len(rejects) == 1
    return None if kept else (rejects[0].reason, rejects[0].score, rejects[0].detail)


@pytest.mark.parametrize(
    ("reason", "threshold", "score", "passes", "fails"),
    [
        ("black", "max_black_ratio", "black_ratio", 0.4, 0.6),
        ("dark", "min_luminance", "luminance", 0.6, 0.4),
        ("bright", "max_luminance", "luminance", 0.4, 0.6),
        ("static", "max_still_ratio", "still_ratio", 0.4, 0.6),
        ("duplicate_frames", "max_duplicate_ratio", "duplicate_ratio", 0.4, 0.6),
        ("slow_motion", "min_motion", "motion", 0.6, 0.4),
        ("fast_motion", "max_motion", "motion", 0.4, 0.6),
        ("interlaced", "max_comb_ratio", "comb_ratio", 0.4, 0.6),
        ("flickering", "max_flicker", "flicker", 0.4, 0.6),
        ("blurry", "min_sharpness", "sharpness", 0.6, 0.4),
    ],
)
def test_each_filter_rejects_on_its_side_of_its_threshold(
    reason: str, threshold: str, score: str, passes: float, fails: float
) -> None:
    # Little motion, so that a still shot is a static one.
    scores = {"motion": 0.001}
    cfg = OFF.model_copy(update={threshold: 0.5})
    assert verdict(cfg, **scores | {score: passes}) is None
    assert verdict(cfg, **scores | {score: 0.5}) is None  # the threshold itself passes
    assert verdict(cfg, **scores | {score: math.nan}) is not None
    found = verdict(cfg, **scores | {score: fails})
    side = "above" if threshold.startswith("max") else "below"
    assert found == (reason, fails, f"{reason}: {score} {fails:g} is {side} 0.5")
    assert verdict(OFF, **scores | {score: fails}) is None


def test_bars_are_measured_in_coded_pixels_and_size_in_upright_square_ones() -> None:
    cfg = OFF.model_copy(update={"min_crop_ratio": 0.8})
    assert verdict(cfg, crop_height_px=288) is None
    assert verdict(cfg, crop_height_px=287) == (
        "letterboxed", 287 / 360, "letterboxed: crop_ratio 0.797222 is below 0.8",
    )  # fmt: skip
    assert verdict(OFF.model_copy(update={"min_width_px": 853, "min_height_px": 360})) is None
    wide, high = OFF.model_copy(update={"min_width_px": 854}), {"min_height_px": 361}
    assert verdict(wide) == ("small", 853, "small: width_px 853 is below 854")
    assert verdict(OFF.model_copy(update=high)) == (
        "small", 360, "small: height_px 360 is below 361",
    )  # fmt: skip


def test_a_still_shot_that_jumps_is_a_slideshow() -> None:
    cfg = OFF.model_copy(update={"max_still_ratio": 0.9})
    for motion, still, reason in (
        (0.0, 1.0, "static"),
        (0.0004, 0.98, "static"),  # lips move: 0.02 per moving frame
        (0.002, 0.98, "slideshow"),  # every fiftieth frame is another picture: 0.1
    ):
        found = verdict(cfg, motion=motion, still_ratio=still)
        assert found is not None
        assert found[:2] == (reason, still)


def test_the_first_filter_gives_the_reason_and_all_are_listed() -> None:
    cfg = OFF.model_copy(update={"max_black_ratio": 0.5, "max_still_ratio": 0.9})
    found = verdict(cfg, black_ratio=1.0, still_ratio=0.99, motion=0.0)
    assert found == (
        "black", 1.0, "black: black_ratio 1 is above 0.5; static: still_ratio 0.99 is above 0.9",
    )  # fmt: skip


def test_every_filter_is_in_the_order_and_can_be_switched_off() -> None:
    named = {n for n, _ in inspect.getmembers(filters, inspect.isfunction) if "reject_" in n}
    assert named == {f"reject_{name}" for name in FILTERS | SCORE_FILTERS}
    assert not FILTERS.keys() & SCORE_FILTERS.keys()
    all_off = FiltersConfig(**dict.fromkeys(FiltersConfig.model_fields))  # pyright: ignore[reportArgumentType]
    worst = {"black_ratio": 1.0, "still_ratio": 1.0, "comb_ratio": 1.0, "flicker": 1.0}
    assert verdict(all_off, **worst) is None


@given(st.lists(st.floats(0, 1)), st.floats(0, 1), st.floats(0, 1))
def test_clips_are_kept_or_rejected_and_a_laxer_threshold_keeps_more(
    ratios: list[float], one: float, other: float
) -> None:
    shots = [dataclasses.replace(SHOT, shot_id=str(i), black_ratio=r) for i, r in enumerate(ratios)]
    clips = [dataclasses.replace(CLIP, clip_id=f"c{i}", shot_id=str(i)) for i in range(len(ratios))]
    kept: list[set[str]] = []
    for limit in sorted((one, other)):
        cfg = OFF.model_copy(update={"max_black_ratio": limit})
        good, bad = filter_clips(clips, reversed(shots), [SOURCE], cfg)
        assert [c.clip_id for c in good] == [f"c{i}" for i, r in enumerate(ratios) if r <= limit]
        assert [r.record_id for r in bad] == [f"c{i}" for i, r in enumerate(ratios) if r > limit]
        kept.append({c.clip_id for c in good})
    assert kept[0] <= kept[1]


def scores(aesthetic: float, text_area: float, clip_id: str = "clip") -> list[ClipScore]:
    named = (("text_area", text_area), ("aesthetic", aesthetic))
    return [ClipScore(clip_id, name, "w", value) for name, value in named]


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ((5.0, 0.02), None),  # the thresholds themselves pass
        ((4.9, 0.02), ("unaesthetic", 4.9, "unaesthetic: aesthetic 4.9 is below 5")),
        ((5.0, 0.03), ("text", 0.03, "text: text_area 0.03 is above 0.02")),
        ((4.0, 1.0), ("unaesthetic", 4.0,
         "unaesthetic: aesthetic 4 is below 5; text: text_area 1 is above 0.02")),
    ],
)  # fmt: skip
def test_scored_clips_are_rejected_on_the_wrong_side(
    found: tuple[float, float], expected: tuple[str, float, str] | None
) -> None:
    cfg = OFF.model_copy(update={"min_aesthetic": 5.0, "max_text_ratio": 0.02})
    kept, rejects = filter_scored([CLIP], scores(*found), cfg)
    assert kept == ([CLIP] if expected is None else [])
    assert [(r.reason, r.score, r.detail) for r in rejects] == ([expected] if expected else [])
    assert all(r.stage == "scores" and not r.failed for r in rejects)
    assert filter_scored([CLIP], scores(*found), OFF) == ([CLIP], [])


def test_a_score_that_is_no_number_does_not_pass_and_one_without_threshold_is_not_needed() -> None:
    cfg = OFF.model_copy(update={"min_aesthetic": 5.0})
    [reject] = filter_scored([CLIP], scores(math.nan, 0.0), cfg)[1]
    assert reject.reason == "unaesthetic"
    assert filter_scored([CLIP], scores(6.0, 0.0)[1:], cfg) == ([CLIP], [])


SCORE = st.floats(0, 10)


@given(st.lists(st.tuples(SCORE, SCORE)), st.tuples(SCORE, SCORE), st.tuples(SCORE, SCORE))
def test_scored_clips_reconcile_and_laxer_thresholds_keep_more(
    found: list[tuple[float, float]], one: tuple[float, float], other: tuple[float, float]
) -> None:
    clips = [dataclasses.replace(CLIP, clip_id=f"c{i}") for i in range(len(found))]
    rows = [s for i, values in enumerate(found) for s in scores(*values, clip_id=f"c{i}")]
    kept: list[set[str]] = []
    strict = (max(one[0], other[0]), min(one[1], other[1]))
    for least, most in (strict, one):
        cfg = OFF.model_copy(update={"min_aesthetic": least, "max_text_ratio": most})
        good, bad = filter_scored(clips, reversed(rows), cfg)
        assert [c.clip_id for c in good] == [
            f"c{i}" for i, (a, t) in enumerate(found) if a >= least and t <= most
        ]
        assert sorted([c.clip_id for c in good] + [r.record_id for r in bad]) == sorted(
            c.clip_id for c in clips
        )
        kept.append({c.clip_id for c in good})
    assert kept[0] <= kept[1]
