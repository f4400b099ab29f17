"""No clip holds a frame of another shot or of a transition, on films verified by eye."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from benchmarks.shot_scores import foreign_frames
from benchmarks.spliced import read_truth
from curation.clips import make_clips
from curation.shots import ShotDetection, detect_shots
from curation.sources import read_source
from schemas.config.curation import ClipsConfig, ShotsConfig
from schemas.rows import Clip, Source

ASSETS = Path(__file__).parents[2] / "assets"
FILMS = {
    folder / name: entry
    for folder in (ASSETS / "samples", ASSETS / "transitions")
    for name, entry in read_truth(folder).items()
}


@cache
def detected(path: Path) -> tuple[Source, ShotDetection]:
    source = read_source(path, path.name)
    assert isinstance(source, Source)
    return source, detect_shots(path, source, ShotsConfig())


def clips_of(path: Path, cfg: ClipsConfig) -> list[Clip]:
    source, found = detected(path)
    clips, _ = make_clips(source, found.shots, found.frame_pts, (), cfg, frames=17, max_stride=1)
    return clips


def foreign(path: Path, cfg: ClipsConfig) -> dict[int, set[int]]:
    """Foreign frames of each clip, by its first frame."""
    clips = clips_of(path, cfg)
    return {c.start_frame: foreign_frames(c.start_frame, c.end_frame, FILMS[path]) for c in clips}


@pytest.mark.parametrize("path", FILMS, ids=lambda path: path.name)
def test_clips_hold_no_frame_of_another_shot_or_transition(path: Path) -> None:
    found = foreign(path, ClipsConfig())
    assert found
    assert not any(found.values()), found


def test_most_of_a_film_is_left() -> None:
    """Cutting everything away would pass the test above."""
    kept = total = 0
    for path, truth in FILMS.items():
        kept += sum(c.num_frames for c in clips_of(path, ClipsConfig()))
        total += truth["nframes"]
    assert kept > 0.75 * total


def test_without_leaving_out_doubtful_places_some_do() -> None:
    found = [foreign(path, ClipsConfig(max_doubt=None)) for path in FILMS]
    assert any(any(frames.values()) for frames in found)
