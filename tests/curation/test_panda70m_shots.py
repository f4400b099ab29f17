from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scenedetect import detect
from scenedetect.common import FrameTimecode
from scenedetect.detectors import ContentDetector

from curation.embeddings import ColorLayout, Vector
from curation.fast_shots import Transition
from curation.panda70m_shots import Panda70mShots, forced_cuts
from curation.probe import probe
from curation.video import Frames, decode, read_frames

Span = tuple[int, int]
ODD = Path(__file__).parents[2] / "assets" / "odd"


def fed(frames: Iterable[av.VideoFrame], fps: float, **given: object) -> Panda70mShots:
    settings = {"stitch_distance": 0.6, "drop_distance": 1.0, "embedder": ColorLayout(), **given}
    shots = Panda70mShots(fps=fps, **settings)  # pyright: ignore[reportArgumentType]
    for frame in frames:
        shots.add(frame)
    return shots


def run(frames: Sequence[av.VideoFrame], fps: float, **given: object) -> list[Transition]:
    return fed(frames, fps, **given).transitions(range(len(frames) + 1))


def pictures(rgb: Sequence[Frames]) -> list[av.VideoFrame]:
    return [av.VideoFrame.from_ndarray(picture, format="rgb24") for picture in rgb]


def events(transitions: list[Transition], num_frames: int) -> list[Span]:
    """What lies between transitions."""
    starts = [0, *(t.end_frame for t in transitions)]
    ends = [*(t.start_frame for t in transitions), num_frames]
    return [(a, b) for a, b in zip(starts, ends, strict=True) if a < b]


def slow_events(rgb: Sequence[Frames], fps: float, stitch: float, drop: float) -> list[Span]:
    """Panda-70M's procedure, told once more: everything known before anything is decided."""
    detector = ContentDetector(threshold=25, min_scene_len=15)
    rate = Fraction(fps).limit_denominator(100_000)
    cuts = [
        cut.frame_num
        for i, picture in enumerate(rgb)
        for cut in detector.process_frame(FrameTimecode(i, fps=rate), picture[..., ::-1].copy())
    ]
    bounds = [0]
    for end in [*cuts, len(rgb)]:
        while end - bounds[-1] > 7 * fps:
            bounds.append(bounds[-1] + int(5 * fps))
        bounds.append(end)
    model = ColorLayout(rgb[0].shape[0])
    found: list[tuple[int, int, Vector]] = []
    for i in range(len(bounds) - 1):
        a, b = bounds[i], bounds[i + 1]
        first, last = int(0.95 * a + 0.05 * (b - 1)), int(0.05 * a + 0.95 * (b - 1))
        x = model.embed_clips(rgb[first][None, None])[0]
        y = model.embed_clips(rgb[last][None, None])[0]
        if np.sqrt(((x - y) ** 2).sum()) > drop:
            continue
        if found and found[-1][1] == a and np.sqrt(((found[-1][2] - x) ** 2).sum()) <= stitch:
            found[-1] = (found[-1][0], b, y)
        else:
            found.append((a, b, y))
    return [(a, b) for a, b, _ in found]


colours = st.tuples(*[st.integers(0, 255)] * 3)
takes = st.lists(st.tuples(colours, colours, st.integers(1, 90)), min_size=1, max_size=6)


def blended(takes: list[tuple[tuple[int, ...], tuple[int, ...], int]]) -> list[Frames]:
    """Takes that each go from one colour to another; a square keeps them from being flat."""
    frames: list[Frames] = []
    for begin, end, count in takes:
        for share in np.linspace(0, 1, count):
            colour = (1 - share) * np.array(begin) + share * np.array(end)
            picture = np.full((32, 32, 3), colour.astype(np.uint8))
            picture[8:16, 8:16] = 255 - picture[8:16, 8:16]
            frames.append(picture)
    return frames


@given(
    takes=takes,
    fps=st.sampled_from([0.1, 3.0, 24000 / 1001, 8.0]),
    stitch=st.sampled_from([0.1, 0.6]),
    drop=st.sampled_from([0.5, 1.0, 2.0]),
)
@settings(max_examples=40, deadline=None)
def test_events_are_those_of_the_procedure_done_at_leisure(
    takes: list[tuple[tuple[int, ...], tuple[int, ...], int]],
    fps: float,
    stitch: float,
    drop: float,
) -> None:
    rgb = blended(takes)
    if fps == 0.1:  # where Panda-70M's own loop would not end, and we cut nothing by force
        assert all(t.kind != "forced" for t in run(pictures(rgb), fps))
        return
    found = run(pictures(rgb), fps, stitch_distance=stitch, drop_distance=drop)
    assert events(found, len(rgb)) == slow_events(rgb, fps, stitch, drop)
    assert all(t.score > 1 for t in found)
    assert all(t.start_frame == t.end_frame for t in found if t.kind != "dissolve")


