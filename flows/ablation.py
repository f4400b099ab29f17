"""One ablation over thresholds: its cells, the models trained on some of them, and its folder.

::

    ablations/<id>/results.parquet    one row per cell
    ablations/<id>/overlap.parquet    share of kept windows that two cells have in common
    ablations/<id>/index.html         the page
    ablations/<id>/cells/<cell>/      of a trained cell: sft.parquet, run/, generations/, _DONE.json

The id is a fingerprint of the snapshot and of the settings that decide the results.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import numpy as np

from curation.ablation import Sweep, sweep
from curation.ground_truth import Floats, read_truth, related_windows
from curation.manifests import Manifest, sft_manifest
from curation.selection import REASONS
from flows.ablation_tables import (
    OVERLAP,
    RESULTS,
    CellResult,
    CellScores,
    Overlap,
    score_columns,
)
from flows.sheets import evenly
from inference.batch import run_batch
from inference.evaluation import aggregate, evaluate
from inference.prompts import read_prompts
from schemas.config import CurationConfig, TriptychConfig
from schemas.errors import ConfigError
from schemas.layout import Snapshot, Workspace
from schemas.storage import (
    fingerprint,
    fingerprint_file,
    mark_done,
    point_latest,
    read_done,
    write_text,
)
from schemas.tables import (
    CAPTION_SCORES,
    CLIPS,
    SAMPLES,
    SOURCES,
    WINDOWS,
    read_arrow,
    write_batches,
    write_table,
)
from training.latents import scene_reader
from training.latents_job import encode_manifest
from training.launch import run_stage

log = logging.getLogger(__name__)

VERSION = 1
"""Part of every id. Raise it when a change of code changes the results or the page."""

Tell = Callable[[str], None]


class Ablation:
    """The sweep over a snapshot's windows, and where its results lie.

    Raises:
        ConfigError: Thresholds are to be quantiles, and are not.
        InputError: ``curation.ablation.truth`` cannot be used.
        ManifestError: A table or, where cells are trained, the prompt manifest cannot be read.
    """

    def __init__(self, config: TriptychConfig, snapshot: Snapshot) -> None:
        _check_lows(config.curation)
        self.config = config
        self.snapshot = snapshot
        self.workspace = Workspace(Path(config.workspace).absolute())
        self.windows = read_arrow(snapshot.table("windows"), WINDOWS)
        self.clips = read_arrow(snapshot.table("clips"), CLIPS)
        self.sources = read_arrow(snapshot.table("sources"), SOURCES)
        self.folder = self.workspace.ablations / self._id()

    @cached_property
    def truth(self) -> Floats | None:
        """Which windows are related (1, 0, NaN where nobody knows), if that is given."""
        path = self.config.curation.ablation.truth
        if path is None:
            return None
        uris = self.sources["uri"].to_pylist()
        return related_windows(read_truth(Path(path)), uris, self.windows, self.clips)

    @cached_property
    def sweep(self) -> Sweep:
        """All cells: the thresholds, ascending, of each statistic."""
        cfg = self.config.curation
        scores = self.snapshot.table("caption_scores")
        return sweep(
            self.windows,
            self.clips,
            cfg.manifests,
            sorted(set(cfg.ablation.lows)),
            list(dict.fromkeys(cfg.ablation.statistics)) or [cfg.manifests.statistic],
            caption_scores=read_arrow(scores, CAPTION_SCORES) if scores.is_file() else None,
            related=self.truth,
        )

    def done(self) -> bool:
        """Whether everything is there, and no cell was left out for want of time."""
        record = read_done(self.folder)
        return record is not None and not record["left_out"]

    def scores(self) -> dict[int, CellScores]:
        """Scores of cells by number; cells that keep the same windows share theirs."""
        found: dict[int, CellScores] = {}
        for same in self.groups():
            records = [read_done(self._cell_folder(cell)) for cell in same]
            record = next((r for r in records if r is not None), None)
            if record is not None:
                found |= dict.fromkeys(same, CellScores(**record))
        return found

    def groups(self) -> list[list[int]]:
        """Numbers of the cells, those that keep the same windows together."""
        same: dict[bytes, list[int]] = {}
        for cell in range(len(self.sweep.cells)):
            same.setdefault(self.sweep.kept(cell).tobytes(), []).append(cell)
        return list(same.values())

    def chosen(self) -> list[int]:
        """Cells to train: evenly among those that differ and have something to train on."""
        firsts = [same[0] for same in self.groups() if self.sweep.kept(same[0]).size]
        cells = [cell for cell in firsts if self._num_trainable(self.manifest(cell))]
        return [cells[i] for i in evenly(len(cells), self.config.curation.ablation.train_cells)]

    def manifest(self, cell: int) -> Manifest:
        """The sft manifest of one cell."""
        at = self.sweep.cells[cell]
        changes = {"statistic": at.statistic, "low": at.low}
        rules = self.config.curation.manifests.model_copy(update=changes)
        return sft_manifest(self.windows, self.clips, rules)

    def is_trained(self, cell: int) -> bool:
        """Whether a cell's model has been trained and scored."""
        return read_done(self._cell_folder(cell)) is not None

    def train(self, cell: int, base: Path, tell: Tell) -> CellScores:
        """Fine-tune ``base`` on a cell's windows, generate with it, score the videos.

        Latents come from the workspace's cache; the rest is kept in the cell's folder, so that it
        is not taken for the workspace's own model. What an earlier call has finished is not done
        again.

        Raises:
            TrainingFailed: The training process ended early; calling again resumes.
        """
        started = time.monotonic()
        config, folder = self.config, self._cell_folder(cell)
        manifest, path = self.manifest(cell), folder / "sft.parquet"
        write_batches(path, SAMPLES, manifest.samples(), self._metadata() | manifest.limits)
        if config.training.latents.source == "cache":
            tell("encode")
            reader = scene_reader(self.workspace, config.curation.sources)
            encode_manifest(
                config.training, path, base, self.workspace, reader, engine=config.engine
            )
        tell("train")
        run_stage(config, "sft", path, base, folder / "run")
        tell("generate")
        videos = Workspace(folder)
        batch, count = run_batch(config, folder / "run" / "model", videos)
        count.check_failures(config.generation.max_error_ratio)
        tell("evaluate")
        rows, count = evaluate(config, videos, batch)
        count.check_failures(config.generation.max_error_ratio)
        means = aggregate(rows, count.input)
        scores = CellScores(
            cell=cell,
            samples=self._num_trainable(manifest),
            **{k: means[k] for k in ("visual", "semantic", "sequence", "scored", "videos")},
            seconds=round(time.monotonic() - started, 3),
        )
        mark_done(folder, dataclasses.asdict(scores))
        return scores

    def publish(self, page: str, left_out: list[int]) -> None:
        """Write tables and page, mark them as done, and let ``LATEST`` name them.

        Args:
            page: The HTML page.
            left_out: Cells that should have been trained and were not.
        """
        noted = self._metadata()
        write_table(self.folder / "results.parquet", RESULTS, self.results(), noted)
        shares = np.ndenumerate(self.sweep.overlap())
        pairs = [Overlap(cell, other, float(share)) for (cell, other), share in shares]
        write_table(self.folder / "overlap.parquet", OVERLAP, pairs, noted)
        write_text(self.folder / "index.html", page)
        record = {"snapshot": self.snapshot.root.name, "cells": len(self.sweep.cells)}
        mark_done(self.folder, record | {"left_out": left_out})

    def results(self) -> list[CellResult]:
        """The rows of ``results.parquet``."""
        scores = self.scores()
        results: list[CellResult] = []
        for number, cell in enumerate(self.sweep.cells):
            values = dataclasses.asdict(cell)
            rejects = values.pop("rejects")
            values |= {f"rejected_{reason}": rejects.get(reason, 0) for reason in REASONS if reason}
            results.append(CellResult(number, **values, **score_columns(scores.get(number))))
        return results

    def point(self) -> None:
        """Let ``LATEST`` name this ablation."""
        point_latest(self.workspace.ablations, self.folder.name)

    def _metadata(self) -> dict[str, str]:
        return {"snapshot": self.snapshot.root.name, "code_version": version("triptych")}

    def _cell_folder(self, cell: int) -> Path:
        return self.folder / "cells" / str(cell)

    @staticmethod
    def _num_trainable(manifest: Manifest) -> int:
        """Samples the trainer takes."""
        accepted = manifest.clips["trainable_sft"].to_numpy()[manifest.rows].all(axis=1)
        return int((accepted & (manifest.splits == "train")).sum())

    def _id(self) -> str:
        cfg = self.config.curation
        asked = cfg.ablation.model_dump(mode="json", exclude={"max_minutes", "truth"})
        truth = cfg.ablation.truth
        known = fingerprint_file(Path(truth)) if truth and Path(truth).is_file() else truth
        training: list[object] = []
        if cfg.ablation.train_cells:
            prompts, rejects = read_prompts(Path(self.config.generation.prompts), self.config)
            rows = [dataclasses.asdict(row) for row in (*prompts, *rejects)]
            sections = ("training", "generation", "evaluation")
            training = [rows, *(getattr(self.config, s).model_dump(mode="json") for s in sections)]
        rules = cfg.manifests.model_dump(mode="json")
        return fingerprint(VERSION, self.snapshot.root.name, rules, asked, known, training)


def _check_lows(cfg: CurationConfig) -> None:
    """Quantiles are 0 to 1; only here are the thresholds and their unit known together."""
    wrong = [low for low in cfg.ablation.lows if not 0 <= low <= 1]
    if cfg.manifests.band == "quantile" and wrong:
        raise ConfigError(
            "thresholds that are not quantiles",
            where="curation.ablation.lows",
            found=wrong,
            expected="0 to 1, as curation.manifests.band is quantile",
            do="set curation.ablation.lows, for example to [0, 0.25, 0.5, 0.75]",
        )
