"""Write stories.webp, the animation of the README, from the demo's videos.

Run: python docs/images/make_stories.py WORKSPACE
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from flows.reproduce_work import scenes_of
from schemas.layout import Workspace
from schemas.storage import latest
from schemas.tables import GENERATIONS, read_table

SCENES, ENLARGED, GAP_PX = 3, 3, 6


def main(workspace: Workspace) -> None:
    """A row per story, its first scenes side by side, all playing."""
    batch = latest(workspace.generations)
    assert batch is not None, "the demo has not generated anything here"
    rows = read_table(batch / "generations.parquet", GENERATIONS)
    stories = [scenes_of(workspace, row)[:SCENES] for row in rows]
    frames = [
        Image.fromarray(_column([_row([scene[k] for scene in story]) for story in stories]))
        for k in range(min(len(scene) for story in stories for scene in story))
    ]
    frames[0].save(
        Path(__file__).with_name("stories.webp"),
        save_all=True,
        append_images=frames[1:],
        duration=1000 // rows[0].fps,
        loop=0,
        quality=85,
    )


def _row(pictures: list[np.ndarray]) -> np.ndarray:
    return _joined([p.repeat(ENLARGED, 0).repeat(ENLARGED, 1) for p in pictures], 1)


def _column(pictures: list[np.ndarray]) -> np.ndarray:
    return _joined(pictures, 0)


def _joined(pictures: list[np.ndarray], axis: int) -> np.ndarray:
    shape = list(pictures[0].shape)
    shape[axis] = GAP_PX
    gap = np.full(shape, 255, np.uint8)
    return np.concatenate([x for p in pictures for x in (gap, p)][1:], axis)


if __name__ == "__main__":
    main(Workspace(Path(sys.argv[1])))
