from __future__ import annotations

import json
import shutil
from pathlib import Path

import av
import pytest
from PIL import Image

import inference.batch as batch_module
from inference.batch import run_batch
from inference.outputs import decoded_shape
from schemas.errors import CheckpointError, GenerationError, ManifestError
from schemas.rows import Prompt
from schemas.storage import latest, read_done, read_json
from schemas.tables import GENERATIONS, REJECTS, read_table

pytestmark = pytest.mark.slow

PROMPTS = [
    Prompt("three", ["One.", "Two.", "Three."], seed=1),
    Prompt("four", ["Eins.", "Zwei.", "Drei."], "blurred", 2, ["Vier."]),
]


def bytes_of(folder: Path, suffix: str) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.glob(f"*{suffix}")}


def test_videos_sidecars_sheets_and_tables(tiny_base, workspace, config_for):
    seen: list[tuple[int, int, str]] = []
    folder, count = run_batch(
        config_for(PROMPTS), tiny_base, workspace, lambda *event: seen.append(event)
    )
    assert (count.input, count.kept, count.failed, count.reused, count.produced) == (2, 2, 0, 0, 7)
    assert [(done, total) for done, total, _ in seen] == [(1, 2), (2, 2)]
    assert latest(workspace.generations) == folder
    assert read_done(folder) is not None
    assert read_json(folder / "counts.json") == [count.to_dict()]
    assert read_table(folder / "rejects.parquet", REJECTS) == []
    rows = {g.prompt_id: g for g in read_table(folder / "generations.parquet", GENERATIONS)}
    assert {k: (g.num_scenes, g.extended_scenes) for k, g in rows.items()} == {
        "three": (3, 0),
        "four": (4, 1),
    }
    for row in rows.values():
        video = Path(row.video_uri)
        assert decoded_shape(video) == (row.num_frames, 32, 32) == (5 * row.num_scenes, 32, 32)
        sidecar = read_json(video.with_suffix(".json"))
        with av.open(str(video)) as container:
            assert container.streams.video[0].average_rate == 8
            assert container.streams.video[0].codec_context.name == "h264"
            provenance = json.loads(container.metadata["comment"])
        assert sidecar.pop("seconds") > 0
        assert provenance == sidecar
        assert [*sidecar["prompts"], *sidecar["extend_prompts"]] == row.prompts
        assert sidecar["model_sha256"] == row.model_sha256
        sheet = Image.open(video.with_suffix(".jpg"))
        assert sheet.size == (4 * 36 - 4, row.num_scenes * 36 - 4)


def test_running_again_makes_nothing_and_changes_no_table(
    tiny_base, workspace, monkeypatch, config_for
):
    config = config_for(PROMPTS)
    folder, _ = run_batch(config, tiny_base, workspace)
    before = {p: p.stat().st_mtime_ns for p in workspace.videos.iterdir()}
    tables = bytes_of(folder, ".parquet")
    monkeypatch.setattr(batch_module, "_load", None)  # loading a model would be an error now
    again, count = run_batch(config, tiny_base, workspace)
    assert again == folder
    assert (count.kept, count.reused, count.failed) == (2, 2, 0)
    assert {p: p.stat().st_mtime_ns for p in workspace.videos.iterdir()} == before
    assert bytes_of(folder, ".parquet") == tables


