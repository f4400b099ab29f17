"""viclip-tiny on held-out ToonWorld: retrieval, the gap, and what the similarity filter keeps.

Usage: python -m benchmarks.toonworld_similarity [--pairs 1000] [--videos 60] [--data build/tiny]
    [--out build/bench/toonworld_similarity.json]

Retrieval: one scene of each of 300 episodes and its caption; the share of captions (scenes) whose
own scene (caption) is among the first one and five. Equal captions tie, and a tie counts as found.

Gap: shots that follow one another in episodes (related) and in compilations (unrelated), rendered
as clips of any length; how often a related pair is more alike than an unrelated one (ROC-AUC).

Filter: as many episodes as compilations are written as mp4 and go through the real curation, from
shot detection on. A window is related if all its scenes are of one story. Precision is the share of
related windows among those a threshold keeps, recall the share of related windows that it keeps.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.tables import target, write_report
from curation.ablation import sweep
from curation.embeddings import load_embedder, spread_frames
from curation.ground_truth import read_truth, related_windows
from curation.pipeline import start_ray, stop_ray
from curation.refresh import Refresh
from curation.toonworld.world import Video, draw_compilation, draw_episode
from curation.toonworld.write import CAPTIONS, STORIES, write_dataset
from schemas.config.curation import (
    ClipsConfig,
    CurationConfig,
    EmbeddingConfig,
    ManifestsConfig,
    SourcesConfig,
)
from schemas.config.root import EngineConfig, TriptychConfig
from schemas.layout import Snapshot
from schemas.tables import CLIPS, SOURCES, WINDOWS, read_arrow
from training.tiny.stories import FPS, FRAMES, HELD_OUT_SEED, PIXELS, load_stories
from training.tiny.viclip import load_takes

WEIGHTS = "assets/tiny/viclip"
SCENES = 300
LEAST_AUC = 0.97
LOWS = (-1.0, 0.0, 0.6, 0.7, 0.8)
"""The paper's thresholds; -1 keeps all windows."""
QUANTILES = (0.25, 0.5, 0.75)
STATISTICS = (ManifestsConfig().statistic, "min_adjacent")
_BATCH = 32

ABOUT = f"""
Seed {HELD_OUT_SEED}, on which nothing was trained. Retrieval ranks {SCENES} scenes of nine frames
by their captions, cut off after 32 tokens or read in pieces (chunk); a tie counts as found. Related
pairs follow one another in an episode, unrelated ones in a compilation. The filter's windows come
from mp4 files through the real curation; `all` is without a threshold, `q` are quantiles.
"""

Vectors = npt.NDArray[np.float32]
Row = dict[str, Any]


