from __future__ import annotations

import logging
import os
from pathlib import Path

import fsspec
import pytest

from curation.inputs.downloads import Downloads
from curation.inputs.listing import Listing, list_videos
from schemas.config.curation import SourcesConfig
from schemas.errors import InputError

PANDA = "videoID,url,timestamp,caption,matching_score\n"


def listed(root: Path, *inputs: str, **values: object) -> Listing:
    cfg = SourcesConfig.model_validate({"inputs": inputs, "captions_csv": None, **values})
    return list_videos(cfg, Downloads(root / "cache", cfg))


def names(listing: Listing) -> list[str]:
    return [v.uri.rpartition("/")[2] for v in listing.videos]


@pytest.fixture
def films(tmp_path: Path) -> Path:
    folder = tmp_path / "films"
    folder.mkdir()
    for name in ("a.mp4", "b.mkv", "notes.txt"):
        (folder / name).write_bytes(b"x")
    return folder


def test_each_place_once_in_order_whatever_names_it(tmp_path: Path, films: Path) -> None:
    (films / "list.csv").write_text("path,caption\na.mp4,first\nc.mp4,\na.mp4,second\n")
    inputs = (f"{films}/**/*.mp4", f"{films}", f"{films}/list.csv", f"{films}/../films/a.mp4")
    listing = listed(tmp_path, *inputs)
    assert names(listing) == ["a.mp4", "b.mkv", "c.mp4"]
    assert [s.caption for s in listing.videos[0].captions] == ["first", "second"]
    assert listed(tmp_path, *inputs[::-1]) == listing


@pytest.mark.parametrize("name", ["gone.mp4", "empty", "*.webm", "empty.csv"])
def test_an_input_that_matches_nothing_is_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.csv").write_text("path\n")
    with pytest.raises(InputError, match="matches no video"):
        listed(tmp_path, str(tmp_path / name))


def test_auto_says_what_it_took_a_list_for(
    tmp_path: Path, films: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (films / "p.csv").write_text(
        f"{PANDA}a,a.mp4,\"[['0:00:01.000', '0:00:02.000']]\",\"['x']\",[1]\n"
    )
    with caplog.at_level(logging.INFO):
        listing = listed(tmp_path, f"{films}/p.csv")
    assert f"input={films}/p.csv format=panda70m" in caplog.text
    assert names(listing) == ["a.mp4"]
    with pytest.raises(InputError, match="lacks columns"):
        listed(tmp_path, f"{films}/p.csv", format="pretrain_csv")


def test_a_media_root_is_joined_by_name(tmp_path: Path, films: Path) -> None:
    row = "\"[['0:00:01.000', '0:00:02.000']]\",\"['x']\",[1]"
    (tmp_path / "p.csv").write_text(
        f"{PANDA}b,https://host/watch?v=b,{row}\nz,https://host/z,{row}\n"
    )
    listing = listed(tmp_path, f"{tmp_path}/p.csv", media_root=str(films))
    assert [v.uri for v in listing.videos] == [f"{films}/b.mkv"]
    assert [r.reason for r in listing.rejects] == ["missing_media"]
    (tmp_path / "l.csv").write_text("path\na.mp4\n")
    assert [v.uri for v in listed(tmp_path, f"{tmp_path}/l.csv", media_root=str(films)).videos] == [
        f"{films}/a.mp4"
    ]


def test_captions_of_a_table_go_to_the_videos_that_are_there(
    tmp_path: Path, films: Path, caplog: pytest.LogCaptureFixture
) -> None:
    row = "\"[['0:00:01.000', '0:00:02.000']]\",\"['x']\",[1]"
    captions = films / "captions.csv"
    captions.write_text(f"{PANDA}a,a.mp4,{row}\nz,z.mp4,{row}\nbad,a.mp4,1,1,1\n")
    listing = listed(tmp_path, str(films), captions_csv=str(captions))
    assert names(listing) == ["a.mp4", "b.mkv"]
    assert [len(v.captions) for v in listing.videos] == [1, 0]
    assert [r.record_id for r in listing.rejects] == [f"{captions}, line 4, videoID 'bad'"]
    assert "captions=0" not in caplog.text
    listed(tmp_path, f"{films}/b.mkv", captions_csv=str(captions))
    assert "captions=0" in caplog.text
    with pytest.raises(InputError, match="list of videos cannot be read"):
        listed(tmp_path, str(films), captions_csv=f"{films}/gone.csv")


def test_lists_may_be_globbed_and_their_folder_named(tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    for name in "ab":
        (tmp_path / "lists" / f"{name}.csv").write_text(f"path\n{name}.mp4\n")
    assert names(listed(tmp_path, f"{tmp_path}/lists/*.csv")) == ["a.mp4", "b.mp4"]
    assert names(listed(tmp_path, f"{tmp_path}/lists", format="list")) == ["a.mp4", "b.mp4"]


def test_remote_lists_name_files_beside_them(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/listing/l.csv", b"path\na.mp4\n/local/b.mp4\nhttps://host/c.mp4\n")
    listing = listed(tmp_path, "memory://listing/l.csv")
    assert [v.uri for v in listing.videos] == [
        "/local/b.mp4",
        "https://host/c.mp4",
        "memory:///listing/a.mp4",
    ]


def test_an_output_of_video2dataset_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "out" / "00000").mkdir(parents=True)
    (tmp_path / "out" / "00000_stats.json").write_text("{}")
    (tmp_path / "out" / "00000" / "00000000.mp4").write_bytes(b"x")
    (tmp_path / "out" / "00000" / "00000000.txt").write_text("A cat.")
    (found,) = listed(tmp_path, f"{tmp_path}/out").videos
    assert [s.source for s in found.captions] == ["video2dataset"]
    (found,) = listed(tmp_path, f"{tmp_path}/out", format="videos").videos
    assert found.captions == ()


def test_names_that_are_not_utf8_are_listed_printably(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.mp4")).write_bytes(b"x")
    (found,) = listed(tmp_path, str(tmp_path)).videos
    assert found.uri == f"file://{tmp_path}/caf%E9.mp4"
