"""The page of an ablation: what each threshold keeps, in numbers, plots and pictures.

Like the report it is one file, without scripts and without anything from elsewhere, and every word
of strangers is escaped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from markupsafe import Markup

from flows import charts
from flows.ablation import Ablation
from flows.ablation_tables import CellResult
from flows.pages import environment
from flows.sheets import WindowRow, evenly, window_row
from schemas.arrow_compute import pc
from schemas.rows import Clip, Source, Window
from schemas.tables import CLIPS, SOURCES, WINDOWS, from_arrow

MAX_STILL_BYTES = 5_000_000
"""Room for pictures, so that the page stays under 8 MB; windows far from a threshold go first."""
MAX_MATRIX = 24
"""Cells shown in the overlap table; ``overlap.parquet`` has all."""

REASON_TEXTS = {
    "rejected_no_caption": "no caption",
    "rejected_near_duplicate": "near duplicate",
    "rejected_below_threshold": "below",
    "rejected_above_threshold": "above",
    "rejected_overlapping": "overlapping",
    "rejected_source_full": "source full",
}


@dataclass(frozen=True)
class Example:
    """A window with its pairwise similarities, e.g. ``("1–2", 0.61)``."""

    row: WindowRow
    pairs: list[tuple[str, float]]


@dataclass(frozen=True)
class Edge:
    """What lies on both sides of one or more thresholds of a statistic, nearest first."""

    statistic: str
    lows: list[str]
    below: list[Example]
    above: list[Example]


def render(ablation: Ablation, left_out: Sequence[int]) -> str:
    """The page as HTML.

    Args:
        ablation: The sweep and what has been trained on its cells.
        left_out: Cells that should have been trained and were not.
    """
    results = ablation.results()
    scores = {r.cell: r for r in results if r.trained_as is not None}
    truth = ablation.truth
    context: dict[str, Any] = {
        "headline": headline(results),
        "facts": _facts(ablation),
        "cells": results,
        "quantile": results[0].band == "quantile",
        "reasons": {k: v for k, v in REASON_TEXTS.items() if any(getattr(r, k) for r in results)},
        "has_text": any(r.caption_similarity is not None for r in results),
        "has_truth": truth is not None,
        "related": results[0].related,
        "unknown": 0 if truth is None else int(np.isnan(truth).sum()),
        "scores": scores,
        "left_out": left_out,
        "charts": _charts(results),
        "histograms": _histograms(ablation, results),
        "matrix": _matrix(ablation, results),
        "edges": _edges(ablation, results),
        "num_scenes": ablation.config.curation.windows.scenes_per_sample,
    }
    return environment().get_template("ablation.html.j2").render(context)


def headline(cells: Sequence[CellResult]) -> str:
    """What the lowest and the highest threshold keep, and where most is lost between them."""
    first = [c for c in cells if c.statistic == cells[0].statistic]
    low, high = first[0], first[-1]
    total = low.input_windows
    if not total:
        return "There are no windows to choose from: no source has enough consecutive clips."
    if not low.kept_windows:
        reason = max(REASON_TEXTS, key=lambda name: getattr(low, name))
        return (
            f"None of {_windows(total)} is kept, whatever the threshold; most are left out as "
            f"“{REASON_TEXTS[reason]}”."
        )
    text = f"Of {_windows(total)}, a {low.statistic} of {low.low:g} or more keeps {_kept(low)}"
    if len(first) == 1:
        return f"{text}."
    text += f"; of {high.low:g} or more, {_kept(high)}."
    before, after = max(pairwise(first), key=lambda p: p[0].kept_windows - p[1].kept_windows)
    lost = before.kept_windows - after.kept_windows
    if not lost:
        return f"{text} No threshold in between changes anything."
    return f"{text} The largest step is from {before.low:g} to {after.low:g}: {_windows(lost)}."


def _windows(count: int) -> str:
    return f"{count:,} window{'' if count == 1 else 's'}"


def _kept(cell: CellResult) -> str:
    share = 100 * cell.kept_windows / cell.input_windows
    return f"{cell.kept_windows:,} ({share:.0f} %, {60 * cell.hours:.1f} minutes of film)"


def _facts(ablation: Ablation) -> dict[str, str]:
    cfg = ablation.config.curation
    rules = cfg.manifests
    limits = {
        "high": f"{rules.high:g}",
        "near duplicates from": "off" if rules.near_duplicate is None else rules.near_duplicate,
        "shared clips": "any" if rules.max_shared_clips is None else rules.max_shared_clips,
        "per source": "any" if rules.max_per_source is None else rules.max_per_source,
    }
    facts = {
        "Dataset": cfg.dataset,
        "Snapshot": ablation.snapshot.root.name,
        "Similarity model": cfg.embedding.model,
        "Thresholds are": "quantiles" if rules.band == "quantile" else "similarities",
        "Other rules": ", ".join(f"{name} {value}" for name, value in limits.items()),
    }
    if cfg.embedding.weights:
        facts["Similarity model"] += f" ({Path(cfg.embedding.weights).name})"
    if cfg.ablation.truth:
        facts["Ground truth"] = Path(cfg.ablation.truth).name
    return facts


def _lines(results: Sequence[CellResult], name: str) -> dict[str, charts.Line]:
    """One line per statistic of what is known of a column, over the low threshold."""
    lines: dict[str, charts.Line] = {}
    for statistic, group in groupby(results, key=lambda r: r.statistic):
        known = [(r.low, v) for r in group if (v := getattr(r, name)) is not None]
        if known:
            lines[statistic] = ([x for x, _ in known], [y for _, y in known])
    return lines


def _charts(results: Sequence[CellResult]) -> list[tuple[Markup, str]]:
    """Charts over the threshold, each with what it shows; none without windows."""
    total = results[0].input_windows
    if not total:
        return []
    shares = {
        name: (lows, [100 * kept / total for kept in counts])
        for name, (lows, counts) in _lines(results, "kept_windows").items()
    }
    found = [
        (
            charts.threshold_chart("kept", "windows kept, %", shares, 100.0),
            "How many of all windows each threshold keeps.",
        )
    ]
    texts = _lines(results, "caption_similarity")
    if texts:
        chart = charts.threshold_chart("text", "similarity of captions", texts, None)
        found.append((chart, "How well the captions of the clips kept say what they show, mean."))
    recall, precision = _lines(results, "recall"), _lines(results, "precision")
    if recall and precision:
        both = {s: (recall[s][1][: len(precision[s][1])], precision[s][1]) for s in precision}
        lows = {s: precision[s][0] for s in precision}
        chart = charts.precision_recall_chart(both, lows)
        found.append((chart, "Of what is kept, how much is related; of what is related, how much "
                      "is kept. One mark per threshold."))  # fmt: skip
    for name in ("visual", "semantic", "sequence"):
        lines = _lines(results, name)
        if lines:
            chart = charts.threshold_chart(name, f"{name} consistency × 100", lines, None)
            found.append((chart, "Of videos by models fine-tuned on the windows kept."))
    return found


def _histograms(ablation: Ablation, results: Sequence[CellResult]) -> list[Markup]:
    found: list[Markup] = []
    for statistic, group in groupby(results, key=lambda r: r.statistic):
        marks = {r.low_similarity: f"{r.low:g}" for r in group}
        values = ablation.windows[statistic].to_numpy()
        if len(values):
            found.append(charts.threshold_histogram(values, statistic, marks))
    return found


def _matrix(ablation: Ablation, results: Sequence[CellResult]) -> dict[str, Any]:
    shares = ablation.sweep.overlap()
    shown = evenly(len(results), MAX_MATRIX)
    heads = [results[i] for i in shown]
    return {
        "groups": [(s, len(list(g))) for s, g in groupby(heads, key=lambda r: r.statistic)],
        "heads": heads,
        "rows": [(results[i], [float(shares[i, j]) for j in shown]) for i in shown],
        "total": len(results),
    }


def _edges(ablation: Ablation, results: Sequence[CellResult]) -> list[Edge]:
    """Windows on both sides of the thresholds, as many as the page has room for."""
    count = ablation.config.curation.ablation.examples
    near: dict[tuple[str, tuple[int, ...], tuple[int, ...]], list[str]] = {}
    for cell in results if count else ():
        below, above = ablation.sweep.near(cell.cell, count)
        key = (cell.statistic, tuple(below), tuple(above))
        near.setdefault(key, []).append(f"{cell.low:g}")
    examples = _examples(ablation, {(s, r) for s, *sides in near for side in sides for r in side})

    def size(room: int) -> int:
        rows = ((s, row) for s, *sides in near for side in sides for row in side[:room])
        return sum(len(still.uri) for key in rows for still in examples[key].row.stills)

    room = next((n for n in range(count, 0, -1) if size(n) <= MAX_STILL_BYTES), 0)
    return [
        Edge(statistic, lows, *([examples[statistic, r] for r in side[:room]] for side in sides))
        for (statistic, *sides), lows in near.items()
    ]


def _examples(ablation: Ablation, wanted: set[tuple[str, int]]) -> dict[tuple[str, int], Example]:
    """Examples by statistic and row of the windows."""
    numbers = sorted({row for _, row in wanted})
    taken = from_arrow(WINDOWS, ablation.windows.take(pa.array(numbers, pa.int64())))
    windows: dict[int, Window] = dict(zip(numbers, taken, strict=True))
    ids = pa.array(sorted({i for w in taken for i in w.clip_ids}), pa.string())
    held = ablation.clips.filter(pc.is_in(ablation.clips["clip_id"], value_set=ids))
    clips: dict[str, Clip] = {c.clip_id: c for c in from_arrow(CLIPS, held)}
    ids = pa.array(sorted({w.source_id for w in taken}), pa.string())
    held = ablation.sources.filter(pc.is_in(ablation.sources["source_id"], value_set=ids))
    sources: dict[str, Source] = {s.source_id: s for s in from_arrow(SOURCES, held)}
    cache = ablation.workspace.cache("thumbnails")
    found: dict[tuple[str, int], Example] = {}
    for statistic, number in sorted(wanted):
        window = windows[number]
        names = combinations(range(1, len(window.clip_ids) + 1), 2)
        pairs = [(f"{a}–{b}", s) for (a, b), s in zip(names, window.similarities, strict=True)]
        row = window_row(window, statistic, "", clips, sources, cache)
        found[statistic, number] = Example(row, pairs)
    return found
