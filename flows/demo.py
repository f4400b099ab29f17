"""What the demo works on: a few cartoon films, drawn on the spot into the workspace."""

from __future__ import annotations

from pathlib import Path

from curation.toonworld.write import CAPTIONS, write_dataset
from schemas.config import TriptychConfig
from schemas.config.presets import toonworld

FILMS = "toonworld"
"""Folder of the films, in the workspace."""
EPISODES, COMPILATIONS = 10, 5
SEED = 3
"""Neither the seed that the embedded models learnt from nor the one they are scored on."""
HEIGHT_PX, WIDTH_PX, FPS = 64, 64, 8


def with_films(config: TriptychConfig) -> TriptychConfig:
    """Draw the films that are not there yet; the config that reads them.

    A config that names sources of its own is given back as it is, and nothing is drawn.
    """
    if config.curation.sources != toonworld().curation.sources:
        return config
    folder = Path(config.workspace) / FILMS
    write_dataset(folder, SEED, EPISODES, COMPILATIONS, HEIGHT_PX, WIDTH_PX, FPS)
    read = {"inputs": (str(folder),), "captions_csv": str(folder / CAPTIONS)}
    sources = config.curation.sources.model_copy(update=read)
    return config.model_copy(
        update={"curation": config.curation.model_copy(update={"sources": sources})}
    )
