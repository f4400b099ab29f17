"""Batches in this process; with Ray and at length they are in test_batch_at_length."""

from __future__ import annotations

import json
import shutil
import signal
import threading
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import inference.actor as actor_module
import inference.batch as batch_module
from curation.mp4 import write_mp4
from curation.video import read_frames
from inference.batch import run_batch
from inference.extension import generate_scenes
from inference.outputs import VideoWriter
from inference.plan import plan_batch
from schemas.errors import CheckpointError, GenerationError, ManifestError
from schemas.layout import Workspace
from schemas.rows import Prompt
from schemas.storage import latest, read_done, read_json
from schemas.tables import GENERATIONS, REJECTS, read_table
from training.latents import Encoder

pytestmark = pytest.mark.slow

PROMPTS = [
    Prompt("three", ["One.", "Two.", "Three."], seed=1),
    Prompt("four", ["Eins.", "Zwei.", "Drei."], "blurred", 2, ["Vier."]),
]
TWO = [Prompt(f"p{i}", ["Red.", "Blue."], seed=i) for i in range(4)]


def bytes_of(folder: Path, suffix: str) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.glob(f"*{suffix}")}


def rows_of(folder: Path) -> dict[str, object]:
    return {g.prompt_id: g for g in read_table(folder / "generations.parquet", GENERATIONS)}


@pytest.fixture
def calls(monkeypatch) -> list[list[str]]:
    """The prompt ids of every call that denoises."""
    seen: list[list[str]] = []

    def counted(pipeline, stories, **rest):
        seen.append([story.prompt_id for story in stories])
        yield from generate_scenes(pipeline, stories, **rest)

    monkeypatch.setattr(actor_module, "generate_scenes", counted)
    return seen


def test_videos_sidecars_and_tables(tiny_base, workspace, config_for):
    seen: list[tuple] = []
    folder, count = run_batch(
        config_for(PROMPTS), tiny_base, workspace, lambda *event: seen.append(event)
    )
    assert (count.input, count.kept, count.failed, count.reused, count.produced) == (2, 2, 0, 0, 7)
    assert [event[:2] for event in seen] == [(0, 2), (0, 2), (1, 2), (2, 2)]
    assert [event[2] for event in seen[:2]] == ["encoding 9 texts", "loading the model"]
    assert {event[2] for event in seen[2:]} == {"three: generated", "four: generated"}
    assert seen[2][3] > 0
    assert seen[3][3] == 0
    assert latest(workspace.generations) == folder
    assert read_done(folder) is not None
    assert read_json(folder / "counts.json") == [count.to_dict()]
    assert read_table(folder / "rejects.parquet", REJECTS) == []
    rows = rows_of(folder)
    assert {k: (g.num_scenes, g.extended_scenes, g.given_scenes) for k, g in rows.items()} == {
        "three": (3, 0, 0),
        "four": (4, 1, 0),
    }
    for row in rows.values():
        video = Path(row.video_uri)
        sidecar = read_json(video.with_suffix(".json"))
        assert row.video_sha256 == sidecar["files"][video.name]["sha256"]
        with av.open(str(video)) as container:
            stream = container.streams.video[0]
            assert (stream.frames, stream.width, stream.height) == (row.num_frames, 32, 32)
            assert stream.average_rate == 8
            provenance = json.loads(container.metadata["comment"])
        assert row.num_frames == sum(row.scene_frames) == 5 * row.num_scenes
        assert sidecar["seconds"] > 0
        assert {k: sidecar[k] for k in provenance} == provenance
        assert sidecar["prompts"] == row.prompts
        assert sidecar["seeds"] == row.seeds
        assert sidecar["model_sha256"] == row.model_sha256


def test_running_again_loads_nothing_and_changes_no_table(
    tiny_base, workspace, monkeypatch, config_for
):
    config = config_for(PROMPTS)
    folder, _ = run_batch(config, tiny_base, workspace)
    before = {p: p.stat().st_mtime_ns for p in workspace.videos.iterdir()}
    tables = bytes_of(folder, ".parquet")
    monkeypatch.setattr(batch_module, "make_missing", None)  # to start anything would fail
    again, count = run_batch(config, tiny_base, workspace)
    assert again == folder
    assert (count.kept, count.reused, count.failed) == (2, 2, 0)
    assert {p: p.stat().st_mtime_ns for p in workspace.videos.iterdir()} == before
    assert bytes_of(folder, ".parquet") == tables


