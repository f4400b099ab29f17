"""A sweep is what making every manifest one by one would give."""

from __future__ import annotations

import dataclasses
import random
from statistics import fmean

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curation.ablation import Cell, Sweep, sweep
from curation.manifests import Manifest, sft_manifest
from schemas.config.curation import ManifestsConfig, Statistic
from schemas.rows import Clip, Window, stable_id
from schemas.tables import CLIPS, SAMPLES, WINDOWS, from_arrow, to_arrow

STATISTICS: list[Statistic] = ["min_pairwise", "mean_adjacent"]
LOWS = (0.6, -1.0, 0.0, 0.25, 0.9, 1.0)


def film(chance: random.Random, sources: int, shots: int) -> tuple[list[Clip], list[Window]]:
    clips = [
        Clip(
            clip_id=stable_id(s, i), shot_id=f"{s}/{i}", source_id=f"source{s}", uri=f"/{s}.mp4",
            index=i, start_pts=i, end_pts=i + 1, start_frame=i, end_frame=i + 1, num_frames=1,
            start_s=2.0 * i, end_s=2.0 * i + chance.choice([0.5, 1.5]), fps=25.0, width_px=64,
            height_px=48, caption=chance.choice(["A ball.", "A cat.", "A cat.", ""]),
            caption_source="", matching_score=None, trainable_pretrain=True, trainable_sft=True,
        )
        for s in range(sources)
        for i in range(shots)
    ]  # fmt: skip
    windows = [
        Window(
            sample_id=stable_id("w", s, i), source_id=f"source{s}", index=i,
            clip_ids=[stable_id(s, i + k) for k in range(3)], similarities=[0.0] * 3,
            min_adjacent=0.0, mean_adjacent=chance.choice([0.2, 0.4, 0.6, 0.8]),
            min_pairwise=chance.choice([-0.5, 0.0, 0.25, 0.3, 0.95]), mean_pairwise=0.0,
            max_pairwise=chance.choice([0.5, 0.5, 0.999]), largest_gap_s=0.1,
        )
        for s in range(sources)
        for i in range(shots - 2)
    ]  # fmt: skip
    return clips, windows


def one_by_one(
    clips: list[Clip],
    windows: list[Window],
    cfg: ManifestsConfig,
    cell: Cell,
    texts: dict[str, float],
    related: dict[str, float],
) -> Manifest:
    """Compare a cell with the manifest of its threshold, counted row by row."""
    at = cfg.model_copy(update={"low": cell.low, "statistic": cell.statistic})
    made = sft_manifest(to_arrow(WINDOWS, windows), to_arrow(CLIPS, clips), at)
    samples = [s for table in made.samples() for s in from_arrow(SAMPLES, table)]
    scenes = {scene.clip_id: scene for s in samples for scene in s.scenes}
    assert (cell.kept_windows, cell.input_windows) == (len(samples), len(windows))
    assert (cell.clips, cell.sources) == (
        len(scenes),
        len({s.source_id for s in scenes.values()}),
    )
    assert cell.hours == pytest.approx(sum(s.end_s - s.start_s for s in scenes.values()) / 3600)
    scores = [s.similarity for s in samples]
    assert cell.mean_similarity == (pytest.approx(fmean(scores)) if scores else None)
    told = [texts[clip_id] for clip_id in scenes if clip_id in texts]
    assert cell.caption_similarity == (pytest.approx(fmean(told)) if told else None)
    reasons = made.rejects["reason"].to_pylist()
    assert cell.rejects == {r: reasons.count(r) for r in sorted(set(reasons))}
    assert repr(cell.low_similarity) == made.limits["low_similarity"]
    truth = [related[s.sample_id] for s in samples]
    known = [t for t in truth if not np.isnan(t)]
    assert cell.precision == (pytest.approx(fmean(known)) if known else None)
    total = sum(t for t in related.values() if not np.isnan(t))
    assert cell.related == total
    assert cell.recall == (pytest.approx(np.nansum(truth) / total) if total else None)
    return made


@given(
    st.randoms(use_true_random=False),
    st.integers(0, 4),
    st.sampled_from(["similarity", "quantile"]),
    st.sampled_from([None, 0, 1]),
    st.sampled_from([0.5, 1.0]),
)
def test_cells_are_what_manifests_hold(
    chance: random.Random, sources: int, band: str, shared: int | None, high: float
) -> None:
    clips, windows = film(chance, sources, 6)
    cfg = ManifestsConfig.model_validate(
        {"band": band, "low": 0, "high": high, "max_shared_clips": shared, "max_per_source": 3}
    )
    lows = [low for low in LOWS if low >= 0 or band == "similarity"]
    texts = {c.clip_id: chance.random() for c in clips if c.caption == "A cat."}
    related = {w.sample_id: chance.choice([0.0, 1.0, np.nan]) for w in windows}
    in_order = to_arrow(WINDOWS, windows)
    found = sweep(
        in_order,
        to_arrow(CLIPS, clips),
        cfg,
        lows,
        STATISTICS,
        caption_scores=pa.table({"clip_id": list(texts), "similarity": list(texts.values())})
        if texts
        else None,
        related=np.array([related[i] for i in in_order["sample_id"].to_pylist()], np.float64),
    )
    assert [(c.statistic, c.low) for c in found.cells] == [(s, x) for s in STATISTICS for x in lows]
    ids = in_order["sample_id"].to_pylist()
    kept: list[set[str]] = []
    for number, cell in enumerate(found.cells):
        made = one_by_one(clips, windows, cfg, cell, texts, related)
        kept.append(set(made.sample_ids.to_pylist()))
        assert {ids[i] for i in found.kept(number)} == kept[-1]
    expected = [[len(a & b) / len(a | b) if a | b else 1.0 for b in kept] for a in kept]
    assert found.overlap() == pytest.approx(np.array(expected).reshape(len(kept), len(kept)))


def small() -> tuple[Sweep, pa.Table]:
    clips, windows = film(random.Random(1), 2, 7)
    clips = [dataclasses.replace(c, caption="A cat.") for c in clips]
    windows = [
        dataclasses.replace(w, min_pairwise=i / 10, max_pairwise=0.999 if i == 3 else 0.5)
        for i, w in enumerate(windows)
    ]
    table = to_arrow(WINDOWS, windows)
    found = sweep(table, to_arrow(CLIPS, clips), ManifestsConfig(), [0.45, 2.0], ["min_pairwise"])
    return found, table


def test_the_windows_nearest_to_a_threshold_come_first() -> None:
    found, table = small()
    scores = table["min_pairwise"].to_numpy()
    below, above = found.near(0, 2)
    assert scores[below].tolist() == [0.4, 0.2]  # 0.3 is a near duplicate at any threshold
    assert scores[above].tolist() == [0.5, 0.6]
    below, above = found.near(1, 1)
    assert (scores[below].tolist(), above) == ([0.9], [])
