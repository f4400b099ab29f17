"""The README of a dataset folder: what a reader who has nothing but the folder should know."""

from __future__ import annotations

import yaml

_COLUMNS = """\
| column | meaning |
|---|---|
| `sample_id` | id of the sample; depends only on its clips |
| `kind` | `sft`: consecutive, similar scenes of one video; `pretrain`: scenes of several videos |
| `split` | `train`, `val` or `test`, by a hash of the source video |
| `scenes` | the scenes in order, see below |
| `similarity` | the similarity that was compared with the threshold; null for `pretrain` |
| `trainable` | whether the trainer's own rule accepts every scene (it may be too short) |

Each of `scenes` has `clip_id`, `source_id` (SHA-256 of the source file, first 32 hex digits), `uri`
(the source, as it was named where it was curated), the span in it (`start_pts`, `end_pts` in ticks;
`start_frame`, `end_frame`; `start_s`, `end_s`; half-open), `num_frames`, `fps`, `width_px`,
`height_px` (upright, square pixels), `caption` and `video`, {video}."""

_VIDEO = {
    True: "the clip's file, relative to this folder",
    False: "the clip's file on the machine where it was exported, or null if there is none: the "
    "videos are not part of this folder",
}


def card(
    title: str, counts: dict[str, dict[str, int]], lineage: dict[str, str], with_videos: bool
) -> str:
    """A dataset card with the YAML head that ``datasets`` and the Hub read.

    Args:
        title: Heading.
        counts: Samples by config and split; the first config is the default.
        lineage: What made the data, in words.
        with_videos: Whether the clips are in the folder.
    """
    configs = [
        {"config_name": kind}
        | ({"default": True} if kind == next(iter(counts)) else {})
        | {"data_files": [{"split": s, "path": f"data/{kind}/{s}.parquet"} for s in splits]}
        for kind, splits in counts.items()
    ]
    head = {
        "pretty_name": title,
        "license": "unknown",
        "task_categories": ["text-to-video"],
        "configs": configs,
    }
    table = "\n".join(
        f"| `{kind}` | {split} | {n} |"
        for kind, splits in counts.items()
        for split, n in splits.items()
    )
    made_from = "\n".join(f"- {name.replace('_', ' ')}: `{v}`" for name, v in lineage.items())
    return f"""\
---
{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---

# {title}

Multi-scene video samples, curated with Triptych: each row is a sequence of scenes with captions.

| config | split | samples |
|---|---|---|
{table}

## Licence

Not stated. The rights in the videos and captions are their owners'; whoever publishes this folder
has to name the licence here and in the head of this file.

## Lineage

{made_from or "Not stated."}

## Columns

{_COLUMNS.format(video=_VIDEO[with_videos])}
"""
