from __future__ import annotations

import json
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from curation.video import read_frames
from inference.contact_sheet import MAX_ROWS, ContactSheet
from inference.outputs import VideoFiles, VideoWriter, finished_sha256
from schemas.errors import InputError
from schemas.layout import Workspace
from schemas.storage import read_json

PROMPTS = ["A red field.", "A green sea, and " + "waves " * 60, "青い空"]
PROVENANCE = {"prompt_id": "colours", "prompts": PROMPTS, "seeds": [1, 2, 3], "model_sha256": "ab"}
ALL = {"save_frames": True, "save_scenes": True, "save_latents": True}
LENGTHS = (5, 1, 9)


def scenes() -> list[np.ndarray]:
    made = []
    for channel, length in enumerate(LENGTHS):
        frames = np.zeros((length, 32, 48, 3), np.uint8)
        frames[..., channel] = np.linspace(60, 200, length)[:, None, None]
        made.append(frames)
    return made


def latents(scene: int) -> torch.Tensor:
    return torch.full((1 + LENGTHS[scene] // 4, 4, 4, 6), float(scene))


def write(files: VideoFiles, seconds: float = 1.23456, **saved: bool) -> str:
    with VideoWriter(files, 8, PROMPTS, PROVENANCE, **saved) as out:
        for number, frames in enumerate(scenes()):
            out.add_scene(frames, latents(number))
        return out.finish(seconds)


@pytest.fixture
def files(tmp_path: Path) -> VideoFiles:
    return VideoFiles.of(Workspace(tmp_path), "gen-1")


def test_the_video_its_chapters_and_how_it_was_made(files: VideoFiles):
    sha256 = write(files)
    assert sorted(p.name for p in files.folder.iterdir()) == [
        "gen-1.jpg", "gen-1.json", "gen-1.mp4", "gen-1.poster.jpg",
    ]  # fmt: skip
    sidecar = read_json(files.sidecar)
    names = ["gen-1.jpg", "gen-1.mp4", "gen-1.poster.jpg"]
    assert sorted(sidecar.pop("files")) == names
    assert sidecar.pop("seconds") == 1.235
    assert sidecar == PROVENANCE
    with av.open(str(files.video)) as container:
        assert json.loads(container.metadata["comment"]) == PROVENANCE
        assert container.metadata["title"] == "colours"
        stream = container.streams.video[0]
        assert (stream.average_rate, stream.codec_context.pix_fmt) == (8, "yuv420p")
        chapters = container.chapters()
    starts = [c["start"] * c["time_base"] * 8 for c in chapters]
    assert starts == [0, 5, 6]
    assert chapters[0]["metadata"]["title"] == PROMPTS[0]
    assert chapters[2]["metadata"]["title"] == PROMPTS[2]
    back = read_frames(files.video, range(15), height_px=32, width_px=48)
    assert np.abs(back.astype(int) - np.concatenate(scenes())).mean() < 3
    assert finished_sha256(files) == sha256


def test_same_scenes_same_bytes(files: VideoFiles, tmp_path: Path):
    other = VideoFiles(tmp_path / "elsewhere", files.stem)
    assert write(files, **ALL) == write(other, seconds=9, **ALL)
    names = {p.relative_to(files.folder) for p in files.folder.rglob("*") if p.is_file()}
    assert len(names) == 3 + 1 + sum(LENGTHS) + 3 + 3
    for name in names - {Path("gen-1.json")}:
        assert (files.folder / name).read_bytes() == (other.folder / name).read_bytes(), name


def test_frames_scenes_and_latents(files: VideoFiles):
    write(files, **ALL)
    for number, frames in enumerate(scenes()):
        for i, frame in enumerate(frames):
            assert np.array_equal(np.asarray(Image.open(files.frame(number, i))), frame)
        tensors = safetensors.torch.load_file(files.latents(number))
        assert torch.equal(tensors["latents"], latents(number))
        with av.open(str(files.scene(number))) as container:
            assert sum(1 for _ in container.decode(video=0)) == LENGTHS[number]
            comment = json.loads(container.metadata["comment"])
        assert comment == {**PROVENANCE, "scene": number}


def test_the_poster_is_the_middle_of_the_first_scene(files: VideoFiles):
    write(files)
    poster = np.asarray(Image.open(files.poster)).astype(int)
    assert poster.shape == (32, 48, 3)
    assert np.abs(poster - scenes()[0][2]).max() < 5


def test_only_what_is_whole_is_finished(files: VideoFiles, tmp_path: Path):
    assert finished_sha256(files) is None
    sha256 = write(files, save_latents=True)
    assert finished_sha256(files) == finished_sha256(files, save_latents=True) == sha256
    assert finished_sha256(files, save_frames=True) is None
    kept = tmp_path / "kept"
    shutil.copytree(files.folder, kept)
    video = files.video.read_bytes()

    def flip_a_bit() -> None:
        files.video.write_bytes(video[:-1] + bytes([video[-1] ^ 1]))

    damages = {
        "cut": lambda: files.video.write_bytes(video[:-1]),
        "same size, other bytes": flip_a_bit,
        "no video": files.video.unlink,
        "no poster": files.poster.unlink,
        "no sidecar": files.sidecar.unlink,
        "no latents": files.latents(1).unlink,
        "half a sidecar": lambda: files.sidecar.write_text('{"files": {'),
        "another sidecar": lambda: files.sidecar.write_text('["files"]'),
        "an old sidecar": lambda: files.sidecar.write_text('{"seconds": 1}'),
    }
    for name, damage in damages.items():
        damage()
        assert finished_sha256(files) is None, name
        shutil.rmtree(files.folder)
        shutil.copytree(kept, files.folder)
        assert finished_sha256(files) == sha256, name


def test_what_is_not_finished_leaves_no_video(files: VideoFiles):
    with pytest.raises(OSError, match="disk"), VideoWriter(files, 8, PROMPTS, PROVENANCE) as out:
        out.add_scene(scenes()[0])
        raise OSError("the disk is full")
    with VideoWriter(files, 8, PROMPTS, PROVENANCE) as out:
        out.add_scene(scenes()[0])
    with (
        pytest.raises(InputError, match="one size"),
        VideoWriter(files, 8, PROMPTS, PROVENANCE) as out,
    ):
        out.add_scene(scenes()[0])
        out.add_scene(scenes()[0][:, :16])
    assert list(files.folder.iterdir()) == []


def test_what_a_killed_process_left_goes(files: VideoFiles):
    files.folder.mkdir(parents=True)
    for name in (".gen-1.77.tmp.mp4", ".gen-1.poster.77.tmp.jpg", ".gen-10.77.tmp.mp4"):
        (files.folder / name).write_bytes(b"half")
    write(files)
    assert [p.name for p in files.folder.glob(".*")] == [".gen-10.77.tmp.mp4"]


def test_the_sheet_is_as_wide_for_every_video_and_has_a_row_per_scene():
    def sheet(count: int, text: str, height: int) -> Image.Image:
        made = ContactSheet([text] * count)
        for _ in range(count):
            made.add(np.full((5, height, 48, 3), 200, np.uint8))
        return made.image()

    one, two = sheet(1, "A field.", 32), sheet(2, "A field.", 32)
    assert one.width == two.width
    row = two.height - one.height
    assert row == 20 + 6 + 160 + 16  # caption, gap, tile, margin
    assert sheet(1, "words " * 100, 32).height == one.height + 20  # no more than two lines
    assert sheet(1, "青い空", 32).height == one.height
    assert sheet(MAX_ROWS + 9, "A field.", 32).height == one.height + (MAX_ROWS - 1) * row


def test_a_caption_that_cannot_be_written_is_left_out():
    def ink(text: str) -> int:
        made = ContactSheet([text])
        made.add(np.zeros((1, 32, 48, 3), np.uint8))
        return int((np.asarray(made.image())[:36] > 200).all(-1).sum())

    assert ink("A field.") > 0
    assert ink("青い空") == ink("") == 0
