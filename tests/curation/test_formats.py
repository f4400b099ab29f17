"""Manifests in other formats: exact round trips, and other libraries as readers."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import random
import subprocess
import sys
import tarfile
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from curation.formats.collection import Collection, exports_beside
from curation.formats.hf_folder import write_hf_folder
from curation.formats.json_array import read_array
from curation.formats.official_export import write_pretrain_csv, write_sft_json
from curation.formats.official_import import SUFFIX, Form, Imported, import_list, rejects_beside
from curation.formats.output_folder import written_folder
from curation.formats.webdataset import ShardLimits, write_webdataset
from curation.isolation import close_children
from curation.mp4 import write_mp4
from curation.probe import probe
from curation.video import decode
from schemas.config import preset
from schemas.errors import InputError, ManifestError
from schemas.layout import Snapshot
from schemas.rows import Embedding, Export, Sample, Scene, stable_id
from schemas.tables import EMBEDDINGS, EXPORTS, REJECTS, SAMPLES, read_table, write_table

CONFIG = preset("tiny")
META = {"config_hash": "c0ffee", "code_version": "9.9", "snapshot": "snap"}


def scene(folder: Path, source: int, index: int, caption: str = "", fps: float = 24.0) -> Scene:
    return Scene(
        clip_id=stable_id("clip", source, index), source_id=f"source{source}",
        uri=f"/films/{source}, \"x\".mkv", start_pts=index * 1000 - 7, end_pts=index * 1000 + 900,
        start_frame=index * 50, end_frame=index * 50 + 45, num_frames=45, start_s=index / 3,
        end_s=index / 3 + 1.1, fps=fps, width_px=64, height_px=48,
        caption=caption or f"Scene {index} of {source}, a \"red\" ball.",
    )  # fmt: skip


def sample(kind: str, scenes: Sequence[Scene], split: str = "train", number: int = 0) -> Sample:
    similarity = 0.1 + number / 7 if kind == "sft" else None
    sample_id = stable_id(kind, number, *(s.clip_id for s in scenes))
    return Sample(sample_id, kind, split, list(scenes), similarity, number % 2 == 0)


def export_of(scene: Scene, folder: Path) -> Export:
    """The clip's file: other frames and rate than the scene's, as mode copy may give."""
    data = random.Random(scene.clip_id).randbytes(300 + int(scene.clip_id[:2], 16))
    path = folder / f"{scene.clip_id}.mp4"
    folder.mkdir(exist_ok=True, parents=True)
    path.write_bytes(data)
    return Export(
        scene.clip_id, "copy", str(path), scene.start_pts - 40, scene.end_pts, scene.num_frames + 3,
        scene.fps / 3, 66, 50, len(data), hashlib.sha256(data).hexdigest(),
    )  # fmt: skip


def snapshot_of(folder: Path, samples: Sequence[Sample], exported: bool = True) -> Collection:
    snapshot = Snapshot(folder / "snap")
    for kind in ("sft", "pretrain"):
        rows = [s for s in samples if s.kind == kind]
        write_table(snapshot.manifest(kind), SAMPLES, rows, META)
    row = Embedding("c", "viclip", "s", 0, "abc123", [1.0, 0.0])
    write_table(snapshot.table("embeddings"), EMBEDDINGS, [row], META)
    if exported:
        scenes = {s.clip_id: s for row in samples for s in row.scenes}
        rows = [export_of(s, folder / "clips") for s in scenes.values()]
        write_table(snapshot.table("exports"), EXPORTS, rows, META)
    return Collection.of_snapshot(snapshot)


@pytest.fixture
def some(tmp_path: Path) -> Collection:
    """Overlapping sft samples in three splits; pretrain samples that use clips twice."""
    clips = [[scene(tmp_path, s, i) for i in range(5)] for s in range(4)]
    splits = ["train", "train", "val", "test"]
    samples = [
        sample("sft", clips[s][i : i + 3], splits[s], 3 * s + i) for s in range(4) for i in range(3)
    ]
    for number, (a, b, c) in enumerate([(0, 1, 2), (3, 0, 1), (2, 3, 0), (0, 1, 2)]):
        rows = [clips[a][number % 3], clips[b][1], clips[c][2]]
        samples.append(sample("pretrain", rows, "train" if number else "val", number))
    random.Random(3).shuffle(samples)
    return snapshot_of(tmp_path, samples)


WRITE: dict[str, Callable[..., Any]] = {
    "sft-json": write_sft_json,
    "pretrain-csv": write_pretrain_csv,
}
KIND = {"sft-json": "sft", "pretrain-csv": "pretrain"}
FORMS = tuple(WRITE)


def read_back(form: Form, path: Path, out: Path, **options: Any) -> Imported:
    return import_list(form, path, out, CONFIG, **options)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("split", [None, "train"])
@pytest.mark.parametrize("relative", [False, True])
def test_round_trips_are_exact(
    some: Collection, tmp_path: Path, form: Form, split: str | None, relative: bool
) -> None:
    root = tmp_path if relative else None
    first, out, again = tmp_path / f"a{SUFFIX[form]}", tmp_path / "back.parquet", tmp_path / "b"
    WRITE[form](some, first, split=split, root=root)
    assert (str(tmp_path / "clips") in first.read_text()) == (not relative)
    expected = list(some.samples(KIND[form], split))
    found = read_back(form, first, out, root=root)
    assert read_table(out, SAMPLES) == expected
    assert (found.samples, found.measured, found.rejects) == (len(expected), 0, [])
    exports = {e.clip_id: e for e in read_table(some.exports, EXPORTS)}
    used = {s.clip_id for row in expected for s in row.scenes}
    assert {e.clip_id: e for e in read_table(exports_beside(out), EXPORTS)} == {
        clip_id: exports[clip_id] for clip_id in used
    }
    WRITE[form](Collection.of_manifest(out), again, split=split, root=root)
    assert again.read_bytes() == first.read_bytes()


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)
NUMBERS = st.floats(0.01, 1e9)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15)
@given(st.lists(TEXT, min_size=3, max_size=3), NUMBERS, st.sampled_from(FORMS))
def test_any_caption_and_rate_survive(
    tmp_path_factory: pytest.TempPathFactory, captions: list[str], fps: float, form: Form
) -> None:
    folder = tmp_path_factory.mktemp("any")
    scenes = [scene(folder, i, i, caption, fps) for i, caption in enumerate(captions)]
    data = snapshot_of(folder, [sample("sft", scenes), sample("pretrain", scenes)])
    first, out, again = folder / f"a{SUFFIX[form]}", folder / "back.parquet", folder / "b"
    WRITE[form](data, first)
    read_back(form, first, out)
    assert read_table(out, SAMPLES) == list(data.samples(KIND[form]))
    WRITE[form](Collection.of_manifest(out), again)
    assert again.read_bytes() == first.read_bytes()


def test_the_trainer_reads_the_lists_as_it_does_its_own(some: Collection, tmp_path: Path) -> None:
    """By the published trainer's rules: what it looks up, with pandas as it does."""
    exports = {e.uri: e for e in read_table(some.exports, EXPORTS)}
    captions = {
        s.clip_id: s.caption for k in KIND.values() for r in some.samples(k) for s in r.scenes
    }
    write_pretrain_csv(some, tmp_path / "p.csv")
    table = pd.read_csv(tmp_path / "p.csv")
    assert list(table.columns[:6]) == ["fps", "width", "height", "caption", "path", "num_frame"]
    kept = table[(table["num_frame"] * (0.95 - 0.05) // 3) >= 14].reset_index(drop=True)
    assert (
        len(kept)
        == len(table)
        == len({s.clip_id for r in some.samples("pretrain") for s in r.scenes})
    )
    for _, row in table.iterrows():
        export = exports[row["path"]]
        assert row["caption"] == captions[export.clip_id]
        assert (row["num_frame"], row["fps"]) == (export.num_frames, export.fps)
        assert (row["width"], row["height"]) == (export.width_px, export.height_px)
    write_sft_json(some, tmp_path / "s.json")
    groups = pd.read_json(tmp_path / "s.json")
    samples = list(some.samples("sft"))
    assert len(groups) == len(samples)
    for (_, group), expected in zip(groups.iterrows(), samples, strict=True):
        assert [exports[v["url"]].clip_id for v in group["values"]] == [
            s.clip_id for s in expected.scenes
        ]
        assert [v["caption"] for v in group["values"]] == [s.caption for s in expected.scenes]
    value = json.loads((tmp_path / "s.json").read_text())[0]["values"][0]
    assert list(value)[:7] == ["vid", "width", "height", "duration", "fps", "url", "caption"]
    assert value["duration"] == pytest.approx(48 / 8)


def test_an_edited_caption_counts(some: Collection, tmp_path: Path) -> None:
    path, out = tmp_path / "s.json", tmp_path / "o.parquet"
    write_sft_json(some, path)
    groups = json.loads(path.read_text())
    groups[0]["values"][1]["caption"] = "Another."
    path.write_text(json.dumps(groups, indent=4))
    read_back("sft-json", path, out)
    expected = list(some.samples("sft"))
    expected[0].scenes[1] = dataclasses.replace(expected[0].scenes[1], caption="Another.")
    assert read_table(out, SAMPLES) == expected


@pytest.mark.parametrize("form", FORMS)
def test_clips_without_files_are_named(tmp_path: Path, form: Form) -> None:
    scenes = [scene(tmp_path, i, i) for i in range(5)]
    data = snapshot_of(tmp_path, [sample(KIND[form], scenes)], exported=False)
    with pytest.raises(ManifestError, match=r"export\.mode=reencode") as caught:
        WRITE[form](data, tmp_path / "list")
    assert str(caught.value.found).startswith(f"5 of 5 clips, such as {scenes[0].clip_id}, ")
    assert not (tmp_path / "list").exists()
    data = snapshot_of(tmp_path, [sample(KIND[form], scenes)])
    (tmp_path / "clips" / f"{scenes[3].clip_id}.mp4").write_bytes(b"?")
    with pytest.raises(ManifestError, match=r"1 of 5 files, such as \S*" + scenes[3].clip_id):
        WRITE[form](data, tmp_path / "list")


def test_nothing_to_export_is_an_error(some: Collection, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="no samples of split 'test'"):
        write_pretrain_csv(some, tmp_path / "p.csv", split="test")
    with pytest.raises(ManifestError, match="does not lie under the root"):
        write_pretrain_csv(some, tmp_path / "p.csv", root=tmp_path / "else")
    assert not (tmp_path / "p.csv").exists()


def test_two_captions_of_a_clip_do_not_fit_into_one_row(tmp_path: Path) -> None:
    scenes = [scene(tmp_path, i, i) for i in range(3)]
    other = [dataclasses.replace(scenes[0], caption="Other."), *scenes[1:]]
    data = snapshot_of(tmp_path, [sample("pretrain", scenes), sample("pretrain", other, number=1)])
    with pytest.raises(ManifestError, match=scenes[0].clip_id):
        write_pretrain_csv(data, tmp_path / "p.csv")


def test_what_is_broken_in_our_own_lists_costs_only_itself(
    some: Collection, tmp_path: Path
) -> None:
    path, out = tmp_path / "s.json", tmp_path / "o.parquet"
    write_sft_json(some, path)
    groups = json.loads(path.read_text())
    films: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for group in groups:
        films[group["prefix"]].append(group)
    one, two, three, four = films.values()
    del one[1]["values"][1]["scene"]["start_pts"]
    [shared] = set.intersection(*({v["vid"] for v in g["values"]} for g in two))
    for number, group in enumerate(two):
        value = next(v for v in group["values"] if v["vid"] == shared)
        value["file"]["sha256"] = str(number)
    three[0]["split"] = "trian"
    four[1]["values"] = []
    groups += [four[0], 7]
    expected = [g["sample_id"] for g in groups[:12] if g not in (one[1], two[1], two[2],
                                                                 three[0], four[1])]  # fmt: skip
    path.write_text(json.dumps(groups))
    found = read_back("sft-json", path, out)
    assert {s.sample_id for s in read_table(out, SAMPLES)} == set(expected)
    assert Counter(r.reason for r in found.rejects) == {
        "bad_value": 1, "clip_conflict": 2, "incomplete_sample": 3, "bad_split": 1, "bad_group": 2,
        "duplicate_sample": 1,
    }  # fmt: skip
    assert f"{path}, group 14" in [r.record_id for r in found.rejects]
    assert len(read_table(rejects_beside(out), REJECTS)) == len(found.rejects)
    csv_path = tmp_path / "p.csv"
    write_pretrain_csv(some, csv_path)
    lines = csv_path.read_text().splitlines()
    csv_path.write_text("\n".join([*lines[:2], *lines[3:]]))
    found = read_back("pretrain-csv", csv_path, out)
    gone = json.loads(pd.read_csv(io.StringIO("\n".join(lines)))["samples"][1])
    assert {r.reason for r in found.rejects} == {"incomplete_sample"}
    assert len(found.rejects) == len(gone)
    lost = {use["sample_id"] for use in gone}
    expected = [s for s in some.samples("pretrain") if s.sample_id not in lost]
    assert read_table(out, SAMPLES) == expected


def film(path: Path, frames: int, shade: int, fps: int = 12) -> Path:
    path.parent.mkdir(exist_ok=True)
    pixels = np.full((frames, 48, 64, 3), shade, np.uint8)
    pixels[:, :, :, 0] += np.arange(frames, dtype=np.uint8)[:, None, None]
    write_mp4(path, pixels, fps)
    return path


@pytest.fixture
def films(tmp_path: Path):
    """Six films of 20 to 25 frames."""
    yield [film(tmp_path / "films" / f"{i}.mp4", 20 + i, 30 * i) for i in range(6)]
    close_children()


def whole(path: Path, caption: str) -> Scene:
    """The oracle: what a film is as a scene."""
    times = [Fraction(f.pts or 0) * (f.time_base or 0) for f in decode(path)]
    source = probe(path)
    tick = Fraction(source.time_base_num, source.time_base_den)
    step = times[1] - times[0]
    start, end = int(times[0] / tick), int((times[-1] + step) / tick)
    return Scene(
        stable_id(stable_id(source.source_id, start, end), start, end), source.source_id,
        str(path), start, end, 0, len(times), len(times), 0.0, float(len(times) * step),
        float(1 / step), 64, 48, caption,
    )  # fmt: skip


@pytest.mark.slow
def test_a_foreign_json_gives_every_run_the_trainer_may_draw(
    films: list[Path], tmp_path: Path
) -> None:
    text = [f"Film {i}." for i in range(6)]
    values = [{"url": f"films/{i}.mp4", "caption": t} for i, t in enumerate(text)]
    (tmp_path / "films" / "bad.mp4").write_bytes(b"no film")
    groups = [
        {"prefix": "v", "values": values[:5]},
        {"prefix": "w", "values": [*values[2:5], {"url": "films/bad.mp4", "caption": "x"},
                                   *values[3:6], {"url": "films/0.mp4", "caption": " "}]},
        {"prefix": "short", "values": values[:2]},
    ]  # fmt: skip
    path, out = tmp_path / "s.json", tmp_path / "o.parquet"
    path.write_text(json.dumps(groups))
    found = read_back("sft-json", path, out)
    scenes = [whole(f, t) for f, t in zip(films, text, strict=True)]
    assert [s.scenes for s in read_table(out, SAMPLES)] == [
        scenes[0:3], scenes[1:4], scenes[2:5], scenes[3:6]
    ]  # fmt: skip
    reasons = sorted((r.record_id.split(", ", 1)[1], r.reason) for r in found.rejects)
    assert reasons == [
        ("group 2", "duplicate_sample"),  # films 2 to 4 again
        ("group 2, value 4", "cannot_open"),
        ("group 2, value 8", "no_caption"),
        ("group 3", "too_few_scenes"),
    ]
    assert {s.similarity for s in read_table(out, SAMPLES)} == {None}
    exports = read_table(exports_beside(out), EXPORTS)
    for export in exports:
        data = Path(export.uri).read_bytes()
        assert export.sha256 == hashlib.sha256(data).hexdigest()
        assert (export.mode, export.size_bytes) == ("given", len(data))
    # From here on it is a manifest like any other.
    write_sft_json(Collection.of_manifest(out), tmp_path / "own.json")
    read_back("sft-json", tmp_path / "own.json", tmp_path / "own.parquet")
    assert read_table(tmp_path / "own.parquet", SAMPLES) == read_table(out, SAMPLES)


@pytest.mark.slow
def test_a_foreign_csv_is_drawn_like_any_pretrain_manifest(
    films: list[Path], tmp_path: Path
) -> None:
    rows = [f"12,64,48,Film {i}.,{path},{20 + i}" for i, path in enumerate(films)]
    rows += [f"12,64,48,Again.,{films[0]},20", "12,64,48,Gone.,gone.mp4,20"]
    rows[1] = rows[1].replace(",21", ",99")
    path, out = tmp_path / "p.csv", tmp_path / "o.parquet"
    path.write_text("\n".join(["fps,width,height,caption,path,num_frame", *rows]))
    found = read_back("pretrain-csv", path, out)
    scenes = {whole(f, f"Film {i}.") for i, f in enumerate(films)}
    samples = read_table(out, SAMPLES)
    uses = defaultdict(int)
    for row in samples:
        assert len({s.source_id for s in row.scenes}) == len(row.scenes) == 3
        for s in row.scenes:
            uses[s] += 1
    assert dict(uses) == dict.fromkeys(scenes, CONFIG.curation.manifests.uses_per_clip)
    assert found.corrected == 1
    reasons = sorted((r.record_id.split(", ", 1)[1], r.reason) for r in found.rejects)
    assert reasons == [("line 8", "duplicate_clip"), ("line 9", "not_found")]


@pytest.mark.slow
def test_our_own_list_can_be_taken_as_files(films: list[Path], tmp_path: Path) -> None:
    scenes = [scene(tmp_path, i, i) for i in range(3)]
    data = snapshot_of(tmp_path, [sample("sft", scenes)])
    exports = [
        dataclasses.replace(
            export_of(s, tmp_path / "clips"), uri=str(f), size_bytes=f.stat().st_size
        )
        for s, f in zip(scenes, films, strict=False)
    ]
    write_table(data.exports, EXPORTS, exports)
    write_sft_json(data, tmp_path / "s.json")
    read_back("sft-json", tmp_path / "s.json", tmp_path / "o.parquet", whole_files=True)
    [found] = read_table(tmp_path / "o.parquet", SAMPLES)
    assert found.scenes == [whole(f, s.caption) for s, f in zip(scenes, films, strict=False)]


def test_a_list_without_samples_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text('[{"values": []}]')
    with pytest.raises(ManifestError, match="1 bad_group"):
        read_back("sft-json", tmp_path / "s.json", tmp_path / "o.parquet")
    (tmp_path / "p.csv").write_text("path,caption\n")
    with pytest.raises(InputError, match="lacks columns"):
        read_back("pretrain-csv", tmp_path / "p.csv", tmp_path / "o.parquet")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.csv", "s.json"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=6,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(st.lists(JSON), st.sampled_from([None, 2]), st.integers(1, 9))
def test_arrays_are_read_as_a_whole_parser_does(
    tmp_path: Path, value: list[Any], indent: int | None, chunk: int
) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(value, indent=indent), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("curation.formats.json_array._CHUNK", chunk)
        assert list(read_array(path)) == value


@pytest.mark.parametrize("text", ["", "{}", "[1", "[1,]", "[1 2]", "[1] 2", "[,]", "\udcff"])
def test_what_is_no_array_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match="the list cannot be read"):
        list(read_array(path))


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        infos = tar.getmembers()
        assert all((i.mtime, i.uid, i.gid, i.uname, i.mode) == (0, 0, 0, "", 0o644) for i in infos)
        return {i.name: tar.extractfile(i).read() for i in infos}  # pyright: ignore


@pytest.mark.parametrize("limits", [ShardLimits(), ShardLimits(2), ShardLimits(9, 10_240)])
def test_shards_hold_every_sample_once(
    some: Collection, tmp_path: Path, limits: ShardLimits
) -> None:
    folder = tmp_path / "shards"
    written = write_webdataset(some, "sft", folder, limits)
    index = json.loads((folder / "index.json").read_text())
    assert index["samples"] == written.samples == {"train": 6, "val": 3, "test": 3}
    assert index["lineage"]["similarity_weights_sha256"] == "abc123"
    clips = {e.clip_id: Path(e.uri).read_bytes() for e in read_table(some.exports, EXPORTS)}
    for split, shards in index["shards"].items():
        found: list[dict[str, Any]] = []
        for shard in shards:
            path = folder / split / shard["file"]
            assert shard["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
            assert shard["size_bytes"] == path.stat().st_size
            assert shard["samples"] <= limits.max_samples
            assert path.stat().st_size <= limits.max_bytes or shard["samples"] == 1
            inside = members(path)
            texts = [json.loads(data) for name, data in inside.items() if name.endswith(".json")]
            assert len(texts) == shard["samples"]
            for text in texts:
                for s in text["scenes"]:
                    assert inside[f"{text['sample_id']}.{s['video']}"] == clips[s["clip_id"]]
            found += texts
        expected = list(some.samples("sft", split))
        assert [t["sample_id"] for t in found] == [s.sample_id for s in expected]
        assert [[s["caption"] for s in t["scenes"]] for t in found] == [
            [s.caption for s in row.scenes] for row in expected
        ]
        assert [t["similarity"] for t in found] == [s.similarity for s in expected]
    again = tmp_path / "again"
    write_webdataset(some, "sft", again, limits)
    names = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    assert [(again / n).read_bytes() for n in names] == [(folder / n).read_bytes() for n in names]


def test_the_webdataset_library_reads_the_shards(some: Collection, tmp_path: Path) -> None:
    wds = pytest.importorskip("webdataset")
    write_webdataset(some, "pretrain", tmp_path / "shards", ShardLimits(2))
    urls = [str(p) for p in sorted((tmp_path / "shards" / "train").glob("*.tar"))]
    assert len(urls) == 2
    rows = list(wds.WebDataset(urls, shardshuffle=False).decode())
    expected = list(some.samples("pretrain", "train"))
    assert [r["__key__"] for r in rows] == [s.sample_id for s in expected]
    for row, want in zip(rows, expected, strict=True):
        assert [s["caption"] for s in row["json"]["scenes"]] == [s.caption for s in want.scenes]
        assert all(f"scene{i}.mp4" in row for i in range(3))


def test_a_changed_clip_is_noticed_and_nothing_is_left(some: Collection, tmp_path: Path) -> None:
    path = next((tmp_path / "clips").iterdir())
    path.write_bytes(b"?" * path.stat().st_size)
    for write in (
        lambda: write_webdataset(some, "sft", tmp_path / "out", ShardLimits()),
        lambda: write_hf_folder(some, tmp_path / "out", title="t", with_videos=True),
    ):
        with pytest.raises(ManifestError, match="has changed"):
            write()
        assert not [p for p in tmp_path.iterdir() if "out" in p.name]


def test_only_an_own_earlier_output_is_replaced(some: Collection, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    write_webdataset(some, "sft", folder, ShardLimits(1))
    write_webdataset(some, "sft", folder, ShardLimits())
    assert len(list((folder / "train").iterdir())) == 1
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    (folder / "train" / "mine.txt").write_text("mine")
    for write in (
        lambda: write_webdataset(some, "sft", folder, ShardLimits()),
        lambda: write_hf_folder(some, folder, title="t"),
    ):
        with pytest.raises(InputError, match="not an earlier output"):
            write()
        (folder / "train" / "mine.txt").unlink(missing_ok=True)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="found: a file"), written_folder(tmp_path / "file", "x"):
        pass


LOAD = """
import json, sys
from datasets import load_dataset, get_dataset_config_names
folder = sys.argv[1]
print(json.dumps({
    name: {split: rows.to_list() for split, rows in load_dataset(folder, name).items()}
    for name in get_dataset_config_names(folder)
}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("with_videos", [False, True])
def test_the_datasets_library_reads_the_folder(
    some: Collection, tmp_path: Path, with_videos: bool
) -> None:
    pytest.importorskip("datasets")
    folder = tmp_path / "hf"
    write_hf_folder(some, folder, title="Two, or: more", with_videos=with_videos)
    done = subprocess.run(  # apart from our code, and with a cache of its own
        [sys.executable, "-I", "-c", LOAD, str(folder)],
        cwd=tmp_path,
        env={"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PATH": ""},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == {"sft", "pretrain"}
    assert set(found["sft"]) == {"train", "validation", "test"}
    assert set(found["pretrain"]) == {"train", "validation"}
    exports = {e.clip_id: e for e in read_table(some.exports, EXPORTS)}
    for kind, splits in found.items():
        for ours, theirs in {"train": "train", "val": "validation", "test": "test"}.items():
            rows = splits.get(theirs, [])
            for row in rows:
                for s in row["scenes"]:
                    video = s.pop("video")
                    if with_videos:
                        data = (folder / video).read_bytes()
                        assert hashlib.sha256(data).hexdigest() == exports[s["clip_id"]].sha256
                    else:
                        assert video == exports[s["clip_id"]].uri
            assert rows == [dataclasses.asdict(s) for s in some.samples(kind, ours)]


def test_the_card_says_what_it_can_and_no_more(some: Collection, tmp_path: Path) -> None:
    write_hf_folder(some, tmp_path / "hf", title="Two, or: more")
    text = (tmp_path / "hf" / "README.md").read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert head["license"] == "unknown"
    assert [c["config_name"] for c in head["configs"]] == ["sft", "pretrain"]
    assert all(word in text for word in ("`snap`", "`c0ffee`", "`9.9`", "`abc123`", "Not stated"))


def test_without_files_the_folder_refers_to_sources(tmp_path: Path) -> None:
    scenes = [scene(tmp_path, i, i) for i in range(3)]
    data = snapshot_of(tmp_path, [sample("sft", scenes)], exported=False)
    written = write_hf_folder(data, tmp_path / "hf", title="t")
    assert written.samples == {"sft/train": 1}
    table = pd.read_parquet(tmp_path / "hf" / "data" / "sft" / "train.parquet")
    assert [s["video"] for s in table["scenes"][0]] == [None] * 3
    assert [s["uri"] for s in table["scenes"][0]] == [s.uri for s in scenes]
    with pytest.raises(ManifestError, match="3 of 3 clips"):
        write_hf_folder(data, tmp_path / "hf2", title="t", with_videos=True)
