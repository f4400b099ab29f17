"""Which windows are related, by a ground truth of spans and stories."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pcsv
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curation.ground_truth import SCHEMA, read_truth, related_windows
from schemas.errors import InputError

FILMS = ["/films/a.mp4", "/films/b.mp4", "/more/a.mp4"]


def spans(*rows: tuple[str, float, float, str]) -> pa.Table:
    return pa.Table.from_pylist(
        [dict(zip(SCHEMA.names, row, strict=True)) for row in rows], schema=SCHEMA
    )


def tables(clips: list[tuple[str, float, float]], n: int = 3) -> tuple[pa.Table, pa.Table]:
    """Windows of ``n`` consecutive clips of one film, and the clips."""
    ids = [f"c{i}" for i in range(len(clips))]
    made = pa.table(
        {
            "clip_id": ids,
            "uri": pa.array([c[0] for c in clips], pa.string()),
            "start_s": pa.array([c[1] for c in clips], pa.float64()),
            "end_s": pa.array([c[2] for c in clips], pa.float64()),
        }
    )
    runs = [
        ids[i : i + n]
        for i in range(len(clips) - n + 1)
        if len({c[0] for c in clips[i : i + n]}) == 1
    ]
    return pa.table({"clip_ids": pa.array(runs, pa.list_(pa.string()))}), made


def story_of(rows: list[tuple[str, float, float, str]], clip: tuple[str, float, float]):
    middle = (clip[1] + clip[2]) / 2
    return next((s for u, a, b, s in rows if u == clip[0] and a <= middle < b), None)


@st.composite
def films(draw: st.DrawFn):
    """Spans that do not overlap, and clips in order of film and time."""
    rows, clips = [], []
    for uri in FILMS:
        edges = sorted(draw(st.sets(st.integers(0, 24), max_size=8)))
        for a, b in pairwise(edges):
            if draw(st.booleans()):
                rows.append((uri, float(a), float(b), draw(st.sampled_from("xyz"))))
        for start in range(draw(st.integers(0, 8))):
            length = draw(st.integers(1, 6)) / 2
            clips.append((uri, 3.0 * start, 3.0 * start + length))
    return rows, clips


@given(films(), st.integers(2, 3), st.randoms(use_true_random=False))
def test_related_is_what_looking_at_each_window_gives(made, n, chance):
    rows, clips = made
    if not rows:
        return
    windows, table = tables(clips, n)
    shuffled = chance.sample(rows, len(rows))
    found = related_windows(spans(*shuffled), FILMS, windows, table)
    by_id = {f"c{i}": clip for i, clip in enumerate(clips)}
    expected = []
    for ids in windows["clip_ids"].to_pylist():
        stories = [story_of(rows, by_id[i]) for i in ids]
        expected.append(math.nan if None in stories else float(len(set(stories)) == 1))
    np.testing.assert_array_equal(found, expected)


def test_a_span_holds_its_start_and_not_its_end():
    windows, clips = tables([(FILMS[1], 0, 2), (FILMS[1], 2, 4), (FILMS[1], 4, 6)])
    whole = spans((FILMS[1], 1.0, 5.5, "x"))
    assert related_windows(whole, FILMS, windows, clips).tolist() == [1.0]
    short = spans((FILMS[1], 1.0, 5.0, "x"))
    assert np.isnan(related_windows(short, FILMS, windows, clips)).all()


@pytest.mark.parametrize("name", ["/films/b.mp4", "b.mp4", "elsewhere/b.mp4"])
def test_a_source_is_named_by_its_uri_or_by_a_file_name_of_its_own(name):
    windows, clips = tables([(FILMS[1], i, i + 1) for i in range(3)])
    truth = spans((name, 0, 9, "x"), ("/films/unused.mp4", 0, 9, "y"))
    assert related_windows(truth, FILMS, windows, clips).tolist() == [1.0]


def test_a_relative_path_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    films = [str(tmp_path / "one" / "a.mp4"), str(tmp_path / "two" / "a.mp4")]
    windows, clips = tables([(films[1], i, i + 1) for i in range(3)])
    assert related_windows(spans(("two/a.mp4", 0, 9, "x")), films, windows, clips).tolist() == [1.0]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("a.mp4", 0, 1, "x")], "that of several sources"),
        ([("c.mp4", 0, 1, "x")], "of no source of this snapshot"),
        ([], "of no source of this snapshot"),
        ([("b.mp4", 0, 2, "x"), ("/films/b.mp4", 1, 3, "x")], "overlap"),
    ],
)
def test_what_cannot_be_matched_is_said(rows, message):
    windows, clips = tables([(FILMS[1], i, i + 1) for i in range(3)])
    with pytest.raises(InputError, match=message):
        related_windows(spans(*rows), FILMS, windows, clips)


def test_csv_and_parquet_are_read_alike_and_a_number_may_be_a_story(tmp_path: Path):
    table = spans(("a.mp4", 0.5, 2, "007"), ("a.mp4", 2, 3.25, "story, two"))
    pq.write_table(table, tmp_path / "truth.parquet")
    pcsv.write_csv(table.append_column("note", pa.array(["", "x"])), tmp_path / "truth.csv")
    assert read_truth(tmp_path / "truth.parquet").equals(table)
    assert read_truth(tmp_path / "truth.csv").equals(table)
    whole = pa.table({"uri": ["a.mp4"], "start_s": [0], "end_s": [4], "story": [7]})
    pq.write_table(whole, tmp_path / "numbers.parquet")
    assert read_truth(tmp_path / "numbers.parquet")["story"].to_pylist() == ["7"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "not there"),
        ("uri,start_s,story\na.mp4,0,x\n", "end_s"),
        ("uri,start_s,end_s,story\na.mp4,zero,1,x\n", "zero"),
        ("uri,start_s,end_s,story\na.mp4,0,1,x\na.mp4,2,2,x\n", "row 2"),
        ("uri,start_s,end_s,story\na.mp4,,1,x\n", "row 1"),
        ("uri,start_s,end_s,story\na.mp4,-1,1,x\n", "row 1"),
        ("uri,start_s,end_s,story\na.mp4,0,1,\n", "row 1"),
        ("", "cannot be read"),
    ],
)
def test_a_file_that_is_no_ground_truth_is_refused(tmp_path: Path, text, message):
    path = tmp_path / "truth.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_truth(path)
