from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.prompt_commands import MAX_LISTED, prompts
from inference.prompts import read_prompts
from schemas.config import TriptychConfig
from schemas.rows import Prompt


def run(*args: object):
    return CliRunner().invoke(prompts, [str(a) for a in args])


def test_check_lists_bad_rows_and_says_so_in_the_exit_code(tmp_path: Path):
    path = tmp_path / "p.csv"
    path.write_text("prompt_id,prompt_1,prompt_2,steps\na,x,y,\nb,,,\nc,[bold]z,,0\n")
    result = run("check", path)
    assert result.exit_code == 1
    assert "line 3: prompts holds no scene" in result.output
    assert "line 4: steps: input should be greater" in result.output
    assert "1 story of 2 scenes can be generated; 2 rows cannot" in result.output
    path.write_text("prompt_id,prompt_1\na,x\n")
    assert run("check", path).exit_code == 0


def test_check_takes_the_settings_that_generate_takes(tmp_path: Path):
    path = tmp_path / "p.csv"
    path.write_text("prompt_id,prompt_1\na,x\n")
    assert run("check", path, "-s", "generation.steps=7").exit_code == 0


def test_many_bad_rows_are_counted(tmp_path: Path):
    path = tmp_path / "p.jsonl"
    rows = [json.dumps({"prompt_id": f"a{i}", "prompts": [""]}) for i in range(MAX_LISTED + 3)]
    path.write_text("\n".join(rows))
    output = run("check", path).output
    assert output.count("prompts[0] is empty") == MAX_LISTED
    assert f"3 more. In all: {MAX_LISTED + 3} empty_prompt_text" in output


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl", ".json"])
def test_import_writes_what_generate_reads(tmp_path: Path, suffix: str):
    source, target = tmp_path / "talc.json", tmp_path / f"out{suffix}"
    source.write_text(json.dumps({"Cat_0": ["One.", "Two.", "Three.", "Four."], "Dog_1": [""]}))
    result = run("import", "--from", "talc", source, target, "--together", 3)
    assert result.exit_code == 1
    assert "row 2: prompts[0] is empty" in result.output
    assert "1 story written; 1 left out" in result.output
    expected = Prompt("Cat_0", ["One.", "Two.", "Three."], extend_prompts=["Four."])
    assert read_prompts(target, TriptychConfig()) == ([expected], [])


def test_import_of_scripts(tmp_path: Path):
    source, target = tmp_path / "scripts.txt", tmp_path / "out.csv"
    source.write_text("# walk\nActor1: a red hat\nActor1 walks.\nActor1 rests.\n")
    assert run("import", "--from", "actors", source, target).exit_code == 0
    assert target.read_text() == (
        "prompt_id,prompt_1,prompt_2\nwalk,Actor1 (a red hat) walks.,Actor1 (a red hat) rests.\n"
    )
