from __future__ import annotations

import dataclasses
from fractions import Fraction
from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curation.captions import CaptionSpan
from curation.clips import make_clips, pieces, pretrain_trainable, sft_trainable
from schemas.config.curation import ClipsConfig
from schemas.rows import Clip, Reject, Shot, Source

SOURCE = Source(
    source_id="s", uri="/films/s.mp4", size_bytes=1, packet_sha256="p", container="mp4",
    codec="h264", pix_fmt="yuv420p", bit_depth=8, width_px=640, height_px=360, rotation_deg=90,
    sar_num=1, sar_den=2, time_base_num=1, time_base_den=100, start_pts=1000, avg_fps=25.0,
    is_vfr=False, is_interlaced=False, has_edit_list=False, duration_s=4.0, num_frames=100,
    has_audio=False,
)  # fmt: skip
FIRST_PTS = 1000
FRAME_PTS = [FIRST_PTS + 4 * i for i in range(101)]
KIND_IN = {0: "start"}
KIND_OUT = {100: "end"}


def shots(*bounds: int) -> list[Shot]:
    return [
        Shot(
            shot_id=f"shot{i}", source_id="s", index=i, start_pts=FRAME_PTS[a],
            end_pts=FRAME_PTS[b], start_frame=a, end_frame=b, start_s=a / 25, end_s=b / 25,
            transition_in=KIND_IN.get(a, "cut"), transition_out=KIND_OUT.get(b, "cut"),
            transition_in_frames=0, transition_out_frames=0,
            detector="fast", confidence=None, doubts=[], luminance=0.5, motion=0.1, sharpness=1.0,
            black_ratio=0.0, duplicate_ratio=0.0, still_ratio=0.0, comb_ratio=0.0, flicker=0.0,
            crop_x_px=0, crop_y_px=0, crop_width_px=640, crop_height_px=360,
        )
        for i, (a, b) in enumerate(pairwise(bounds))
    ]  # fmt: skip


def clips_of(
    shots: list[Shot],
    captions: list[CaptionSpan] | None = None,
    frame_pts: list[int] = FRAME_PTS,
    **settings: object,
) -> tuple[list[Clip], list[Reject]]:
    cfg = ClipsConfig.model_validate({"trim_frames": 2, "min_frames": 10} | settings)
    return make_clips(SOURCE, shots, frame_pts, captions or [], cfg, frames=9, max_stride=3)


def test_only_sides_that_border_another_shot_are_trimmed() -> None:
    clips, rejects = clips_of(shots(0, 30, 60, 100))
    assert [(c.start_frame, c.end_frame) for c in clips] == [(0, 28), (32, 58), (62, 100)]
    assert not rejects
    clip = clips[1]
    assert (clip.start_pts, clip.end_pts) == (FRAME_PTS[32], FRAME_PTS[58])
    assert (clip.start_s, clip.end_s) == pytest.approx((1.28, 2.32))
    assert (clip.width_px, clip.height_px) == (360, 320)  # upright, square pixels


def test_short_ones_are_rejected_with_their_length() -> None:
    clips, rejects = clips_of(shots(0, 50, 63, 100))
    assert [c.index for c in clips] == [0, 2]
    assert [(r.record_id, r.reason, r.score) for r in rejects] == [("shot1", "too_short", 9)]
    assert (
        len(clips_of(shots(0, 2, 4, 100), trim_frames=3)[1]) == 2
    )  # nothing left is too short too


def test_captions_come_with_their_source_and_score() -> None:
    spans = [CaptionSpan(0, 2, "red", 0.4), CaptionSpan(2.3, 2.9, "blue", None)]
    one, two = clips_of(shots(0, 50, 100), spans)[0]
    assert (one.caption, one.caption_source, one.matching_score) == ("red", "panda70m_csv", 0.4)
    assert (two.caption, two.caption_source, two.matching_score) == ("", "none", None)


@given(st.lists(st.integers(1, 99), unique=True).map(sorted), st.integers(0, 9), st.integers(1, 60))
def test_every_shot_is_kept_or_rejected_and_clips_stay_inside(
    inner: list[int], trim: int, shortest: int
) -> None:
    bounds = [0, *inner, 100]
    clips, rejects = clips_of(shots(*bounds), trim_frames=trim, min_frames=shortest)
    kept = {c.shot_id for c in clips}
    refused = {r.record_id for r in rejects}
    assert kept | refused == {f"shot{i}" for i in range(len(bounds) - 1)}
    assert not kept & refused
    for clip in clips:
        start, end = bounds[clip.index], bounds[clip.index + 1]
        assert start + trim * (start > 0) == clip.start_frame
        assert end - trim * (end < 100) == clip.end_frame
        assert clip.num_frames == clip.end_frame - clip.start_frame >= shortest


def test_no_frame_of_a_transition_is_in_a_clip() -> None:
    fade, before, after = shots(0, 40, 70, 100)
    fade = dataclasses.replace(fade, transition_in="fade", transition_in_frames=5)
    before = dataclasses.replace(before, transition_out="dissolve", transition_out_frames=6)
    after = dataclasses.replace(after, transition_in="dissolve", transition_in_frames=4)
    clips, _ = clips_of([fade, before, after])
    assert [(c.start_frame, c.end_frame) for c in clips] == [(7, 38), (42, 62), (76, 100)]


