from __future__ import annotations

import json

import pytest

from inference.prompt_importers import read_actors, read_talc
from inference.prompts import check_records
from schemas.config import TriptychConfig
from schemas.errors import ManifestError
from schemas.rows import Prompt


def checked(path, reader):
    good, bad = check_records(path, reader(path), TriptychConfig())
    return good, [(r.detail.split(":")[0], r.reason) for r in bad]


def test_talc_prompts(tmp_path):
    path = tmp_path / "single_character_multiple_context.json"
    stories = {
        "Elephant_0": ["An elephant splashes.", "It trumpets.", "It marches.", "It rests."],
        "Falcon_1": ["A falcon soars.", ""],
        "Dolphin_2": "not a list",
    }
    path.write_text(json.dumps(stories, indent=4))
    good, bad = checked(path, read_talc)
    assert good == [Prompt("Elephant_0", stories["Elephant_0"])]
    assert bad == [("row 2", "empty_prompt_text"), ("row 3", "wrong_type")]


def test_talc_training_lines(tmp_path):
    path = tmp_path / "val.jsonl"
    video = "vatex/Ptf_2VRj-V0_000122_000132"
    line = {"captions": ["A.", "B."], "video_segments": [f"{video}_0.mp4", f"{video}_1.mp4"]}
    path.write_text(json.dumps(line) + "\n" + '{"captions": ["A."]}\n{"captions"\n')
    good, bad = checked(path, read_talc)
    assert good == [Prompt(video, ["A.", "B."])]
    assert bad == [("line 2", "wrong_type"), ("line 3", "invalid_json")]


@pytest.mark.parametrize("text", ["[]", "{", ""])
def test_what_is_not_talc(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ManifestError):
        read_talc(path)


SCRIPTS = """
# picnic
Actor1: short black hair,  wearing sunglasses.
Actor1 spreads out a blanket; Actor1 smiles.
Actor2 (a long yellow dress) watches Actor1's dog.
Actor1 and actor2 share snacks.

Actor1 (a red hat) runs.
Actor1 rests.

# unknown
Actor1 meets Actor3.

# changing
Actor1 (a red hat) runs.
Actor1 (a blue hat) rests.

# absent
Actor1: a red hat
Nobody is here.
"""


def test_actors_are_described_in_every_scene(tmp_path):
    path = tmp_path / "scripts.txt"
    path.write_text(SCRIPTS)
    good, bad = checked(path, read_actors)
    black, yellow = "(short black hair, wearing sunglasses)", "(a long yellow dress)"
    assert good == [
        Prompt(
            "picnic",
            [
                f"Actor1 {black} spreads out a blanket; Actor1 smiles.",
                f"Actor2 {yellow} watches Actor1 {black}'s dog.",
                f"Actor1 {black} and actor2 {yellow} share snacks.",
            ],
        ),
        Prompt("story-8", ["Actor1 (a red hat) runs.", "Actor1 (a red hat) rests."]),
    ]
    assert bad == [
        ("line 11", "not_described"),
        ("line 14", "described_differently"),
        ("line 18", "not_in_story"),
    ]


def test_scripts_as_json(tmp_path):
    path = tmp_path / "scripts.json"
    scripts = [
        {"prompt_id": "a", "actors": {"actor1": "a red hat"}, "scenes": ["Actor1 runs."]},
        {"prompt_id": "b", "scenes": ["Actor1 (a red hat) runs.", "Actor1 rests."]},
        {"prompt_id": "c", "actors": ["a red hat"], "scenes": ["Actor1 runs."]},
        {"prompt_id": "d", "scenes": "Actor1 runs."},
        {"prompt_id": "e", "scene": ["It rains."]},
        {"scenes": ["It rains."]},
        "It rains.",
    ]
    path.write_text(json.dumps(scripts))
    good, bad = checked(path, read_actors)
    assert good == [
        Prompt("a", ["Actor1 (a red hat) runs."]),
        Prompt("b", ["Actor1 (a red hat) runs.", "Actor1 (a red hat) rests."]),
    ]
    assert bad == [
        ("row 3", "wrong_type"),
        ("row 4", "wrong_type"),
        ("row 5", "unknown_column"),
        ("row 6", "missing_prompt_id"),
        ("row 7", "wrong_type"),
    ]
