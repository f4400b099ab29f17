"""Manifests as the lists that Mask²DiT's published trainer reads: pretrain CSV and SFT JSON.

The trainer wants one file per clip, and takes paths as they are (relative ones from where it is
started). Of the pretrain CSV it reads ``path``, ``caption`` and ``num_frame``, and puts rows
together itself; of the SFT JSON, from each group with enough values, ``url`` and ``caption`` of N
consecutive ones. It looks columns and keys up by name, so others do not disturb it. Here they hold
what the official ones cannot say, and ``official_import`` reads it back:

``scene``
    The scene in the manifest: its ids, its source and the span there (as JSON in a CSV cell).
``file``
    What the clip's file shows, its size and its checksum.
``samples``
    Pretrain: the samples the clip is in, and where, for the CSV has one row per clip, however often
    it is used.
``sample_id``, ``split``, ``similarity``, ``trainable``
    SFT: those of the sample, which is one group, so that the trainer can only draw it whole.

Source: Mask²DiT (github.com/Tianhao-Qi/Mask2DiT), ``PretrainVideoDataset``, ``SFTVideoDataset``.
"""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curation.formats.collection import ClipFiles, Collection
from schemas.errors import ManifestError
from schemas.rows import Export, Sample, Scene
from schemas.storage import atomic_path

CSV_COLUMNS = ("fps", "width", "height", "caption", "path", "num_frame")
OWN_CSV_COLUMNS = ("scene", "file", "samples")

SCENE_KEYS = tuple(f.name for f in dataclasses.fields(Scene) if f.name != "caption")
FILE_KEYS = ("mode", "start_pts", "end_pts", "size_bytes", "sha256")
"""What of an export the official keys do not hold."""


@dataclass(frozen=True)
class Written:
    """What an export wrote.

    Attributes:
        files: The files, or those that matter in a folder of many.
        samples: Samples by split.
        clips: Different clips.
    """

    files: tuple[Path, ...]
    samples: dict[str, int]
    clips: int


def write_pretrain_csv(
    data: Collection, path: Path, *, split: str | None = None, root: Path | None = None
) -> Written:
    """Write the pretrain manifest as a CSV, each clip where it first appears.

    Args:
        data: With a pretrain manifest.
        path: The CSV; replaced atomically.
        split: Only samples of this split; None = all.
        root: Paths are written relative to this folder; None = absolute.

    Raises:
        ManifestError: There are no samples, clips have no files, a file is not under ``root``, or
            samples disagree about a clip.
    """
    files = ClipFiles(data.exports)
    files.require(data.samples("pretrain", split))
    uses: dict[str, list[dict[str, Any]]] = {}
    shown: dict[str, int] = {}
    samples: dict[str, int] = {}
    for number, sample in enumerate(data.samples("pretrain", split)):
        samples[sample.split] = samples.get(sample.split, 0) + 1
        for use, scene in zip(_uses(number, sample), sample.scenes, strict=True):
            uses.setdefault(scene.clip_id, []).append(use)
            if shown.setdefault(scene.clip_id, hash(scene)) != hash(scene):
                raise _disagree(data, scene)
    require_samples(samples, data, "pretrain", split)
    with (
        atomic_path(path) as tmp,
        tmp.open("w", encoding="utf-8", newline="") as text,
    ):
        # Every text in quotes: the writer leaves a bare carriage return without them.
        writer = csv.writer(text, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
        writer.writerow((*CSV_COLUMNS, *OWN_CSV_COLUMNS))
        for scene in _first_appearances(data, split):
            export = files[scene.clip_id]
            official = (
                export.fps, export.width_px, export.height_px, scene.caption,
                _path_text(export, root), export.num_frames,
            )  # fmt: skip
            own = (_scene(scene), _file(export), uses[scene.clip_id])
            writer.writerow((*official, *map(_compact, own)))
    return Written((path,), samples, len(uses))


def write_sft_json(
    data: Collection, path: Path, *, split: str | None = None, root: Path | None = None
) -> Written:
    """Write the sft manifest as a JSON array, one group of N values and one line per sample.

    Arguments and errors as for :func:`write_pretrain_csv`.
    """
    files = ClipFiles(data.exports)
    files.require(data.samples("sft", split))
    samples: dict[str, int] = {}
    clips: set[str] = set()
    with atomic_path(path) as tmp, tmp.open("w", encoding="utf-8", newline="") as text:
        for sample in data.samples("sft", split):
            text.write(",\n" if samples else "[\n")
            values = [_value(s, files[s.clip_id], root) for s in sample.scenes]
            group = {"prefix": sample.scenes[0].source_id, "values": values}
            own = {k: getattr(sample, k) for k in ("sample_id", "split", "similarity", "trainable")}
            text.write(_compact(group | own))
            samples[sample.split] = samples.get(sample.split, 0) + 1
            clips.update(s.clip_id for s in sample.scenes)
        text.write("\n]\n")
        require_samples(samples, data, "sft", split)
    return Written((path,), samples, len(clips))


def _value(scene: Scene, export: Export, root: Path | None) -> dict[str, Any]:
    return {
        "vid": scene.clip_id,
        "width": export.width_px,
        "height": export.height_px,
        "duration": export.num_frames / export.fps,
        "fps": export.fps,
        "url": _path_text(export, root),
        "caption": scene.caption,
        "num_frame": export.num_frames,
        "scene": _scene(scene),
        "file": _file(export),
    }


def _scene(scene: Scene) -> dict[str, Any]:
    return {key: getattr(scene, key) for key in SCENE_KEYS}


def _file(export: Export) -> dict[str, Any]:
    return {key: getattr(export, key) for key in FILE_KEYS}


def _uses(number: int, sample: Sample) -> Iterator[dict[str, Any]]:
    """What each scene's clip says of its sample, the ``number``-th of the list."""
    for place in range(len(sample.scenes)):
        yield {
            "sample_id": sample.sample_id,
            "number": number,
            "scene": place,
            "of": len(sample.scenes),
            "split": sample.split,
            "similarity": sample.similarity,
            "trainable": sample.trainable,
        }


def _first_appearances(data: Collection, split: str | None) -> Iterator[Scene]:
    seen: set[str] = set()
    for sample in data.samples("pretrain", split):
        for scene in sample.scenes:
            if scene.clip_id not in seen:
                seen.add(scene.clip_id)
                yield scene


def _path_text(export: Export, root: Path | None) -> str:
    if root is None:
        return export.uri
    try:
        return Path(export.uri).relative_to(root.absolute()).as_posix()
    except ValueError as error:
        raise ManifestError(
            "a clip's file does not lie under the root",
            where=f"clip {export.clip_id}",
            found=export.uri,
            expected=f"a file in {root.absolute()}",
            do="give a --root that holds all files, or none for absolute paths",
        ) from error


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def _disagree(data: Collection, scene: Scene) -> ManifestError:
    return ManifestError(
        "two samples say different things of one clip",
        where=data.manifests["pretrain"],
        found=f"clip {scene.clip_id}",
        expected="one caption and one span per clip: the CSV has one row for it",
        do="write the manifest anew",
    )


def require_samples(
    samples: dict[str, int], data: Collection, kind: str, split: str | None
) -> None:
    """Check that there was something to write.

    Raises:
        ManifestError: There was not.
    """
    if not samples:
        raise ManifestError(
            "there is nothing to export",
            where=data.manifests[kind],
            found="no samples" + (f" of split {split!r}" if split else ""),
            do="export another split, or refresh the dataset with other thresholds",
        )
