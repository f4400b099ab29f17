from __future__ import annotations

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.prompts import read_prompts, write_prompts
from schemas.errors import ManifestError
from schemas.rows import Prompt
from schemas.tables import REJECTS, write_table

TEXT = st.text(st.characters(categories=("L", "N", "P", "S")), min_size=1, max_size=20)


@settings(max_examples=20, deadline=None)
@given(
    st.lists(
        st.builds(
            Prompt,
            prompt_id=TEXT,
            prompts=st.lists(TEXT, min_size=1, max_size=16),
            negative_prompt=st.just("") | TEXT,
            seed=st.integers(0, 2**63 - 1),
            extend_prompts=st.lists(TEXT, max_size=3),
        ),
        min_size=1,
        max_size=5,
        unique_by=lambda p: p.prompt_id,
    )
)
def test_what_is_written_is_read(tmp_path_factory, prompts):
    path = tmp_path_factory.mktemp("prompts") / "p.parquet"
    assert write_prompts(path, prompts) == len(prompts)
    read, rejects = read_prompts(path)
    assert sorted(read, key=lambda p: p.prompt_id) == sorted(prompts, key=lambda p: p.prompt_id)
    assert rejects == []


def test_optional_columns_may_be_missing(tmp_path):
    path = tmp_path / "plain.parquet"
    frame = pd.DataFrame({"prompt_id": ["a"], "prompts": [["x", "y"]], "note": ["kept out"]})
    frame.to_parquet(path)
    assert read_prompts(path) == ([Prompt("a", ["x", "y"])], [])


def test_every_bad_row_is_listed_with_its_number_and_reason(tmp_path):
    path = tmp_path / "bad.parquet"
    rows = [
        {"prompt_id": "good", "prompts": ["x"], "seed": 3.0, "extend_prompts": ["y"]},
        {"prompt_id": "none", "prompts": []},
        {"prompt_id": "null", "prompts": None},
        {"prompt_id": "many", "prompts": ["x"] * 17},
        {"prompt_id": "good", "prompts": ["again"]},
        {"prompt_id": "blank", "prompts": ["x", "  "]},
        {"prompt_id": "gap", "prompts": ["x", None]},
        {"prompt_id": " ", "prompts": ["x"]},
        {"prompt_id": None, "prompts": ["x"]},
        {"prompt_id": "seed", "prompts": ["x"], "seed": 0.5},
        {"prompt_id": "minus", "prompts": ["x"], "seed": -1.0},
        {"prompt_id": "extend", "prompts": ["x"], "extend_prompts": [""]},
        {"prompt_id": "two", "prompts": [""], "seed": -2.0},
    ]
    schema = pa.schema(
        {
            "prompt_id": pa.string(),
            "prompts": pa.list_(pa.string()),
            "seed": pa.float64(),
            "extend_prompts": pa.list_(pa.string()),
        }
    )
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    good, rejects = read_prompts(path)
    assert good == [Prompt("good", ["x"], seed=3, extend_prompts=["y"])]
    found = [
        (int(r.detail.split(":")[0].removeprefix("row ")), r.record_id, r.reason) for r in rejects
    ]
    assert found == [
        (2, "none", "empty_prompts"),
        (3, "null", "empty_prompts"),
        (4, "many", "wrong_number_of_prompts"),
        (5, "good", "duplicate_prompt_id"),
        (6, "blank", "empty_prompt_text"),
        (7, "gap", "wrong_type"),
        (8, " ", "missing_prompt_id"),
        (9, "row-9", "missing_prompt_id"),
        (10, "seed", "invalid_seed"),
        (11, "minus", "invalid_seed"),
        (12, "extend", "empty_prompt_text"),
        (13, "two", "empty_prompt_text"),
    ]
    assert "prompts[0] is empty" in rejects[-1].detail
    assert "seed is -2.0" in rejects[-1].detail
    assert "is already row 1" in rejects[3].detail
    assert not any(r.failed for r in rejects)


def test_columns_of_the_wrong_type_are_row_mistakes(tmp_path):
    path = tmp_path / "types.parquet"
    columns = {"prompt_id": ["a"], "prompts": ["one text"], "negative_prompt": [1]}
    pq.write_table(pa.table(columns), path)
    _, (reject,) = read_prompts(path)
    assert reject.reason == "wrong_type"
    assert "prompts is str" in reject.detail
    assert "negative_prompt is 1" in reject.detail


def test_files_that_are_no_manifest(tmp_path):
    path = tmp_path / "x.parquet"
    with pytest.raises(ManifestError, match="not there"):
        read_prompts(path)
    path.write_bytes(b"not parquet")
    with pytest.raises(ManifestError, match="as Parquet"):
        read_prompts(path)
    pq.write_table(pa.table({"prompt_id": ["a"]}), path)
    with pytest.raises(ManifestError, match="lacks columns"):
        read_prompts(path)
    write_table(path, REJECTS, [])
    with pytest.raises(ManifestError, match="another table"):
        read_prompts(path)
