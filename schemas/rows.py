"""The rows of every table, one frozen dataclass each; tables.py derives Parquet schemas.

Words: *source* one video file; *shot* one take between two transitions; *clip* the usable span of
a shot;
*scene* a clip with its caption inside a sample; *sample* an ordered row of N scenes.
Spans are half-open ``[start, end)``. Time is kept exactly, as integer PTS ticks of a rational time
base;
seconds are derived.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field

TRIPTYCH_NAMESPACE = uuid.UUID("6f1d2a54-9f0e-5b57-8a53-3f0c1a7d6b21")
_VARIANT = {f"{digit:x}": f"{digit & 3 | 8:x}" for digit in range(16)}


def stable_id(*parts: object) -> str:
    """A UUID (version 5) that depends only on ``parts``: the same parts always give the same id."""
    return str(uuid.uuid5(TRIPTYCH_NAMESPACE, "\x1f".join(str(p) for p in parts)))


def stable_ids(parts: Iterable[Iterable[str]]) -> list[str]:
    """:func:`stable_id` of many, several times as fast."""
    start = hashlib.sha1(TRIPTYCH_NAMESPACE.bytes, usedforsecurity=False)
    ids: list[str] = []
    for strings in parts:
        digest = start.copy()
        digest.update("\x1f".join(strings).encode())
        h = digest.hexdigest()
        # RFC 9562: version 5 in the 13th digit, variant 10 in the first two bits of the 17th.
        ids.append(f"{h[:8]}-{h[8:12]}-5{h[13:16]}-{_VARIANT[h[16]]}{h[17:20]}-{h[20:32]}")
    return ids


@dataclass(frozen=True)
class Source:
    """One video file. ``source_id`` is the SHA-256 of its bytes, first 32 hex digits.

    ``packet_sha256`` is of the video stream's packets alone, so a remuxed copy has the same one.
    ``width_px`` and ``height_px`` are those of the coded picture, not rotated, not stretched.
    ``start_pts`` is the PTS of the first frame. None where only a full decode can tell.
    """

    source_id: str
    uri: str
    size_bytes: int
    packet_sha256: str
    container: str
    codec: str
    pix_fmt: str
    bit_depth: int
    width_px: int
    height_px: int
    rotation_deg: int
    sar_num: int
    sar_den: int
    time_base_num: int
    time_base_den: int
    start_pts: int | None
    avg_fps: float
    is_vfr: bool | None
    is_interlaced: bool | None
    has_edit_list: bool
    duration_s: float | None
    num_frames: int | None
    has_audio: bool


@dataclass(frozen=True)
class Doubt:
    """Frames ``[start_frame, end_frame)`` of a shot that may be a transition; a higher score, more.

    ``score`` is the detector's statistic over its threshold, >= 1.
    """

    start_frame: int
    end_frame: int
    score: float


@dataclass(frozen=True)
class Shot:
    """One take between two transitions. ``shot_id`` = uuid5(source_id, start_pts, end_pts).

    Shots partition the frames of a source. A gradual transition is shared by the two it joins:
    ``transition_in_frames`` at the start of this one and ``transition_out_frames`` at its end show
    more than this shot alone. Transitions are ``start``, ``end``, ``cut``, ``dissolve``, ``fade``,
    ``wipe`` or ``forced`` (cut by a length rule). ``doubts`` are places in between that may be
    transitions; clips leave them out (``clips.max_doubt``).

    Measured on the frames outside transitions, scored here and judged by ``curation.filters``:
    luminance, motion and sharpness (as named), ``black_ratio`` (share of black frames),
    ``duplicate_ratio`` (share of frames equal to the one before), ``still_ratio`` (share of frames
    that hardly differ from the one before), ``comb_ratio`` (share of frames with combs),
    ``flicker`` (mean change of luminance that reverses at the next frame), and the picture inside
    black bars (``crop_*``, in pixels of the coded picture).
    """

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
    transition_in_frames: int
    transition_out_frames: int
    detector: str
    confidence: float | None
    doubts: list[Doubt]
    luminance: float
    motion: float
    sharpness: float
    black_ratio: float
    duplicate_ratio: float
    still_ratio: float
    comb_ratio: float
    flicker: float
    crop_x_px: int
    crop_y_px: int
    crop_width_px: int
    crop_height_px: int


@dataclass(frozen=True)
class Clip:
    """The usable span of a shot after trimming. Virtual: nothing is re-encoded.

    ``clip_id`` = uuid5(shot_id, start_pts, end_pts). A long shot may give several clips. ``index``
    counts in time order the spans that could have become clips of this source, those left out
    included: two clips are consecutive if their indexes are. ``width_px`` and ``height_px`` are
    those of the upright picture with square pixels. ``trainable_pretrain`` and ``trainable_sft``
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
class Export:
    """One clip written as a file of its own.

    ``start_pts`` and ``end_pts`` are the span that the file really shows: with ``mode="copy"`` it
    begins at a key frame, maybe before the clip.
    """

    clip_id: str
    mode: str
    uri: str
    start_pts: int
    end_pts: int
    num_frames: int
    fps: float
    width_px: int
    height_px: int
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Embedding:
    """One clip's unit-norm descriptor under one model; stored as a fixed-size float16 list.

    ``source_id`` and ``start_pts`` are the clip's; they put the table into the order of clips.
    """

    clip_id: str
    model_id: str
    source_id: str
    start_pts: int
    weights_sha256: str
    vector: list[float]


