from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from curation.mp4 import write_mp4
from curation.video import decode, read_frames
from schemas.errors import InputError


def gradient(num_frames: int = 9) -> np.ndarray:
    y, x = np.mgrid[0:64, 0:96]
    shades = [np.stack([x * 2 + t, y * 3, np.full_like(x, 60)], -1) for t in range(num_frames)]
    return np.stack(shades).clip(0, 255).astype(np.uint8)


def test_round_trip(tmp_path: Path) -> None:
    frames = gradient()
    path = tmp_path / "out" / "video.mp4"
    write_mp4(path, frames, 8, {"title": "A story", "triptych.seed": "7"})
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.codec.canonical_name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert stream.average_rate == 8
        assert container.metadata["title"] == "A story"
        assert container.metadata["triptych.seed"] == "7"
    back = read_frames(path, range(9), height_px=64, width_px=96)
    assert np.abs(back.astype(int) - frames).mean() < 2
    assert [p.name for p in path.parent.iterdir()] == ["video.mp4"]


def test_constant_rate_and_index_in_front(tmp_path: Path) -> None:
    path = tmp_path / "video.mp4"
    write_mp4(path, gradient(), Fraction(30000, 1001))
    pts = [f.pts for f in decode(path)]
    assert len(pts) == 9
    assert set(np.diff(pts)) == {pts[1] - pts[0]}
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


def test_same_input_same_bytes(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4"):
        write_mp4(tmp_path / name, gradient(), 8, {"comment": "x"})
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


@pytest.mark.parametrize(
    ("frames", "fps", "message"),
    [
        (np.zeros((2, 31, 32, 3), np.uint8), 8, "even sizes"),
        (np.zeros((2, 32, 32, 3), np.float32), 8, "cannot write these frames"),
        (np.zeros((0, 32, 32, 3), np.uint8), 8, "cannot write these frames"),
        (np.zeros((2, 32, 32, 3), np.uint8), 0, "must be positive"),
    ],
)
def test_impossible_videos_are_refused_and_leave_nothing(
    tmp_path: Path, frames: np.ndarray, fps: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        write_mp4(tmp_path / "video.mp4", frames, fps)
    assert not list(tmp_path.iterdir())
