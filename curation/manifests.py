"""Manifests, which training reads: ``sft`` of related scenes, ``pretrain`` of unrelated ones.

Verdicts are taken here from stored scores, so another threshold costs one pass over a table.
Everything is a pure function of its inputs, whatever order they come in.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Literal

from schemas.config.curation import ManifestsConfig
from schemas.errors import ManifestError
from schemas.rows import Clip, Reject, Sample, Scene, Window, stable_id

SFT_STAGE = "manifest_sft"
PRETRAIN_STAGE = "manifest_pretrain"


def split_of(source_id: str, val_percent: int) -> Literal["train", "val"]:
    """``val`` for ``val_percent`` % of sources, by hash: others do not move it."""
    return "val" if _number("split", source_id) % 100 < val_percent else "train"


def sft_samples(
    windows: Iterable[Window], clips: Iterable[Clip], cfg: ManifestsConfig
) -> tuple[list[Sample], list[Reject]]:
    """Windows whose statistic lies in ``[cfg.low, cfg.high]``, as samples.

    Rejected with the score: ``no_caption`` (a scene without one cannot be trained on),
    ``below_threshold``, ``above_threshold``. Returns one sample or one reject per window.
    """
    by_id = {c.clip_id: c for c in clips}
    samples: list[Sample] = []
    rejects: list[Reject] = []
    for window in sorted(windows, key=lambda w: w.sample_id):
        run = [by_id[clip_id] for clip_id in window.clip_ids]
        score: float = getattr(window, cfg.statistic)
        silent = [c.index for c in run if not c.caption]
        reason, detail = "", ""
        if silent:
            reason, detail = "no_caption", f"spans without a caption: {silent}"
        elif score < cfg.low:
            reason, detail = "below_threshold", f"{cfg.statistic} below {cfg.low:g}"
        elif score > cfg.high:
            reason, detail = "above_threshold", f"{cfg.statistic} above {cfg.high:g}"
        if reason:
            rejects.append(
                Reject(window.sample_id, SFT_STAGE, reason, detail, run[0].uri, False, score)
            )
            continue
        samples.append(
            Sample(
                sample_id=window.sample_id,
                kind="sft",
                split=split_of(window.source_id, cfg.val_percent),
                scenes=[_scene(c) for c in run],
                similarity=score,
                trainable=all(c.trainable_sft for c in run),
            )
        )
    return samples, rejects


def pretrain_samples(
    clips: Iterable[Clip], scenes_per_sample: int, cfg: ManifestsConfig
) -> tuple[list[Sample], list[Reject]]:
    """Rows of N unrelated clips: each row takes N different sources.

    Every clip offers ``cfg.uses_per_clip`` uses. Rows are drawn within a split, and clips that the
    trainer would refuse only meet their like, so that one short clip does not spoil a row. Each
    draw takes the sources with most uses left, which gives as many rows as possible; ties and the
    order within a row come from the seed. A clip is used again only after all others of its source.

    Returns:
        Samples, and one reject per use that found no place: ``no_caption`` or ``unused_clip_use``.
        So ``clips * uses_per_clip == samples * N + rejects``.

    Raises:
        ManifestError: The captioned clips come from fewer than N sources.
    """
    samples: list[Sample] = []
    rejects: list[Reject] = []
    groups: dict[tuple[str, bool], list[Clip]] = defaultdict(list)
    sources: set[str] = set()
    for clip in sorted(clips, key=lambda c: c.clip_id):
        if clip.caption:
            sources.add(clip.source_id)
            split = split_of(clip.source_id, cfg.val_percent)
            groups[split, clip.trainable_pretrain].append(clip)
        else:
            rejects += _unused([clip] * cfg.uses_per_clip, "no_caption", "clip without a caption")
    if len(sources) < scenes_per_sample:
        raise ManifestError(
            "too few sources for pre-training samples of unrelated scenes",
            found=f"{len(sources)} sources with captioned clips",
            expected=f"at least {scenes_per_sample} (curation.windows.scenes_per_sample)",
            do="add videos with captions",
        )
    for (split, trainable), group in sorted(groups.items()):
        rows, left = _draw(group, scenes_per_sample, cfg.uses_per_clip, cfg.seed)
        samples += _pretrain_rows(rows, split, trainable)
        rejects += _unused(left, "unused_clip_use", "no other source had a use left to pair with")
    return samples, rejects


def _draw(
    clips: Sequence[Clip], n: int, uses: int, seed: int
) -> tuple[list[list[Clip]], list[Clip]]:
    """Rows of ``n`` clips from different sources, and the uses left over."""
    queues: dict[str, list[Clip]] = defaultdict(list)
    for clip in clips:
        queues[clip.source_id].append(clip)
    for source_id, queue in queues.items():
        queue.sort(key=lambda c: _number(seed, c.clip_id))
        queues[source_id] = queue * uses
    heap = [(-len(queue), _number(seed, 0, s), s) for s, queue in queues.items()]
    heapq.heapify(heap)
    rows: list[list[Clip]] = []
    while len(heap) >= n:
        taken = [heapq.heappop(heap)[2] for _ in range(n)]
        taken.sort(key=lambda s: _number(seed, "order", len(rows), s))
        rows.append([queues[s].pop(0) for s in taken])
        for s in taken:
            if queues[s]:
                heapq.heappush(heap, (-len(queues[s]), _number(seed, len(rows), s), s))
    return rows, [clip for _, _, s in sorted(heap) for clip in queues[s]]


def _pretrain_rows(rows: Iterable[list[Clip]], split: str, trainable: bool) -> list[Sample]:
    seen: Counter[tuple[str, ...]] = Counter()
    samples: list[Sample] = []
    for row in rows:
        clip_ids = tuple(c.clip_id for c in row)
        samples.append(
            Sample(
                # Where sources are few the same row can be drawn again; it is another sample.
                sample_id=stable_id("pretrain", *clip_ids, seen[clip_ids]),
                kind="pretrain",
                split=split,
                scenes=[_scene(c) for c in row],
                similarity=None,
                trainable=trainable,
            )
        )
        seen[clip_ids] += 1
    return samples


def _unused(clips: Iterable[Clip], reason: str, detail: str) -> list[Reject]:
    return [Reject(c.clip_id, PRETRAIN_STAGE, reason, detail, c.uri, False) for c in clips]


def _scene(clip: Clip) -> Scene:
    return Scene(**{name: getattr(clip, name) for name in Scene.__dataclass_fields__})


def _number(*parts: object) -> int:
    """A number that depends only on ``parts`` and looks random."""
    digest = hashlib.sha256("\x1f".join(str(p) for p in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big")
