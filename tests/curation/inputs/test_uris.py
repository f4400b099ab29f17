from __future__ import annotations

import json
import os
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from curation.inputs import uris

names = st.binary(min_size=1, max_size=20).filter(lambda b: not {0, 47} & set(b)).map(os.fsdecode)


@given(names.filter(lambda n: n not in (".", "..")))
def test_every_file_name_has_a_printable_uri_that_leads_back(name: str) -> None:
    path = Path("/films") / name
    uri = uris.uri_of(path)
    assert uris.path_of(uri) == path
    assert json.loads(json.dumps(uri, ensure_ascii=False).encode()) == uri


def test_paths_are_absolute_and_utf8_ones_stay_as_they_are(tmp_path: Path) -> None:
    assert uris.uri_of(tmp_path / "a" / ".." / "é %41.mp4") == f"{tmp_path}/é %41.mp4"
    assert uris.normal("film.mp4") == str(Path.cwd() / "film.mp4")
    assert uris.normal("file:///films/%C3%A9.mp4") == "/films/é.mp4"


def test_names_in_lists_are_joined_to_their_folder() -> None:
    assert uris.join("/films", "a/../b.mp4") == "/films/b.mp4"
    assert uris.join("/films", "/other/b.mp4") == "/other/b.mp4"
    assert uris.join("s3://bucket/films/", "b.mp4") == "s3://bucket/films/b.mp4"
    assert uris.join("/films", "https://host/b.mp4?x=1") == "https://host/b.mp4?x=1"
    assert uris.parent("https://host/lists/a.csv?x=/y") == "https://host/lists"
    assert uris.parent("/films/a.csv") == "/films"


def test_tar_members_lead_back_to_member_and_tar() -> None:
    uri = uris.tar_member("a/b.mp4", "s3://bucket/0.tar")
    assert uri == "tar://a/b.mp4::s3://bucket/0.tar"
    assert uris.split_tar_member(uri) == ("a/b.mp4", "s3://bucket/0.tar")
    assert uris.split_tar_member("s3://bucket/0.tar") is None