@pytest.mark.parametrize("damage", ["cut mp4", "no sidecar", "no mp4"])
def test_a_half_written_video_is_made_again_and_is_the_same(
    tiny_base, workspace, damage: str, config_for
):
    config = config_for(PROMPTS)
    run_batch(config, tiny_base, workspace)
    whole = bytes_of(workspace.videos, ".mp4")
    victim = workspace.videos / sorted(whole)[0]
    if damage == "cut mp4":
        victim.write_bytes(whole[victim.name][: len(whole[victim.name]) // 2])
    elif damage == "no sidecar":
        victim.with_suffix(".json").unlink()
    else:
        victim.unlink()
    _, count = run_batch(config, tiny_base, workspace)
    assert (count.kept, count.reused) == (2, 1)
    assert bytes_of(workspace.videos, ".mp4") == whole


def test_settings_and_weights_are_part_of_the_id(tmp_path, tiny_base, workspace, config_for):
    def ids(model: Path, **generation) -> set[str]:
        folder, _ = run_batch(config_for(PROMPTS[:1], **generation), model, workspace)
        rows = read_table(folder / "generations.parquet", GENERATIONS)
        return {g.generation_id for g in rows}

    other = tmp_path / "other"
    shutil.copytree(tiny_base, other)
    (other / "_DONE.json").write_text("{}")  # a note beside the weights is no other model
    assert ids(other) == ids(tiny_base)
    index = other / "scheduler" / "scheduler_config.json"
    index.write_text(index.read_text().replace('"snr_shift_scale": 1.0', '"snr_shift_scale": 3.0'))
    changes = [ids(tiny_base, steps=3), ids(tiny_base, guidance=2.0), ids(tiny_base, fps=9)]
    changes += [ids(tiny_base, scheduler="dpm"), ids(other)]
    assert len(set.union(ids(tiny_base), *changes)) == 6
    # context only matters to a story that is extended
    assert ids(tiny_base, context_scenes=1) == ids(tiny_base)


def test_an_error_stays_in_its_row_and_is_tried_again(
    tiny_base, workspace, monkeypatch, config_for
):
    config = config_for(PROMPTS)
    real = batch_module.write_video

    def full_disk(files, scenes, *rest):
        if len(scenes) == 4:
            raise OSError("No space left on device")
        real(files, scenes, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(batch_module, "write_video", full_disk)
        folder, count = run_batch(config, tiny_base, workspace)
    assert (count.kept, count.failed, count.reasons) == (1, 1, {"os_error": 1})
    rows = {g.prompt_id: g for g in read_table(folder / "generations.parquet", GENERATIONS)}
    assert rows["three"].status == "done"
    assert (rows["four"].status, rows["four"].video_uri) == ("failed", "")
    assert "No space left" in rows["four"].error
    (reject,) = read_table(folder / "rejects.parquet", REJECTS)
    assert (reject.record_id, reject.failed) == ("four", True)
    again, count = run_batch(config, tiny_base, workspace)
    assert again == folder
    assert (count.kept, count.reused, count.failed) == (2, 1, 0)


def test_a_batch_in_which_all_fails_is_not_done(tiny_base, workspace, monkeypatch, config_for):
    def broken(*_args):
        raise OSError("No space left on device")

    monkeypatch.setattr(batch_module, "write_video", broken)
    with pytest.raises(GenerationError, match="2 x os_error"):
        run_batch(config_for(PROMPTS), tiny_base, workspace)
    assert latest(workspace.generations) is None
    (table,) = workspace.generations.glob("*/generations.parquet")
    assert {g.status for g in read_table(table, GENERATIONS)} == {"failed"}
    assert read_done(table.parent) is None


def test_bad_rows_are_rejected_and_the_rest_is_made(tiny_base, workspace, config_for):
    prompts = [PROMPTS[0], Prompt("empty", []), Prompt("blank", [" "])]
    folder, count = run_batch(config_for(prompts), tiny_base, workspace)
    assert (count.input, count.kept, count.rejected) == (3, 1, 2)
    assert count.reasons == {"empty_prompt_text": 1, "empty_prompts": 1}
    rejected = {r.record_id: r.reason for r in read_table(folder / "rejects.parquet", REJECTS)}
    assert rejected == {"empty": "empty_prompts", "blank": "empty_prompt_text"}


def test_no_good_row_or_no_model_ends_before_anything_is_loaded(tmp_path, workspace, config_for):
    with pytest.raises(ManifestError, match="row 1: prompts holds no scene"):
        run_batch(config_for([Prompt("empty", [])]), tmp_path / "none", workspace)
    with pytest.raises(CheckpointError, match="model folder is not there"):
        run_batch(config_for(PROMPTS), tmp_path / "none", workspace)
