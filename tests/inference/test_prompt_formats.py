from __future__ import annotations

import pytest

from inference.prompt_formats import read_records
from schemas.errors import ManifestError


def places(path):
    return [
        (r.place, r.values.get("prompt_id"), [m[0] for m in r.mistakes]) for r in read_records(path)
    ]


def test_csv_lines_are_those_of_the_file(tmp_path):
    path = tmp_path / "p.csv"
    path.write_bytes(
        b"\xef\xbb\xbfprompt_id,prompt_1\r\n"
        b'a,"one\r\ntwo, ""three"""\r\n'
        b"\r\n"
        b",\r\n"
        b"b,four, five\r\n"
        b"c\r\n"
        b"d,\xc3\xa4"
    )
    assert places(path) == [
        ("line 2", "a", []),
        ("line 6", None, ["wrong_number_of_cells"]),
        ("line 7", None, ["wrong_number_of_cells"]),
        ("line 8", "d", []),
    ]
    first, second, _, last = read_records(path)
    assert first.values["prompt_1"] == 'one\r\ntwo, "three"'
    assert "3 cells for 2 columns" in second.mistakes[0][1]
    assert last.values["prompt_1"] == "ä"


@pytest.mark.parametrize("separator", [";", "\t"])
def test_csv_of_other_spreadsheets(tmp_path, separator):
    path = tmp_path / "p.csv"
    path.write_text(f'prompt_id{separator}prompt_1\na{separator}"x, y; z"\n')
    (record,) = read_records(path)
    assert record.values == {"prompt_id": "a", "prompt_1": "x, y; z"}


@pytest.mark.parametrize(
    ("text", "line"), [('id,p\na,x\nb,"open\nc,y\nd,z\n', 3), ('id,p\na,"x"y\n', 2)]
)
def test_a_csv_with_a_stray_quote_is_not_guessed_at(tmp_path, text, line):
    path = tmp_path / "p.csv"
    path.write_text(text)
    with pytest.raises(ManifestError, match=f"(?s)CSV is broken.*line {line}"):
        read_records(path)


def test_jsonl_lines_are_told_apart(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(
        '{"prompt_id": "a", "prompts": ["x\u2028y\u0085z"]}\n'
        "\n"
        '{"prompt_id": "b", "prom\n'
        '["c"]\r\n'
        '{"prompt_id": "d", "seed": 1, "seed": 2}\n'
        '{"prompt_id": "e", "seed": NaN}\r\n'
        '{"prompt_id": "f", "prompts": ["cut of'
    )
    assert places(path) == [
        ("line 1", "a", []),
        ("line 3", None, ["invalid_json"]),
        ("line 4", None, ["wrong_type"]),
        ("line 5", None, ["invalid_json"]),
        ("line 6", "e", []),
        ("line 7", None, ["invalid_json"]),
    ]
    records = read_records(path)
    assert records[0].values["prompts"] == ["x\u2028y\u0085z"]
    assert "'seed' stands twice" in records[3].mistakes[0][1]
    assert records[4].values == {"prompt_id": "e"}


BROKEN = {
    "cut.json": (b'[\n{"prompt_id": "a"},\n{"prompt_id": "b"', "not JSON.*line 3"),
    "deep.json": (b"[" * 100_000, "not JSON.*recursion"),
    "object.json": (b'{"a": ["x", "y"]}', "no JSON array.*prompts import"),
    "latin.csv": ("prompt_id,prompt_1\na,x\nb,Mädchen\n".encode("latin-1"), "not UTF-8.*line 3"),
    "wide.csv": ("prompt_id,prompt_1\n".encode("utf-16"), "not UTF-8.*line 1"),
    "empty.csv": (b"", "is empty"),
    "blank.jsonl": (b"\xef\xbb\xbf \r\n\n", "is empty"),
    "twice.csv": (b"seed,prompt_id,seed\n1,a,2\n", "one name.*seed"),
    "no.parquet": (b"not parquet", "as Parquet"),
    "prompts.txt": (b"a", "format.*not known.*.jsonl"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_files_that_no_row_can_answer_for(tmp_path, name):
    data, message = BROKEN[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ManifestError, match=f"(?s){message}"):
        read_records(tmp_path / name)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ManifestError, match="not there"):
        read_records(tmp_path / "p.csv")
