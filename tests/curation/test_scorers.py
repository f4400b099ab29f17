"""Optional scorers: which are configured, and the refresh stage that they make, through Ray."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from curation import pipeline
from curation.mp4 import write_mp4
from curation.pipeline import stop_ray
from curation.refresh import Refresh
from curation.scorers import NamedScorer, named_scorers
from schemas.config.curation import (
    CurationConfig,
    FiltersConfig,
    ManifestsConfig,
    ScorersConfig,
    SourcesConfig,
)
from schemas.config.root import EngineConfig, TriptychConfig
from schemas.counts import StageCount
from schemas.errors import CheckpointError, ConfigError
from schemas.layout import Snapshot
from schemas.rows import ClipScore
from schemas.tables import CLIP_SCORES, CLIPS, EMBEDDINGS, REJECTS, read_table
from tests.curation.tiny_weights import linear_head, write_clip, write_detector

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

FILMS = ("big_buck_bunny.mp4", "chaplin.mp4", "sintel_trailer.mp4")


@pytest.fixture(scope="module")
def scorers(tmp_path_factory: pytest.TempPathFactory) -> ScorersConfig:
    folder = tmp_path_factory.mktemp("weights")
    write_clip(folder / "clip")
    torch.save(linear_head(), folder / "head.pth")
    write_detector(folder / "text.onnx", (4.0, 4.0, 4.0))
    return ScorersConfig(
        clip=os.path.relpath(folder / "clip"),
        aesthetic_head=str(folder / "head.pth"),
        text_detector=str(folder / "text.onnx"),
        text_height_px=64,
    )


@pytest.fixture(scope="module")
def make(samples: Path) -> Iterator[Callable[..., Refresh]]:
    def make(workspace: Path, scorers: ScorersConfig, **thresholds: float) -> Refresh:
        curation = CurationConfig(
            sources=SourcesConfig(inputs=tuple(str(samples / f) for f in FILMS)),
            filters=FiltersConfig(**thresholds),  # pyright: ignore[reportArgumentType]
            manifests=ManifestsConfig(low=-1.0),
            scorers=scorers,
        )
        engine = EngineConfig(num_cpus=2, object_store_mb=80)
        return Refresh(TriptychConfig(workspace=str(workspace), curation=curation, engine=engine))

    yield make
    stop_ray()


def run(refresh: Refresh) -> tuple[Snapshot, dict[str, StageCount]]:
    counts = [refresh.sources(), refresh.shots(), refresh.clips(), refresh.filters()]
    counts += [refresh.scores()] if refresh.scorers else []
    counts += [refresh.embeddings(), refresh.dedup(), refresh.windows(), *refresh.manifests()]
    return refresh.publish(), {c.stage: c for c in counts}


def stored(snapshot: Snapshot) -> list[ClipScore]:
    return read_table(snapshot.table("scores"), CLIP_SCORES)


@pytest.fixture(scope="module")
def whole(
    make: Callable[..., Refresh], scorers: ScorersConfig, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Snapshot, dict[str, StageCount]]:
    return run(make(tmp_path_factory.mktemp("whole"), scorers))


def workspace_of(snapshot: Snapshot) -> Path:
    return snapshot.root.parents[2]


def test_every_clip_has_every_score(whole: tuple[Snapshot, dict[str, StageCount]]) -> None:
    snapshot, counts = whole
    assert list(counts).index("scores") == list(counts).index("filters") + 1
    count = counts["scores"]
    assert (count.input, count.kept, count.reused) == (counts["filters"].kept,) * 2 + (0,)
    clips = read_table(snapshot.table("clips"), CLIPS)
    plain = pd.read_parquet(snapshot.table("scores"))  # nothing of ours needed to read it
    assert plain.groupby("scorer_id").size().to_dict() == {
        "aesthetic": len(clips), "text_area": len(clips),
    }  # fmt: skip
    assert set(plain["clip_id"]) == {c.clip_id for c in clips}
    by_scorer = plain.groupby("scorer_id")["value"]
    assert (by_scorer.std() > 0).all()  # the scorers look at the clips
    assert plain.groupby("scorer_id")["weights_sha256"].nunique().eq(1).all()
    assert "scores.parquet" in {p.name for p in snapshot.root.iterdir()}


def test_a_threshold_rejects_without_scoring_again(
    whole: tuple[Snapshot, dict[str, StageCount]],
    make: Callable[..., Refresh],
    scorers: ScorersConfig,
) -> None:
    snapshot, counts = whole
    scores = stored(snapshot)
    aesthetic = {s.clip_id: s.value for s in scores if s.scorer_id == "aesthetic"}
    text = {s.clip_id: s.value for s in scores if s.scorer_id == "text_area"}
    limits = sorted(aesthetic.values())[2], sorted(set(text.values()))[-2]
    strict, found = run(
        make(workspace_of(snapshot), scorers, min_aesthetic=limits[0], max_text_ratio=limits[1])
    )
    ugly = {c for c, v in aesthetic.items() if v < limits[0]}
    wordy = {c for c, v in text.items() if v > limits[1]}
    assert len(ugly) == 2
    assert wordy
    count = found["scores"]
    assert count.reused == count.input == counts["scores"].input
    assert count.kept == count.input - len(ugly | wordy)
    assert count.reasons == {
        reason: number
        for reason, number in (("unaesthetic", len(ugly)), ("text", len(wordy - ugly)))
        if number
    }
    assert found["embeddings"].input == count.kept
    assert stored(strict) == scores
    rejects = {
        r.record_id: r for r in read_table(strict.table("rejects"), REJECTS) if r.stage == "scores"
    }
    assert set(rejects) == ugly | wordy
    assert {c: rejects[c].score for c in ugly} == {c: aesthetic[c] for c in ugly}
    left = {c.clip_id for c in read_table(strict.table("clips"), CLIPS)}
    assert left == set(aesthetic) - ugly - wordy
    assert {e.clip_id for e in read_table(strict.table("embeddings"), EMBEDDINGS)} == left


def test_without_scorers_there_is_no_stage(
    whole: tuple[Snapshot, dict[str, StageCount]], make: Callable[..., Refresh]
) -> None:
    plain = make(workspace_of(whole[0]), ScorersConfig())
    assert plain.scorers == ()
    snapshot, counts = run(plain)
    assert "scores" not in counts
    assert not snapshot.table("scores").exists()
    assert read_table(snapshot.table("clips"), CLIPS) == read_table(whole[0].table("clips"), CLIPS)


def test_only_missing_scores_are_computed_and_weights_are_known_by_content(
    whole: tuple[Snapshot, dict[str, StageCount]],
    make: Callable[..., Refresh],
    scorers: ScorersConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    snapshot, counts = whole
    # the same weights under another path: nothing has changed
    assert scorers.aesthetic_head is not None
    moved = tmp_path / "moved.pth"
    moved.write_bytes(Path(scorers.aesthetic_head).read_bytes())
    same = make(workspace_of(snapshot), scorers.model_copy(update={"aesthetic_head": str(moved)}))
    same.sources()
    assert same.published() == snapshot
    # other weights under the same path: only that score is computed
    asked: list[tuple[str, int]] = []
    real = pipeline.score_clips

    def counted(pieces: list[pipeline.Piece], *rest: object) -> list[pipeline.Failure]:
        scorer = rest[2]
        assert isinstance(scorer, NamedScorer)
        asked.append((scorer.scorer_id, sum(len(p.payload["clips"]) for p in pieces)))
        return real(pieces, *rest)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(pipeline, "score_clips", counted)
    torch.save(linear_head(seed=9), moved)
    other = make(workspace_of(snapshot), scorers.model_copy(update={"aesthetic_head": str(moved)}))
    changed, found = run(other)
    assert asked == [("aesthetic", counts["scores"].input), ("text_area", 0)]
    assert found["scores"].reused == 0
    before = {(s.clip_id, s.scorer_id): s for s in stored(snapshot)}
    after = {(s.clip_id, s.scorer_id): s for s in stored(changed)}
    assert before.keys() == after.keys()
    for key, score in after.items():
        assert (score == before[key]) == (key[1] == "text_area")


def test_clips_that_cannot_be_read_fail_once(
    whole: tuple[Snapshot, dict[str, StageCount]],
    scorers: ScorersConfig,
    make: Callable[..., Refresh],
    samples: Path,
    tmp_path: Path,
) -> None:
    shutil.copy(samples / FILMS[0], tmp_path)
    pattern = np.kron(np.random.default_rng(0).integers(0, 256, (8, 12, 3)), np.ones((8, 8, 1)))
    frames = np.stack([np.roll(pattern.astype(np.uint8), i, 1) for i in range(30)])
    write_mp4(tmp_path / "made.mp4", frames, 12)
    config = make(workspace_of(whole[0]), scorers).config
    sources = SourcesConfig(inputs=(str(tmp_path),))
    curation = config.curation.model_copy(update={"sources": sources})
    refresh = Refresh(config.model_copy(update={"curation": curation}))
    refresh.sources()
    refresh.shots()
    refresh.clips()
    refresh.filters()
    (tmp_path / "made.mp4").unlink()
    count = refresh.scores()
    assert (count.failed, count.reasons) == (1, {"not_found": 1})  # though two scorers failed
    assert count.reused == count.kept == count.input - 1 > 0
    assert refresh.embeddings().input == count.kept


def test_weights_that_cannot_be_used_are_named(
    whole: tuple[Snapshot, dict[str, StageCount]],
    make: Callable[..., Refresh],
    scorers: ScorersConfig,
    tmp_path: Path,
) -> None:
    torch.save(linear_head(768), tmp_path / "wide.pth")
    wide = scorers.model_copy(update={"aesthetic_head": str(tmp_path / "wide.pth")})
    refresh = make(workspace_of(whole[0]), wide)
    refresh.sources()
    refresh.shots()
    refresh.clips()
    refresh.filters()
    with pytest.raises(CheckpointError, match=r"(?s)another shape.*\(1, 768\)"):
        refresh.scores()


def test_a_threshold_needs_its_weights(make: Callable[..., Refresh], tmp_path: Path) -> None:
    for threshold, weights in (
        ("min_aesthetic", "aesthetic_head"),
        ("max_text_ratio", "text_detector"),
    ):
        with pytest.raises(ConfigError, match=rf"(?s)filters.{threshold}.*give.*scorers.{weights}"):
            make(tmp_path, ScorersConfig(), **{threshold: 0.5})


def test_weights_must_be_there_and_complete(scorers: ScorersConfig, tmp_path: Path) -> None:
    off = FiltersConfig()
    for key in ("clip", "aesthetic_head"):
        with pytest.raises(ConfigError, match="needs a CLIP model and a head"):
            named_scorers(scorers.model_copy(update={key: None}), off)
    for key in ("text_detector", "aesthetic_head"):
        gone = scorers.model_copy(update={key: str(tmp_path / "gone")})
        with pytest.raises(ConfigError, match=rf"(?s)not there.*scorers.{key}.*gone"):
            named_scorers(gone, off)
    with pytest.raises(CheckpointError, match="not a folder with an OpenCLIP model"):
        named_scorers(scorers.model_copy(update={"clip": str(tmp_path)}), off)


def test_a_scorer_is_known_by_weights_and_settings_alone(scorers: ScorersConfig) -> None:
    off = FiltersConfig()
    aesthetic, text = named_scorers(scorers, off)
    assert (aesthetic.scorer_id, aesthetic.settings) == ("aesthetic", (3,))
    assert (text.scorer_id, text.settings) == ("text_area", (3, 64))
    larger = scorers.model_copy(update={"text_height_px": 96})
    assert named_scorers(larger, off)[0] == aesthetic
    assert named_scorers(larger, off)[1] != text
    only_text = scorers.model_copy(update={"clip": None, "aesthetic_head": None})
    assert named_scorers(only_text, off) == (text,)
