"""The three consistency scores of generated videos.

With unit-norm video features f and text features g of the same model: Visual is the mean of
f(s_i).f(s_j) over all pairs of scenes, Semantic the mean of f(s_i).g(p_i) over scenes, Sequence the
mean of the two.

Source: the Mask2DiT paper (arXiv 2503.19881), section 4.1, and its conference slides; the paper
prints them x 100.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import accumulate, combinations
from pathlib import Path
from statistics import fmean
from typing import Any

from numpy import float32
from numpy.typing import NDArray

from curation.embeddings import Embedder, load_embedder, spread_frames
from curation.video import read_frames
from schemas.config import TriptychConfig
from schemas.counts import StageCount, count_reasons
from schemas.errors import VideoDecodeError
from schemas.layout import Workspace
from schemas.rows import Generation, Reject, Score
from schemas.storage import fingerprint, read_json, write_json
from schemas.tables import GENERATIONS, REJECTS, SCORES, read_metadata, read_table, write_table

log = logging.getLogger(__name__)

STAGE = "evaluate"


@dataclass(frozen=True)
class Consistency:
    """The scores of one video, in [-1, 1]; None where the model has no text side."""

    visual: float
    semantic: float | None
    sequence: float | None


def consistency(video: NDArray[float32], texts: Sequence[NDArray[float32] | None]) -> Consistency:
    """Score one video.

    Args:
        video: One unit-norm feature per scene, (S, D), S >= 2.
        texts: One unit-norm feature (D,) per scene's prompt, or None where there is none.
    """
    assert len(video) >= 2, "visual consistency needs two scenes"
    assert len(video) == len(texts), "one text per scene"
    visual = fmean(float(a @ b) for a, b in combinations(video, 2))
    matches = [float(f @ g) for f, g in zip(video, texts, strict=True) if g is not None]
    if not matches:
        return Consistency(visual, None, None)
    semantic = fmean(matches)
    return Consistency(visual, semantic, (visual + semantic) / 2)


def evaluate(
    config: TriptychConfig, workspace: Workspace, batch_dir: Path
) -> tuple[list[Score], StageCount]:
    """Score the videos of a batch; write ``scores.parquet`` and ``scores.json`` beside them.

    Rejects and the stage's count are added to the batch's ``rejects.parquet`` and ``counts.json``.

    Args:
        config: The evaluation section is used.
        workspace: The workspace that holds the videos.
        batch_dir: Folder written by ``run_batch``.

    Returns:
        The scores, and the count of generations: kept (scored), rejected (not generated, or a
        single scene), failed (the video cannot be read).

    Raises:
        ManifestError: The batch has no generations table.
    """
    started = time.monotonic()
    generations = read_table(batch_dir / "generations.parquet", GENERATIONS)
    log.info("stage=%s start videos=%d model=%s", STAGE, len(generations), config.evaluation.model)
    embedder = load_embedder(config.evaluation)
    known = _known_scores(batch_dir / "scores.parquet", config, embedder)
    scores: list[Score] = []
    rejects: list[Reject] = []
    for generation in generations:
        result = known.get(generation.generation_id) or _score_or_reject(
            generation, workspace, embedder, config
        )
        if isinstance(result, Score):
            scores.append(result)
        else:
            rejects.append(result)
    failed = sum(r.failed for r in rejects)
    count = StageCount(
        stage=STAGE,
        unit="video",
        input=len(generations),
        kept=len(scores),
        rejected=len(rejects) - failed,
        failed=failed,
        reused=sum(s.generation_id in known for s in scores),
        seconds=time.monotonic() - started,
        reasons=count_reasons(r.reason for r in rejects),
    ).check()
    _publish(batch_dir, scores, rejects, count, _key(config, embedder))
    log.info("stage=%s end kept=%d rejected=%d failed=%d seconds=%.1f", STAGE, count.kept,
             count.rejected, count.failed, count.seconds)  # fmt: skip
    return scores, count


def aggregate(scores: Sequence[Score], num_videos: int) -> dict[str, Any]:
    """Means over a batch, x 100 as the paper prints them.

    Args:
        scores: Scores of the videos that could be scored.
        num_videos: Videos that were asked for; ``coverage`` is the scored share of them, and
            ``text_coverage`` the share that has text scores too.
    """

    def mean(values: list[float]) -> float | None:
        return 100 * fmean(values) if values else None

    semantic = [s.semantic for s in scores if s.semantic is not None]
    return {
        "videos": num_videos,
        "scored": len(scores),
        "coverage": len(scores) / num_videos if num_videos else 0.0,
        "text_coverage": len(semantic) / num_videos if num_videos else 0.0,
        "visual": mean([s.visual for s in scores]),
        "semantic": mean(semantic),
        "sequence": mean([s.sequence for s in scores if s.sequence is not None]),
    }


def _known_scores(path: Path, config: TriptychConfig, embedder: Embedder) -> dict[str, Score]:
    """Scores an earlier evaluation with the same settings and model weights left, by video."""
    if not path.is_file() or read_metadata(path).get("scored_with") != _key(config, embedder):
        return {}
    return {s.generation_id: s for s in read_table(path, SCORES)}


def _key(config: TriptychConfig, embedder: Embedder) -> str:
    """What a score depends on besides its video, which its id already stands for."""
    return fingerprint(config.evaluation.hash(), embedder.model_id, embedder.weights_sha256)


def _score_or_reject(
    generation: Generation, workspace: Workspace, embedder: Embedder, config: TriptychConfig
) -> Score | Reject:
    """The one wrapper that turns what goes wrong with a video into a reject."""
    try:
        if generation.status != "done":
            return _reject(generation, "not_generated", generation.error)
        if generation.num_scenes < 2:
            detail = "visual consistency compares scenes; this video has one"
            return _reject(generation, "single_scene", detail)
        path = workspace.videos / f"{generation.generation_id}.mp4"
        video = _scene_features(generation, path, embedder, config.evaluation.frames_per_scene)
        result = consistency(video, embedder.embed_texts(generation.prompts))
    except Exception as error:
        log.exception("stage=%s failed generation_id=%s", STAGE, generation.generation_id)
        reason = error.reason if isinstance(error, VideoDecodeError) else "evaluation_error"
        return _reject(generation, reason, f"{type(error).__name__}: {error}", failed=True)
    return Score(
        generation_id=generation.generation_id,
        prompt_id=generation.prompt_id,
        model_id=embedder.model_id,
        visual=result.visual,
        semantic=result.semantic,
        sequence=result.sequence,
        scored_scenes=generation.num_scenes,
    )


def _scene_features(
    generation: Generation, path: Path, embedder: Embedder, scored: int
) -> NDArray[float32]:
    """One unit-norm feature per scene, (S, D), from the mp4 as it was written."""
    starts = accumulate(generation.scene_frames, initial=0)
    spans = zip(starts, generation.scene_frames, strict=False)
    wanted = [i for start, length in spans for i in spread_frames(start, length, scored)]
    size = embedder.image_px
    frames = read_frames(path, wanted, height_px=size, width_px=size, mode=embedder.mode)
    return embedder.embed_clips(frames.reshape(generation.num_scenes, scored, *frames.shape[1:]))


def _reject(generation: Generation, reason: str, detail: str, *, failed: bool = False) -> Reject:
    return Reject(
        record_id=generation.generation_id,
        stage=STAGE,
        reason=reason,
        detail=detail,
        uri=generation.video_uri,
        failed=failed,
    )


def _publish(
    batch_dir: Path,
    scores: Sequence[Score],
    rejects: Sequence[Reject],
    count: StageCount,
    key: str,
) -> None:
    """Write the scores, and replace this stage's part of the batch's rejects and counts."""
    metadata = {"code_version": version("triptych"), "scored_with": key}
    write_table(batch_dir / "scores.parquet", SCORES, scores, metadata)
    write_json(batch_dir / "scores.json", aggregate(scores, count.input))
    table = batch_dir / "rejects.parquet"
    others = [r for r in read_table(table, REJECTS) if r.stage != STAGE] if table.is_file() else []
    write_table(table, REJECTS, [*others, *rejects], metadata)
    counts = batch_dir / "counts.json"
    earlier: list[dict[str, Any]] = read_json(counts) if counts.is_file() else []
    write_json(counts, [*(c for c in earlier if c["stage"] != STAGE), count.to_dict()])
