from __future__ import annotations

import csv
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.captions import CaptionSpan
from curation.inputs.lists import Listed, ListFile
from curation.inputs.panda70m import read_panda70m
from schemas.errors import InputError
from schemas.rows import Reject

HEADER = ["videoID", "url", "timestamp", "caption", "matching_score"]
OPTIONAL = ["desirable_filtering", "shot_boundary_detection"]
TIMES = "[['0:00:01.500', '0:00:03.000'], ['1:02:03.250', '1:02:04.000']]"
CAPTIONS = '["it\'s red", "blue, she said"]'
ONE = "[['0:00:10.000', '0:00:20.000']]"


def write(path: Path, *rows: list[str], header: list[str] | None = None) -> ListFile:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header or HEADER, *rows])
    return ListFile(str(path), path, "/films")


def test_one_row_is_one_video_with_a_span_per_clip(tmp_path: Path) -> None:
    file = write(tmp_path / "c.csv", ["a", "a.mp4", TIMES, CAPTIONS, "[0.45, None]"])
    assert list(read_panda70m(file)) == [
        Listed(
            "/films/a.mp4",
            (
                CaptionSpan(1.5, 3.0, "it's red", 0.45),
                CaptionSpan(3723.25, 3724.0, "blue, she said", None),
            ),
        )
    ]


def test_parquet_copies_may_hold_real_lists(tmp_path: Path) -> None:
    row = {
        "videoID": "a",
        "url": "a.mp4",
        "timestamp": [["0:00:01.000", "0:00:02.000"]],
        "caption": ["red"],
        "matching_score": [0.5],
    }
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "c.parquet")
    file = ListFile("c.parquet", tmp_path / "c.parquet", "/films")
    assert list(read_panda70m(file)) == [Listed("/films/a.mp4", (CaptionSpan(1, 2, "red", 0.5),))]


@pytest.mark.parametrize(
    ("shots", "expected"),
    [
        ("[[['0:00:00.000', '0:00:03.500'], ['0:00:03.500', '0:00:09.999']]]",
         ((10, 13.5), (13.5, 19.999))),
        ("[['0:00:00.000', '0:00:09.999']]", ((10, 19.999),)),  # flat
        ("[[]]", ()),
        ("[[['0:00:00.000', '0:00:00.000']]]", ()),  # no length, no shot
        ("", ()),
    ],
)  # fmt: skip
def test_shots_are_relative_to_their_clip(
    tmp_path: Path, shots: str, expected: tuple[tuple[float, float], ...]
) -> None:
    row = ["a", "a.mp4", ONE, "['x']", "[1]", "['desirable']", shots]
    (found,) = read_panda70m(write(tmp_path / "c.csv", row, header=HEADER + OPTIONAL))
    assert isinstance(found, Listed)
    assert found.captions[0].shots == expected


def test_a_single_clip_may_be_flat_and_cells_may_be_long(tmp_path: Path) -> None:
    long = "x" * 200_000
    row = ["a", "/far/a.mp4", "['0:00:01.000', '0:00:02.000']", f"['{long}']", "[1]"]
    assert list(read_panda70m(write(tmp_path / "c.csv", row))) == [
        Listed("/far/a.mp4", (CaptionSpan(1, 2, long, 1.0),))
    ]


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        ([TIMES, "['one']", "[1, 2]"], "unequal_lengths",
         "timestamp: 2, caption: 1, matching_score: 2"),
        ([TIMES, "__import__('os').getcwd()", "[1, 2]"], "bad_literal", "column caption"),
        ([TIMES, CAPTIONS, "0.5"], "bad_literal", "column matching_score"),
        ([TIMES, CAPTIONS, "['a', 'b']"], "bad_score", "not a finite number"),
        ([TIMES, CAPTIONS, "[1e999, 1]"], "bad_score", "inf"),
        ([TIMES, "['one', 2]", "[1, 2]"], "bad_caption", "2"),
        (["[['0:00:01.000'], []]", CAPTIONS, "[1, 2]"], "bad_timestamp", "pair"),
        (["[['later', '0:00:02.000']]", "['one']", "[1]"], "bad_timestamp", "later"),
        (["[['0:00:03.000', '0:00:02.000']]", "['one']", "[1]"], "bad_timestamp", "no length"),
        ([ONE, "['one']", "[1]", "", "[[['0:00:01.000']]]"], "bad_shots", "pair"),
        ([ONE, "['one']", "[1]", "[]x", ""], "bad_literal", "desirable_filtering"),
        ([ONE, "['one']", "[1]", "['a', 'b']", ""], "unequal_lengths", "desirable_filtering: 2"),
        (["[" * 10_000, "['one']", "[1]"], "bad_literal", "timestamp"),
    ],
)  # fmt: skip
def test_bad_rows_are_named_and_cost_no_other(
    tmp_path: Path, row: list[str], reason: str, detail: str
) -> None:
    good = ["good", "a.mp4", TIMES, CAPTIONS, "[1, 2]", "", ""]
    bad = (["bad", "b.mp4", *row, "", ""])[:7]
    file = write(tmp_path / "c.csv", good, bad, good, header=HEADER + OPTIONAL)
    first, reject, last = read_panda70m(file)
    assert first == last
    assert isinstance(reject, Reject)
    assert reject.record_id == f"{file.uri}, line 3, videoID 'bad'"
    assert (reject.reason, reject.uri, reject.failed) == (reason, "/films/b.mp4", False)
    assert detail in reject.detail


def test_videos_of_a_media_root_are_found_by_id_or_by_name(tmp_path: Path) -> None:
    rest = [ONE, "['x']", "[1]"]
    file = write(
        tmp_path / "c.csv",
        ["abc-_1", "https://www.youtube.com/watch?v=abc-_1", *rest],
        ["7", "https://host/films/some.mp4?x=1", *rest],
        ["8", "https://host/gone.mp4", *rest],
    )
    media = {"abc-_1": "/m/abc-_1.webm", "some": "/m/some.mkv", "some.mkv": "/m/some.mkv"}
    first, second, third = read_panda70m(file, media)
    assert isinstance(first, Listed)
    assert isinstance(second, Listed)
    assert (first.uri, second.uri) == ("/m/abc-_1.webm", "/m/some.mkv")
    assert isinstance(third, Reject)
    assert third.reason == "missing_media"


def test_missing_columns_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="lacks columns"):
        list(read_panda70m(write(tmp_path / "c.csv", header=HEADER[:-1])))


def test_the_samples_captions_are_well_formed(samples: Path) -> None:
    found = list(read_panda70m(ListFile("captions.csv", samples / "captions.csv", str(samples))))
    assert found
    assert all(isinstance(f, Listed) and Path(f.uri).is_file() for f in found)
