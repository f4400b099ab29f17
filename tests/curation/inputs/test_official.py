from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from curation.captions import CaptionSpan
from curation.inputs.lists import Listed, ListFile
from curation.inputs.official import read_pretrain_csv, read_sft_json
from schemas.errors import InputError
from schemas.rows import Reject


def test_the_pretrain_csv(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text(
        "fps,width,height,caption,path,num_frame\n"
        '24,1280,720,"A cat, asleep",clips/a.mp4,200\n24,1280,720,A dog,,200\n'
    )
    good, bad = read_pretrain_csv(ListFile("p.csv", path, "/films"))
    caption = CaptionSpan(0, math.inf, "A cat, asleep", None, "pretrain_csv")
    assert good == Listed("/films/clips/a.mp4", (caption,))
    assert isinstance(bad, Reject)
    assert (bad.record_id, bad.reason) == ("p.csv, line 3", "missing_path")


def test_the_sft_json(tmp_path: Path) -> None:
    groups = [
        {"prefix": "v1", "values": [{"url": "a.mp4", "caption": "One"}, {"url": "/b.mp4"}]},
        {"prefix": "v2"},
        {"prefix": "v3", "values": [{"caption": "no url"}, {"url": "c.mp4", "caption": 3}, 7]},
    ]
    path = tmp_path / "s.json"
    path.write_text(json.dumps(groups))
    first, second, *bad = read_sft_json(ListFile("s.json", path, "/films"))
    assert first == Listed("/films/a.mp4", (CaptionSpan(0, math.inf, "One", None, "sft_json"),))
    assert second == Listed("/b.mp4")
    assert [(r.record_id, r.reason) for r in bad if isinstance(r, Reject)] == [
        ("s.json, group 2", "bad_group"),
        ("s.json, group 3, value 1", "missing_path"),
        ("s.json, group 3, value 2", "bad_caption"),
        ("s.json, group 3, value 3", "bad_row"),
    ]


@pytest.mark.parametrize("text", ["{}", "[", "\udcff"])
def test_other_json_is_an_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "s.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError):
        list(read_sft_json(ListFile("s.json", path, "/films")))
