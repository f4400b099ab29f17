from __future__ import annotations

import json
import shlex
from pathlib import Path

from PIL import Image
from typer.testing import CliRunner

from curation.inputs.downloads import Downloads
from curation.inputs.listing import list_videos
from curation.toonworld.world import draw_episode
from curation.video import decode
from flows.cli import app
from flows.toonworld_command import contact_sheet
from schemas.config import load_config


def run(folder: Path, *args: object):
    small = ("--height", 32, "--width", 48, "--seed", 3)
    return CliRunner().invoke(app, ["toonworld", str(folder), *map(str, (*small, *args))])


def test_what_is_written_can_be_curated_with_the_printed_settings(tmp_path: Path):
    folder = tmp_path / "my toons"
    result = run(folder, "--episodes", 1, "--compilations", 1)
    assert result.exit_code == 0, result.output
    truth = json.loads((folder / "truth.json").read_text())
    assert sorted(truth) == ["compilation_00000.mp4", "episode_00000.mp4"]
    for name, entry in truth.items():
        sizes = [(frame.height, frame.width) for frame in decode(folder / name)]
        assert sizes == [(32, 48)] * entry["nframes"]
    assert Image.open(folder / "contact_sheet.jpg").width > 900

    command = shlex.split(result.output.split("curate it:")[1])
    assert command[:2] == ["triptych", "refresh"]
    config = load_config(None, [text for text in command[2:] if text != "-s"])
    sources = config.curation.sources
    listing = list_videos(sources, Downloads(tmp_path / "cache", sources))
    found = {Path(video.uri).name: len(video.captions) for video in listing.videos}
    assert found == {name: len(entry["shots"]) for name, entry in truth.items()}
    assert not listing.rejects
    assert config.curation.clips.min_frames == config.training.model.frames


def test_a_second_call_keeps_the_videos(tmp_path: Path):
    first = run(tmp_path, "--episodes", 1, "--compilations", 0)
    assert "there already" not in first.output
    again = run(tmp_path, "--episodes", 2, "--compilations", 0)
    assert "2 episodes and 0 compilations (1 were there already)" in again.output


def test_nothing_to_draw_is_an_error(tmp_path: Path):
    result = run(tmp_path, "--episodes", 0, "--compilations", 0)
    assert "there is nothing to draw" in str(result.exception)
    assert not any(tmp_path.iterdir())


def test_the_sheet_has_a_row_per_story_up_to_its_limit():
    few, many = (
        contact_sheet([draw_episode(1, i) for i in range(count)], 32, 32) for count in (1, 2)
    )
    assert many.width == few.width
    assert many.height > 1.9 * few.height
