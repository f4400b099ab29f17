from __future__ import annotations

import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from curation.mp4 import MAX_TITLE_BYTES, open_mp4, write_mp4
from curation.video import decode, read_frames
from schemas.errors import InputError


def gradient(num_frames: int = 9) -> np.ndarray:
    y, x = np.mgrid[0:64, 0:96]
    shades = [np.stack([x * 2 + t, y * 3, np.full_like(x, 60)], -1) for t in range(num_frames)]
    return np.stack(shades).clip(0, 255).astype(np.uint8)


def textured() -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, 6, (15, 160, 240, 3))
    return (noise + np.linspace(20, 200, 240)[:, None]).astype(np.uint8)


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


@pytest.mark.parametrize("frames", [gradient(15), textured()], ids=["gradient", "textured"])
def test_same_input_same_bytes_whatever_memory_held(tmp_path: Path, frames: np.ndarray) -> None:
    """glibc fills memory on allocation as told; the encoder's defaults fail this."""
    np.save(tmp_path / "frames.npy", frames)
    written = []
    for filling in ("0", "85", "255"):
        path = tmp_path / f"{filling}.mp4"
        command = [sys.executable, "-c", WRITE, str(tmp_path / "frames.npy"), str(path)]
        subprocess.run(command, check=True, env={**os.environ, "MALLOC_PERTURB_": filling})
        written.append(path.read_bytes())
    assert written[0] == written[1] == written[2]


WRITE = """
import sys
import numpy as np
from pathlib import Path
from curation.mp4 import open_mp4
with open_mp4(Path(sys.argv[2]), 8, {"comment": "x"}) as out:
    for scene in np.split(np.load(sys.argv[1]), 3):
        out.add(scene, "scene")
"""


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


def test_pieces_are_one_video_with_chapters_that_begin_at_key_frames(tmp_path: Path) -> None:
    frames = gradient(11)
    path = tmp_path / "story.mp4"
    with open_mp4(path, 8, {"title": "A story"}) as out:
        out.add(frames[:5], "Es schneit: ein Mädchen geht los.")
        out.add(frames[5:6], "")
        out.add(frames[6:], "Actor1 \u2014 \u732b")
        assert not path.exists()
    with av.open(str(path)) as container:
        chapters = container.chapters()
        assert container.metadata["title"] == "A story"
        keys = [f.pts * f.time_base * 8 for f in container.decode(video=0) if f.key_frame]
    at = [(c["start"] * c["time_base"] * 8, c["end"] * c["time_base"] * 8) for c in chapters]
    assert at == [(0, 5), (5, 6), (6, 11)]
    assert [c["metadata"].get("title", "") for c in chapters] == [
        "Es schneit: ein Mädchen geht los.", "", "Actor1 \u2014 \u732b",
    ]  # fmt: skip
    assert keys == [0, 5, 6]
    back = read_frames(path, range(11), height_px=64, width_px=96)
    assert np.abs(back.astype(int) - frames).mean() < 2


def test_long_titles_are_cut_between_characters(tmp_path: Path) -> None:
    with open_mp4(tmp_path / "video.mp4", 8) as out:
        out.add(gradient(2), "ä" * 200)
    with av.open(str(tmp_path / "video.mp4")) as container:
        (chapter,) = container.chapters()
    title = chapter["metadata"]["title"]
    assert title == "ä" * 126 + "…"
    assert len(title.encode()) == MAX_TITLE_BYTES


def test_three_hundred_chapters(tmp_path: Path) -> None:
    with open_mp4(tmp_path / "video.mp4", 8) as out:
        for number in range(300):
            out.add(gradient(1)[:, :32, :32], f"scene {number}")
    with av.open(str(tmp_path / "video.mp4")) as container:
        titles = [c["metadata"]["title"] for c in container.chapters()]
    assert titles == [f"scene {number}" for number in range(300)]


def test_one_piece_has_the_bytes_of_write_mp4(tmp_path: Path) -> None:
    frames = gradient()
    write_mp4(tmp_path / "whole.mp4", frames, 8, {"title": "x"})
    with open_mp4(tmp_path / "pieces.mp4", 8, {"title": "x"}) as out:
        out.add(frames[:4])
        out.add(frames[4:])
    assert (tmp_path / "whole.mp4").read_bytes() == (tmp_path / "pieces.mp4").read_bytes()


def test_a_video_that_is_not_finished_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="disk"), open_mp4(tmp_path / "video.mp4", 8) as out:
        out.add(gradient())
        raise OSError("the disk is full")
    with pytest.raises(InputError, match="needs frames"), open_mp4(tmp_path / "video.mp4", 8):
        pass
    with (
        pytest.raises(InputError, match=r"(?s)one size.*96 x 32"),
        open_mp4(tmp_path / "v.mp4", 8) as out,
    ):
        out.add(gradient())
        out.add(gradient()[:, :32])
    assert not list(tmp_path.iterdir())
