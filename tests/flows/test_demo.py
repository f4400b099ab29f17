"""The films that the demo draws, and when it draws none."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows import demo
from schemas.config import load_config, preset


def test_films_are_drawn_once_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(demo, "EPISODES", 1)
    monkeypatch.setattr(demo, "COMPILATIONS", 1)
    config = load_config(None, [f"workspace={tmp_path}"], base=preset("toonworld"))
    sources = demo.with_films(config).curation.sources
    (folder,) = map(Path, sources.inputs)
    films = {p.name: p.stat().st_mtime_ns for p in folder.glob("*.mp4")}
    assert sorted(films) == ["compilation_00000.mp4", "episode_00000.mp4"]
    assert Path(str(sources.captions_csv)).is_file()
    demo.with_films(config)
    assert films == {p.name: p.stat().st_mtime_ns for p in folder.glob("*.mp4")}


@pytest.mark.parametrize("own", [[], ["curation.sources.inputs=[films]"]])
def test_sources_of_ones_own_are_left_alone(own: list[str], tmp_path: Path):
    start = preset("toonworld" if own else "tiny")
    config = load_config(None, [f"workspace={tmp_path}", *own], base=start)
    assert demo.with_films(config) == config
    assert not (tmp_path / demo.FILMS).exists()
