from __future__ import annotations

import json
import logging
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.prompts import read_prompts, write_prompts
from schemas.config import TriptychConfig
from schemas.errors import ManifestError
from schemas.rows import Prompt
from schemas.tables import REJECTS, write_table

CONFIG = TriptychConfig()
TEXT = st.text(st.characters(categories=("L", "N", "P", "S", "Z")), min_size=1, max_size=20).filter(
    str.strip
)
SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "steps": st.integers(1, 1000),
        "guidance": st.floats(0, 20),
        "scheduler": st.just("dpm"),
    },
)


def read(path: Path):
    return read_prompts(path, CONFIG)


@st.composite
def stories(draw) -> Prompt:
    prompts = draw(st.lists(TEXT, min_size=1, max_size=16))
    extend = draw(st.lists(TEXT, max_size=3))
    scenes = len(prompts) + len(extend)

    def each(values):
        return draw(st.just([]) | st.lists(values, min_size=scenes, max_size=scenes))

    chosen = draw(SETTINGS)
    return Prompt(
        prompt_id=draw(TEXT),
        prompts=prompts,
        negative_prompt=draw(st.just("") | TEXT),
        seed=draw(st.integers(0, 2**63 - 1)),
        extend_prompts=extend,
        negative_prompts=each(st.just("") | TEXT),
        seeds=each(st.integers(0, 2**63 - 1)),
        frames=each(st.sampled_from([1, 5, 49, 201])),
        settings=json.dumps(chosen, sort_keys=True) if chosen else "",
    )


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl", ".json"])
@settings(max_examples=12)
@given(prompts=st.lists(stories(), min_size=1, max_size=5, unique_by=lambda p: p.prompt_id))
def test_what_is_written_is_read(tmp_path_factory, suffix, prompts):
    path = tmp_path_factory.mktemp("prompts") / f"p{suffix}"
    assert write_prompts(path, prompts) == len(prompts)
    found, rejects = read(path)
    assert found == sorted(prompts, key=lambda p: p.prompt_id)
    assert rejects == []


def test_every_column_in_every_format(tmp_path):
    (tmp_path / "clips").mkdir()
    clip = tmp_path / "clips" / "a b.mp4"
    clip.touch()
    row = {
        "prompt_id": "all", "prompts": ["one", "two"], "extend_prompts": ["three"],
        "negative_prompt": "dark", "negative_prompts": ["", "x, y", ""], "seed": 7,
        "seeds": [1, 2, 2**63 - 1], "frames": [5, 9, 13], "given": ["", "clips/a b.mp4"],
        "settings": {"steps": 3, "dynamic_guidance": True}, "_note": "not read",
    }  # fmt: skip
    cells = {k: json.dumps(v) if isinstance(v, (list, dict)) else v for k, v in row.items()}
    (tmp_path / "a.json").write_text(json.dumps([row]))
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    pd.DataFrame([cells]).to_csv(tmp_path / "a.csv", index=False)
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    pd.DataFrame([cells]).to_parquet(tmp_path / "cells.parquet")
    expected = Prompt(
        "all", ["one", "two"], "dark", 7, ["three"], ["", "x, y", ""], [1, 2, 2**63 - 1],
        [5, 9, 13], ["", str(clip)], '{"dynamic_guidance": true, "steps": 3}',
    )  # fmt: skip
    for name in ("a.json", "a.jsonl", "a.csv", "a.parquet", "cells.parquet"):
        assert read(tmp_path / name) == ([expected], []), name


