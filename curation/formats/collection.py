"""What is exported: the manifests of a snapshot, or one that was imported, and the clips' files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from curation.inputs import uris
from schemas.arrow_compute import pc
from schemas.errors import ManifestError
from schemas.layout import Snapshot
from schemas.rows import Export, Sample, Scene
from schemas.tables import EMBEDDINGS, EXPORTS, SAMPLES, iter_tables, read_arrow, read_metadata

KINDS = ("sft", "pretrain")
SPLITS = ("train", "val", "test")

_ROWS = 2048
"""Samples held as Python objects at once."""

_NAMED = 3
"""How many ids an error message names."""


@dataclass(frozen=True)
class Collection:
    """Manifests with what is known of where they come from.

    Attributes:
        manifests: The table of samples of each kind.
        exports: The table of the clips' files; it need not be there.
        lineage: What made it, in words for readers: snapshot, config hash, code version, model.
    """

    manifests: dict[str, Path]
    exports: Path
    lineage: dict[str, str]

    @classmethod
    def of_snapshot(cls, snapshot: Snapshot) -> Collection:
        """Both manifests of a snapshot."""
        manifests = {kind: snapshot.manifest(kind) for kind in KINDS}
        found = read_metadata(manifests["sft"])
        lineage = {k: found[k] for k in ("config_hash", "code_version") if k in found}
        model = {"similarity_model": "model_id", "similarity_weights_sha256": "weights_sha256"}
        embeddings = snapshot.table("embeddings")
        if embeddings.is_file():
            rows = iter_tables(embeddings, EMBEDDINGS, list(model.values()), rows=1)
            for row in next((r.to_pylist() for r in rows), [])[:1]:
                lineage |= {name: row[column] for name, column in model.items()}
        return cls(manifests, snapshot.table("exports"), {"snapshot": snapshot.root.name} | lineage)

    @classmethod
    def of_manifest(cls, path: Path) -> Collection:
        """One manifest file with the table of clip files beside it (:func:`exports_beside`).

        Raises:
            ManifestError: It holds no sample, or samples of both kinds.
        """
        kinds = {k for t in iter_tables(path, SAMPLES, ["kind"]) for k in t["kind"].to_pylist()}
        if len(kinds) != 1 or not kinds <= set(KINDS):
            raise ManifestError(
                "a manifest holds samples of one kind",
                where=path,
                found=", ".join(sorted(kinds)) or "no samples",
                expected=" or ".join(KINDS),
            )
        lineage = {k: v for k, v in read_metadata(path).items() if k not in _OF_THE_TABLE}
        return cls({kinds.pop(): path}, exports_beside(path), lineage)

    def samples(self, kind: str, split: str | None = None) -> Iterator[Sample]:
        """Samples in the manifest's order, of one split or of all.

        Raises:
            ManifestError: There is no manifest of that kind.
        """
        if kind not in self.manifests:
            raise ManifestError(
                f"there is no manifest of kind {kind!r}",
                where=", ".join(map(str, self.manifests.values())),
                found=", ".join(self.manifests),
                expected=kind,
                do="give another manifest, or the format of this kind",
            )
        for table in iter_tables(self.manifests[kind], SAMPLES, rows=_ROWS):
            wanted = table if split is None else table.filter(pc.field("split") == split)
            for row in wanted.to_pylist():
                yield Sample(**(row | {"scenes": [Scene(**s) for s in row["scenes"]]}))


_OF_THE_TABLE = {"table", "schema_version"}


def exports_beside(manifest: Path) -> Path:
    """Where the clip files of an imported manifest are listed."""
    return manifest.with_suffix(".exports.parquet")


class ClipFiles:
    """The clips that have files of their own.

    Raises:
        ManifestError: The table cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        table = read_arrow(path, EXPORTS) if path.is_file() else EXPORTS.schema.empty_table()
        self._columns = {n: table[n].combine_chunks() for n in EXPORTS.schema.names}
        self._rows = {clip_id: i for i, clip_id in enumerate(table["clip_id"].to_pylist())}

    def __getitem__(self, clip_id: str) -> Export:
        row = self._rows[clip_id]
        return Export(**{name: values[row].as_py() for name, values in self._columns.items()})

    def path(self, clip_id: str) -> Path | None:
        """The clip's file, or None if it has none."""
        return uris.path_of(self[clip_id].uri) if clip_id in self._rows else None

    def require(self, samples: Iterable[Sample]) -> None:
        """Check that every clip has its file, of the size that was noted.

        Raises:
            ManifestError: Clips without one, or with another; their number and the first few.
        """
        seen: set[str] = set()
        missing: list[str] = []
        changed: list[str] = []
        for scene in (s for sample in samples for s in sample.scenes):
            if scene.clip_id in seen:
                continue
            seen.add(scene.clip_id)
            if scene.clip_id not in self._rows:
                missing.append(scene.clip_id)
            elif not _is_whole(self[scene.clip_id]):
                changed.append(self[scene.clip_id].uri)
        if missing:
            raise ManifestError(
                "clips have no file of their own",
                where=self._path,
                found=f"{len(missing)} of {len(seen)} clips, such as {_some(missing)}",
                expected="one exported file per clip",
                do="run `triptych refresh -s curation.export.mode=reencode` and export that "
                "snapshot; its table of rejects says why a clip could not be written",
            )
        if changed:
            raise ManifestError(
                "files of clips are gone or have changed",
                where=self._path,
                found=f"{len(changed)} of {len(seen)} files, such as {_some(changed)}",
                expected="the files as they were exported",
                do="refresh the dataset again: it writes them anew",
            )

    def read(self, clip_id: str) -> bytes:
        """The bytes of a clip's file, checked against the noted checksum.

        Raises:
            ManifestError: They differ.
        """
        export, path = self[clip_id], self.path(clip_id)
        assert path is not None, "require() first"
        data = path.read_bytes()
        found = hashlib.sha256(data).hexdigest()
        if found != export.sha256:
            raise ManifestError(
                "the file of a clip has changed",
                where=path,
                found=f"sha256 {found}",
                expected=f"sha256 {export.sha256}",
                do="refresh the dataset again: it writes the file anew",
            )
        return data


def _is_whole(export: Export) -> bool:
    path = uris.path_of(export.uri)
    return path is not None and path.is_file() and path.stat().st_size == export.size_bytes


def _some(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", …" if len(names) > _NAMED else "")
