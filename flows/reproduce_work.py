"""Work on a cell of the reproduction: it is trained, generated with and scored.

``python -m flows.reproduce_work PLACE.json CELL`` does one cell in a process of its own, with one
thread. What is finished is never done again, and what was interrupted goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from flows.reproduce_cells import Budget, Cell
from schemas.config import TriptychConfig
from schemas.config.presets import toonworld
from schemas.errors import GenerationError
from schemas.layout import Workspace
from schemas.rows import Generation
from schemas.storage import mark_done, read_done, read_json
from schemas.tables import GENERATIONS, read_table

log = logging.getLogger(__name__)

WARMUP, EMA = 20, 0.98
"""Steps of warm-up, and decay of the average of the weights: runs are a few hundred steps."""
STILL = ("action",)
"""What a single frame cannot show."""


@dataclass(frozen=True)
class Place:
    """Where everything of one reproduction lies.

    Attributes:
        root: Its folder: ``cells/``, ``shared/``, ``base/``, ``sft/`` and the prompts.
        workspace: The workspace around it, with the data and the caches.
        models: The embedded models: ``model/``, ``viclip/``, ``probe/``.
        videos: The folder of ToonWorld.
        pretrain: The manifest of unrelated scenes.
        budget: What it may cost.
    """

    root: Path
    workspace: Path
    models: Path
    videos: Path
    pretrain: Path
    budget: Budget

    @property
    def prompts(self) -> Path:
        """The held-out prompts."""
        return self.root / "prompts.jsonl"

    @property
    def spent(self) -> Path:
        """What every piece of work has cost."""
        return self.root / "spent.jsonl"

    def sft(self, low: float) -> Path:
        """The manifest of related scenes, of this similarity or a higher one."""
        return self.root / "sft" / f"low{low:g}.parquet"

    @property
    def base(self) -> Path:
        """The model that all cells start from; it knows single pictures."""
        return self.root / "base"

    def cell(self, cell: Cell) -> Path:
        """Folder of a cell."""
        return self.root / "cells" / cell.key

    def shared(self, name: str) -> Path:
        """Run folder of a shared pre-training."""
        return self.root / "shared" / name

    def config(self, seed: int = 0, mask: str = "v2") -> TriptychConfig:
        """Settings of data, training, generation and evaluation; steps are the cell's."""
        budget, config = self.budget, toonworld(str(self.videos))
        stage = {
            "batch_size": budget.batch_size,
            "micro_batch_size": budget.batch_size,
            "lr": budget.lr,
            "warmup_steps": WARMUP,
            "ema_decay": EMA,
            "seed": seed,
        }
        training = config.training
        model = {"base": str(self.base), "mask": mask, "seed": seed, "frames": budget.frames}
        viclip = {"weights": str(self.models / "viclip")}
        curation = config.curation
        embedding = curation.embedding.model_copy(update=viclip)
        return config.model_copy(
            update={
                "workspace": str(self.workspace),
                "curation": curation.model_copy(update={"embedding": embedding}),
                "evaluation": config.evaluation.model_copy(update=viclip),
                "training": training.model_copy(
                    update={
                        "model": training.model.model_copy(update=model),
                        "pretrain": training.pretrain.model_copy(update=stage),
                        "sft": training.sft.model_copy(update=stage),
                        "zero_stage": 0,  # one rank has nothing to share
                        "monitors": (),
                    }
                ),
                "generation": config.generation.model_copy(
                    update={
                        "prompts": str(self.prompts),
                        "steps": budget.denoising_steps,
                        "guidance": budget.guidance,
                        "scene_guidance": False,  # which the paper does not know
                        "actors": 1,
                    }
                ),
            }
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        paths = {
            n: str(getattr(self, n)) for n in ("root", "workspace", "models", "videos", "pretrain")
        }
        return {**paths, "budget": self.budget.to_dict()}

    @classmethod
    def of(cls, values: dict[str, Any]) -> Place:
        """The inverse of :meth:`to_dict`."""
        paths = {name: Path(value) for name, value in values.items() if name != "budget"}
        return cls(**paths, budget=Budget(**values["budget"]))


def pretrain(place: Place, cell: Cell) -> Path:
    """The shared pre-training of a cell's mask and seed; its model folder."""
    assert cell.shared is not None, "this cell has none"
    folder = place.shared(cell.shared)
    _train(place, cell, "pretrain", place.budget.pretrain_steps, place.base, folder)
    return folder / "model"


def is_done(place: Place, cell: Cell) -> bool:
    """Whether a cell has been trained and scored."""
    return read_done(place.cell(cell)) is not None


def is_pretrained(place: Place, cell: Cell) -> bool:
    """Whether the pre-training that a cell goes on from is there."""
    return cell.shared is None or read_done(place.shared(cell.shared)) is not None


def do_cell(place: Place, cell: Cell) -> dict[str, Any]:
    """Train a cell, generate the held-out stories with it, and score them.

    Returns:
        What is kept of it: its settings and the scores of every story.

    Raises:
        TrainingFailed: The training process ended early; calling again resumes.
        GenerationError: A story was not generated.
    """
    folder = place.cell(cell)
    done = read_done(folder)
    if done is not None:
        return done
    stories = generate_and_score(place, cell, train(place, cell))
    steps = list(place.budget.steps(cell))
    record = {**dataclasses.asdict(cell), "steps": steps, "stories": stories}
    mark_done(folder, record)
    return record


def train(place: Place, cell: Cell) -> Path:
    """All stages of a cell; the folder of its model."""
    pretrain_steps, sft_steps = place.budget.steps(cell)
    run = place.cell(cell) / "run"
    if not sft_steps:
        # it goes on from a copy of the shared part, which stays as it is for the others
        _copy_once(pretrain(place, cell).parent, run)
        _train(place, cell, "pretrain", pretrain_steps, place.base, run)
    else:
        start = pretrain(place, cell) if cell.shared else place.base
        _train(place, cell, "sft", sft_steps, start, run)
    return run / "model"


def _copy_once(folder: Path, to: Path) -> None:
    """Copy a finished run, whole or not at all."""
    if not to.exists():
        partial = to.with_name(f".{to.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(folder, partial)
        partial.replace(to)


def _train(place: Place, cell: Cell, stage: Any, steps: int, init: Path, folder: Path) -> None:
    from training.launch import run_stage  # torch takes seconds

    config = place.config(cell.seed, cell.mask)
    settings = getattr(config.training, stage).model_copy(
        # no video is made from a checkpoint; they are there for a run that is interrupted
        update={"steps": steps, "checkpoint_every": 250, "keep_checkpoints": 1}
    )
    training = config.training.model_copy(update={stage: settings})
    manifest = place.pretrain if stage == "pretrain" else place.sft(cell.low)
    run_stage(config.model_copy(update={"training": training}), stage, manifest, init, folder)


def generate_and_score(place: Place, cell: Cell, model: Path) -> dict[str, dict[str, float]]:
    """Scores of every held-out story: the paper's three, and the two of the ground truth."""
    from curation.toonworld.probe import load_probe
    from inference.batch import run_batch
    from inference.evaluation import evaluate
    from inference.toon_scores import score_stories

    # one place for all: the texts of the prompts are encoded there already
    config, videos = place.config(cell.seed, cell.mask), Workspace(place.root)
    batch, _ = run_batch(config, model, videos)
    scores, _ = evaluate(config, videos, batch)
    made = {g.generation_id: g for g in read_table(batch / "generations.parquet", GENERATIONS)}
    if len(scores) != len(made):
        raise GenerationError(
            "not every story of a cell was generated and scored",
            where=batch,
            found=f"{len(scores)} of {len(made)}",
            do="read rejects.parquet there, mend the cause and run again",
        )
    stories = [made[score.generation_id] for score in scores]
    frames = [scenes_of(videos, story) for story in stories]
    told = [story.prompts for story in stories]
    left_out = STILL if place.budget.frames == 1 else ()
    probe = load_probe(place.models / "probe")
    truths = score_stories(probe, frames, told, left_out=left_out)
    return {
        score.prompt_id: {
            "visual": score.visual,
            "semantic": cast("float", score.semantic),  # ViCLIP has a text side
            "sequence": cast("float", score.sequence),
            "style": truth.style,
            "told": truth.semantic,
            "both": (truth.style + truth.semantic) / 2,
        }
        for score, truth in zip(scores, truths, strict=True)
    }


def scenes_of(workspace: Workspace, story: Generation) -> list[npt.NDArray[np.uint8]]:
    """The scenes of a generated video, each (T, H, W, 3), from the mp4 as it was written."""
    from curation.video import read_frames

    path = workspace.videos / f"{story.generation_id}.mp4"
    numbers = range(story.num_frames)
    frames = read_frames(path, numbers, height_px=story.height_px, width_px=story.width_px)
    return np.split(frames, np.cumsum(story.scene_frames)[:-1])


def _end_with_parent() -> None:
    """Stop as on Ctrl-C when the process that started this one is gone."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _counting(place: Place, cell: Cell) -> Generator[None]:
    """Note the CPU time of this process and those it started, however the work ends."""
    started = time.monotonic()
    try:
        yield
    finally:
        spent = os.times()
        cpu = spent.user + spent.system + spent.children_user + spent.children_system
        wall = time.monotonic() - started
        line = {"cell": cell.key, "cpu_s": round(cpu, 1), "wall_s": round(wall, 1)}
        with place.spent.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def main() -> None:
    """Do the cell that is given as JSON."""
    parser = argparse.ArgumentParser(description="One cell of `triptych reproduce`.")
    parser.add_argument("place", type=Path)
    parser.add_argument("cell", type=json.loads)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    _end_with_parent()
    import torch

    torch.set_num_threads(1)
    place, cell = Place.of(read_json(args.place)), Cell(**args.cell)
    with _counting(place, cell):
        do_cell(place, cell)


if __name__ == "__main__":
    main()
