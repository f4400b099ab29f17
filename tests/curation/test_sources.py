from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from curation.captions import CaptionSpan
from curation.inputs.downloads import Downloads
from curation.inputs.listing import captions_by_source
from curation.inputs.lists import Listed
from curation.inputs.uris import uri_of
from curation.sources import read_source, reject_duplicates
from schemas.config.curation import SourcesConfig
from schemas.rows import Reject, Source


def test_defects_become_rejects(samples: Path) -> None:
    path = samples / "broken" / "empty.mp4"
    reject = read_source(path)
    assert isinstance(reject, Reject)
    assert (reject.record_id, reject.reason, reject.failed) == (str(path), "empty_file", False)


def test_what_the_system_refuses_becomes_a_reject(tmp_path: Path) -> None:
    (tmp_path / "folder.mp4").mkdir()
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    reasons: dict[str, str] = {}
    for name in ("folder.mp4", "pipe.mp4", "loop.mp4", "gone.mp4", "gone/x.mp4"):
        reject = read_source(tmp_path / name)
        assert isinstance(reject, Reject)
        assert not reject.failed
        reasons[name] = reject.reason
    assert reasons == {
        "folder.mp4": "not_a_file",
        "pipe.mp4": "not_a_file",
        "loop.mp4": "symlink_loop",
        "gone.mp4": "not_found",
        "gone/x.mp4": "not_found",
    }


def test_a_name_that_is_not_utf8_is_read_under_a_printable_one(
    samples: Path, tmp_path: Path
) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9.mp4")
    path.write_bytes((samples / "chaplin.mp4").read_bytes())
    uri = uri_of(path)
    assert uri == f"file://{tmp_path}/caf%E9.mp4"
    with Downloads(tmp_path / "cache", SourcesConfig()).opened(uri) as local:
        source = read_source(local, uri)
    assert isinstance(source, Source)
    assert source.uri == uri


def test_a_changed_file_is_a_new_source_and_a_renamed_one_is_not(
    samples: Path, tmp_path: Path
) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes((samples / "chaplin.mp4").read_bytes())
    first = read_source(path)
    renamed = read_source(path.rename(tmp_path / "b.mp4"))
    path.write_bytes((samples / "big_buck_bunny.mp4").read_bytes())
    changed = read_source(path)
    assert isinstance(first, Source)
    assert isinstance(changed, Source)
    assert renamed == dataclasses.replace(first, uri=str(tmp_path / "b.mp4"))
    assert changed.source_id != first.source_id


@pytest.fixture
def copies(samples: Path, tmp_path: Path) -> list[Source]:
    sources: list[Source] = []
    for name in ("b.mp4", "a.mp4", "c.mp4"):
        (tmp_path / name).write_bytes((samples / "chaplin.mp4").read_bytes())
        source = read_source(tmp_path / name)
        assert isinstance(source, Source)
        sources.append(source)
    return sources


def test_the_first_path_of_equal_files_wins_in_any_order(
    copies: list[Source], tmp_path: Path
) -> None:
    for order in (copies, copies[::-1]):
        kept, rejects = reject_duplicates(order)
        assert [s.uri for s in kept] == [str(tmp_path / "a.mp4")]
        assert [r.record_id for r in rejects] == [str(tmp_path / n) for n in ("b.mp4", "c.mp4")]
        assert {r.reason for r in rejects} == {"duplicate_source"}


def test_the_kept_one_has_the_captions_of_its_duplicates(
    copies: list[Source], tmp_path: Path
) -> None:
    early, late = CaptionSpan(0, 1, "early", None), CaptionSpan(1, 2, "late", 0.5)
    videos = [
        Listed(str(tmp_path / "a.mp4"), (late,)),
        Listed(str(tmp_path / "b.mp4")),
        Listed(str(tmp_path / "c.mp4"), (early, late)),
    ]
    expected = {copies[0].source_id: (early, late)}
    assert captions_by_source(videos, copies) == expected
    assert captions_by_source(videos[::-1], copies[::-1]) == expected