def main() -> None:
    """Measure, print tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pairs", type=int, default=1000, help="of either kind, at least")
    parser.add_argument("--videos", type=int, default=60, help="of either kind")
    parser.add_argument("--data", type=Path, default=Path("build/tiny"))
    parser.add_argument("--out", type=Path, default=Path("build/bench/toonworld_similarity.json"))
    args = parser.parse_args()
    rows = retrieval(args.data)
    gap = gap_row(args.data, args.pairs)
    rows += [gap, *grid(args.data / "similarity", args.videos)]
    targets = [target("ROC-AUC of related against unrelated pairs", gap["auc"], LEAST_AUC)]
    write_report(args.out, "Similarity on ToonWorld", ABOUT, rows, targets)


def retrieval(data: Path) -> list[Row]:
    """Recall of scenes by captions and of captions by scenes."""
    stories = load_stories(data, HELD_OUT_SEED, SCENES)
    frames = stories.frames[:, 0, spread_frames(0, FRAMES, 8)]
    told = [captions[0] for captions in stories.captions]
    rows: list[Row] = []
    for long_text in ("truncate", "chunk"):
        cfg = EmbeddingConfig(model="viclip", weights=WEIGHTS, long_text=long_text)
        embedder = load_embedder(cfg, "cpu")
        texts = np.stack([v for v in embedder.embed_texts(told) if v is not None])
        alike = texts @ described(embedder.embed_clips, frames).T
        for case, table in (("caption to scene", alike), ("scene to caption", alike.T)):
            better = (table > np.diag(table)[:, None] + 1e-6).sum(1)
            found = {f"recall_at_{k}": float((better < k).mean()) for k in (1, 5)}
            group = f"Retrieval among {SCENES} scenes"
            rows.append({"group": group, "case": f"{case}, {long_text}", **found})
    return rows


def gap_row(data: Path, pairs: int) -> Row:
    """Similarities of related and of unrelated pairs."""
    embedder = load_embedder(EmbeddingConfig(model="viclip", weights=WEIGHTS), "cpu")
    alike: list[list[float]] = []
    for kind, draw in (("episodes", draw_episode), ("compilations", draw_compilation)):
        videos = enough(draw, pairs)
        shots = [shot for video in videos for shot in video.shots]
        frames = load_takes(data, f"similarity/{kind}/{HELD_OUT_SEED}", shots)
        vectors = described(embedder.embed_clips, frames)
        starts = np.cumsum([0, *(len(video.shots) for video in videos)])
        spans = (vectors[a:b] for a, b in pairwise(starts))
        alike.append([float(x @ y) for span in spans for x, y in pairwise(span)])
    related, unrelated = alike
    return {
        "group": "Gap between related and unrelated pairs",
        "case": f"{len(related)} related, {len(unrelated)} unrelated",
        "auc": float((np.array(related)[:, None] > unrelated).mean()),
        "mean_related": float(np.mean(related)),
        "mean_unrelated": float(np.mean(unrelated)),
        "related_5_percent": float(np.quantile(related, 0.05)),
        "unrelated_95_percent": float(np.quantile(unrelated, 0.95)),
    }


def enough(draw: Callable[[int, int], Video], pairs: int) -> list[Video]:
    """The first videos of the held-out seed with at least so many pairs of shots."""
    videos: list[Video] = []
    while sum(len(video.joins) for video in videos) < pairs:
        videos.append(draw(HELD_OUT_SEED, len(videos)))
    return videos


def described(embed: Callable[[Any], Vectors], frames: Any) -> Vectors:
    """(N, D) vectors of clips (N, T, H, W, 3), a few at a time."""
    batches = range(0, len(frames), _BATCH)
    return np.concatenate([embed(np.array(frames[i : i + _BATCH])) for i in batches])


def grid(folder: Path, videos: int) -> list[Row]:
    """Precision and recall of the sft manifest for each threshold."""
    write_dataset(folder / "videos", HELD_OUT_SEED, videos, videos, PIXELS, PIXELS, FPS)
    snapshot = curated(folder)
    windows = read_arrow(snapshot.table("windows"), WINDOWS)
    clips = read_arrow(snapshot.table("clips"), CLIPS)
    uris = read_arrow(snapshot.table("sources"), SOURCES)["uri"].to_pylist()
    truth = read_truth(folder / "videos" / STORIES)
    related = related_windows(truth, uris, windows, clips)
    rows: list[Row] = []
    for band, lows in (("similarity", LOWS), ("quantile", QUANTILES)):
        rules = ManifestsConfig(band=band)
        for cell in sweep(windows, clips, rules, lows, STATISTICS, related=related).cells:
            low = "all" if cell.low < 0 else f"{'q ' * (band == 'quantile')}{cell.low:g}"
            rows.append(
                {
                    "group": f"Filter: {len(related)} windows, {cell.related} related",
                    "case": f"{cell.statistic}, {low}",
                    "threshold": None if cell.low < 0 else round(cell.low_similarity, 3),
                    "kept": cell.kept_windows,
                    "precision": cell.precision,
                    "recall": cell.recall,
                }
            )
    return rows


def curated(folder: Path) -> Snapshot:
    """The snapshot of the videos, made anew or as an earlier run left it."""
    inputs = folder / "videos"
    config = TriptychConfig(
        workspace=str(folder / "workspace"),
        curation=CurationConfig(
            sources=SourcesConfig(inputs=(str(inputs),), captions_csv=str(inputs / CAPTIONS)),
            # Shots of two to four seconds are 16 to 32 frames at this rate.
            clips=ClipsConfig(min_frames=FRAMES),
            embedding=EmbeddingConfig(model="viclip", weights=WEIGHTS),
        ),
        engine=EngineConfig(num_cpus=1),
    )
    work = Refresh(config)
    start_ray(config.engine)
    try:
        work.sources()
        if work.published() is None:
            for stage in (
                work.shots, work.clips, work.filters, work.embeddings, work.dedup, work.windows,
                work.manifests,
            ):  # fmt: skip
                print(stage(), flush=True)
    finally:
        stop_ray()
    return work.publish()


if __name__ == "__main__":
    main()
