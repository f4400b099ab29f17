from __future__ import annotations

import io
import json
import math
import tarfile
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.captions import CaptionSpan
from curation.inputs.downloads import Downloads
from curation.inputs.lists import Listed
from curation.inputs.video2dataset import is_video2dataset, read_video2dataset
from schemas.config.curation import SourcesConfig
from schemas.rows import Reject

SAMPLES: list[dict[str, Any]] = [
    {"key": "00000000", "url": "https://x/0", "caption": "zero", "status": "success"},
    {"key": "00000001", "url": "https://x/1", "caption": "one", "status": "failed_to_download",
     "error_message": "Private video"},
    {"key": "00000002", "url": "https://x/2", "caption": "two", "status": "failed_to_subsample",
     "error_message": "no scenes"},
    {"key": "00000003_00001", "url": "https://x/3", "caption": "three", "status": "success",
     "matching_score": 0.4},
    {"key": "00000004", "url": "https://x/4", "caption": "lost", "status": "success"},
]  # fmt: skip
LOST = "00000004"


def members() -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for sample in SAMPLES:
        if sample["status"] == "success" and sample["key"] != LOST:
            files[f"{sample['key']}.mp4"] = f"video {sample['key']}".encode()
            files[f"{sample['key']}.txt"] = f"{sample['caption']}\n".encode()
            files[f"{sample['key']}.json"] = json.dumps(sample).encode()
            files[f"{sample['key']}.en.vtt"] = b"WEBVTT"
    return files


def write_tar(path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members().items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def write(root: Path, layout: str, rows: bool = True) -> Path:
    root.mkdir()
    if rows:
        pq.write_table(pa.Table.from_pandas(pd.DataFrame(SAMPLES)), root / "00000.parquet")
    if layout == "webdataset":
        write_tar(root / "00000.tar")
    else:
        (root / "00000").mkdir()
        for name, content in members().items():
            (root / "00000" / name).write_bytes(content)
    (root / "00000_stats.json").write_text("{}")
    return root


@pytest.mark.parametrize("layout", ["files", "webdataset"])
def test_every_sample_ends_in_one_place(tmp_path: Path, layout: str) -> None:
    root = write(tmp_path / "out", layout)
    assert is_video2dataset(root)
    assert not is_video2dataset(tmp_path)
    found = list(read_video2dataset(root, {".mp4"}))
    assert len(found) == len(SAMPLES)
    videos = [f for f in found if isinstance(f, Listed)]
    rejects = [f for f in found if isinstance(f, Reject)]
    assert [v.captions for v in videos] == [
        (CaptionSpan(0, math.inf, "zero", None, "video2dataset"),),
        (CaptionSpan(0, math.inf, "three", 0.4, "video2dataset"),),
    ]
    assert [(r.record_id, r.reason, r.detail, r.uri) for r in rejects] == [
        (f"{root}, sample 00000001", "failed_to_download", "Private video", "https://x/1"),
        (f"{root}, sample 00000002", "failed_to_subsample", "no scenes", "https://x/2"),
        (f"{root}, sample {LOST}", "missing_media", rejects[2].detail, "https://x/4"),
    ]
    downloads = Downloads(tmp_path / "cache", SourcesConfig())
    for video, key in zip(videos, ("00000000", "00000003_00001"), strict=True):
        with downloads.opened(video.uri) as path:
            assert path.read_bytes() == f"video {key}".encode()


@pytest.mark.parametrize("layout", ["files", "webdataset"])
def test_an_unfinished_shard_gives_what_is_there(tmp_path: Path, layout: str) -> None:
    root = write(tmp_path / "out", layout, rows=False)
    found = list(read_video2dataset(root, {".mp4"}))
    assert [len(f.captions) for f in found if isinstance(f, Listed)] == [1, 1]
    assert len(found) == 2


def test_a_truncated_tar_gives_what_came_before_the_damage(tmp_path: Path) -> None:
    root = write(tmp_path / "out", "webdataset", rows=False)
    tar = root / "00000.tar"
    with tarfile.open(tar) as whole:
        last = next(m for m in whole.getmembers() if m.name == "00000003_00001.mp4")
    tar.write_bytes(tar.read_bytes()[: last.offset + 100])
    found = list(read_video2dataset(root, {".mp4"}))
    assert [f.reason if isinstance(f, Reject) else f.captions[0].caption for f in found] == [
        "bad_tar",
        "zero",
    ]


def test_broken_json_is_a_reject(tmp_path: Path) -> None:
    root = write(tmp_path / "out", "files")
    (root / "00000" / "00000000.json").write_text("{")
    first, *others = read_video2dataset(root, {".mp4"})
    assert isinstance(first, Reject)
    assert (first.reason, len(others)) == ("bad_row", 4)
