from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curation.captions import CaptionSpan
from curation.clips import make_clips, pretrain_trainable, sft_trainable
from schemas.config.curation import ClipsConfig
from schemas.rows import Clip, Reject, Shot, Source

SOURCE = Source(
    source_id="s", uri="/films/s.mp4", size_bytes=1, container="mp4", codec="h264",
    pix_fmt="yuv420p", width_px=640, height_px=360, rotation_deg=90, sar_num=1, sar_den=1,
    time_base_num=1, time_base_den=100, avg_fps=25.0, is_vfr=False, duration_s=4.0,
    num_frames=100, has_audio=False,
)  # fmt: skip
FIRST_PTS = 1000
FRAME_PTS = [FIRST_PTS + 4 * i for i in range(101)]


def shots(*bounds: int) -> list[Shot]:
    return [
        Shot(
            shot_id=f"shot{i}", source_id="s", index=i, start_pts=FRAME_PTS[a],
            end_pts=FRAME_PTS[b], start_frame=a, end_frame=b, start_s=a / 25, end_s=b / 25,
            transition_in="start" if a == 0 else "cut",
            transition_out="end" if b == 100 else "cut",
            detector="adaptive", confidence=None, luminance=0.5, motion=0.1, sharpness=1.0,
        )
        for i, (a, b) in enumerate(pairwise(bounds))
    ]  # fmt: skip


def clips_of(
    bounds: list[int], captions: list[CaptionSpan] | None = None, **settings: int
) -> tuple[list[Clip], list[Reject]]:
    cfg = ClipsConfig(**({"trim_frames": 2, "min_frames": 10} | settings))
    return make_clips(
        SOURCE, shots(*bounds), FRAME_PTS, captions or [], cfg, frames=9, max_stride=3
    )


def test_only_sides_that_border_another_shot_are_trimmed() -> None:
    clips, rejects = clips_of([0, 30, 60, 100])
    assert [(c.start_frame, c.end_frame) for c in clips] == [(0, 28), (32, 58), (62, 100)]
    assert not rejects
    clip = clips[1]
    assert (clip.start_pts, clip.end_pts) == (FRAME_PTS[32], FRAME_PTS[58])
    assert (clip.start_s, clip.end_s) == pytest.approx((1.28, 2.32))
    assert (clip.width_px, clip.height_px) == (360, 640)  # upright


def test_short_ones_are_rejected_with_their_length() -> None:
    clips, rejects = clips_of([0, 50, 63, 100])
    assert [c.index for c in clips] == [0, 2]
    assert [(r.record_id, r.reason, r.score) for r in rejects] == [("shot1", "too_short", 9)]
    assert len(clips_of([0, 2, 4, 100], trim_frames=3)[1]) == 2  # nothing left is too short too


def test_captions_come_with_their_source_and_score() -> None:
    spans = [CaptionSpan(0, 2, "red", 0.4), CaptionSpan(2.3, 2.9, "blue", None)]
    one, two = clips_of([0, 50, 100], spans)[0]
    assert (one.caption, one.caption_source, one.matching_score) == ("red", "panda70m_csv", 0.4)
    assert (two.caption, two.caption_source, two.matching_score) == ("", "none", None)


@given(st.lists(st.integers(1, 99), unique=True).map(sorted), st.integers(0, 9), st.integers(1, 60))
def test_every_shot_is_kept_or_rejected_and_clips_stay_inside(
    inner: list[int], trim: int, shortest: int
) -> None:
    bounds = [0, *inner, 100]
    clips, rejects = clips_of(bounds, trim_frames=trim, min_frames=shortest)
    kept = {c.shot_id for c in clips}
    refused = {r.record_id for r in rejects}
    assert kept | refused == {f"shot{i}" for i in range(len(bounds) - 1)}
    assert not kept & refused
    for clip in clips:
        start, end = bounds[clip.index], bounds[clip.index + 1]
        assert start + trim * (start > 0) == clip.start_frame
        assert end - trim * (end < 100) == clip.end_frame
        assert clip.num_frames == clip.end_frame - clip.start_frame >= shortest


def test_the_papers_trainability_limits() -> None:
    assert next(n for n in range(200) if pretrain_trainable(n, 49, 3)) == 164
    assert next(n for n in range(99) if sft_trainable(n, 49)) == 49


@given(st.integers(0, 5000), st.integers(1, 200))
def test_the_pretrain_rule_is_the_loaders_own(num_frames: int, frames: int) -> None:
    assert pretrain_trainable(num_frames, frames, 3) == (num_frames * 0.9 // 3 >= frames)
    assert pretrain_trainable(num_frames, frames, 3) == (
        Fraction(num_frames) * Fraction(9, 10) // 3 >= frames
    )