@pytest.mark.parametrize("damage", ["cut mp4", "no sidecar", "no mp4"])
def test_a_half_written_video_is_made_again_and_is_the_same(
    tiny_base, workspace, damage: str, config_for, calls
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
    calls.clear()
    _, count = run_batch(config, tiny_base, workspace)
    assert (count.kept, count.reused, len(calls)) == (2, 1, 1)
    assert bytes_of(workspace.videos, ".mp4") == whole


def test_files_asked_for_later_are_made_and_the_video_stays_the_same(
    tiny_base, workspace, config_for
):
    run_batch(config_for(PROMPTS[:1]), tiny_base, workspace)
    whole = bytes_of(workspace.videos, ".mp4")
    config = config_for(PROMPTS[:1], save_latents=True, save_frames=True)
    _, count = run_batch(config, tiny_base, workspace)
    assert count.reused == 0
    assert bytes_of(workspace.videos, ".mp4") == whole
    assert len(list(workspace.videos.glob("*.latents/*"))) == 3
    assert len(list(workspace.videos.glob("*.frames/*"))) == 15
    _, count = run_batch(config_for(PROMPTS[:1]), tiny_base, workspace)
    assert count.reused == 1


def ids(config, model: Path, workspace) -> set[str]:
    return {job.planned.generation_id for job in plan_batch(config, model, workspace).jobs}


def test_what_decides_the_pixels_is_the_id_and_nothing_else(
    tmp_path, tiny_base, workspace, config_for
):
    def of(prompt: Prompt = PROMPTS[0], model: Path = tiny_base, **generation) -> set[str]:
        return ids(config_for([prompt], **generation), model, workspace)

    other = tmp_path / "other"
    shutil.copytree(tiny_base, other)
    (other / "_DONE.json").write_text("{}")  # a note beside the weights is no other model
    assert of(model=other) == of()
    index = other / "scheduler" / "scheduler_config.json"
    index.write_text(index.read_text().replace('"snr_shift_scale": 1.0', '"snr_shift_scale": 3.0'))
    one = PROMPTS[0]
    different = [
        of(),
        of(model=other),
        *(of(**{k: v}) for k, v in {"steps": 3, "guidance": 2.0, "fps": 9}.items()),
        of(scheduler="dpm"),
        of(quantize="int8"),
        of(scene_guidance=True),
        of(replace(one, seed=2)),
        of(replace(one, seeds=[1, 1, 2])),
        of(replace(one, frames=[5, 5, 9])),
        of(replace(one, negative_prompts=["", "dull", ""])),
        of(replace(one, settings='{"guidance": 3.0}')),
        of(replace(one, prompts=one.prompts[:2], extend_prompts=one.prompts[2:])),
    ]
    assert len(set.union(*different)) == len(different)
    same = [
        of(context_scenes=1),  # which matters to a story that is extended only
        of(condition_noise=True),
        of(actors=2),
        of(threads=2),
        of(micro_batch=4),
        of(save_latents=True),
        of(replace(one, seed=5, seeds=[1, 1, 1])),
        of(replace(one, settings='{"steps": 2}')),
        of(replace(one, frames=[5, 5, 5])),
    ]
    assert set.union(*same) == of()
    assert of(guidance=1.0, scene_guidance=True) == of(guidance=1.0)
    four = PROMPTS[1]
    assert len(of(four) | of(four, context_scenes=1) | of(four, condition_noise=True)) == 3


def test_rows_of_one_micro_batch_are_as_one_by_one(tiny_base, tmp_path, config_for, calls):
    latents: dict[int, list[torch.Tensor]] = {}
    for size in (1, 3):
        workspace = Workspace(tmp_path / str(size))  # one each, so that nothing is reused
        calls.clear()
        config = config_for(TWO, micro_batch=size, save_latents=True)
        _, count = run_batch(config, tiny_base, workspace)
        assert count.kept == 4
        assert [len(call) for call in calls] == ([1] * 4 if size == 1 else [3, 1])
        files = sorted(workspace.videos.glob("*.latents/*"))
        latents[size] = [load_file(path)["latents"] for path in files]
    assert len(latents[1]) == 8
    for alone, together in zip(latents[1], latents[3], strict=True):
        torch.testing.assert_close(alone, together, atol=1e-5, rtol=0)


def test_texts_are_encoded_once_and_the_model_needs_no_text_encoder(
    tiny_base, workspace, config_for, monkeypatch
):
    encoded: list[str] = []
    real = Encoder.caption

    def counted(self, caption):
        encoded.append(caption)
        return real(self, caption)

    monkeypatch.setattr(Encoder, "caption", counted)
    run_batch(config_for(PROMPTS), tiny_base, workspace)
    assert len(encoded) == len(set(encoded)) == 9  # seven prompts, "" and "blurred"
    run_batch(config_for(PROMPTS, steps=3), tiny_base, workspace)
    assert len(encoded) == 9
    # other videos of the same texts do without the text encoder
    for module in ("training.latents", "inference.pipeline"):
        monkeypatch.setattr(f"{module}.load_text_encoder", None)
    _, count = run_batch(config_for(PROMPTS, steps=1), tiny_base, workspace)
    assert count.kept == 2


def test_given_videos_are_encoded_and_guide_the_others(
    tiny_base, tmp_path, workspace, config_for, loaded
):
    # twice the size: it is scaled down; two frames too many: the first are taken
    clip = np.random.default_rng(0).integers(0, 255, (7, 64, 64, 3), dtype=np.uint8)
    clip = clip // 4 + np.arange(0, 140, 20, dtype=np.uint8)[:, None, None, None]
    write_mp4(tmp_path / "given.mp4", clip, 8)
    prompt = Prompt("given", ["One.", "Two."], seed=1, given=[str(tmp_path / "given.mp4"), ""])
    config = config_for([prompt], save_latents=True)
    folder, _ = run_batch(config, tiny_base, workspace)
    (row,) = rows_of(folder).values()
    assert (row.given_scenes, row.num_frames) == (1, 10)
    pixels = read_frames(tmp_path / "given.mp4", range(5), height_px=32, width_px=32, mode="cover")
    stem = workspace.videos / f"{row.generation_id}.latents"
    latents = [load_file(stem / f"0{i}.safetensors")["latents"] for i in range(2)]
    torch.testing.assert_close(latents[0], loaded.encode_video(pixels))
    # another file there is another video; the same file elsewhere is the same
    before = ids(config, tiny_base, workspace)
    (tmp_path / "given.mp4").rename(tmp_path / "moved.mp4")
    moved = replace(prompt, given=[str(tmp_path / "moved.mp4"), ""])
    assert ids(config_for([moved]), tiny_base, workspace) == before
    write_mp4(tmp_path / "moved.mp4", clip[::-1], 8)
    assert ids(config_for([moved]), tiny_base, workspace) != before


def test_a_given_video_that_is_too_short_fails_once_and_alone(
    tiny_base, tmp_path, workspace, config_for, calls
):
    write_mp4(tmp_path / "short.mp4", np.zeros((3, 32, 32, 3), np.uint8), 8)
    short = Prompt("short", ["One.", "Two."], given=[str(tmp_path / "short.mp4"), ""])
    config = config_for([*TWO[:1], short], retries=3)
    folder, count = run_batch(config, tiny_base, workspace)
    assert (count.kept, count.failed, count.reasons) == (1, 1, {"missing_frames": 1})
    assert calls == [["p0"]]
    assert rows_of(folder)["short"].status == "failed"


class FullDisk(VideoWriter):
    """Fails for one story."""

    def finish(self, seconds: float) -> str:
        if self._provenance["prompt_id"] in ("four", "p1"):
            raise OSError("No space left on device")
        return super().finish(seconds)


@pytest.mark.parametrize("retries", [0, 2])
def test_an_error_stays_in_its_row_and_is_tried_again(
    tiny_base, workspace, monkeypatch, config_for, calls, retries: int
):
    config = config_for(PROMPTS, retries=retries)
    with monkeypatch.context() as patch:
        patch.setattr(actor_module, "VideoWriter", FullDisk)
        folder, count = run_batch(config, tiny_base, workspace)
    assert sorted(calls[:2]) == [["four"], ["three"]]
    assert calls[2:] == [["four"]] * retries
    assert (count.kept, count.failed, count.reasons) == (1, 1, {"os_error": 1})
    rows = rows_of(folder)
    assert rows["three"].status == "done"
    assert (rows["four"].status, rows["four"].video_uri) == ("failed", "")
    assert "No space left" in rows["four"].error
    (reject,) = read_table(folder / "rejects.parquet", REJECTS)
    assert (reject.record_id, reject.failed) == ("four", True)
    assert len(list(workspace.videos.glob("*.mp4"))) == 1
    again, count = run_batch(config, tiny_base, workspace)
    assert again == folder
    assert (count.kept, count.reused, count.failed) == (2, 1, 0)


def test_in_a_micro_batch_only_the_row_that_failed_is_done_again(
    tiny_base, workspace, monkeypatch, config_for, calls
):
    monkeypatch.setattr(actor_module, "VideoWriter", FullDisk)
    _, count = run_batch(config_for(TWO, micro_batch=4, retries=0), tiny_base, workspace)
    assert (count.kept, count.failed) == (3, 1)
    assert calls == [["p0", "p1", "p2", "p3"], ["p1"]]


def test_without_memory_the_micro_batch_is_halved(
    tiny_base, workspace, monkeypatch, config_for, calls, caplog
):
    counted = actor_module.generate_scenes

    def too_large(pipeline, stories, **rest):
        scenes = counted(pipeline, stories, **rest)
        yield next(scenes)
        if len(stories) > 1:
            text = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"
            raise RuntimeError(f"[enforce fail at alloc_cpu.cpp] {text}")
        yield from scenes

    monkeypatch.setattr(actor_module, "generate_scenes", too_large)
    with caplog.at_level("INFO", "inference"):
        _, count = run_batch(config_for(TWO, micro_batch=4), tiny_base, workspace)
    assert (count.kept, count.failed) == (4, 0)
    assert [len(call) for call in calls] == [4, 2, 2, 1, 1, 1, 1]
    assert "out_of_memory micro_batch=4 next=2" in caplog.text
    assert "micro_batches_halved=3" in caplog.text
    assert not list(workspace.videos.glob(".*"))  # nothing half-written stays


def test_a_batch_in_which_all_fails_is_not_done(tiny_base, workspace, monkeypatch, config_for):
    class Broken(VideoWriter):
        def finish(self, seconds: float) -> str:
            raise OSError("No space left on device")

    monkeypatch.setattr(actor_module, "VideoWriter", Broken)
    with pytest.raises(GenerationError, match="2 x os_error"):
        run_batch(config_for(PROMPTS), tiny_base, workspace)
    assert latest(workspace.generations) is None
    (table,) = workspace.generations.glob("*/generations.parquet")
    assert {g.status for g in read_table(table, GENERATIONS)} == {"failed"}
    assert read_done(table.parent) is None


def test_an_interrupt_ends_the_run_within_a_step_and_leaves_nothing_half_written(
    tiny_base, workspace, config_for, monkeypatch
):
    steps: list[int] = []
    real = actor_module.VideoMaker._on_step

    def interrupted(self, done: int, total: int) -> None:
        steps.append(done)
        if done == 3:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        real(self, done, total)

    monkeypatch.setattr(actor_module.VideoMaker, "_on_step", interrupted)
    threads = torch.get_num_threads()
    # a shell's background jobs, and all they start, ignore the signal
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_batch(config_for(PROMPTS[:1], steps=1000), tiny_base, workspace)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(steps) < 500
    assert not list(workspace.generations.rglob("*.*"))
    assert torch.get_num_threads() == threads


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


def test_a_model_that_does_not_load_is_no_rows_fault(tiny_base, tmp_path, workspace, config_for):
    broken = tmp_path / "broken"
    shutil.copytree(tiny_base, broken)
    (broken / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"no weights")
    with pytest.raises(CheckpointError):
        run_batch(config_for(PROMPTS), broken, workspace)
    assert not list(workspace.generations.glob("*/generations.parquet"))


def test_the_cost_of_a_story(tiny_base, workspace, config_for):
    """Guidance doubles it, steps multiply it, and the exact cache saves the context's share."""

    def flops(prompt: Prompt, **generation) -> float:
        return plan_batch(config_for([prompt], **generation), tiny_base, workspace).flops[0]

    three = PROMPTS[0]
    assert flops(three, steps=4) == 2 * flops(three, steps=2)
    assert flops(three, guidance=6.0) == 2 * flops(three, guidance=1.0)
    added = replace(three, extend_prompts=["Four."])
    # the fourth scene is one pass more over three scenes, two of them clean
    assert flops(added) == 2 * flops(three)
    assert flops(added, context_scenes=1) < flops(added)
