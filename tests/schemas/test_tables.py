import dataclasses
import random

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import ManifestError
from schemas.rows import Embedding, Prompt, Reject, Sample, Scene, stable_id
from schemas.tables import (
    EMBEDDINGS,
    PROMPTS,
    REJECTS,
    SAMPLES,
    from_arrow,
    iter_tables,
    read_metadata,
    read_table,
    to_arrow,
    write_batches,
    write_table,
)


def scene(name: str) -> Scene:
    return Scene(
        clip_id=name,
        source_id="s",
        uri="/v.mp4",
        start_pts=0,
        end_pts=10,
        start_frame=0,
        end_frame=10,
        num_frames=10,
        start_s=0.0,
        end_s=0.4,
        fps=25.0,
        width_px=64,
        height_px=64,
        caption="a <b> ä",
    )


def sample(name: str) -> Sample:
    return Sample(name, "sft", "train", [scene("a"), scene("b")], None, True)


def test_nested_rows_read_back(tmp_path):
    rows = [sample("x"), sample("y")]
    write_table(tmp_path / "t.parquet", SAMPLES, rows, {"config_hash": "abc"})
    assert read_table(tmp_path / "t.parquet", SAMPLES) == rows
    frame = pd.read_parquet(tmp_path / "t.parquet")
    assert list(frame["sample_id"]) == ["x", "y"]
    assert frame["scenes"][0][1]["caption"] == "a <b> ä"
    metadata = pq.read_metadata(tmp_path / "t.parquet").metadata
    assert metadata[b"triptych.config_hash"] == b"abc"
    assert metadata[b"triptych.schema_version"] == b"1.0"


text = st.text(max_size=8)
prompts = st.builds(
    Prompt,
    prompt_id=st.uuids().map(str),
    prompts=st.lists(text, max_size=3),
    negative_prompt=text,
    seed=st.integers(0, 2**40),
    extend_prompts=st.lists(text, max_size=2),
)


@given(st.lists(prompts, max_size=6, unique_by=lambda p: p.prompt_id), st.randoms())
def test_order_does_not_matter(rows: list[Prompt], rng: random.Random):
    shuffled = rows[:]
    rng.shuffle(shuffled)
    assert to_arrow(PROMPTS, rows).equals(to_arrow(PROMPTS, shuffled))
    assert sorted(
        from_arrow(PROMPTS, to_arrow(PROMPTS, rows)), key=lambda p: p.prompt_id
    ) == sorted(rows, key=lambda p: p.prompt_id)


def test_equal_rows_give_equal_bytes(tmp_path):
    x, y = Prompt("x", ["one"]), Prompt("y", ["two"])
    write_table(tmp_path / "a.parquet", PROMPTS, [x, y])
    write_table(tmp_path / "b.parquet", PROMPTS, [y, x])
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_embeddings_are_fixed_size_float16(tmp_path):
    rows = [Embedding("c", "m", "s", 0, "", [0.5, -0.25, 0.0])]
    write_table(tmp_path / "e.parquet", EMBEDDINGS, rows)
    field = pq.read_schema(tmp_path / "e.parquet").field("vector")
    assert field.type == pa.list_(pa.float16(), 3)
    assert read_table(tmp_path / "e.parquet", EMBEDDINGS)[0].vector == [0.5, -0.25, 0.0]


def test_a_repeated_key_is_refused():
    with pytest.raises(ManifestError, match="same key"):
        to_arrow(SAMPLES, [sample("x"), sample("x")])


def test_empty_tables_keep_their_schema(tmp_path):
    write_table(tmp_path / "r.parquet", REJECTS, [])
    assert read_table(tmp_path / "r.parquet", REJECTS) == []
    names = [f.name for f in dataclasses.fields(Reject)]
    assert pq.read_schema(tmp_path / "r.parquet").names == names


def test_reading_the_wrong_thing(tmp_path):
    with pytest.raises(ManifestError, match="not there"):
        read_table(tmp_path / "none.parquet", SAMPLES)
    (tmp_path / "text.parquet").write_text("no")
    with pytest.raises(ManifestError, match="cannot be read"):
        read_table(tmp_path / "text.parquet", SAMPLES)
    write_table(tmp_path / "p.parquet", PROMPTS, [])
    with pytest.raises(ManifestError, match="another table"):
        read_table(tmp_path / "p.parquet", SAMPLES)
    future = to_arrow(SAMPLES, []).replace_schema_metadata({"triptych.schema_version": "2.0"})
    pq.write_table(future, tmp_path / "f.parquet")
    with pytest.raises(ManifestError, match=r"version 2\.0"):
        read_table(tmp_path / "f.parquet", SAMPLES)
    pq.write_table(pa.table({"sample_id": ["x"]}), tmp_path / "c.parquet")
    with pytest.raises(ManifestError, match="lacks columns"):
        read_table(tmp_path / "c.parquet", SAMPLES)


def test_stable_ids():
    assert stable_id("a", 1) == stable_id("a", 1) != stable_id("a1")


def test_batches_are_written_as_one_table(tmp_path):
    rows = [Embedding(f"c{i}", "m", "s", i, "", [float(i), 1.0]) for i in range(5)]
    whole = to_arrow(EMBEDDINGS, rows)
    batches = [whole.slice(0, 2), whole.slice(2, 0), whole.slice(2)]
    path = tmp_path / "e.parquet"
    assert write_batches(path, EMBEDDINGS, batches, {"snapshot": "x"}) == 5
    assert read_table(path, EMBEDDINGS) == rows
    assert read_metadata(path)["snapshot"] == "x"
    found = list(iter_tables(path, EMBEDDINGS, ["clip_id"], rows=2))
    assert [t.column_names for t in found] == [["clip_id"]] * len(found)
    assert [i for t in found for i in t["clip_id"].to_pylist()] == [r.clip_id for r in rows]
    assert write_batches(path, EMBEDDINGS, []) == 0
    assert read_table(path, EMBEDDINGS) == []


def test_batches_out_of_order_are_refused_and_leave_nothing(tmp_path):
    rows = [Embedding(f"c{i}", "m", "s", i, "", [1.0]) for i in range(4)]
    whole = to_arrow(EMBEDDINGS, rows)
    for batches in ([whole.slice(2), whole.slice(0, 2)], [whole.take([1, 0])]):
        with pytest.raises(ManifestError, match=r"start_pts . before ."):
            write_batches(tmp_path / "e.parquet", EMBEDDINGS, batches)
        assert list(tmp_path.iterdir()) == []
