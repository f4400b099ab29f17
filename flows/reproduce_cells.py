"""The cells of the reproduction: what is trained for each row of the paper's ablation tables.

A cell is one model: a mask, the lowest similarity its SFT data was let in with, the stages it went
through, a seed. Rows of different tables that mean the same model share a cell, and all cells of
one mask and seed start SFT from the same pre-training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

from schemas.errors import ConfigError

Stages = Literal["both", "pretrain", "sft", "sft-part"]

EVERYTHING = -1.0
"""A lowest similarity that lets every window in."""
DEFAULT_LOW = 0.8
"""What all cells but those of the table of thresholds are fine-tuned with, as in the paper."""


@dataclass(frozen=True)
class Cell:
    """One model to train and score.

    Attributes:
        mask: Attention mask.
        stages: Pre-training and then SFT; or one of them for as many steps as both together; or
            ``sft-part``, SFT for the steps that it has where pre-training comes first.
        low: Lowest similarity of a window of the SFT data; of no meaning without SFT.
        seed: Of the order of samples, noise and timesteps.
    """

    mask: str = "v2"
    stages: Stages = "both"
    low: float = DEFAULT_LOW
    seed: int = 0

    @property
    def key(self) -> str:
        """Name of the cell and of its folder."""
        data = "" if self.stages == "pretrain" else f"-low{self.low:g}"
        return f"{self.mask}-{self.stages}{data}-seed{self.seed}"

    @property
    def shared(self) -> str | None:
        """Name of the pre-training it goes on from, which others share; None if it does not."""
        return None if self.stages.startswith("sft") else f"pretrain-{self.mask}-seed{self.seed}"


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        name: What it is called.
        cell: Its cell of seed 0.
        paper: Visual, semantic and sequence consistency x 100 in the paper; None = not given.
    """

    name: str
    cell: Cell
    paper: tuple[float | None, float | None, float | None]


_NOT_THERE = (None, None, None)

# Source of the paper's figures: Mask2DiT (arXiv 2503.19881), the tables of its ablations.
TABLES: dict[str, tuple[Row, ...]] = {
    "masks": (
        Row("v1", Cell("v1"), (58.09, 24.69, 41.39)),
        Row("v2", Cell("v2"), (68.45, 23.82, 46.14)),
        Row("v3", Cell("v3"), (77.56, 23.47, 50.52)),
        Row("v4", Cell("v4"), (93.43, 20.73, 57.08)),
        Row("v5", Cell("v5"), (90.72, 20.60, 55.66)),
    ),
    "thresholds": (
        # The paper's first row is CogVideoX, which no related scenes were ever shown to.
        Row("no SFT", Cell(stages="pretrain"), (55.01, 22.64, None)),
        Row("none", Cell(low=EVERYTHING), _NOT_THERE),
        Row("0.0", Cell(low=0.0), (63.94, 24.31, 44.13)),
        Row("0.6", Cell(low=0.6), (66.46, 23.96, 45.21)),
        Row("0.7", Cell(low=0.7), (67.71, 23.98, 45.85)),
        Row("0.8", Cell(low=0.8), (73.22, 23.54, 48.38)),
    ),
    "stages": (
        Row("pre-training only", Cell(stages="pretrain"), (49.04, 26.36, 37.70)),
        Row("SFT only", Cell(stages="sft-part"), (73.22, 23.54, 48.38)),
        Row("SFT only, longer", Cell(stages="sft"), _NOT_THERE),
        Row("both", Cell(), (73.73, 23.73, 48.73)),
    ),
}
QUICK_ROWS = {
    "masks": ("v1", "v2", "v5"),
    "thresholds": ("no SFT", "none", "0.8"),
    "stages": tuple(row.name for row in TABLES["stages"]),
}
"""Rows of ``--quick``: those between which the paper's differences are the largest."""


@dataclass(frozen=True)
class Budget:
    """How much each cell is given; results of different budgets are kept apart.

    Attributes:
        videos: Episodes, and as many compilations, that the data is made of.
        prompts: Held-out stories that every cell is scored on.
        frames: Of a scene, 1 or 5. With 1, scenes are stills, at a fifth of the time.
        pretrain_steps: Of a model that goes through both stages.
        sft_steps: Likewise.
        batch_size: Stories per step.
        lr: Learning rate.
        denoising_steps: Of a generated story.
        guidance: Likewise.
    """

    videos: int = 150
    prompts: int = 32
    frames: int = 1
    pretrain_steps: int = 200
    sft_steps: int = 400
    batch_size: int = 8
    lr: float = 1e-3
    denoising_steps: int = 20
    guidance: float = 2.0

    def steps(self, cell: Cell) -> tuple[int, int]:
        """Steps of pre-training and of SFT; all cells but ``sft-part`` have the same in all."""
        total = self.pretrain_steps + self.sft_steps
        return {
            "both": (self.pretrain_steps, self.sft_steps),
            "pretrain": (total, 0),
            "sft": (0, total),
            "sft-part": (0, self.sft_steps),
        }[cell.stages]

    def to_dict(self) -> dict[str, float]:
        """Names and values."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


def rows_of(tables: Sequence[str], quick: bool) -> dict[str, list[Row]]:
    """The rows to fill, by table.

    Raises:
        ConfigError: There is no such table.
    """
    unknown = [name for name in tables if name not in TABLES]
    if unknown or not tables:
        raise ConfigError(
            "no such table", found=unknown or "none", expected=f"some of {', '.join(TABLES)}"
        )
    return {
        name: [row for row in TABLES[name] if not quick or row.name in QUICK_ROWS[name]]
        for name in tables
    }


def jobs(rows: dict[str, list[Row]], seeds: int) -> list[Cell]:
    """All cells, each once: those of seed 0 first, so that a stop early leaves whole tables."""
    return list(
        dict.fromkeys(
            Cell(row.cell.mask, row.cell.stages, row.cell.low, seed)
            for seed in range(seeds)
            for table in rows.values()
            for row in table
        )
    )
