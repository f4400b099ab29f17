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
        description="Folders (searched recursively), globs, files, URIs (s3://, gs://, http://), "
        "or lists of them.",
        min_length=1,
    )
    format: Literal[
        "auto", "videos", "list", "panda70m", "video2dataset", "pretrain_csv", "sft_json"
    ] = Field(
        default="auto",
        description="What the inputs are; auto decides by name and header, and says so in the log.",
    )
    suffixes: tuple[str, ...] = Field(
        default=VIDEO_SUFFIXES, description="File name endings taken from folders, any case."
    )
    captions_csv: str | None = Field(
        default="assets/samples/captions.csv",
        description="Panda-70M-style CSV with captions per time span for videos given otherwise; "
        "url is a path relative to the CSV.",
    )
    media_root: str | None = Field(
        default=None,
        description="Folder or URI that relative paths in lists are joined to; empty = the list's.",
    )
    max_file_gb: float = Field(
        default=20.0, description="Larger remote files are rejected, in GB, > 0.", gt=0
    )
    cache_limit_gb: float = Field(
        default=100.0, description="Room for fetched files in the workspace, in GB, > 0.", gt=0
    )
    ytdlp: bool = Field(
        default=False,
        description="Fetch web pages that are not plain video files with yt-dlp (extra: youtube).",
    )


class ShotsConfig(StageConfig):
    """How shots are found."""

    detector: Literal[
        "fast", "adaptive", "content", "histogram", "hash", "panda70m", "transnetv2"
    ] = Field(
        default="fast",
        description="fast (ours: cuts, dissolves, fades); PySceneDetect's adaptive, content, "
        "histogram, hash (cuts only); panda70m (Panda-70M's splitting: cut, then stitch what looks "
        "alike to the similarity model); transnetv2 (a network: cuts and gradual transitions).",
    )
    threshold: float | None = Field(
        default=None,
        description="Threshold of a detector other than fast, > 0; empty = its own default "
        "(panda70m's cuts: 25; transnetv2, a probability: 0.5).",
        gt=0,
    )
    stitch_distance: float = Field(
        default=0.6,
        description="panda70m: neighbours at most this far apart are one shot; a distance of unit "
        "vectors, > 0, at most 2. Panda-70M: 0.6 with ImageBind; other models need other values.",
        gt=0,
        le=2,
    )
    drop_distance: float = Field(
        default=1.0,
        description="panda70m: a piece whose ends are further apart is a transition; > 0, at most "
        "2 (never). Panda-70M: 1.0 with ImageBind; other models need other values.",
        gt=0,
        le=2,
    )
    transnetv2_weights: str | None = Field(
        default=None,
        description="transnetv2: checkpoint in the official PyTorch layout, .pth or .safetensors.",
    )
    min_shot_s: float = Field(
        default=0.6,
        description="Shortest shot of a PySceneDetect detector in seconds, >= 0. Source: "
        "PySceneDetect's parameter sweep (0.6 s).",
        ge=0,
    )
    detect_height_px: int = Field(
        default=180,
        description="Height of the frames PySceneDetect's detectors see, 16 to 2160.",
        ge=16,
        le=2160,
    )
    timeout_s: float = Field(
        default=600.0,
        description="Wall-clock limit for one video in seconds, > 0; then it is rejected.",
        gt=0,
    )
    memory_mb: int = Field(
        default=4096, description="Memory limit for one video in MB, 256 or more.", ge=256
    )

    @model_validator(mode="after")
    def _transnetv2(self) -> ShotsConfig:
        if self.detector == "transnetv2":
            if self.transnetv2_weights is None:
                raise ValueError(
                    "transnetv2 needs its weights: set transnetv2_weights to the file "
                    "transnetv2-pytorch-weights.pth that inference-pytorch/convert_weights.py of "
                    "github.com/soCzech/TransNetV2 writes"
                )
            if self.threshold is not None and self.threshold >= 1:
                raise ValueError(
                    f"threshold ({self.threshold:g}) must be below 1: transnetv2's is a probability"
                )
        return self


