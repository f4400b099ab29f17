from __future__ import annotations

import csv
from pathlib import Path

import pytest

from curation.captions import CaptionSpan, caption_for, read_captions
from schemas.errors import InputError

HEADER = ["videoID", "url", "timestamp", "caption", "matching_score"]
OPTIONAL = ["desirable_filtering", "shot_boundary_detection"]
TIMES = "[['0:00:01.500', '0:00:03.000'], ['1:02:03.250', '1:02:04.000']]"
CAPTIONS = '["it\'s red", "blue, she said"]'


def write(path: Path, *rows: list[str], header: list[str] | None = None) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header or HEADER, *rows])
    return path


def test_one_row_becomes_one_span_per_clip(tmp_path: Path) -> None:
    path = write(tmp_path / "c.csv", ["a", "films/a.mp4", TIMES, CAPTIONS, "[0.45, None]"])
    assert read_captions(path) == {
        str(tmp_path / "films" / "a.mp4"): [
            CaptionSpan(1.5, 3.0, "it's red", 0.45),
            CaptionSpan(3723.25, 3724.0, "blue, she said", None),
        ]
    }


def test_optional_columns_long_cells_absolute_paths_and_joined_rows(tmp_path: Path) -> None:
    long = "x" * 200_000
    one = [
        "a", "/films/a.mp4", "[['0:00:00.000', '0:00:01.000']]", f"['{long}']", "[1]",
        "['desirable']", "[['0:00:00.000', '0:00:01.000']]",
    ]  # fmt: skip
    two = ["a", "/films/a.mp4", TIMES, CAPTIONS, "[1, 2]", "['d', 'd']", "[[], []]"]
    path = write(tmp_path / "c.csv", two, one, header=HEADER + OPTIONAL)
    spans = read_captions(path)["/films/a.mp4"]
    assert [s.start_s for s in spans] == [0.0, 1.5, 3723.25]
    assert len(spans[0].caption) == 200_000


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([TIMES, "['one']", "[1, 2]"], "timestamp: 2, caption: 1, matching_score: 2"),
        ([TIMES, "__import__('os').getcwd()", "[1, 2]"], "column caption"),
        ([TIMES, CAPTIONS, "0.5"], "column matching_score"),
        ([TIMES, CAPTIONS, "['a', 'b']"], "not a number"),
        (["[['0:00:01.000'], ['0:00:01.000', '0:00:02.000']]", CAPTIONS, "[1, 2]"], "pair"),
        (["[['later', '0:00:02.000']]", "['one']", "[1]"], "cannot be read"),
        (["[['0:00:03.000', '0:00:02.000']]", "['one']", "[1]"], "no length"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, row: list[str], message: str) -> None:
    good = ["good", "a.mp4", TIMES, CAPTIONS, "[1, 2]"]
    path = write(tmp_path / "c.csv", good, ["bad", "b.mp4", *row])
    with pytest.raises(InputError, match=message) as caught:
        read_captions(path)
    assert "line 3, videoID 'bad'" in str(caught.value)


def test_missing_file_and_columns(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not found"):
        read_captions(tmp_path / "c.csv")
    with pytest.raises(InputError, match="lacks columns"):
        read_captions(write(tmp_path / "c.csv", header=HEADER[:-1]))


def test_a_clip_takes_the_span_that_covers_most_of_it() -> None:
    spans = [CaptionSpan(0, 4, "first", None), CaptionSpan(4, 10, "second", None)]
    assert caption_for(spans, 3, 8) is spans[1]
    assert caption_for(spans, 2, 6) is spans[0]  # a tie goes to the earlier
    assert caption_for(spans, 9, 12) is None  # a third of the clip says too little
    assert caption_for([], 0, 1) is None


def test_the_samples_captions_are_well_formed(samples: Path) -> None:
    spans = read_captions(samples / "captions.csv")
    assert all(Path(path).is_file() for path in spans)
