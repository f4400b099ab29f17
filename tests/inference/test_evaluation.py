from __future__ import annotations

from dataclasses import replace
from math import sqrt

import numpy as np
import pytest

from curation.mp4 import write_mp4
from inference.batch import run_batch
from inference.evaluation import aggregate, consistency, evaluate
from schemas.rows import Generation, Prompt, Score
from schemas.storage import read_json
from schemas.tables import GENERATIONS, REJECTS, SCORES, read_table, write_table

A, B = np.array([1, 0], np.float32), np.array([0, 1], np.float32)
DIAGONAL = np.array([1, 1], np.float32) / np.float32(sqrt(2))


def test_the_three_scores_by_hand():
    # pairs: A.B = 0, A.D = B.D = 1/sqrt 2; texts: A.A = 1, B.A = 0, D.B = 1/sqrt 2
    result = consistency(np.stack([A, B, DIAGONAL]), [A, A, B])
    assert result.visual == pytest.approx(2 / sqrt(2) / 3)
    assert result.semantic == pytest.approx((1 + 0 + 1 / sqrt(2)) / 3)
    assert result.sequence == pytest.approx((2 / sqrt(2) / 3 + (1 + 1 / sqrt(2)) / 3) / 2)


def test_scenes_without_text_are_left_out_and_none_at_all_gives_none():
    video = np.stack([A, B])
    assert consistency(video, [None, B]).semantic == 1
    alone = consistency(video, [None, None])
    assert (alone.visual, alone.semantic, alone.sequence) == (0, None, None)


def test_aggregate_is_times_a_hundred_with_its_coverage():
    scores = [Score("a", "a", "m", 0.5, 0.25, 0.375, 3), Score("b", "b", "m", 0.7, None, None, 3)]
    assert aggregate(scores, 4) == {
        "videos": 4,
        "scored": 2,
        "coverage": 0.5,
        "text_coverage": 0.25,
        "visual": pytest.approx(60),
        "semantic": pytest.approx(25),
        "sequence": pytest.approx(37.5),
    }
    assert aggregate([], 0)["visual"] is None


def generation(name: str, num_scenes: int, status: str = "done") -> Generation:
    return Generation(
        generation_id=name,
        prompt_id=name,
        status=status,
        video_uri=f"{name}.mp4",
        video_sha256="0",
        prompts=["a red wall", *["a scene"] * (num_scenes - 1)],
        negative_prompts=[""] * num_scenes,
        seeds=[0] * num_scenes,
        num_scenes=num_scenes,
        given_scenes=0,
        extended_scenes=0,
        scene_frames=[5] * num_scenes,
        num_frames=5 * num_scenes,
        width_px=64,
        height_px=32,
        fps=8,
        scheduler="ddim",
        steps=1,
        guidance=1.0,
        model_sha256="0",
        error="" if status == "done" else "it broke",
    )


def flat(*colours: tuple[int, int, int]) -> np.ndarray:
    """A video of scenes of one colour each, 5 frames per scene."""
    scenes = [np.full((5, 32, 64, 3), c, np.uint8) for c in colours]
    return np.concatenate(scenes)


def test_every_video_is_scored_rejected_or_failed(tmp_path, workspace, config_for):
    red, blue = (220, 20, 20), (20, 20, 220)
    write_mp4(workspace.videos.joinpath("same.mp4"), flat(red, red, red), 8)
    write_mp4(workspace.videos.joinpath("mixed.mp4"), flat(red, red, blue), 8)
    write_mp4(workspace.videos.joinpath("short.mp4"), flat(red, red), 8)
    rows = [generation(n, 3) for n in ("same", "mixed", "short", "gone")]
    rows += [generation("single", 1), generation("broken", 3, status="failed")]
    batch = workspace.generations / "batch"
    write_table(batch / "generations.parquet", GENERATIONS, rows)
    config = config_for([])

    scores, count = evaluate(config, workspace, batch)
    assert (count.input, count.kept, count.rejected, count.failed) == (6, 2, 2, 2)
    by_name = {s.generation_id: s for s in scores}
    assert by_name["same"].visual == pytest.approx(1, abs=1e-3)
    assert by_name["mixed"].visual < 0.95
    # only the first prompt names a colour, and the first scenes of both videos show it
    assert by_name["same"].semantic == pytest.approx(by_name["mixed"].semantic, abs=1e-3)
    assert by_name["same"].semantic > 0.9
    assert read_table(batch / "scores.parquet", SCORES) == sorted(scores, key=lambda s: s.prompt_id)
    rejected = {
        r.record_id: (r.reason, r.failed) for r in read_table(batch / "rejects.parquet", REJECTS)
    }
    assert rejected == {
        "short": ("missing_frames", True),
        "gone": ("not_found", True),
        "single": ("single_scene", False),
        "broken": ("not_generated", False),
    }
    assert read_json(batch / "scores.json")["coverage"] == pytest.approx(2 / 6)

    tables = {p.name: p.read_bytes() for p in batch.glob("*.parquet")}
    evaluate(config, workspace, batch)
    assert {p.name: p.read_bytes() for p in batch.glob("*.parquet")} == tables
    assert [c["stage"] for c in read_json(batch / "counts.json")] == ["evaluate"]


def test_scenes_of_unequal_length_are_scored_by_their_own_frames(tmp_path, workspace, config_for):
    red, blue = (220, 20, 20), (20, 20, 220)
    frames = np.concatenate([flat(red)[:1], flat(red, red)[:9], flat(blue)])
    write_mp4(workspace.videos / "uneven.mp4", frames, 8)
    write_mp4(workspace.videos / "even.mp4", flat(red, red, blue), 8)
    rows = [generation("even", 3), replace(generation("uneven", 3), scene_frames=[1, 9, 5])]
    write_table(tmp_path / "generations.parquet", GENERATIONS, rows)
    (even, uneven), _ = evaluate(config_for([]), workspace, tmp_path)
    assert uneven.visual == pytest.approx(even.visual, abs=2e-3)
    assert uneven.visual < 0.95


def test_a_generated_batch_is_scored_beside_its_own_counts(tiny_base, workspace, config_for):
    prompts = [Prompt("p", ["One.", "Two.", "Three."], extend_prompts=["Four."]), Prompt("bad", [])]
    config = config_for(prompts)
    folder, _ = run_batch(config, tiny_base, workspace)
    (score,), count = evaluate(config, workspace, folder)
    assert (score.prompt_id, score.scored_scenes, count.kept) == ("p", 4, 1)
    assert -1 <= score.visual <= 1 + 1e-6
    assert (score.semantic, score.sequence) == (None, None)  # the prompts name no colour
    assert [c["stage"] for c in read_json(folder / "counts.json")] == ["generate", "evaluate"]
    assert [r.record_id for r in read_table(folder / "rejects.parquet", REJECTS)] == ["bad"]


def test_scores_are_reused_until_the_scorer_changes(tmp_path, workspace, config_for):
    write_mp4(workspace.videos / "a.mp4", flat((255, 0, 0), (0, 0, 255), (0, 255, 0)), 8)
    write_table(tmp_path / "generations.parquet", GENERATIONS, [generation("a", 3)])
    config = config_for([])
    first, count = evaluate(config, workspace, tmp_path)
    assert count.reused == 0
    (workspace.videos / "a.mp4").unlink()
    again, count = evaluate(config, workspace, tmp_path)
    assert (again, count.reused) == (first, 1)
    fewer = config.evaluation.model_copy(update={"frames_per_scene": 2})
    _, count = evaluate(config.model_copy(update={"evaluation": fewer}), workspace, tmp_path)
    assert (count.reused, count.failed) == (0, 1)
