"""A manifest as WebDataset shards: tar files of whole samples, which stream in order.

::

    <folder>/index.json                       what is in the shards, with their checksums
    <folder>/<split>/<kind>-000000.tar        <sample_id>.json, .scene0.mp4, .scene1.mp4, …

Equal manifests and clip files give equal bytes: no times, owners or names of this machine.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curation.formats.collection import SPLITS, ClipFiles, Collection
from curation.formats.official_export import Written, require_samples
from curation.formats.output_folder import written_folder
from schemas.rows import Sample
from schemas.storage import atomic_path, write_json

FORM = "webdataset"
INDEX = "index.json"

_BLOCK = 512
"""A tar file is made of blocks of so many bytes."""

_END = 10_240
"""Its end is padded to a multiple of this."""


@dataclass(frozen=True)
class ShardLimits:
    """A shard is closed before it would pass one of these; a larger sample has one of its own.

    Attributes:
        max_samples: Samples in a shard. video2dataset: 1000.
        max_bytes: Size of the tar file in bytes.
    """

    max_samples: int = 1000
    max_bytes: int = 1_000_000_000


def write_webdataset(
    data: Collection, kind: str, folder: Path, limits: ShardLimits, *, split: str | None = None
) -> Written:
    """Write the samples of a manifest as shards, in the manifest's order, a folder per split.

    Args:
        data: With a manifest of this kind.
        kind: ``sft`` or ``pretrain``.
        folder: Written whole, or not at all; replaces only its own earlier output.
        limits: Size of a shard.
        split: Only samples of this split; None = all.

    Raises:
        InputError: The folder holds something else.
        ManifestError: There are no samples, or clips have no files or changed ones.
    """
    files = ClipFiles(data.exports)
    files.require(data.samples(kind, split))
    samples: dict[str, int] = {}
    clips: set[str] = set()
    with written_folder(folder, FORM) as (building, record):
        shards: dict[str, list[dict[str, Any]]] = {}
        for name in SPLITS if split is None else (split,):
            members = (_members(sample, files) for sample in data.samples(kind, name))
            found = list(_write_shards(building / name, kind, members, limits))
            if found:
                shards[name] = found
                samples[name] = sum(shard["samples"] for shard in found)
        require_samples(samples, data, kind, split)
        for sample in data.samples(kind, split):
            clips.update(scene.clip_id for scene in sample.scenes)
        index = {"kind": kind, "lineage": data.lineage, "samples": samples, "shards": shards}
        write_json(building / INDEX, index)
        record["samples"] = samples
    paths = [folder / name / s["file"] for name in shards for s in shards[name]]
    return Written((folder / INDEX, *paths), samples, len(clips))


def _members(sample: Sample, files: ClipFiles) -> dict[str, bytes]:
    """The files of one sample by name: its key up to the first dot, then what it is."""
    scenes: list[dict[str, Any]] = []
    videos: dict[str, bytes] = {}
    for place, scene in enumerate(sample.scenes):
        export = files[scene.clip_id]
        name = f"scene{place}{Path(export.uri).suffix}"
        videos[f"{sample.sample_id}.{name}"] = files.read(scene.clip_id)
        scenes.append(
            {
                "video": name,
                "clip_id": scene.clip_id,
                "source_id": scene.source_id,
                "caption": scene.caption,
                "num_frames": export.num_frames,
                "fps": export.fps,
                "width_px": export.width_px,
                "height_px": export.height_px,
                "start_s": scene.start_s,
                "end_s": scene.end_s,
            }
        )
    fields = ("sample_id", "kind", "split", "similarity", "trainable")
    text = {name: getattr(sample, name) for name in fields} | {"scenes": scenes}
    data = json.dumps(text, ensure_ascii=False, allow_nan=False).encode()
    return {f"{sample.sample_id}.json": data, **videos}


def _write_shards(
    folder: Path, kind: str, samples: Iterator[dict[str, bytes]], limits: ShardLimits
) -> Iterator[dict[str, Any]]:
    """Fill one shard after the other; gives what the index says of each."""
    ahead = next(samples, None)
    number = 0
    while ahead is not None:
        path = folder / f"{kind}-{number:06d}.tar"
        count, size = 0, 0
        with ExitStack() as stack:
            tmp = stack.enter_context(atomic_path(path))
            tar = stack.enter_context(tarfile.open(tmp, "w", format=tarfile.USTAR_FORMAT))
            while ahead is not None and (not count or _fits(count, size, ahead, limits)):
                for name, data in ahead.items():
                    tar.addfile(_header(name, len(data)), io.BytesIO(data))
                count, size = count + 1, size + _size(ahead)
                ahead = next(samples, None)
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        yield {
            "file": path.name,
            "samples": count,
            "size_bytes": path.stat().st_size,
            "sha256": sha256,
        }
        number += 1


def _fits(count: int, size: int, sample: dict[str, bytes], limits: ShardLimits) -> bool:
    whole = size + _size(sample) + 2 * _BLOCK  # two empty blocks end the file
    padded = -(-whole // _END) * _END
    return count < limits.max_samples and padded <= limits.max_bytes


def _size(sample: dict[str, bytes]) -> int:
    """Bytes in a tar file: a header and whole blocks for each member."""
    return sum(_BLOCK + -(-len(data) // _BLOCK) * _BLOCK for data in sample.values())


def _header(name: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = size
    info.mode = 0o644
    return info  # mtime, uid and gid are 0, owner names empty
