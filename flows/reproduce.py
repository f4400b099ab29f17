"""The paper's three ablation tables on ToonWorld: data once, then cell after cell.

::

    <workspace>/reproductions/toonworld-<videos>/   the videos
    <workspace>/reproductions/<id>/                 of one budget and one set of embedded models:
      prompts.jsonl, pretrain.parquet, sft/, base/  what cells start from
      shared/<pre-training>/, cells/<cell>/run/     runs; cells/<cell>/_DONE.json: the scores
      generations/, logs/, spent.jsonl              videos of all cells; CPU time
      results.json, reproduction.md                 what is shown in the end

Cells are processes of their own with one thread each, as many as there are cores. What is finished
is never done again; what was interrupted goes on.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from flows.reproduce_cells import TABLES, Budget, Cell
from flows.reproduce_work import Place, is_done, is_pretrained
from schemas.errors import TrainingFailed
from schemas.layout import Snapshot, Workspace
from schemas.storage import fingerprint, fingerprint_folder, mark_done, read_done, write_json

log = logging.getLogger(__name__)

MODELS = Path("assets/tiny")
VERSION = 3
"""Part of every id. Raise it when a change of code changes the results."""
POLL_S = 0.5
LOG_LINES = 15


def place_of(workspace: Path, budget: Budget, models: Path = MODELS) -> Place:
    """Where a reproduction with these embedded models lies; nothing is made."""
    from training.tiny.base import pieces_of

    weights = [fingerprint_folder(models / name) for name in ("pictures", "viclip", "probe")]
    weights += pieces_of(models / "model").values()
    workspace, models = workspace.absolute(), models.absolute()
    folder = Workspace(workspace).reproductions
    root = folder / fingerprint(VERSION, budget.to_dict(), weights)
    videos = folder / f"toonworld-{budget.videos}"
    return Place(root, workspace, models, videos, root / "pretrain.parquet", budget)


def prepare(place: Place) -> dict[str, Any]:
    """Render, curate, encode: all that cells have in common; what is known of the data.

    Raises:
        TriptychError: A stage of the pipeline failed.
    """
    from training.tiny.base import make_picture_base

    make_picture_base(place.base, place.models / "pictures", place.models / "model")
    done = read_done(place.root)
    if done is None:
        started = time.monotonic()
        write_json(place.root / "place.json", place.to_dict())
        snapshot = curate(place)
        thresholds = choose(place, snapshot)
        encode(place)
        ask(place)
        done = {"thresholds": thresholds, "seconds": round(time.monotonic() - started, 1)}
        mark_done(place.root, done)
        log.info("reproduce state=prepared seconds=%.0f", done["seconds"])
    return done


def curate(place: Place) -> Snapshot:
    """Render ToonWorld, episodes and as many compilations, and send it through the pipeline."""
    from curation.toonworld.write import write_dataset
    from flows.refresh import refresh_dataset
    from training.tiny.stories import FPS, PIXELS, TRAIN_SEED

    count = place.budget.videos
    write_dataset(place.videos, TRAIN_SEED, count, count, PIXELS, PIXELS, FPS)
    return Snapshot(refresh_dataset(place.config()).snapshot)


def choose(place: Place, snapshot: Snapshot) -> dict[str, Any]:
    """Write the manifest of every threshold; how many windows each lets in, and how many rightly.

    Returns:
        By lowest similarity: windows, and the share of them whose scenes are of one story.
    """
    from curation.ablation import sweep
    from curation.ground_truth import read_truth, related_windows
    from curation.manifests import sft_manifest
    from schemas.tables import CLIPS, SAMPLES, SOURCES, WINDOWS, read_arrow, write_batches

    windows = read_arrow(snapshot.table("windows"), WINDOWS)
    clips = read_arrow(snapshot.table("clips"), CLIPS)
    sources = read_arrow(snapshot.table("sources"), SOURCES)
    truth = read_truth(place.videos / "stories.csv")
    related = related_windows(truth, sources["uri"].to_pylist(), windows, clips)
    rules = place.config().curation.manifests
    lows = sorted({row.cell.low for rows in TABLES.values() for row in rows})
    for low in lows:
        manifest = sft_manifest(windows, clips, rules.model_copy(update={"low": low}))
        write_batches(place.sft(low), SAMPLES, manifest.samples(), manifest.limits)
    place.pretrain.write_bytes(snapshot.manifest("pretrain").read_bytes())
    found = sweep(windows, clips, rules, lows, [rules.statistic], related=related).cells
    return {
        f"{low:g}": {"windows": cell.kept_windows, "related": cell.precision}
        for low, cell in zip(lows, found, strict=True)
    }


def encode(place: Place) -> None:
    """Encode every scene and caption that any cell reads."""
    from training.latents import scene_reader
    from training.latents_job import encode_manifest

    config, workspace = place.config(), Workspace(place.workspace)
    reader = scene_reader(workspace, config.curation.sources)
    lows = {row.cell.low for rows in TABLES.values() for row in rows}
    for manifest in (place.pretrain, place.sft(min(lows))):  # the lowest lets in all that others do
        encode_manifest(config.training, manifest, place.base, workspace, reader)


def ask(place: Place) -> None:
    """Write the held-out prompts, and encode them."""
    from curation.toonworld.captions import caption
    from curation.toonworld.world import draw_episode
    from inference.prompts import write_prompts
    from inference.texts import text_cache, text_encoder
    from schemas.rows import Prompt
    from training.tiny.stories import HELD_OUT_SEED, SCENES

    stories = [draw_episode(HELD_OUT_SEED, k) for k in range(place.budget.prompts)]
    told = {s.name: [caption(shot) for shot in s.shots[:SCENES]] for s in stories}
    prompts = [Prompt(name, texts, seed=k) for k, (name, texts) in enumerate(told.items())]
    write_prompts(place.prompts, prompts)
    config = place.config()
    length = {"max_text_seq_length": config.training.model.text_tokens}
    cache = text_cache(config, place.base, Workspace(place.root), length)
    texts = dict.fromkeys(text for scenes in told.values() for text in scenes)
    text_encoder(cache, config).write_captions(["", *texts])


def run_cells(place: Place, cells: Sequence[Cell], hours: float | None, processes: int) -> None:
    """Do all cells that are not done, in their order, until the time is up.

    Args:
        place: Prepared.
        cells: What to do.
        hours: No further cell is begun after so many; what is at work is finished. None = no limit.
        processes: How many are done side by side.

    Raises:
        TrainingFailed: A cell failed; others at work are stopped, and go on at the next call.
    """
    started = time.monotonic()
    running: dict[Cell, subprocess.Popen[bytes]] = {}
    try:
        while True:
            for cell in [c for c, child in running.items() if child.poll() is not None]:
                _check(place, cell, running.pop(cell).returncode)
                done = sum(is_done(place, c) for c in cells)
                log.info("reproduce cell=%s state=done cells=%d of=%d minutes=%.0f", cell.key, done,
                         len(cells), (time.monotonic() - started) / 60)  # fmt: skip
            is_over = hours is not None and time.monotonic() - started > 3600 * hours
            while not is_over and len(running) < processes:
                cell = next_cell(place, cells, running)
                if cell is None:
                    break
                running[cell] = _start(place, cell)
            if not running:
                return
            time.sleep(POLL_S)
    finally:
        for child in running.values():
            child.send_signal(signal.SIGTERM)  # training stops after its step, with a checkpoint
        for child in running.values():
            child.wait()


def next_cell(place: Place, cells: Sequence[Cell], running: Collection[Cell]) -> Cell | None:
    """The first cell to be done that waits for no pre-training another one is at."""
    at_work = {cell.shared for cell in running if not is_pretrained(place, cell)}
    waiting = (c for c in cells if c not in running and not is_done(place, c))
    return next((c for c in waiting if c.shared is None or c.shared not in at_work), None)


def _start(place: Place, cell: Cell) -> subprocess.Popen[bytes]:
    path = _log(place, cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "flows.reproduce_work", str(place.root / "place.json")]
    with path.open("ab") as output:
        return subprocess.Popen(
            [*command, json.dumps(dataclasses.asdict(cell))],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C reaches this process alone, which stops them
        )


def _check(place: Place, cell: Cell, code: int) -> None:
    if code == 0:
        return
    path = _log(place, cell)
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
    raise TrainingFailed(
        f"cell {cell.key} failed (exit code {code}); its last log lines:\n"
        + "\n".join(f"    {line}" for line in lines),
        where=path,
        do="mend the cause and run the same command again; what is finished is kept",
    )


def _log(place: Place, cell: Cell) -> Path:
    return place.root / "logs" / f"{cell.key}.txt"


def core_hours(place: Place) -> float:
    """CPU time of all work on cells so far."""
    lines = place.spent.read_text(encoding="utf-8").splitlines() if place.spent.is_file() else []
    return sum(json.loads(line)["cpu_s"] for line in lines) / 3600


def records_of(place: Place, cells: Sequence[Cell]) -> dict[str, Any]:
    """What was kept of each finished cell, by key."""
    found = {cell.key: read_done(place.cell(cell)) for cell in cells}
    return {key: record for key, record in found.items() if record is not None}
