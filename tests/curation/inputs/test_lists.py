from __future__ import annotations

import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.captions import CaptionSpan
from curation.inputs.lists import Listed, ListFile, detect_kind, read_list
from schemas.errors import InputError
from schemas.rows import Reject


def write(path: Path, text: str | bytes) -> ListFile:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return ListFile(str(path), path, "/films")


def span(start_s: float, end_s: float, text: str, score: float | None = None) -> CaptionSpan:
    return CaptionSpan(start_s, end_s, text, score, "list")


CSV = """path,caption,start_s,end_s
a.mp4,"red, then
blue",1.5,3
b.mp4,,,
s3://bucket/c.mp4,all,,
"""
JSONL = """{"path": "a.mp4", "caption": "red, then\\nblue", "start_s": 1.5, "end_s": 3}

{"path": "b.mp4"}
{"path": "s3://bucket/c.mp4", "caption": "all", "other": [1]}
"""
EXPECTED = [
    Listed("/films/a.mp4", (span(1.5, 3, "red, then\nblue"),)),
    Listed("/films/b.mp4"),
    Listed("s3://bucket/c.mp4", (span(0, math.inf, "all"),)),
]


def test_the_three_formats_say_the_same(tmp_path: Path) -> None:
    table = pa.table(
        {
            "path": ["a.mp4", "b.mp4", "s3://bucket/c.mp4"],
            "caption": ["red, then\nblue", None, "all"],
            "start_s": [1.5, None, None],
            "end_s": [3.0, None, math.nan],
        }
    )
    pq.write_table(table, tmp_path / "l.parquet")
    parquet = ListFile("l.parquet", tmp_path / "l.parquet", "/films")
    assert list(read_list(parquet)) == EXPECTED
    assert list(read_list(write(tmp_path / "l.csv", b"\xef\xbb\xbf" + CSV.encode()))) == EXPECTED
    assert list(read_list(write(tmp_path / "l.jsonl", JSONL))) == EXPECTED


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (",text,0,1,", "missing_path"),
        ("a.mp4,text,2,1,", "bad_span"),
        ("a.mp4,text,-1,1,", "bad_span"),
        ("a.mp4,text,one,2,", "bad_number"),
        ("a.mp4,text,0,inf,", "bad_number"),
        ("a.mp4,text,0,1,high", "bad_number"),
        ("a.mp4,text", "bad_row"),
        ("a.mp4,text,0,1,,extra", "bad_row"),
    ],
)
def test_a_bad_row_is_named_and_costs_no_other(tmp_path: Path, row: str, reason: str) -> None:
    header = "path,caption,start_s,end_s,matching_score"
    file = write(tmp_path / "l.csv", f"{header}\nok.mp4,x,0,1,0.5\n{row}\nok2.mp4,,,,\n")
    first, bad, last = read_list(file)
    assert first == Listed("/films/ok.mp4", (span(0, 1, "x", 0.5),))
    assert last == Listed("/films/ok2.mp4")
    assert isinstance(bad, Reject)
    assert (bad.record_id, bad.reason, bad.failed) == (f"{file.uri}, line 3", reason, False)


def test_bad_lines_of_json_are_named(tmp_path: Path) -> None:
    file = write(tmp_path / "l.jsonl", b'{"uri": "a.mp4"}\n{"uri"\n[]\n{"uri": 3}\n\xff\n')
    found = list(read_list(file))
    assert found[0] == Listed("/films/a.mp4")
    assert [(r.record_id[-6:], r.reason) for r in found[1:] if isinstance(r, Reject)] == [
        ("line 2", "bad_json"),
        ("line 3", "bad_json"),
        ("line 4", "missing_path"),
        ("line 5", "bad_json"),
    ]


@pytest.mark.parametrize(
    ("name", "text", "kind"),
    [
        ("a.csv", "videoID,url,timestamp,caption,matching_score\n", "panda70m"),
        ("a.csv", "fps,width,height,caption,path,num_frame\n", "pretrain_csv"),
        ("a.csv", "url,caption\n", "list"),
        ("a.jsonl", '{"path": "a.mp4"}\n', "list"),
        ("a.json", "[]", "sft_json"),
    ],
)
def test_the_kind_is_told_by_suffix_and_columns(
    tmp_path: Path, name: str, text: str, kind: str
) -> None:
    assert detect_kind(write(tmp_path / name, text))[0] == kind


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"name,caption\n", "lacks columns"),
        ("a.csv", b"", "lacks columns"),
        ("a.csv", b"path\n\xff\xfe.mp4\n", "cannot be read"),
        ("a.parquet", b"no parquet", "cannot be read"),
    ],
)
def test_what_is_no_list_is_an_error(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    file = write(tmp_path / name, content)
    with pytest.raises(InputError, match=message):
        list(read_list(file))
