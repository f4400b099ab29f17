"""Configs of the curation stages: sources, shots, clips, embeddings, windows, manifests."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from schemas.config.base import StageConfig

# fmt: off
VIDEO_SUFFIXES = (
    ".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov",
    ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv",
)
# fmt: on


class SourcesConfig(StageConfig):
    """Where videos come from."""

    inputs: tuple[str, ...] = Field(
        default=("assets/samples",),
        description="Files, folders (searched recursively) or globs of videos.",
        min_length=1,
    )
    suffixes: tuple[str, ...] = Field(
        default=VIDEO_SUFFIXES, description="File name endings taken from folders, any case."
    )
    captions_csv: str | None = Field(
        default="assets/samples/captions.csv",
        description="Panda-70M-style CSV with captions per time span; url is a path relative to "
        "the CSV.",
    )


class ShotsConfig(StageConfig):
    """How shots are found."""

    detector: Literal["adaptive", "content", "histogram", "hash"] = Field(
        default="adaptive", description="PySceneDetect detector."
    )
    threshold: float | None = Field(
        default=None,
        description="Detector threshold, > 0; empty = the detector's own default.",
        gt=0,
    )
    min_shot_s: float = Field(
        default=0.6,
        description="Shortest shot in seconds, >= 0. Source: PySceneDetect's parameter sweep (0.6 "
        "s).",
        ge=0,
    )
    detect_height_px: int = Field(
        default=180,
        description="Frames are scaled to this height for detection, 16 to 2160.",
        ge=16,
        le=2160,
    )


class ClipsConfig(StageConfig):
    """How a shot becomes a usable span."""

    trim_frames: int = Field(
        default=2,
        description="Frames dropped at both ends of a shot, so that no neighbour leaks in, 0 to "
        "250.",
        ge=0,
        le=250,
    )
    min_frames: int = Field(
        default=17,
        description="Shortest clip in frames, >= 1. The paper's training needs 49.",
        ge=1,
    )


class EmbeddingConfig(StageConfig):
    """The similarity model and what it is shown."""

    model: Literal["color-layout"] = Field(
        default="color-layout",
        description="Similarity model. color-layout needs no weights: mean colours on a grid, per "
        "part of the clip.",
    )
    frames_per_clip: int = Field(
        default=8,
        description="Frames read per clip, evenly spaced, 1 to 64. ViCLIP uses 8.",
        ge=1,
        le=64,
    )
    height_px: int = Field(
        default=32,
        description="Frames are scaled to this many pixels square, 8 to 1024.",
        ge=8,
        le=1024,
    )


class WindowsConfig(StageConfig):
    """Which consecutive clips are compared."""

    scenes_per_sample: int = Field(
        default=3, description="Scenes in a sample (N), 2 to 16. Paper: 3.", ge=2, le=16
    )
    max_gap_s: float = Field(
        default=2.0,
        description="Largest gap between consecutive clips in seconds, >= 0; a longer one splits "
        "the run.",
        ge=0,
    )


class ManifestsConfig(StageConfig):
    """What is taken into the pretrain and sft manifests."""

    statistic: Literal["min_adjacent", "mean_adjacent", "min_pairwise", "mean_pairwise"] = Field(
        default="min_pairwise",
        description="Which similarity of a window is compared with low and high.",
    )
    low: float = Field(
        default=0.0, description="Lowest similarity kept in sft, -1 to 1.", ge=-1, le=1
    )
    high: float = Field(
        default=0.995,
        description="Highest similarity kept in sft, -1 to 1; above it scenes are near-duplicates.",
        ge=-1,
        le=1,
    )
    uses_per_clip: int = Field(
        default=2,
        description="How often a clip may appear in the pretrain manifest, 1 to 1000.",
        ge=1,
        le=1000,
    )
    val_percent: int = Field(
        default=0,
        description="Share of sources held out for validation, in percent, 0 to 50; chosen by "
        "source hash.",
        ge=0,
        le=50,
    )
    seed: int = Field(default=0, description="Seed of the pretrain draw, >= 0.", ge=0)

    @model_validator(mode="after")
    def _band(self) -> ManifestsConfig:
        if self.low > self.high:
            raise ValueError(f"low ({self.low:g}) must not be above high ({self.high:g})")
        return self


class CurationConfig(StageConfig):
    """From videos to three-scene manifests (flow refresh-dataset)."""

    dataset: str = Field(
        default="demo",
        description="Name of the dataset in the workspace.",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
    )
    sources: SourcesConfig = Field(default=SourcesConfig(), description="Where videos come from.")
    shots: ShotsConfig = Field(default=ShotsConfig(), description="How shots are found.")
    clips: ClipsConfig = Field(default=ClipsConfig(), description="How a shot becomes a clip.")
    embedding: EmbeddingConfig = Field(
        default=EmbeddingConfig(), description="The similarity model."
    )
    windows: WindowsConfig = Field(
        default=WindowsConfig(), description="Which consecutive clips are compared."
    )
    manifests: ManifestsConfig = Field(
        default=ManifestsConfig(), description="What goes into the manifests."
    )
    ablation: tuple[float, ...] = Field(
        default=(-1.0, 0.0, 0.2, 0.4, 0.6, 0.8),
        description="Low thresholds tried by the flow ablate-thresholds, each -1 to 1.",
    )
    max_error_ratio: float = Field(
        default=0.5,
        description="The run fails when a larger share of a stage's records fails, 0 to 1.",
        ge=0,
        le=1,
    )
