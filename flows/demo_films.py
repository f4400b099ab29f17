"""The films of ``triptych demo``: drawn on the spot where the settings name none."""

from __future__ import annotations

from pathlib import Path

from curation.toonworld.write import write_dataset
from schemas.config import TriptychConfig
from schemas.config.presets import toonworld

EPISODES, COMPILATIONS = 8, 3
SEED = 3
"""Not what the embedded models were trained on (1), nor what they are scored on (2)."""
FPS = 8
SOURCES = toonworld().curation.sources


def with_films(config: TriptychConfig) -> TriptychConfig:
    """Draw ToonWorld into the workspace if the sources are those of the preset ``toonworld``.

    Returns:
        The settings, with what was drawn as their sources. Other settings come back as they are.
    """
    curation = config.curation
    if curation.sources.inputs != SOURCES.inputs:
        return config
    folder = Path(config.workspace) / "toonworld"
    shape = config.training.model
    write_dataset(folder, SEED, EPISODES, COMPILATIONS, shape.height_px, shape.width_px, FPS)
    drawn = toonworld(str(folder)).curation.sources
    files = {"inputs": drawn.inputs, "captions_csv": drawn.captions_csv}
    sources = curation.sources.model_copy(update=files)
    return config.model_copy(update={"curation": curation.model_copy(update={"sources": sources})})
