from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from curation.mp4 import write_mp4
from curation.probe import display_size, probe
from curation.video import decode, fit, quarter_turns, read_frames, scaled
from schemas.errors import VideoDecodeError


def test_a_damaged_film_fails_where_the_damage_is(samples: Path) -> None:
    with pytest.raises(VideoDecodeError) as caught:
        list(decode(samples / "broken" / "corrupt.mp4"))
    assert caught.value.reason in {"decode_error", "cannot_open"}


@pytest.fixture
def odd(samples: Path) -> Path:
    return samples.parent / "odd"


@pytest.mark.parametrize(("name", "step"), [("big_buck_bunny.mp4", 23), ("chaplin.mp4", 110)])
def test_every_backend_and_seek_gives_the_same_frames(samples: Path, name: str, step: int) -> None:
    path = samples / name
    frames = {i: f for i, f in enumerate(decode(path)) if i % step == 5}
    wanted = [*reversed(list(frames)), 5]
    whole = np.stack([frames[i].to_ndarray(format="rgb24") for i in wanted])
    size = {"height_px": whole.shape[1], "width_px": whole.shape[2]}
    first = frames[5].pts
    assert first is not None
    for backend in ("pyav", "decord"):
        assert np.array_equal(read_frames(path, wanted, backend=backend, **size), whole)
        sought = read_frames(path, wanted, backend=backend, start=(5, first), **size)
        assert np.array_equal(sought, whole)
    small = {"height_px": 32, "width_px": 48, "mode": "cover"}
    by_pyav, by_decord, by_rule = (
        read_frames(path, wanted, backend=b, **small) for b in ("pyav", "decord", "auto")
    )
    assert np.array_equal(by_pyav, by_decord)
    assert np.array_equal(by_pyav, by_rule)


def test_seeking_deep_into_hevc_gives_the_same_frames(samples: Path) -> None:
    path = samples / "popeye_1.mkv"
    numbers = [331, 340, 360]
    tracked = {i: f for i, f in zip(range(361), decode(path), strict=False) if i in numbers}
    start_pts = tracked[331].pts
    assert start_pts is not None
    read = read_frames(path, numbers, height_px=90, width_px=120, start=(331, start_pts))
    for i, number in enumerate(numbers):
        expected = fit(tracked[number].to_ndarray(format="rgb24"), 90, 120, "stretch")
        assert np.array_equal(read[i], expected)


def test_rotation_is_applied_alike(tmp_path: Path) -> None:
    frames = np.zeros((4, 32, 48, 3), np.uint8)
    frames[:, :8, :8] = (255, 0, 0)  # red mark in the coded top left corner
    path = tmp_path / "phone.mp4"
    write_mp4(path, frames, 10)
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40
    turned = np.array([0, 0x10000, 0, -0x10000, 0, 0, 0, 0, 0x40000000], ">i4")
    data[matrix : matrix + 36] = turned.tobytes()
    path.write_bytes(data)
    assert probe(path).rotation_deg == 270
    by_pyav, by_decord = (
        read_frames(path, [0, 3], height_px=48, width_px=32, backend=b) for b in ("pyav", "decord")
    )
    assert np.array_equal(by_pyav, by_decord)
    red = by_pyav[0, :, :, 0].astype(int) - by_pyav[0, :, :, 1]
    assert red[:8, -8:].min() > 100  # turned clockwise, the mark is in the top right corner
    assert red[8:].max() < 60


