"""One HTML page that says what a workspace holds: data, training, videos, scores.

The page is made from the workspace alone, so it can be made again at any time. It is one file: no
scripts, no fonts, no pictures from elsewhere. Captions and file names come from strangers; the
template escapes every one of them.
"""

from __future__ import annotations

import json
import logging
import platform
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import pyarrow.parquet as pq
from markupsafe import Markup

from curation.snapshot_diff import diff_snapshots, previous_of
from flows import charts, sheets
from flows.diff import file_words, reasons_by_title, spread_words, value_words
from flows.pages import environment
from schemas.config import CurationConfig, TriptychConfig, load_config
from schemas.counts import StageCount
from schemas.errors import ManifestError, ReconciliationError
from schemas.layout import Snapshot, Workspace
from schemas.rows import Reject, Score
from schemas.storage import latest, read_done, read_json, write_text
from schemas.tables import (
    CLIPS,
    GENERATIONS,
    REJECTS,
    SAMPLES,
    SCORES,
    SHOTS,
    SOURCES,
    WINDOWS,
    Table,
    read_table,
)

LOG = logging.getLogger(__name__)
R = TypeVar("R")

EXAMPLES_PER_REASON = 3

# Source: Mask2DiT (Qi et al., CVPR 2025, arXiv 2503.19881), comparison on 50 scripts of 3 prompts;
# visual, semantic and sequence consistency, x100, with ViCLIP as the scorer.
PAPER_SCORES = (
    ("CogVideoX-5B", 43.82, 20.70, 32.26),
    ("Mask²DiT on CogVideoX-5B", 89.21, 20.81, 55.01),
    ("Mask²DiT, auto-regressive extension", 75.33, 24.29, 49.81),
)

_PANELS = {
    "learning rate": "lr",
    "gradient norm": "grad_norm",
    "samples per second": "samples_per_s",
}

_PACKAGES = ("triptych", "torch", "diffusers", "deepspeed", "ray", "prefect")


@dataclass(frozen=True)
class RejectGroup:
    """Rejected or failed records of one stage that share a reason."""

    stage: str
    reason: str
    failed: bool
    count: int
    examples: list[tuple[str, str]]


@dataclass(frozen=True)
class StageRun:
    """The newest run of one training stage."""

    stage: str
    name: str
    finished: bool
    facts: dict[str, str]
    loss: Markup
    panels: Markup


def build_report(
    config: TriptychConfig,
    workspace: Workspace,
    name: str = "report",
    extra_counts: Sequence[StageCount] | None = None,
) -> Path:
    """Write ``reports/<name>.html`` from what the workspace holds.

    A part that has not been run is named with the command that runs it; that is not an error.

    Args:
        config: Names the dataset; its hash and the base model are shown.
        workspace: Where everything lies.
        name: File name of the page, without suffix.
        extra_counts: Counts of the run that is just ending; each takes the place of the stored
            count of the same stage and unit.

    Returns:
        The page's path.

    Raises:
        ManifestError: A table is there but cannot be read.
    """
    snapshot_dir = latest(workspace.dataset(config.curation.dataset))
    snapshot = Snapshot(snapshot_dir) if snapshot_dir is not None else None
    batch = latest(workspace.generations)
    runs = {stage: _newest_run(workspace, stage) for stage in ("pretrain", "sft")}
    stored = _stored_counts(snapshot, runs, batch)
    counts = merge_counts(stored, extra_counts or ())
    context: dict[str, Any] = {
        "facts": _facts(config, snapshot),
        "tiny": config.training.model.base == "tiny",
        "counts": counts,
        "problems": _problems(counts),
        "rejects": _reject_groups(snapshot, batch),
        "since": _since(snapshot),
        "data": _dataset(config, snapshot, workspace.cache("thumbnails")),
        "training": [_stage_run(stage, run) for stage, run in runs.items() if run is not None],
        "generation": _generation(workspace, batch),
        "ablation": _ablation(workspace),
    }
    html = environment().get_template("report.html.j2").render(context)
    path = workspace.reports / f"{name}.html"
    write_text(path, html)
    LOG.info("report written path=%s size_bytes=%d", path, path.stat().st_size)
    return path


def merge_counts(stored: Sequence[StageCount], fresh: Sequence[StageCount]) -> list[StageCount]:
    """Stored counts with the fresh ones in their places (same stage and unit).

    A fresh count without a stored one follows the fresh count before it, so that a list in the
    order of the pipeline stays in that order.
    """
    merged = list(stored)
    # None: not a stored count, or one that has been replaced.
    keys: list[tuple[str, str] | None] = [(c.stage, c.unit) for c in stored]
    after = 0
    for count in fresh:
        key = (count.stage, count.unit)
        if key in keys:
            after = keys.index(key)
            merged[after], keys[after] = count, None
        else:
            merged.insert(after, count)
            keys.insert(after, None)
        after += 1
    return merged