def test_transitions_may_use_a_shot_up() -> None:
    shot = dataclasses.replace(shots(0, 30, 100)[1], transition_in_frames=40)
    shot = dataclasses.replace(shot, transition_out="dissolve", transition_out_frames=40)
    clips, (reject,) = clips_of([shot], min_frames=1)
    assert not clips
    assert (reject.record_id, reject.reason, reject.score) == ("shot1", "too_short", 0)


def test_a_take_cut_by_a_length_rule_loses_nothing() -> None:
    one, two = shots(0, 50, 100)
    one = dataclasses.replace(one, transition_out="forced")
    two = dataclasses.replace(two, transition_in="forced")
    assert [(c.start_frame, c.end_frame) for c in clips_of([one, two])[0]] == [(0, 50), (50, 100)]


@pytest.mark.parametrize(
    ("rule", "kept", "reasons"),
    [
        ("keep", [(0, 100)], []),
        ("reject", [], ["too_long"]),
        ("split", [(0, 25), (25, 50), (50, 75), (75, 100)], []),
        ("stride", [(0, 30), (30, 60), (60, 90), (90, 100)], []),
    ],
)
def test_long_shots(rule: str, kept: list[tuple[int, int]], reasons: list[str]) -> None:
    clips, rejects = clips_of(shots(0, 100), max_s=1.2, long_shots=rule)
    assert [(c.start_frame, c.end_frame) for c in clips] == kept
    assert [r.reason for r in rejects] == reasons
    assert [c.index for c in clips] == list(range(len(kept)))
    assert len({c.clip_id for c in clips}) == len(kept)


def test_the_short_tail_of_a_long_shot_is_rejected_under_its_own_id() -> None:
    cut_up = {"max_s": 1.2, "long_shots": "stride", "min_frames": 11}
    clips, (reject,) = clips_of(shots(0, 100), **cut_up)
    assert [c.index for c in clips] == [0, 1, 2]
    assert (reject.reason, reject.score) == ("too_short", 10)
    assert "[90, 100)" in reject.detail
    (whole,), _ = clips_of(
        [dataclasses.replace(shots(0, 90, 100)[1], shot_id="shot0")],
        **(cut_up | {"min_frames": 1, "trim_frames": 0}),
    )
    assert reject.record_id == whole.clip_id


def test_a_span_left_out_breaks_the_row_of_indexes() -> None:
    clips, rejects = clips_of(shots(0, 40, 45, 100), max_s=1.2, long_shots="split")
    assert [(c.shot_id, c.index) for c in clips] == [
        ("shot0", 0), ("shot0", 1), ("shot2", 3), ("shot2", 4),
    ]  # fmt: skip
    assert [r.record_id for r in rejects] == ["shot1"]


def test_limits_are_exact_and_follow_the_clock_not_the_frame_number() -> None:
    # 0.7 s is 70 ticks, though the float 0.7 lies below.
    uneven = [0, 10, 20, 70, 80, 230, 240]
    assert pieces(0, 6, uneven, 70, "stride") == [(0, 3), (3, 4), (4, 5), (5, 6)]
    clips, _ = clips_of(shots(0, 35), max_s=1.4, min_frames=35, trim_frames=0)
    assert [c.num_frames for c in clips] == [35]
    ticks = [0, 35, 70, 105]
    shot = dataclasses.replace(shots(0, 100)[0], end_frame=3, end_pts=105)
    clips, _ = clips_of([shot], frame_pts=ticks, max_s=0.7, long_shots="stride", min_frames=1)
    assert [c.num_frames for c in clips] == [2, 1]


def test_a_frame_that_lasts_too_long_is_rejected() -> None:
    shot = dataclasses.replace(shots(0, 100)[0], end_frame=2, end_pts=1000)
    clips, (reject,) = clips_of([shot], frame_pts=[0, 4, 1000], max_s=1.0, min_frames=1)
    assert [c.num_frames for c in clips] == [1]
    assert (reject.reason, reject.score) == ("too_long", pytest.approx(9.96))


@given(
    st.lists(st.integers(1, 500), min_size=1, max_size=80),
    st.integers(1, 2000),
    st.sampled_from(["keep", "split", "stride", "reject"]),
)
def test_pieces_adjoin_and_fit(steps: list[int], limit: int, rule: str) -> None:
    frame_pts = [0, *accumulate(steps)]
    found = pieces(0, len(steps), frame_pts, limit, rule)
    assert found[0][0] == 0
    assert found[-1][1] == len(steps)
    assert all(a[1] == b[0] for a, b in pairwise(found))
    assert all(a < b for a, b in found)
    if rule in ("split", "stride"):
        assert all(frame_pts[b] - frame_pts[a] <= limit or b - a == 1 for a, b in found)
    if rule == "stride":  # no piece could take one frame more
        assert all(frame_pts[b + 1] - frame_pts[a] > limit for a, b in found[:-1])


def test_the_papers_trainability_limits() -> None:
    assert next(n for n in range(200) if pretrain_trainable(n, 49, 3)) == 164
    assert next(n for n in range(99) if sft_trainable(n, 49)) == 49


@given(st.integers(0, 5000), st.integers(1, 200))
def test_the_pretrain_rule_is_the_loaders_own(num_frames: int, frames: int) -> None:
    assert pretrain_trainable(num_frames, frames, 3) == (num_frames * 0.9 // 3 >= frames)
    assert pretrain_trainable(num_frames, frames, 3) == (
        Fraction(num_frames) * Fraction(9, 10) // 3 >= frames
    )