def test_numbered_columns_and_settings_as_columns(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text(
        "prompt_id,prompt_1,prompt_2,prompt_3,extend_prompt_1,negative_prompt_2,seed_1,seed_2,"
        "frames,steps,guidance,dynamic_guidance\n"
        'a,first,"second, with comma",,,blurred,5,6,9,30,4.5,TRUE\n'
        "b,only,,,more,,,,,,,\n"
    )
    assert read(path) == (
        [
            Prompt("a", ["first", "second, with comma"], negative_prompts=["", "blurred"],
                   seeds=[5, 6], frames=[9, 9],
                   settings='{"dynamic_guidance": true, "guidance": 4.5, "steps": 30}'),
            Prompt("b", ["only"], extend_prompts=["more"]),
        ],
        [],
    )  # fmt: skip


def test_optional_columns_may_be_missing_and_notes_are_named(tmp_path, caplog):
    path = tmp_path / "plain.parquet"
    frame = pd.DataFrame({"prompt_id": [7], "prompts": [["x", "y"]], "topic": ["z"], "_n": [1]})
    frame.to_parquet(path)
    with caplog.at_level(logging.WARNING):
        assert read(path) == ([Prompt("7", ["x", "y"])], [])
    assert "columns=topic" in caplog.text and "_n" not in caplog.text


def test_a_manifest_of_an_earlier_version_is_read(tmp_path):
    path = tmp_path / "old.parquet"
    columns = {"prompt_id": ["a"], "prompts": [["x"]], "negative_prompt": [""], "seed": [3],
               "extend_prompts": [["y"]]}  # fmt: skip
    meta = {"triptych.table": "prompts", "triptych.schema_version": "1.0"}
    pq.write_table(pa.table(columns).replace_schema_metadata(meta), path)
    assert read(path) == ([Prompt("a", ["x"], seed=3, extend_prompts=["y"])], [])


BAD = [
    ({"prompts": []}, "empty_prompts", "prompts holds no scene"),
    ({"prompts": None}, "empty_prompts", "prompts holds no scene"),
    ({"prompts": ["x"] * 17}, "wrong_number_of_prompts", "put the rest in extend_prompts"),
    ({"prompts": ["x", "  "]}, "empty_prompt_text", "prompts[1] is empty"),
    ({"prompts": ["x", None]}, "wrong_type", "prompts[1] is None, not text"),
    ({"prompts": "one text"}, "wrong_type", "write in one cell"),
    ({"prompts": 3}, "wrong_type", "prompts is int, not a list"),
    ({"prompts": ["x"], "prompt_1": "x"}, "said_twice", "prompts stands beside prompt_1"),
    ({"prompt_id": " "}, "missing_prompt_id", "prompt_id is ' '"),
    ({"prompt_id": None}, "missing_prompt_id", "prompt_id is None"),
    ({"prompt_id": True}, "missing_prompt_id", "prompt_id is True"),
    ({"extend_prompts": [""]}, "empty_prompt_text", "extend_prompts[0] is empty"),
    ({"negative_prompt": 1}, "wrong_type", "negative_prompt is 1, not text"),
    ({"negative_prompts": ["a"]}, "wrong_count", "negative_prompts has 1 entries for 2 scenes"),
    ({"seed": 0.5}, "invalid_seed", "seed is 0.5"),
    ({"seed": -1}, "invalid_seed", "seed is -1"),
    ({"seed": 2**63}, "invalid_seed", "2^63 - 1"),
    ({"seed": "9e18"}, "invalid_seed", "seed is '9e18'"),  # the last digits are lost
    ({"seed": True}, "invalid_seed", "seed is True"),
    ({"seeds": [1]}, "wrong_count", "seeds has 1 entries for 2 scenes"),
    ({"seeds": [1, "x"]}, "invalid_seed", "seeds[1] is 'x'"),
    ({"frames": 8}, "invalid_frames", "frames is 8, not 1 + a multiple of 4"),
    ({"frames": 205}, "invalid_frames", "at most 201"),
    ({"frames": -3}, "invalid_frames", "frames is -3"),
    ({"frames": "many"}, "invalid_frames", "frames is 'many'"),
    ({"frames": [5, 6]}, "invalid_frames", "frames[1] is 6"),
    ({"frames": [5]}, "wrong_count", "frames has 1 entries for 2 scenes"),
    ({"given": ["", "gone.mp4"]}, "given_not_found", "given[1] is not there: "),
    ({"given": ["", "s3://b/a.mp4"]}, "given_not_found", "is no file of this machine"),
    ({"given": [""]}, "wrong_count", "given has 1 entries for 2 scenes"),
    ({"given": ["here.mp4"] * 2}, "nothing_to_generate", "every scene is given"),
    ({"settings": {"steps": 0}}, "invalid_settings", "steps: input should be greater than or"),
    ({"settings": {"scheduler": "euler"}}, "invalid_settings", "(found 'euler')"),
    ({"settings": {"guidence": 3}}, "invalid_settings", "did you mean 'guidance'?"),
    ({"settings": {"num_inference_steps": 3}}, "invalid_settings", "did you mean 'steps'?"),
    ({"settings": {"guidance": float("inf")}}, "invalid_settings", "guidance is inf"),
    ({"settings": "{"}, "invalid_settings", "settings is not JSON"),
    ({"settings": [1]}, "invalid_settings", "settings is list, not an object"),
    ({"settings": {"steps": 3}, "steps": 4}, "said_twice", "steps stands in settings and"),
    ({"guidance": "six"}, "invalid_settings", "guidance: input should be a valid number"),
    ({"extend_promts": ["x"]}, "unknown_column", "did you mean 'extend_prompts'?"),
    ({"guidance_scale": 3}, "unknown_column", "did you mean 'guidance'?"),
    ({"height": 480}, "unknown_column", "set training.model.height_px"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "reason", "text"), BAD, ids=[str(c)[:40] for c, _, _ in BAD])
def test_every_mistake_has_its_reason(tmp_path, change, reason, text):
    (tmp_path / "here.mp4").touch()
    row = {"prompt_id": "a", "prompts": ["x", "y"]} | change
    path = tmp_path / "p.json"
    path.write_text(json.dumps([{"prompt_id": "good", "prompts": ["x"]}, row]))
    good, (reject,) = read(path)
    assert [p.prompt_id for p in good] == ["good"]
    assert reject.reason == reason
    assert reject.detail.startswith("row 2: ")
    assert text in reject.detail
    assert (reject.stage, reject.uri, reject.failed) == ("prompts", str(path), False)


def test_all_that_is_wrong_with_a_row_is_said(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(
        '{"prompts": ["", 1], "seed": -1, "frames": 2, "steps": 0, "sede": 1}\n'
        '{"prompt_id": "a", "prompts": ["x"]}\n'
    )
    _, (reject,) = read(path)
    assert reject.reason == "unknown_column"
    for text in ("'seed'", "prompt_id is None", "prompts[0] is empty", "prompts[1] is 1",
                 "seed is -1", "frames is 2", "steps: "):  # fmt: skip
        assert text in reject.detail
    assert reject.record_id == "line-1"


def test_a_name_stands_once(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("prompt_id,prompt_1\na,\na,x\nb,y\na,z\n")
    good, bad = read(path)
    assert [(p.prompt_id, p.prompts) for p in good] == [("a", ["x"]), ("b", ["y"])]
    assert [(r.reason, r.detail) for r in bad] == [
        ("empty_prompts", "line 2: prompts holds no scene"),
        ("duplicate_prompt_id", "line 5: 'a' is already line 3"),
    ]


def test_what_pandas_makes_of_gaps(tmp_path):
    frame = pd.DataFrame(
        {"prompt_id": ["a", "b"], "prompt_1": ["x", "y"], "prompt_2": ["z", None],
         "seed": [3.0, None], "steps": [20.0, None], "negative_prompt": [None, "dark"]}
    )  # fmt: skip
    frame.to_csv(tmp_path / "p.csv")  # with its row numbers, under no name
    frame.to_parquet(tmp_path / "p.parquet")
    (tmp_path / "p.json").write_text(json.dumps(frame.astype(object).to_dict("records")))
    expected = [
        Prompt("a", ["x", "z"], seed=3, settings='{"steps": 20}'),
        Prompt("b", ["y"], "dark"),
    ]
    assert "NaN" in (tmp_path / "p.json").read_text()
    for name in ("p.csv", "p.parquet", "p.json"):
        assert read(tmp_path / name) == (expected, []), name


def test_missing_columns_are_said_with_what_was_probably_meant(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"prompt_id": ["a"], "promts": [["x"]]}), path)
    with pytest.raises(ManifestError, match=r"(?s)lacks columns.*'prompts'.*did you mean"):
        read(path)
    pq.write_table(pa.table({"name": ["a"], "text": [["x"]]}), path)
    with pytest.raises(ManifestError, match=r"(?s)\['prompt_id', 'prompts'\] too"):
        read(path)
    write_table(path, REJECTS, [])
    with pytest.raises(ManifestError, match="another table"):
        read(path)


def test_two_rows_of_one_name_are_not_written(tmp_path):
    for suffix in (".parquet", ".csv", ".jsonl"):
        with pytest.raises(ManifestError, match="same key"):
            write_prompts(tmp_path / f"p{suffix}", [Prompt("a", ["x"]), Prompt("a", ["y"])])
    with pytest.raises(ManifestError, match="format"):
        write_prompts(tmp_path / "p.txt", [Prompt("a", ["x"])])
    assert not list(tmp_path.iterdir())