class ClipsConfig(StageConfig):
    """How a shot becomes usable spans."""

    trim_frames: int = Field(
        default=2,
        description="Frames dropped where a shot borders another or a transition, 0 to 250.",
        ge=0,
        le=250,
    )
    max_doubt: float | None = Field(
        default=1.0,
        description="Clips leave out places that may be transitions (under movement, quick pans) "
        "scored at least this, >= 1; empty = none.",
        ge=1,
    )
    min_frames: int = Field(
        default=17,
        description="Shortest clip in frames, >= 1. The paper's training needs 49.",
        ge=1,
    )
    max_s: float | None = Field(
        default=60.0,
        description="Longest clip in seconds, > 0; empty = no limit. Panda-70M: 60.",
        gt=0,
    )
    long_shots: Literal["keep", "split", "stride", "reject"] = Field(
        default="split",
        description="What happens to a longer shot: keep it, split it in halves until they fit, "
        "cut pieces of max_s from its start, or reject it.",
    )


class FiltersConfig(StageConfig):
    """What is left out, by measured scores; an empty value switches a filter off."""

    max_black_ratio: float | None = Field(
        default=0.5, description="reject_black: share of black frames, 0 to 1.", ge=0, le=1
    )
    max_duplicate_ratio: float | None = Field(
        default=None,
        description="reject_duplicate_frames: share of repeated frames, 0 to 1.",
        ge=0,
        le=1,
    )
    max_still_ratio: float | None = Field(
        default=0.98,
        description="reject_static (nothing moves) and reject_slideshow (only jumps): share of "
        "still frames, 0 to 1.",
        ge=0,
        le=1,
    )
    max_comb_ratio: float | None = Field(
        default=0.5, description="reject_interlaced: share of combed frames, 0 to 1.", ge=0, le=1
    )
    max_flicker: float | None = Field(
        default=None,
        description="reject_flickering: mean reversing luminance change, 0 to 1.",
        ge=0,
        le=1,
    )
    min_luminance: float | None = Field(
        default=None, description="reject_dark: mean luma, 0 to 1.", ge=0, le=1
    )
    max_luminance: float | None = Field(
        default=None, description="reject_bright: mean luma, 0 to 1.", ge=0, le=1
    )
    min_motion: float | None = Field(
        default=None,
        description="reject_slow_motion: mean luma change per frame, 0 to 1.",
        ge=0,
        le=1,
    )
    max_motion: float | None = Field(
        default=None,
        description="reject_fast_motion: mean luma change per frame, 0 to 1.",
        ge=0,
        le=1,
    )
    min_sharpness: float | None = Field(
        default=None, description="reject_blurry: variance of the Laplacian of luma, >= 0.", ge=0
    )
    min_crop_ratio: float | None = Field(
        default=None,
        description="reject_letterboxed: share of the picture inside black bars, 0 to 1.",
        ge=0,
        le=1,
    )
    min_width_px: int | None = Field(
        default=None, description="reject_small: width of the upright picture, >= 1.", ge=1
    )
    min_height_px: int | None = Field(
        default=None, description="reject_small: height of the upright picture, >= 1.", ge=1
    )
    min_aesthetic: float | None = Field(
        default=None,
        description="reject_unaesthetic: aesthetic score, 0 to 10; needs scorers.aesthetic_head. "
        "Open-Sora: 4.5 to 5.5.",
        ge=0,
        le=10,
    )
    max_text_ratio: float | None = Field(
        default=None,
        description="reject_text: share of the picture covered by text, 0 to 1; needs "
        "scorers.text_detector.",
        ge=0,
        le=1,
    )


class ScorersConfig(StageConfig):
    """Networks that score clips; each works only where its weights are given."""

    clip: str | None = Field(
        default=None,
        description="Folder of the OpenCLIP model under aesthetic_head: open_clip_config.json and "
        "open_clip_model.safetensors. LAION's heads need OpenAI's ViT-L/14, "
        "timm/vit_large_patch14_clip_224.openai on model hubs.",
    )
    aesthetic_head: str | None = Field(
        default=None,
        description="LAION's aesthetic predictor: sac+logos+ava1-l14-linearMSE.pth or "
        "sa_0_4_vit_l_14_linear.pth.",
    )
    text_detector: str | None = Field(
        default=None,
        description="Text detection network of the DB kind as ONNX, such as PP-OCR's "
        "ch_PP-OCRv4_det_infer.onnx.",
    )
    frames_per_clip: int = Field(
        default=3,
        description="Frames read per clip, evenly spaced, 1 to 64. Open-Sora and Data-Juicer: 3.",
        ge=1,
        le=64,
    )
    text_height_px: int = Field(
        default=320,
        description="Height of the frames the text detector sees, made a multiple of 32; 32 to "
        "2160.",
        ge=32,
        le=2160,
    )


