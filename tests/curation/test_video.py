from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from curation.mp4 import write_mp4
from curation.video import decode, fit, iter_frames, probe, read_frames
from schemas.errors import VideoDecodeError


def reason_of(path: Path) -> str:
    with pytest.raises(VideoDecodeError) as caught:
        probe(path)
    return caught.value.reason


def test_probe_reports_the_coded_picture(samples: Path) -> None:
    source = probe(samples / "big_buck_bunny.mp4")
    assert (source.width_px, source.height_px, source.codec) == (480, 360, "h264")
    assert (source.time_base_num, source.time_base_den, source.avg_fps) == (1, 30, 24.0)
    assert source.has_audio
    assert source.num_frames is None  # unknown until every frame was decoded


@pytest.mark.parametrize(
    ("name", "reason"), [("empty.mp4", "empty_file"), ("audio_only.mp4", "no_video_stream")]
)
def test_unusable_files_are_refused_with_their_reason(
    samples: Path, name: str, reason: str
) -> None:
    assert reason_of(samples / "broken" / name) == reason


def test_text_and_missing_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video " * 50)
    assert reason_of(tmp_path / "text.mp4") == "cannot_open"
    assert reason_of(tmp_path / "gone.mp4") == "not_found"


def test_a_damaged_film_fails_where_the_damage_is(samples: Path) -> None:
    with pytest.raises(VideoDecodeError) as caught:
        list(decode(samples / "broken" / "corrupt.mp4"))
    assert caught.value.reason in {"decode_error", "cannot_open"}


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


def test_iter_frames_streams_small_frames_with_their_times(samples: Path) -> None:
    frames = list(iter_frames(samples / "chaplin.mp4", 45))
    assert len(frames) == 241
    assert frames[0].bgr.shape == (45, 80, 3)
    assert all(a.pts + a.duration == b.pts for a, b in pairwise(frames))


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
