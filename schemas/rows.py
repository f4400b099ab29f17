"""The rows of every table, one frozen dataclass each; tables.py derives Parquet schemas.

Words: *source* one video file; *shot* one take between two transitions; *clip* the usable span of
a shot;
*scene* a clip with its caption inside a sample; *sample* an ordered row of N scenes.
Spans are half-open ``[start, end)``. Time is kept exactly, as integer PTS ticks of a rational time
base;
seconds are derived.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field

TRIPTYCH_NAMESPACE = uuid.UUID("6f1d2a54-9f0e-5b57-8a53-3f0c1a7d6b21")


def stable_id(*parts: object) -> str:
    """A UUID (version 5) that depends only on ``parts``: the same parts always give the same id."""
    return str(uuid.uuid5(TRIPTYCH_NAMESPACE, "\x1f".join(str(p) for p in parts)))


@dataclass(frozen=True)
class Source:
    """One video file. ``source_id`` is the SHA-256 of its bytes, first 32 hex digits."""

    source_id: str
    uri: str
    size_bytes: int
    container: str
    codec: str
    pix_fmt: str
    width_px: int
    height_px: int
    rotation_deg: int
    sar_num: int
    sar_den: int
    time_base_num: int
    time_base_den: int
    avg_fps: float
    is_vfr: bool | None
    duration_s: float | None
    num_frames: int | None
    has_audio: bool


@dataclass(frozen=True)
class Shot:
    """One take between two transitions. ``shot_id`` = uuid5(source_id, start_pts, end_pts)."""

    shot_id: str
    source_id: str
    index: int
    start_pts: int
    end_pts: int
    start_frame: int
    end_frame: int
    start_s: float
    end_s: float
    transition_in: str
    transition_out: str
    detector: str
    confidence: float | None
    luminance: float
    motion: float
    sharpness: float


@dataclass(frozen=True)
class Clip:
    """The usable span of a shot after trimming. Virtual: nothing is re-encoded.

    ``clip_id`` = uuid5(shot_id, start_pts, end_pts). ``trainable_pretrain`` and ``trainable_sft``
    hold the trainers' own acceptance rules (see ``curation.clips``).
    """

    clip_id: str
    shot_id: str
    source_id: str
    uri: str
    index: int
    start_pts: int
    end_pts: int
    start_frame: int
    end_frame: int
    num_frames: int
    start_s: float
    end_s: float
    fps: float
    width_px: int
    height_px: int
    caption: str
    caption_source: str
    matching_score: float | None
    trainable_pretrain: bool
    trainable_sft: bool


@dataclass(frozen=True)
class Embedding:
    """One clip's unit-norm descriptor under one model; stored as a fixed-size float16 list."""

    clip_id: str
    model_id: str
    weights_sha256: str
    vector: list[float]


@dataclass(frozen=True)
class Window:
    """N consecutive clips of one source with all their pairwise similarities.

    ``similarities`` is the upper triangle of the N x N cosine matrix, row by row:
    (0,1), (0,2), ..., (0,N-1), (1,2), ... Scores are stored here; verdicts are taken later.
    """

    sample_id: str
    source_id: str
    clip_ids: list[str]
    similarities: list[float]
    min_adjacent: float
    mean_adjacent: float
    min_pairwise: float
    mean_pairwise: float
    largest_gap_s: float


@dataclass(frozen=True)
class Scene:
    """One clip with its caption inside a sample: all a trainer needs to read it."""

    clip_id: str
    source_id: str
    uri: str
    start_pts: int
    end_pts: int
    start_frame: int
    end_frame: int
    num_frames: int
    start_s: float
    end_s: float
    fps: float
    width_px: int
    height_px: int
    caption: str


@dataclass(frozen=True)
class Sample:
    """An ordered row of N scenes.

    ``kind`` is ``"sft"`` (related consecutive clips) or ``"pretrain"`` (unrelated ones).
    ``similarity`` is the statistic that decided (None for pretrain samples). ``trainable`` is the
    trainer's
    own acceptance rule applied to every scene.
    """

    sample_id: str
    kind: str
    split: str
    scenes: list[Scene]
    similarity: float | None
    trainable: bool


@dataclass(frozen=True)
class Prompt:
    """One story to generate.

    The ``prompts`` are generated together as scenes; each entry of ``extend_prompts`` then adds one
    scene auto-regressively.
    """

    prompt_id: str
    prompts: list[str]
    negative_prompt: str = ""
    seed: int = 0
    extend_prompts: list[str] = field(default_factory=list[str])


@dataclass(frozen=True)
class Reject:
    """A record that a stage did not pass on; ``failed`` marks unexpected errors."""

    record_id: str
    stage: str
    reason: str
    detail: str
    uri: str
    failed: bool
    score: float | None = None


@dataclass(frozen=True)
class Generation:
    """One generated video, or the error that prevented it.

    ``generation_id`` is a content key over prompt, seed, settings and model hash, so nothing is
    made twice.
    """

    generation_id: str
    prompt_id: str
    status: str
    video_uri: str
    prompts: list[str]
    num_scenes: int
    extended_scenes: int
    frames_per_scene: int
    num_frames: int
    width_px: int
    height_px: int
    fps: int
    seed: int
    scheduler: str
    steps: int
    guidance: float
    model_sha256: str
    error: str


@dataclass(frozen=True)
class Score:
    """Consistency scores of one generated video.

    ``semantic`` and ``sequence`` are None where the scorer has no text side for these prompts.
    """

    generation_id: str
    prompt_id: str
    model_id: str
    visual: float
    semantic: float | None
    sequence: float | None
    scored_scenes: int
