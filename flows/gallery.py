"""The page of a batch: every video with its scenes, to play, search and share.

One file beside the batch's tables, with relative links to the videos: the workspace can be moved,
copied or served, and the page opens from disk. Without scripts it is still a page of links.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any
from urllib.parse import quote

from flows.pages import environment
from inference.outputs import VideoFiles
from schemas.config import SamplingConfig
from schemas.layout import Workspace
from schemas.rows import Generation
from schemas.storage import read_json, write_text
from schemas.tables import GENERATIONS, REJECTS, read_table

PAGE = "index.html"
SETTINGS = (*SamplingConfig.model_fields, "fps", "quantize", "step_cache", "vae_tiling")
"""What is said of how videos were made: once for all, and at a video that differs."""


@dataclass(frozen=True)
class Scene:
    """One scene: where it begins in the video, its texts and seed, and how it came in."""

    start_s: float
    prompt: str
    negative_prompt: str
    seed: int
    is_given: bool
    is_added: bool

    def notes(self, seed: bool, negative_prompt: bool) -> list[str]:
        """What else is to be said of it, its seed and negative prompt only if asked for."""
        found = {
            "given": self.is_given,
            "added": self.is_added,
            f"seed {self.seed}": seed,
            f"not: {self.negative_prompt}": negative_prompt and self.negative_prompt,
        }
        return [text for text, is_said in found.items() if is_said]


@dataclass(frozen=True)
class Card:
    """One video with what its sidecar says; ``settings`` holds those of ``SETTINGS`` it names."""

    row: Generation
    scenes: list[Scene]
    settings: dict[str, Any]
    seconds: float | None
    cut: list[str]

    @property
    def length_s(self) -> float:
        """Length of the video."""
        return self.row.num_frames / self.row.fps

    def differs(self, common: Mapping[str, Any]) -> dict[str, Any]:
        """The settings that are not those of most videos."""
        return {name: value for name, value in self.settings.items() if value != common.get(name)}

    @property
    def one_seed(self) -> bool:
        """Whether all scenes have the same seed."""
        return len(set(self.row.seeds)) == 1

    @property
    def one_negative_prompt(self) -> bool:
        """Whether all scenes have the same negative prompt."""
        return len(set(self.row.negative_prompts)) == 1


def build_gallery(workspace: Workspace, batch_folder: Path) -> Path:
    """Write ``index.html`` into the folder of a batch.

    Args:
        workspace: Where the videos are.
        batch_folder: Folder with the tables of the batch.

    Returns:
        The page.

    Raises:
        ManifestError: A table is missing or of another version.
    """
    cards = [
        _card(row, workspace)
        for row in read_table(batch_folder / "generations.parquet", GENERATIONS)
    ]
    made = [card for card in cards if card.row.status == "done"]
    rejects = read_table(batch_folder / "rejects.parquet", REJECTS)
    context: dict[str, Any] = {
        "batch": batch_folder.name,
        "cards": cards,
        "made": len(made),
        "film_s": sum(card.length_s for card in made),
        "common": _common(made),
        "models": sorted({card.row.model_sha256 for card in cards}),
        "sizes": sorted({(card.row.width_px, card.row.height_px) for card in cards}),
        # A row that failed has a card; those that were refused have none.
        "left_out": [reject for reject in rejects if not reject.failed],
        "videos": quote(os.path.relpath(workspace.videos, batch_folder).replace(os.sep, "/")),
    }
    path = batch_folder / PAGE
    write_text(path, environment().get_template("gallery.html.j2").render(context))
    return path


def _common(cards: Sequence[Card]) -> dict[str, Any]:
    """The commonest value of every setting."""
    values = {name: [c.settings[name] for c in cards if name in c.settings] for name in SETTINGS}
    return {name: Counter(found).most_common(1)[0][0] for name, found in values.items() if found}


def _card(row: Generation, workspace: Workspace) -> Card:
    sidecar = VideoFiles.of(workspace, row.generation_id).sidecar
    record: dict[str, Any] = read_json(sidecar) if sidecar.is_file() else {}
    said = asdict(row) | record
    starts = [0, *accumulate(row.scene_frames)]
    given: list[str] = record.get("given") or [""] * row.num_scenes
    texts = zip(row.prompts, row.negative_prompts, row.seeds, given, strict=True)
    scenes = [
        Scene(
            start_s=starts[i] / row.fps,
            prompt=prompt,
            negative_prompt=negative,
            seed=seed,
            is_given=bool(file),
            is_added=i >= row.num_scenes - row.extended_scenes,
        )
        for i, (prompt, negative, seed, file) in enumerate(texts)
    ]
    settings = {name: said[name] for name in SETTINGS if name in said}
    return Card(row, scenes, settings, record.get("seconds"), record.get("truncated_prompts", []))