def _facts(config: TriptychConfig, snapshot: Snapshot | None) -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    done = (read_done(snapshot.root) if snapshot is not None else None) or {}
    return {
        "Dataset": config.curation.dataset,
        "Snapshot": snapshot.root.name if snapshot is not None else "none yet",
        "Snapshot made": _utc(done.get("created_at")),
        "Config hash": config.hash(),
        "Base model": config.training.model.base,
        "Page made": _utc(datetime.now(UTC).isoformat()),
        "Versions": " · ".join(f"{k} {v}" for k, v in versions.items()),
    }


def _utc(moment: str | None) -> str:
    return f"{datetime.fromisoformat(moment):%Y-%m-%d %H:%M} UTC" if moment else "–"


def _rows(path: Path, table: Table[R]) -> list[R]:
    """A table's rows, none where the table has not been written."""
    return read_table(path, table) if path.is_file() else []


def _stored_counts(
    snapshot: Snapshot | None, runs: dict[str, Path | None], batch: Path | None
) -> list[StageCount]:
    """Counts that the stages left in the workspace, in the order of the pipeline."""
    counts: list[StageCount] = []
    if snapshot is not None:
        counts += _count_file(snapshot.counts)
    for stage, run in runs.items():
        metrics = _metrics(run) if run is not None else []
        if metrics:
            seconds = float(sum(m["seconds"] for m in metrics))
            done = len(metrics)
            counts.append(StageCount(stage, "step", input=done, kept=done, seconds=seconds))
    if batch is not None:
        counts += _count_file(batch / "counts.json")
    return counts


def _count_file(path: Path) -> list[StageCount]:
    return [StageCount(**record) for record in read_json(path)] if path.is_file() else []


def _problems(counts: Sequence[StageCount]) -> list[str]:
    """One line per stage whose counts do not reconcile."""
    problems: list[str] = []
    for count in counts:
        try:
            count.check()
        except ReconciliationError as error:
            problems.append(f"{error.what} ({error.where}; {error.found})")
    return problems


def _reject_groups(snapshot: Snapshot | None, batch: Path | None) -> list[RejectGroup]:
    paths: list[Path] = []
    if snapshot is not None:
        paths.append(snapshot.table("rejects"))
    if batch is not None:
        paths.append(batch / "rejects.parquet")
    grouped: defaultdict[tuple[str, str, bool], list[Reject]] = defaultdict(list)
    for reject in (r for path in paths for r in _rows(path, REJECTS)):
        grouped[reject.stage, reject.reason, reject.failed].append(reject)
    return [RejectGroup(*key, len(group), _examples(group)) for key, group in grouped.items()]


def _examples(rejects: Sequence[Reject]) -> list[tuple[str, str]]:
    """File name and detail of the first few rejects that differ in these."""
    found: dict[tuple[str, str], None] = {}
    for reject in rejects:
        detail = (reject.detail.strip().splitlines() or [""])[0][:200]
        if reject.score is not None:
            detail += f" (score {reject.score:.3f})"
        found[Path(reject.uri).name or reject.record_id, detail] = None
        if len(found) == EXAMPLES_PER_REASON:
            break
    return list(found)


def _dataset(
    config: TriptychConfig, snapshot: Snapshot | None, thumbnails: Path
) -> dict[str, Any] | None:
    """What the page says about the snapshot, under the config it was made with."""
    if snapshot is None:
        return None
    stored = snapshot.root / "config.yaml"
    made_with = (load_config(stored) if stored.is_file() else config).curation
    rule = made_with.manifests
    sources = sorted(_rows(snapshot.table("sources"), SOURCES), key=lambda s: Path(s.uri).name)
    shots = _rows(snapshot.table("shots"), SHOTS)
    clips = _rows(snapshot.table("clips"), CLIPS)
    windows = _rows(snapshot.table("windows"), WINDOWS)
    rejects = _rows(snapshot.table("rejects"), REJECTS)
    samples = {kind: _rows(snapshot.manifest(kind), SAMPLES) for kind in ("pretrain", "sft")}
    verdicts = {r.record_id: r.reason for r in rejects}
    verdicts |= {s.sample_id: "kept for SFT" for s in samples["sft"]}
    values = [float(getattr(w, rule.statistic)) for w in windows]
    band = (rule.statistic, rule.low, rule.high)
    return {
        "same_config": _choices(made_with) == _choices(config.curation),
        "tiles": {
            "sources": len(sources),
            "shots": len(shots),
            "clips": len(clips),
            "windows": len(windows),
            "pretrain samples": len(samples["pretrain"]),
            "SFT samples": len(samples["sft"]),
        },
        "sources": sources,
        "sheets": sheets.source_sheets(sources, shots, clips, rejects, thumbnails),
        "rule": rule,
        "histogram": charts.similarity_histogram(values, *band) if values else None,
        "num_windows": len(windows),
        "groups": sheets.window_groups(windows, clips, sources, verdicts, *band, thumbnails),
    }