class DedupConfig(StageConfig):
    """Which repeats are left out."""

    exact: bool = Field(
        default=True,
        description="Reject sources whose video packets equal another's (remuxed copies).",
    )
    near_threshold: float | None = Field(
        default=None,
        description="Reject clips whose similarity to a kept one reaches this, -1 to 1; empty = "
        "off. 0.99 is usual.",
        ge=-1,
        le=1,
    )
    earlier: bool = Field(
        default=False, description="Compare with the clips of earlier snapshots of the dataset too."
    )


class ExportConfig(StageConfig):
    """Clips as files of their own (optional; training reads spans of the sources)."""

    mode: Literal["none", "reencode", "copy"] = Field(
        default="none",
        description="none; reencode (frame-exact, H.264); copy (no loss, begins at a key frame).",
    )
    fps: float | None = Field(
        default=None,
        description="Constant frame rate of re-encoded clips, > 0; empty = as it is.",
        gt=0,
    )
    crf: int = Field(
        default=18, description="Quality of re-encoded clips, 0 (best) to 51.", ge=0, le=51
    )


class SimilarityModelConfig(StageConfig):
    """A model that puts clips and texts into one space."""

    model: Literal["color-layout", "viclip", "openclip"] = Field(
        default="color-layout",
        description="Similarity model. color-layout needs no weights: mean colours on a grid, per "
        "part of the clip. viclip (the paper's) and openclip need weights.",
    )
    weights: str | None = Field(
        default=None,
        description="Weights of viclip (an official .pth or .safetensors file, or a folder with "
        "model.safetensors) or of openclip (a folder with open_clip_config.json and weights).",
    )
    long_text: Literal["truncate", "chunk"] = Field(
        default="truncate",
        description="Captions longer than the model reads (ViCLIP: 32 tokens): truncate (paper), "
        "or chunk (mean over chunks of whole sentences).",
    )