@pytest.mark.parametrize("name", ["vfr_slow_motion.mp4", "rotated_phone.mov", "vp9_alpha.webm"])
def test_odd_files_give_the_same_frames_by_every_backend(odd: Path, name: str) -> None:
    path = odd / name
    frames = list(decode(path))
    numbers = sorted({0, 1, len(frames) // 2, len(frames) - 1})
    width, height = display_size(probe(path))
    for size in ({"height_px": height, "width_px": width}, {"height_px": 32, "width_px": 32}):
        expected = []
        for number in numbers:
            turns = quarter_turns(frames[number])
            upright = np.rot90(frames[number].to_ndarray(format="rgb24"), turns)
            expected.append(fit(upright, size["height_px"], size["width_px"], "cover"))
        for backend in ("auto", "pyav", "decord"):
            read = read_frames(path, numbers, mode="cover", backend=backend, **size)
            assert np.array_equal(read, expected), backend


def test_a_size_change_midstream_gives_one_size_and_the_same_pictures(odd: Path) -> None:
    size = {"height_px": 150, "width_px": 200}
    numbers = [0, 58, 100, 117]  # red 400 x 300, then green 200 x 150
    by_pyav, by_decord = (
        read_frames(odd / "size_change.mp4", numbers, backend=b, **size).astype(int)
        for b in ("pyav", "decord")
    )
    assert [tuple(frame[75, 100] > 60) for frame in by_pyav] == [
        (True, False, False),
        (True, False, False),
        (False, True, False),
        (False, True, False),
    ]
    assert np.abs(by_pyav - by_decord).max() <= 4


@pytest.mark.parametrize("turned", [False, True])
def test_pixels_become_square(tmp_path: Path, turned: bool) -> None:
    """A disc stored twice as narrow comes out round, upright or on its side."""
    y, x = np.mgrid[0:128, 0:128]
    disc = np.where((x * 2 - 128) ** 2 + (y - 64) ** 2 < 40**2, 255, 0).astype(np.uint8)
    path = tmp_path / "anamorphic.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 128, 128, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(2)
        if turned:
            stream.set_display_rotation(90)
        image = np.repeat(disc[:, :, None], 3, 2)
        for i in range(3):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = i
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    source = probe(path)
    assert (source.sar_num, source.sar_den) == (2, 1)
    assert display_size(source) == ((128, 256) if turned else (256, 128))
    for backend in ("pyav", "decord", "auto"):
        shown = read_frames(path, [2], height_px=128, width_px=128, mode="cover", backend=backend)
        lit = shown[0, :, :, 0] > 128
        assert abs(int(lit.any(0).sum()) - 80) <= 2
        assert abs(int(lit.any(1).sum()) - 80) <= 2


def test_frames_beyond_the_end_are_an_error(samples: Path) -> None:
    for backend in ("pyav", "auto"):
        with pytest.raises(VideoDecodeError) as caught:
            read_frames(
                samples / "chaplin.mp4", [240, 241], height_px=8, width_px=8, backend=backend
            )
        assert caught.value.reason == "missing_frames"


def test_cover_keeps_the_aspect_and_crops_the_middle() -> None:
    frame = np.zeros((20, 60, 3), np.uint8)
    frame[:, 20:40] = 200
    assert (fit(frame, 10, 10, "cover") == 200).all()
    assert fit(frame, 10, 10, "stretch")[:, 0].max() == 0


def test_scaled_keeps_the_aspect(samples: Path) -> None:
    frame = next(decode(samples / "chaplin.mp4"))
    assert scaled(frame, 45).shape == (45, 80, 3)


@pytest.mark.parametrize("width_px", [16, 48, 72, 128])
def test_narrow_videos_decord_cannot_read_come_from_pyav(tmp_path: Path, width_px: int) -> None:
    """decord 0.6 gives four channels at some small widths; ``auto`` must not take them."""
    ramp = np.linspace(0, 255, 64 * width_px * 3).reshape(64, width_px, 3).astype(np.uint8)
    path = tmp_path / "narrow.mp4"
    write_mp4(path, np.stack([ramp] * 4), 8)
    size = {"height_px": 64, "width_px": width_px}
    auto = read_frames(path, [0, 3], **size, backend="auto")
    assert np.array_equal(auto, read_frames(path, [0, 3], **size, backend="pyav"))
    if width_px == 48:
        with pytest.raises(VideoDecodeError, match="decord cannot read"):
            read_frames(path, [0, 3], **size, backend="decord")
