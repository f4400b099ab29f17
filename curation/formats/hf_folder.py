"""Manifests as a folder that Hugging Face ``datasets.load_dataset`` opens, with a dataset card.

::

    <folder>/README.md                       the card: configs sft and pretrain, lineage, columns
    <folder>/data/<kind>/<split>.parquet     one row per sample; train, validation, test
    <folder>/videos/<ab>/<clip_id>.mp4       with_videos: the clips, by the first digits of their id

Nothing of Triptych is needed to read it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from curation.formats.collection import SPLITS, ClipFiles, Collection
from curation.formats.dataset_card import card
from curation.formats.official_export import Written, require_samples
from curation.formats.output_folder import written_folder
from schemas.rows import Sample
from schemas.storage import atomic_path, write_text
from schemas.tables import SAMPLES

FORM = "huggingface"

HF_SPLITS: dict[str, str] = dict(zip(SPLITS, ("train", "validation", "test"), strict=True))
"""Our names of splits to Hugging Face's."""

_ROWS = 1024
"""Samples in a row group."""


def write_hf_folder(
    data: Collection, folder: Path, *, title: str, with_videos: bool = False
) -> Written:
    """Write all manifests as one dataset folder, a config each.

    Every scene has a column ``video``: with ``with_videos`` its clip's file in the folder,
    otherwise the path of the file that was exported on this machine, or null. ``uri`` and the span
    name the source either way.

    Args:
        data: The manifests; those without samples are left out.
        folder: Written whole, or not at all; replaces only its own earlier output.
        title: Heading of the card.
        with_videos: Copy the clips' files into the folder.

    Raises:
        InputError: The folder holds something else.
        ManifestError: There are no samples at all, or, with videos, clips have no files.
    """
    files = ClipFiles(data.exports)
    if with_videos:
        files.require(s for kind in data.manifests for s in data.samples(kind))
    counts: dict[str, dict[str, int]] = {}
    videos: dict[str, str | None] = {}
    with written_folder(folder, FORM) as (building, record):
        for kind in data.manifests:
            found = {
                HF_SPLITS[split]: rows
                for split in SPLITS
                if (rows := _write_split(data, kind, split, files, videos, building, with_videos))
            }
            if found:
                counts[kind] = found
        for kind in list(data.manifests)[:1] if not counts else ():
            require_samples({}, data, kind, None)
        write_text(building / "README.md", card(title, counts, data.lineage, with_videos))
        record["samples"] = counts
    paths = [folder / "data" / k / f"{s}.parquet" for k, splits in counts.items() for s in splits]
    samples = {f"{k}/{s}": n for k, splits in counts.items() for s, n in splits.items()}
    return Written((folder / "README.md", *paths), samples, len(videos))


def _schema() -> pa.Schema:
    """That of a manifest, with a file in every scene."""
    at = SAMPLES.schema.get_field_index("scenes")
    scene: Any = SAMPLES.schema.field(at).type.value_type
    fields = [*scene, pa.field("video", pa.string())]
    scenes = pa.field("scenes", pa.list_(pa.field("item", pa.struct(fields), nullable=False)))
    return SAMPLES.schema.set(at, scenes.with_nullable(False))


def _write_split(
    data: Collection,
    kind: str,
    split: str,
    files: ClipFiles,
    videos: dict[str, str | None],
    folder: Path,
    with_videos: bool,
) -> int:
    """Write the samples of a split, and the clips they need; no samples, no file."""
    schema = _schema()
    path = folder / "data" / kind / f"{HF_SPLITS[split]}.parquet"
    rows = 0
    with ExitStack() as stack:
        writer: pq.ParquetWriter | None = None
        for part in _parts(data.samples(kind, split)):
            if writer is None:
                tmp = stack.enter_context(atomic_path(path))
                writer = stack.enter_context(pq.ParquetWriter(tmp, schema, compression="zstd"))
            for clip_id in (s.clip_id for sample in part for s in sample.scenes):
                if clip_id not in videos:
                    videos[clip_id] = _video(clip_id, files, folder, with_videos)
            records = [_record(sample, videos) for sample in part]
            writer.write_table(pa.Table.from_pylist(records, schema=schema))
            rows += len(part)
    return rows


def _record(sample: Sample, videos: dict[str, str | None]) -> dict[str, Any]:
    record = dataclasses.asdict(sample)
    for scene in record["scenes"]:
        scene["video"] = videos[scene["clip_id"]]
    return record


def _video(clip_id: str, files: ClipFiles, folder: Path, copied: bool) -> str | None:
    path = files.path(clip_id)
    if not copied or path is None:
        return None if path is None else str(path)
    # The Hub takes at most 10,000 files in a folder.
    name = f"videos/{clip_id[:2]}/{clip_id}{path.suffix}"
    with atomic_path(folder / name) as tmp:
        tmp.write_bytes(files.read(clip_id))
    return name


def _parts(samples: Iterator[Sample]) -> Iterator[list[Sample]]:
    part: list[Sample] = []
    for sample in samples:
        part.append(sample)
        if len(part) == _ROWS:
            yield part
            part = []
    if part:
        yield part
