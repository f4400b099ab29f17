"""The lists of Mask²DiT's published trainer as manifests.

A list that ``official_export`` wrote gives back the very samples and clip files, in order; caption,
path and size are what the official columns say now, so an edited caption counts. Of a list written
elsewhere each row is a scene which is the whole of its file, decoded and measured, for neither kind
says enough (no times; the JSON not even frames). Its samples are

- sft: in each group all the N consecutive values that the trainer may draw (a bad value breaks the
  run); they have no similarity.
- pretrain: drawn as for any pretrain manifest, for the trainer puts rows together at random itself.

A row or group that cannot be used becomes a reject and costs no other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from curation.clips import pretrain_trainable, sft_trainable
from curation.formats.collection import exports_beside
from curation.formats.json_array import read_array
from curation.formats.listed_clips import (
    Entry,
    Use,
    check_split,
    csv_entry,
    is_ours,
    sft_entry,
    typed,
)
from curation.formats.official_export import CSV_COLUMNS
from curation.formats.whole_files import STAGE, WholeFile, measure_files
from curation.inputs import uris
from curation.inputs.lists import BadRow, ListFile, read_rows, require_all
from curation.manifests import CLIP_COLUMNS, pretrain_manifest, split_of
from schemas.config.root import TriptychConfig
from schemas.errors import InputError, ManifestError
from schemas.rows import Export, Reject, Sample, Scene, stable_id
from schemas.storage import fingerprint_file
from schemas.tables import (
    EXPORTS,
    REJECTS,
    SAMPLES,
    from_arrow,
    to_arrow,
    write_batches,
    write_table,
)

Form = Literal["pretrain-csv", "sft-json"]
SUFFIX: dict[Form, str] = {"pretrain-csv": ".csv", "sft-json": ".json"}

_ROWS = 2048
"""Samples held as Python objects at once."""


@dataclass
class Imported:
    """What became of a list.

    Attributes:
        samples: Samples written.
        clips: Clip files they may use.
        restored: Rows that said everything themselves.
        measured: Rows whose file was decoded.
        corrected: Measured rows that gave another number of frames than the file has.
        rejects: Rows, groups and samples that could not be used.
    """

    samples: int
    clips: int
    restored: int
    measured: int
    corrected: int
    rejects: list[Reject]


def rejects_beside(manifest: Path) -> Path:
    """Where what was left out of an imported manifest is listed."""
    return manifest.with_suffix(".rejects.parquet")


def import_list(
    form: Form,
    path: Path,
    out: Path,
    config: TriptychConfig,
    *,
    root: Path | None = None,
    whole_files: bool = False,
) -> Imported:
    """Write a list as a manifest, with its clip files and rejects in tables beside it.

    Args:
        form: What the list is.
        path: The list.
        out: The manifest (Parquet); replaced atomically, after the tables beside it.
        config: Scenes per sample, the trainer's rules, splits, seed, and limits of decoding.
        root: Folder of relative paths; None = the list's.
        whole_files: Take a list of our own as one written elsewhere too.

    Raises:
        InputError: The list cannot be read, lacks columns, or has another suffix.
        ManifestError: No sample comes of it.
    """
    name = uris.uri_of(path)
    suffix = SUFFIX[form]
    if path.suffix.lower() != suffix:
        raise InputError("the list has another suffix", where=path, expected=f"{form} in *{suffix}")
    file = ListFile(name, path, uris.parent(name) if root is None else uris.uri_of(root))
    work = _Import(file, config, whole_files)
    tables = work.pretrain() if form == "pretrain-csv" else work.sft()
    metadata = {
        "imported_as": form,
        "imported_sha256": fingerprint_file(path),
        "code_version": version("triptych"),
    }

    def checked() -> Iterator[pa.Table]:
        found = 0
        for table in tables:
            found += table.num_rows
            yield table
        if not found:
            raise _nothing(file, work.rejects)
        write_table(exports_beside(out), EXPORTS, work.exports.values(), metadata)
        write_table(rejects_beside(out), REJECTS, work.rejects, metadata)

    samples = write_batches(out, SAMPLES, checked(), metadata)
    return Imported(
        samples, len(work.exports), work.restored, len(work.whole), work.corrected, work.rejects
    )


class _Import:
    """One list on its way; ``exports`` and ``rejects`` are whole once its tables are through."""

    def __init__(self, file: ListFile, config: TriptychConfig, whole_files: bool) -> None:
        self.file = file
        self.config = config
        self.whole_files = whole_files
        self.exports: dict[str, Export] = {}
        self.rejects: list[Reject] = []
        self.restored = 0
        self.corrected = 0
        self.whole: dict[str, WholeFile | Reject] = {}
        self._ids: set[str] = set()

    def sft(self) -> Iterator[pa.Table]:
        """Table ``samples`` of the groups of a JSON list, some rows at a time."""
        foreign: list[str] = []
        for group in read_array(self.file.path):
            values = group.get("values") if isinstance(group, dict) else None
            for value in values if isinstance(values, list) else []:
                if is_ours(value) and not self.whole_files:
                    continue
                try:
                    foreign.append(self._sft_entry(value).uri)
                except BadRow:  # reported in the second pass
                    continue
        self.whole = measure_files(foreign, self.config.curation.shots)
        yield from _tables(
            sample
            for number, group in enumerate(read_array(self.file.path), 1)
            for sample in self._group(f"group {number}", group)
        )

    def _group(self, label: str, group: Any) -> Iterator[Sample]:
        try:
            values = group.get("values") if isinstance(group, dict) else None
            if not isinstance(values, list) or not values:
                raise BadRow("bad_group", "the group has no values", repr(group)[:80])
            scenes = [
                self._scene_of(f"{label}, value {place}", value)
                for place, value in enumerate(values, 1)
            ]
            if "sample_id" in group and not self.whole_files:
                if None in scenes:
                    raise BadRow("incomplete_sample", "a value of the sample cannot be used")
                yield self._new(_own_sample(group, [s for s in scenes if s is not None]))
                return
            split = self._split(group.get("prefix") or next((s.source_id for s in scenes if s), ""))
            if not self._runs(scenes):
                found = f"{len(scenes)} values"
                raise BadRow("too_few_scenes", "no N usable values in a row", found)
            for run in self._runs(scenes):
                sample = Sample(
                    sample_id=stable_id(*(s.clip_id for s in run)),
                    kind="sft",
                    split=split,
                    scenes=run,
                    similarity=None,
                    trainable=all(self._sft_trainable(s) for s in run),
                )
                try:
                    yield self._new(sample)
                except BadRow as error:
                    self._reject(label, error)
        except BadRow as error:
            self._reject(label, error)

    def _runs(self, scenes: list[Scene | None]) -> list[list[Scene]]:
        n = self.config.curation.windows.scenes_per_sample
        windows = (scenes[i : i + n] for i in range(len(scenes) - n + 1))
        return [[s for s in w if s is not None] for w in windows if None not in w]

    def _scene_of(self, label: str, value: Any) -> Scene | None:
        try:
            entry = self._sft_entry(value)
            if not entry.caption.strip():
                raise BadRow("no_caption", "a scene without a caption cannot be trained on")
            return self._scene(entry)
        except BadRow as error:
            self._reject(label, error)
            return None

    def pretrain(self) -> Iterator[pa.Table]:
        """Table ``samples`` of the rows of a CSV list, some rows at a time."""
        require_all(self.file, CSV_COLUMNS)
        scenes: dict[str, Scene] = {}
        samples: dict[str, dict[int, tuple[Use, str]]] = {}
        foreign: list[tuple[str, Entry]] = []
        for label, row in read_rows(self.file):
            try:
                if isinstance(row, BadRow):
                    raise row
                entry = csv_entry(row, self.file.base, whole_file=self.whole_files)
                if entry.scene is None:
                    foreign.append((label, entry))
                    continue
                scene = self._scene(entry)
                scenes[scene.clip_id] = scene
                for use in entry.uses:
                    samples.setdefault(use.sample_id, {})[use.scene] = (use, scene.clip_id)
            except BadRow as error:
                self._reject(label, error)
        yield from _tables(self._own_samples(samples, scenes))
        if foreign:
            yield from self._drawn(foreign)

    def _own_samples(
        self, samples: dict[str, dict[int, tuple[Use, str]]], scenes: dict[str, Scene]
    ) -> Iterator[Sample]:
        def number(item: tuple[str, dict[int, tuple[Use, str]]]) -> tuple[int, str]:
            return min(use.number for use, _ in item[1].values()), item[0]

        for sample_id, places in sorted(samples.items(), key=number):
            use, _ = next(iter(places.values()))
            if sorted(places) != list(range(use.of)):
                found = f"scenes {sorted(places)} of {use.of}"
                error = BadRow("incomplete_sample", "the list lacks scenes of the sample", found)
                self._reject(f"sample {sample_id}", error)
                continue
            run = [scenes[places[place][1]] for place in range(use.of)]
            yield Sample(sample_id, "pretrain", use.split, run, use.similarity, use.trainable)

    def _drawn(self, foreign: list[tuple[str, Entry]]) -> Iterator[pa.Table]:
        self.whole = measure_files((e.uri for _, e in foreign), self.config.curation.shots)
        model = self.config.training.model
        clips: dict[str, dict[str, Any]] = {}
        for label, entry in foreign:
            try:
                scene = self._scene(entry)
                if scene.clip_id in clips:
                    raise BadRow("duplicate_clip", "an earlier row has the same file", entry.uri)
            except BadRow as error:
                self._reject(label, error)
                continue
            clips[scene.clip_id] = scene.__dict__ | {
                "caption": entry.caption.strip(),
                "trainable_pretrain": pretrain_trainable(
                    scene.num_frames, model.lengths[-1], model.max_stride
                ),
                "trainable_sft": self._sft_trainable(scene),
            }
        if not clips:
            return
        rows = sorted(clips.values(), key=lambda c: (c["source_id"], c["clip_id"]))
        columns = {name: [row[name] for row in rows] for name in CLIP_COLUMNS}
        cfg = self.config.curation
        manifest = pretrain_manifest(
            pa.table(columns), cfg.windows.scenes_per_sample, cfg.manifests
        )
        self.rejects += from_arrow(REJECTS, manifest.rejects)
        yield from manifest.samples()

    def _sft_entry(self, value: Any) -> Entry:
        return sft_entry(value, self.file.base, whole_file=self.whole_files)

    def _scene(self, entry: Entry) -> Scene:
        """An entry's scene; notes its clip file.

        Raises:
            BadRow: Its file cannot be used, or another entry gives the clip another file.
        """
        if entry.scene is not None and entry.export is not None:
            if self.exports.setdefault(entry.scene.clip_id, entry.export) != entry.export:
                raise BadRow("clip_conflict", "another row gives this clip another file", entry.uri)
            self.restored += 1
            return entry.scene
        whole = self.whole[entry.uri]
        if isinstance(whole, Reject):
            raise BadRow(whole.reason, whole.detail, entry.uri)
        self.exports.setdefault(whole.scene.clip_id, whole.export)
        self.corrected += entry.num_frames not in (None, whole.scene.num_frames)
        return replace(whole.scene, caption=entry.caption.strip())

    def _new(self, sample: Sample) -> Sample:
        if sample.sample_id in self._ids:
            raise BadRow("duplicate_sample", "an earlier group gives this sample")
        self._ids.add(sample.sample_id)
        return sample

    def _split(self, name: str) -> str:
        cfg = self.config.curation.manifests
        return split_of(name, cfg.val_percent, cfg.test_percent)

    def _sft_trainable(self, scene: Scene) -> bool:
        return sft_trainable(scene.num_frames, self.config.training.model.lengths[-1])

    def _reject(self, label: str, error: BadRow) -> None:
        self.rejects.append(replace(self.file.reject(label, error), stage=STAGE))


def _own_sample(group: dict[str, Any], scenes: list[Scene]) -> Sample:
    kept = {name: group.get(name) for name in ("sample_id", "split", "similarity", "trainable")}
    sample = typed(Sample, kept | {"kind": "sft", "scenes": scenes})
    check_split(sample.split)
    return sample


def _tables(samples: Iterable[Sample]) -> Iterator[pa.Table]:
    part: list[Sample] = []
    for sample in samples:
        part.append(sample)
        if len(part) == _ROWS:
            yield to_arrow(SAMPLES, part)
            part = []
    if part:
        yield to_arrow(SAMPLES, part)


def _nothing(file: ListFile, rejects: list[Reject]) -> ManifestError:
    common = Counter(r.reason for r in rejects).most_common(3)
    return ManifestError(
        "no sample comes of the list",
        where=file.uri,
        found=", ".join(f"{n} {reason}" for reason, n in common) or "an empty list",
        expected="groups of enough scenes, or rows of enough clips",
        do=f"correct the list; first: {rejects[0].record_id}: {rejects[0].detail}"
        if rejects
        else "give another list",
    )