@dataclass(frozen=True)
class CaptionScore:
    """How well a clip's caption says what it shows: cosine of text and clip under one model.

    ``long_text`` says what was done to captions longer than the model reads, ``text_chunks`` how
    many pieces this one was read in. ``similarity`` is None where the model has nothing to say of
    the caption. A clip without a caption has no row.
    """

    clip_id: str
    model_id: str
    weights_sha256: str
    long_text: str
    text_chunks: int
    similarity: float | None


@dataclass(frozen=True)
class ClipScore:
    """What one scorer says of one clip: its ``aesthetic`` score, or its ``text_area``.

    Scores are stored here; verdicts are taken later, by ``curation.filters``.
    """

    clip_id: str
    scorer_id: str
    weights_sha256: str
    value: float


@dataclass(frozen=True)
class Window:
    """N consecutive clips of one source with all their pairwise similarities.

    ``similarities`` is the upper triangle of the N x N cosine matrix, row by row:
    (0,1), (0,2), ..., (0,N-1), (1,2), ... Scores are stored here; verdicts are taken later.
    ``index`` is that of the first clip.
    """

    sample_id: str
    source_id: str
    index: int
    clip_ids: list[str]
    similarities: list[float]
    min_adjacent: float
    mean_adjacent: float
    min_pairwise: float
    mean_pairwise: float
    max_pairwise: float
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
class Latent:
    """One scene (``clip_id``) or caption (``caption``) in the latent cache, or why it is not there.

    ``shard`` is the safetensors file beside this table that holds it; None where a scene could not
    be encoded, and then ``reason`` and ``detail`` say why. ``frames`` are the frames that were
    read, by their number in the source.
    """

    key: str
    clip_id: str | None
    caption: str | None
    frames: list[int]
    shard: str | None
    reason: str | None
    detail: str | None


@dataclass(frozen=True)
class Prompt:
    """One story to generate.

    The ``prompts`` are generated together as scenes; each entry of ``extend_prompts`` then adds one
    scene auto-regressively. ``negative_prompts``, ``seeds`` and ``frames`` are lists over all these
    scenes, or empty: then ``negative_prompt``, ``seed`` and the configured number of frames serve
    every scene. ``given`` is a list over ``prompts``: the video file of a scene that is given, or
    "" for one to generate; empty = none is given. ``settings`` is a JSON object of sampling
    settings (``schemas.config.SamplingConfig``) in place of the configured ones, or "".
    """

    prompt_id: str
    prompts: list[str]
    negative_prompt: str = ""
    seed: int = 0
    extend_prompts: list[str] = field(default_factory=list[str])
    negative_prompts: list[str] = field(default_factory=list[str])
    seeds: list[int] = field(default_factory=list[int])
    frames: list[int] = field(default_factory=list[int])
    given: list[str] = field(default_factory=list[str])
    settings: str = ""


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

    ``generation_id`` is a content key over prompt, seeds, settings and model hash, so nothing is
    made twice. ``prompts``, ``negative_prompts``, ``seeds`` and ``scene_frames`` have one entry per
    scene; ``given_scenes`` and ``extended_scenes`` say how many of them were given as videos and
    how many were added auto-regressively.
    """

    generation_id: str
    prompt_id: str
    status: str
    video_uri: str
    video_sha256: str
    prompts: list[str]
    negative_prompts: list[str]
    seeds: list[int]
    num_scenes: int
    given_scenes: int
    extended_scenes: int
    scene_frames: list[int]
    num_frames: int
    width_px: int
    height_px: int
    fps: int
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
