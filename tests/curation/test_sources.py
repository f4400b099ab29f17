from __future__ import annotations

from pathlib import Path

import pytest

from curation.sources import list_videos, read_source, reject_duplicates
from schemas.config.curation import SourcesConfig
from schemas.errors import InputError
from schemas.rows import Reject, Source


def tree(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


def listed(root: Path, *inputs: str) -> list[str]:
    found = list_videos(SourcesConfig(inputs=inputs))
    assert all(p.is_absolute() for p in found)
    return [p.relative_to(root).as_posix() for p in found]


def test_files_folders_and_globs_give_each_video_once(tmp_path: Path) -> None:
    tree(tmp_path, "a/x.mp4", "a/deep/y.MKV", "a/notes.txt", "a/.hidden/z.mp4", "odd[1].mp4", "raw")
    folder, glob = f"{tmp_path}/a", f"{tmp_path}/**/*.mp4"
    assert listed(tmp_path, folder) == ["a/deep/y.MKV", "a/x.mp4"]
    assert listed(tmp_path, glob, folder) == ["a/deep/y.MKV", "a/x.mp4", "odd[1].mp4"]
    assert listed(tmp_path, folder, glob) == listed(tmp_path, glob, folder)
    assert listed(tmp_path, f"{tmp_path}/odd[1].mp4", f"{tmp_path}/raw") == ["odd[1].mp4", "raw"]


@pytest.mark.parametrize("name", ["gone.mp4", "empty", "*.webm"])
def test_an_input_that_matches_nothing_is_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="matches no video"):
        list_videos(SourcesConfig(inputs=(str(tmp_path / name),)))


def test_defects_become_rejects(samples: Path) -> None:
    path = samples / "broken" / "empty.mp4"
    reject = read_source(path)
    assert isinstance(reject, Reject)
    assert (reject.record_id, reject.reason, reject.failed) == (str(path), "empty_file", False)


def test_the_first_path_of_equal_files_wins_in_any_order(samples: Path, tmp_path: Path) -> None:
    sources: list[Source] = []
    for name in ("b.mp4", "a.mp4", "c.mp4"):
        (tmp_path / name).write_bytes((samples / "chaplin.mp4").read_bytes())
        source = read_source(tmp_path / name)
        assert isinstance(source, Source)
        sources.append(source)
    for order in (sources, sources[::-1]):
        kept, rejects = reject_duplicates(order)
        assert [s.uri for s in kept] == [str(tmp_path / "a.mp4")]
        assert [r.record_id for r in rejects] == [str(tmp_path / n) for n in ("b.mp4", "c.mp4")]
        assert {r.reason for r in rejects} == {"duplicate_source"}