def _choices(config: CurationConfig) -> dict[str, Any]:
    """The settings that a snapshot depends on."""
    return config.model_dump(exclude={"ablation", "drift", "max_error_ratio"})


def _since(snapshot: Snapshot | None) -> dict[str, Any] | None:
    """What changed since the snapshot before; None where there is none."""
    before = previous_of(snapshot) if snapshot is not None else None
    if snapshot is None or before is None:
        return None
    try:
        diff = diff_snapshots(before, snapshot)
    except ManifestError as error:
        # The page is about the newer snapshot; an older one may be of a version no longer read.
        return {"diff": None, "old": before.root.name, "problem": error.what}
    return {
        "diff": diff,
        "reasons": reasons_by_title(diff),
        "shares": [s for s in diff.shares if s.old_count or s.new_count],
        "charts": {
            d.name: charts.drift_chart(d)
            for d in diff.drift
            if d.name in ("duration_s", "similarity", "caption_similarity") and d.edges
        },
        "names": file_words,
        "value": value_words,
        "spread": spread_words,
    }


def _newest_run(workspace: Workspace, stage: str) -> Path | None:
    """The run of a stage whose metrics were written last, finished or not."""
    found = [p for p in workspace.runs.glob(f"{stage}-*/metrics.jsonl") if p.stat().st_size]
    return max(found, key=lambda p: (p.stat().st_mtime_ns, p.parent.name)).parent if found else None


def _metrics(run: Path) -> list[dict[str, Any]]:
    """The run's metrics, one dict per step in order; a step repeated after a resume counts once."""
    by_step: dict[int, dict[str, Any]] = {}
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            # The last line of a run that is still writing, or was killed while it did.
            continue
        by_step[record["step"]] = record
    return [by_step[step] for step in sorted(by_step)]


def _stage_run(stage: str, run: Path) -> StageRun:
    metrics = _metrics(run)
    steps = [int(m["step"]) for m in metrics]
    loss = [float(m["loss"]) for m in metrics]
    conditional = [bool(m["conditional"]) for m in metrics]
    mean = charts.moving_mean(loss)
    # A rank that does not know its gradient norm writes null; then that panel is left out.
    panels = {
        label: [float(m[key]) for m in metrics]
        for label, key in _PANELS.items()
        if all(m[key] is not None for m in metrics)
    }
    speed = statistics.median(panels["samples per second"])
    return StageRun(
        stage,
        run.name,
        read_done(run) is not None,
        {
            "Steps": f"{len(steps)}",
            "Loss, moving mean": f"{mean[0]:.3f} → {mean[-1]:.3f}",
            "Conditional steps": f"{sum(conditional)} of {len(steps)}",
            "Speed, median": f"{speed:.2f} samples/s",
        },
        charts.loss_chart(stage, steps, loss, conditional),
        charts.training_panels(stage, steps, panels),
    )


def _generation(workspace: Workspace, batch: Path | None) -> dict[str, Any] | None:
    """The newest batch: its videos as far as the page has room, and its scores."""
    if batch is None:
        return None
    rows = _rows(batch / "generations.parquet", GENERATIONS)
    scores = _rows(batch / "scores.parquet", SCORES)
    return {
        "batch": batch.name,
        "total": len(rows),
        "made": sum(row.status == "done" for row in rows),
        "videos": sheets.batch_videos(workspace, rows),
        "scores": scores,
        "means": [(word, *_mean(scores, word)) for word in ("visual", "semantic", "sequence")],
        "paper": PAPER_SCORES,
    }


def _mean(scores: Sequence[Score], word: str) -> tuple[float | None, int]:
    """Mean over the videos that have the score, and how many have it."""
    values = [v for v in (getattr(s, word) for s in scores) if v is not None]
    return (statistics.fmean(values) if values else None), len(values)


def _ablation(workspace: Workspace) -> dict[str, Any] | None:
    folder = latest(workspace.ablations)
    if folder is None or not (folder / "results.parquet").is_file():
        return None
    rows = pq.read_table(folder / "results.parquet").to_pylist()
    order = list(dict.fromkeys(r["statistic"] for r in rows))
    rows.sort(key=lambda r: (order.index(r["statistic"]), r["low"]))
    return {"name": folder.name, "rows": rows, "page": f"../ablations/{folder.name}/index.html"}