class EmbeddingConfig(SimilarityModelConfig):
    """The similarity model and what it is shown."""

    frames_per_clip: int = Field(
        default=8,
        description="Frames read per clip, evenly spaced, 1 to 64. ViCLIP: 8, no other number.",
        ge=1,
        le=64,
    )
    height_px: int = Field(
        default=32,
        description="color-layout: frames are scaled to this many pixels square, 8 to 1024. The "
        "other models have a size of their own.",
        ge=8,
        le=1024,
    )
    batch_clips: int = Field(
        default=8, description="Clips the model sees at once, 1 to 1024.", ge=1, le=1024
    )
    num_gpus: float = Field(
        default=0.0,
        description="GPUs per worker, >= 0; 0 = CPU. 0.5 = two workers share one.",
        ge=0,
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


Statistic = Literal["min_adjacent", "mean_adjacent", "min_pairwise", "mean_pairwise"]
"""Which similarities of a window are compared with a threshold, and how they are joined."""


class ManifestsConfig(StageConfig):
    """What is taken into the pretrain and sft manifests."""

    statistic: Statistic = Field(
        default="min_pairwise",
        description="Which similarity of a window is compared with low and high.",
    )
    band: Literal["similarity", "quantile"] = Field(
        default="similarity",
        description="What low and high are: similarities, or quantiles (0 to 1) of the statistic "
        "over all windows.",
    )
    low: float = Field(
        default=0.0,
        description="Lowest similarity (or quantile) kept in sft, -1 to 1.",
        ge=-1,
        le=1,
    )
    high: float = Field(
        default=1.0,
        description="Highest similarity (or quantile) kept in sft, -1 to 1.",
        ge=-1,
        le=1,
    )
    near_duplicate: float | None = Field(
        default=0.995,
        description="Windows in which two scenes are at least this alike are left out of sft, -1 "
        "to 1; empty = off.",
        ge=-1,
        le=1,
    )
    max_shared_clips: int | None = Field(
        default=None,
        description="How many clips two sft samples may share, >= 0; the more similar window is "
        "kept. Empty = any.",
        ge=0,
    )
    max_per_source: int | None = Field(
        default=None,
        description="Most sft samples of one source, >= 1; the most similar are kept. Empty = any.",
        ge=1,
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
    test_percent: int = Field(
        default=0,
        description="Share of sources held out for testing, in percent, 0 to 50; chosen by source "
        "hash.",
        ge=0,
        le=50,
    )
    seed: int = Field(default=0, description="Seed of the pretrain draw, >= 0.", ge=0)

    @model_validator(mode="after")
    def _band(self) -> ManifestsConfig:
        if self.low > self.high:
            raise ValueError(f"low ({self.low:g}) must not be above high ({self.high:g})")
        if self.band == "quantile" and (self.low < 0 or self.high < 0):
            raise ValueError(f"quantiles are 0 to 1, found low {self.low:g}, high {self.high:g}")
        return self


class AblationConfig(StageConfig):
    """What the flow ablate-thresholds compares."""

    lows: tuple[float, ...] = Field(
        default=(-1.0, 0.0, 0.2, 0.4, 0.6, 0.8),
        description="Low thresholds tried, in the unit of manifests.band.",
        min_length=1,
    )
    statistics: tuple[Statistic, ...] = Field(
        default=(),
        description="Statistics tried with each threshold; empty = manifests.statistic alone.",
    )
    examples: int = Field(
        default=3,
        description="Windows shown just below and just above each threshold, 0 to 20.",
        ge=0,
        le=20,
    )
    truth: str | None = Field(
        default=None,
        description="Ground truth (Parquet or CSV: uri, start_s, end_s, story): windows whose "
        "scenes are of one story are related. Adds precision and recall.",
    )
    train_cells: int = Field(
        default=0,
        description="Cells, evenly chosen, to train, generate and evaluate with, >= 0.",
        ge=0,
    )
    max_minutes: float = Field(
        default=60.0,
        description="No further cell is trained after this many minutes, > 0.",
        gt=0,
    )


class DriftConfig(StageConfig):
    """How far a refresh may differ from the one before; empty limits are not checked."""

    max_dropped_ratio: float | None = Field(
        default=None,
        description="Largest share of the earlier snapshot's clips that may be gone, 0 to 1.",
        ge=0,
        le=1,
    )
    max_reject_change: float | None = Field(
        default=None,
        description="Largest change of the share of records that any stage rejects, 0 to 1.",
        ge=0,
        le=1,
    )
    max_distance: float | None = Field(
        default=None,
        description="Largest Kolmogorov-Smirnov distance of durations, heights or similarities, "
        "0 to 1.",
        ge=0,
        le=1,
    )


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
    filters: FiltersConfig = Field(default=FiltersConfig(), description="What is left out.")
    scorers: ScorersConfig = Field(
        default=ScorersConfig(), description="Optional networks that score clips."
    )
    dedup: DedupConfig = Field(default=DedupConfig(), description="Which repeats are left out.")
    export: ExportConfig = Field(default=ExportConfig(), description="Clips as files.")
    embedding: EmbeddingConfig = Field(
        default=EmbeddingConfig(), description="The similarity model."
    )
    windows: WindowsConfig = Field(
        default=WindowsConfig(), description="Which consecutive clips are compared."
    )
    manifests: ManifestsConfig = Field(
        default=ManifestsConfig(), description="What goes into the manifests."
    )
    ablation: AblationConfig = Field(
        default=AblationConfig(), description="What the flow ablate-thresholds compares."
    )
    drift: DriftConfig = Field(
        default=DriftConfig(), description="How far a refresh may differ from the one before."
    )
    max_error_ratio: float = Field(
        default=0.5,
        description="The run fails when a larger share of a stage's records fails, 0 to 1.",
        ge=0,
        le=1,
    )
