"""The fast detector on made-up films, where every transition is known."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import pytest

from curation.fast_shots import Transition, decide, find_transitions
from curation.thumbs import fill_in, read_thumbs
from curation.video import decode
from schemas.errors import VideoDecodeError

Frames = npt.NDArray[np.uint8]
HEIGHT, WIDTH = 96, 160


def scene(seed: int, length: int, speed: float = 0.25) -> Frames:
    """(T, H, W, 3): a smooth random picture of its own colours that drifts slowly sideways."""
    random = np.random.default_rng(seed)
    coarse = random.uniform(20, 235, (7, 24, 3))
    rows = np.linspace(0, 6, HEIGHT)
    columns = np.linspace(0, 23, 2 * WIDTH)
    wide = np.stack([_interpolated(coarse[..., c], rows, columns) for c in range(3)], -1)
    starts = (np.arange(length) * speed).astype(int) % WIDTH
    return np.stack([wide[:, s : s + WIDTH] for s in starts]).astype(np.uint8)


def _interpolated(grid: npt.NDArray[np.float64], rows, columns) -> npt.NDArray[np.float64]:
    tall = np.stack([np.interp(rows, range(len(grid)), column) for column in grid.T], 1)
    return np.stack([np.interp(columns, range(tall.shape[1]), row) for row in tall])


def mixed(a: Frames, b: Frames, length: int) -> Frames:
    """Two scenes, the last ``length`` frames of the first dissolving into the second."""
    weight = (np.arange(1, length + 1) / (length + 1))[:, None, None, None]
    middle = a[-length:] * (1 - weight) + b[:length] * weight
    return np.concatenate([a[:-length], middle.astype(np.uint8), b[length:]])


def write(
    path: Path, frames: Frames, codec: str = "libx264", rate: int = 25, **options: str
) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.codec_context.thread_count = 1
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def found(path: Path) -> list[Transition]:
    return find_transitions(path)[0]


@pytest.mark.parametrize(
    ("codec", "options"),
    [
        ("libx264", {"preset": "veryfast"}),
        ("libx264", {"crf": "36", "x264-params": "scenecut=0:bframes=6:keyint=300"}),
        ("mpeg2video", {"b": "800000", "g": "15", "bf": "2"}),
        ("mpeg4", {"b": "400000", "bf": "2"}),
        ("libvpx", {"b": "400000", "deadline": "realtime", "cpu-used": "8"}),
    ],
)
def test_hard_cuts_are_found_at_their_frame(tmp_path, codec, options):
    lengths = [31, 40, 27, 33]
    film = np.concatenate([scene(seed, n) for seed, n in enumerate(lengths)])
    suffix = "webm" if codec == "libvpx" else "mp4"
    transitions = found(write(tmp_path / f"film.{suffix}", film, codec, **options))
    assert [(t.kind, t.start_frame, t.end_frame) for t in transitions] == [
        ("cut", c, c) for c in np.cumsum(lengths)[:-1].tolist()
    ]


def test_times_are_those_of_the_decoded_frames(tmp_path):
    path = write(tmp_path / "film.mp4", np.concatenate([scene(1, 33), scene(2, 30)]))
    pts = [frame.pts for frame in decode(path)]
    transitions, thumbs = find_transitions(path)
    assert thumbs.all_pts.tolist() == pts
    assert [t.start_pts for t in transitions] == [pts[33]]


@pytest.mark.parametrize("length", [6, 12, 24, 40])
def test_a_dissolve_is_covered_whole(tmp_path, length):
    a, b = scene(3, 70), scene(4, 70)
    (t,) = found(write(tmp_path / "film.mp4", mixed(a, b, length)))
    start, end = 70 - length, 70
    assert t.kind == "dissolve"
    assert start - 8 - length // 4 <= t.start_frame <= start + 1
    assert end - 1 <= t.end_frame <= end + 8 + length // 4
    assert abs(t.middle_frame - (start + end) / 2) <= max(3, length // 4)


@pytest.mark.parametrize("level", [0, 235])
def test_fades_out_and_in_are_typed(tmp_path, level):
    a, b = scene(5, 60), scene(6, 60)
    flat = np.full((25, HEIGHT, WIDTH, 3), level, np.uint8)
    film = mixed(mixed(a, np.concatenate([flat, flat]), 15), b, 15)
    transitions = found(write(tmp_path / "film.mp4", film))
    assert [t.kind for t in transitions] == ["fade", "fade"]
    out, back = transitions
    assert out.start_frame <= 46
    assert out.end_frame >= 59
    assert back.start_frame <= 80
    assert back.end_frame >= 94


def test_a_cut_with_one_mixed_frame_keeps_that_frame_out_of_both_shots(tmp_path):
    (t,) = found(write(tmp_path / "film.mp4", mixed(scene(7, 41), scene(8, 40), 1)))
    assert (t.kind, t.start_frame, t.end_frame) == ("cut", 40, 41)


@pytest.mark.parametrize("length", [1, 2, 5])
def test_flashes_are_not_cuts(tmp_path, length):
    film = scene(9, 80)
    film[40 : 40 + length] = film[40 : 40 + length] // 4 + 190
    assert found(write(tmp_path / "film.mp4", film)) == []


def test_something_covering_the_lens_for_a_moment_is_not_a_cut(tmp_path):
    film = scene(10, 80)
    film[40:47] = scene(11, 7)
    assert found(write(tmp_path / "film.mp4", film)) == []


@pytest.mark.parametrize("speed", [0, 1, 3])
def test_pans_and_stills_have_no_transitions(tmp_path, speed):
    assert found(write(tmp_path / "film.mp4", scene(12, 50, speed))) == []


def test_letterbox_changes_nothing(tmp_path):
    film = np.concatenate([scene(13, 30), mixed(scene(14, 60), scene(15, 60), 16)])
    boxed = np.pad(film, ((0, 0), (24, 24), (0, 0), (0, 0)))
    plain = found(write(tmp_path / "plain.mp4", film))
    assert [t.kind for t in found(write(tmp_path / "boxed.mp4", boxed))] == [t.kind for t in plain]
    assert [t.kind for t in plain] == ["cut", "dissolve"]


def test_skipping_frames_finds_what_decoding_all_finds(tmp_path):
    film = np.concatenate([scene(s, n) for s, n in ((16, 35), (17, 28), (18, 44))])
    path = write(tmp_path / "film.mp4", film, "libx264", **{"x264-params": "scenecut=0:bframes=5"})
    skipped = read_thumbs(path)
    assert len(skipped) < len(skipped.all_pts)
    everything = read_thumbs(path, skip=False)
    assert [t.end_frame for t in found(path)] == [t.end_frame for t in decide(everything)]


def test_a_short_fade_in_a_slow_film_loses_none_of_its_frames(tmp_path):
    a, b = scene(29, 40), scene(30, 40)
    share = np.array([2, 1, 0, 0, 0, 0])[:, None, None, None] / 3
    rise = np.array([0, 0, 0, 1, 2, 3])[:, None, None, None] / 4
    middle = (a[34:] * share + b[:6] * rise).astype(np.uint8)
    film = np.concatenate([a[:34], middle, b[6:]])
    path = write(tmp_path / "film.mp4", film, rate=8, **{"x264-params": "bframes=3:b-adapt=0"})
    transitions, thumbs = find_transitions(path)
    assert len(thumbs) == len(film)
    assert {t.kind for t in transitions} == {"fade"}
    assert transitions[0].start_frame <= 36
    assert transitions[-1].end_frame >= 40


def test_filling_in_gives_the_frames_of_a_full_decode(tmp_path):
    path = write(tmp_path / "film.mp4", scene(19, 90), "libx264", **{"x264-params": "keyint=30"})
    thumbs = fill_in(path, read_thumbs(path), [(10, 20), (70, 75)])
    full = read_thumbs(path, skip=False)
    assert {*range(10, 20), *range(70, 75)} <= set(thumbs.frames.tolist())
    assert np.array_equal(thumbs.luma, full.luma[thumbs.frames])
    assert np.array_equal(thumbs.chroma, full.chroma[thumbs.frames])


def test_transitions_are_in_order_and_apart(tmp_path):
    parts = [mixed(scene(s, 40), scene(s + 1, 40), 10) for s in (20, 22, 24)]
    path = write(tmp_path / "film.mp4", np.concatenate(parts))
    transitions, thumbs = find_transitions(path)
    assert len(transitions) == 5
    edges = [edge for t in transitions for edge in (t.start_frame, t.end_frame)]
    assert edges == sorted(edges)
    assert edges[-1] <= len(thumbs.all_pts)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_very_short_files(tmp_path, count):
    assert found(write(tmp_path / "film.mp4", scene(26, count))) == []


def test_a_black_film_has_no_transitions(tmp_path):
    black = np.zeros((40, HEIGHT, WIDTH, 3), np.uint8)
    assert found(write(tmp_path / "film.mp4", black)) == []


@pytest.mark.parametrize("pix_fmt", ["yuv420p10le", "yuv444p", "gray"])
def test_other_pixel_formats(tmp_path, pix_fmt):
    film = np.concatenate([scene(27, 20), scene(28, 20)])
    path = tmp_path / "film.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, pix_fmt
        for picture in film:
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pix_fmt)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert [t.end_frame for t in found(path)] == [20]


def test_a_file_that_is_no_video(tmp_path):
    path = tmp_path / "film.mp4"
    path.write_bytes(b"no video at all")
    with pytest.raises(VideoDecodeError) as error:
        find_transitions(path)
    assert error.value.reason == "cannot_open"