def test_the_first_stage_cuts_where_pyscenedetect_does(samples: Path) -> None:
    path = samples / "sintel_trailer.mp4"
    content = ContentDetector(25, min_scene_len=15)
    scenes = detect(str(path), content, start_in_scene=True, backend="pyav")
    shots = fed(decode(path), probe(path).avg_fps, stitch_distance=1e-9, drop_distance=2.0)
    found = shots.transitions(range(scenes[-1][1].frame_num + 1))
    starts = [start.frame_num for start, _ in scenes[1:]]
    assert len(starts) > 5
    assert [t.start_frame for t in found if t.kind == "cut"] == starts
    assert any(t.kind == "forced" for t in found)


def test_long_spans_are_cut_every_five_seconds() -> None:
    assert forced_cuts(0, 175, 25.0) == []  # seven seconds
    assert forced_cuts(0, 176, 25.0) == [125]
    assert forced_cuts(10, 10 + 425, 25.0) == [135, 260]
    assert forced_cuts(0, 1000, 29.97) == [149, 298, 447, 596, 745, 894]
    assert forced_cuts(0, 1000, 0.1) == []


@given(st.integers(0, 500), st.integers(0, 500), st.floats(0.2, 60))
def test_what_is_cut_early_stays_when_more_is_known(end: int, more: int, fps: float) -> None:
    early, late = forced_cuts(3, 3 + end, fps), forced_cuts(3, 3 + end + more, fps)
    assert late[: len(early)] == early


def test_a_cut_between_like_pictures_is_healed_and_one_between_others_stays() -> None:
    red, dark_red, blue = (200, 30, 30), (110, 16, 16), (30, 40, 190)
    rgb = blended([(red, red, 60), (dark_red, dark_red, 60), (blue, blue, 60)])
    both = run(pictures(rgb), 10, stitch_distance=1e-9)
    assert [t.start_frame for t in both if t.kind == "cut"] == [60, 120]
    (cut,) = run(pictures(rgb), 10)
    assert (cut.kind, cut.start_frame, cut.end_frame, cut.start_pts) == ("cut", 120, 120, 120)


def test_a_long_take_heals_where_it_looks_alike_and_is_forced_where_it_does_not() -> None:
    red, green = (220, 20, 20), (20, 200, 20)
    still = blended([(red, red, 200)])
    assert run(pictures(still), 10, stitch_distance=0.05) == []
    changes = pictures(blended([(red, green, 80)]))
    (changing,) = run(changes, 10, stitch_distance=0.05, drop_distance=2.0)
    assert changing.kind == "forced"
    assert changing.start_frame == 50


def test_a_piece_whose_ends_differ_is_a_transition() -> None:
    red, blue, white = (220, 20, 20), (20, 20, 220), (250, 250, 250)
    rgb = blended([(red, red, 40), (white, blue, 30), (red, red, 40)])
    (gone,) = run(pictures(rgb), 10)
    assert (gone.kind, gone.start_frame, gone.middle_frame, gone.end_frame) == (
        "dissolve", 40, 55, 70,
    )  # fmt: skip
    whole = run(pictures(rgb[40:70]), 10)
    assert [(t.start_frame, t.end_frame) for t in whole] == [(0, 30)]


class Noted(ColorLayout):
    """Keeps what it was shown."""

    def __init__(self) -> None:
        super().__init__(24)
        self.seen: list[Frames] = []

    def embed_clips(self, frames: Frames) -> Vector:
        assert frames.shape[:2] == (2, 1)
        self.seen += list(frames[:, 0])
        return super().embed_clips(frames)


@pytest.mark.parametrize("name", ["size_change.mp4", "rotated_phone.mov", "yuv444_fragmented.mp4"])
def test_the_model_sees_the_frames_that_embeddings_are_made_of(name: str) -> None:
    path, model = ODD / name, Noted()
    frames = list(decode(path))
    fps = probe(path).avg_fps
    shots = fed(frames, fps, embedder=model, stitch_distance=1e-9, drop_distance=2.0)
    found = shots.transitions(range(len(frames) + 1))
    bounds = [0, *(t.start_frame for t in found), len(frames)]
    numbers: list[int] = []
    for a, b in pairwise(bounds):
        numbers += [int(0.95 * a + 0.05 * (b - 1)), int(0.05 * a + 0.95 * (b - 1))]
    wanted = read_frames(path, numbers, height_px=24, width_px=24, backend="pyav")
    assert np.array_equal(np.stack(model.seen), wanted)


def test_frames_are_kept_no_longer_than_a_piece_may_last() -> None:
    rgb = blended([((9, 90, 200), (200, 90, 9), 400)])
    shots = fed([], 10)
    most = 0
    for frame in pictures(rgb):
        shots.add(frame)
        most = max(most, len(shots._small))
    assert most <= 7 * 10 + 15
