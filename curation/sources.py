"""Finding source videos and making one ``sources`` row of each."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from pathlib import Path

from curation.video import probe
from schemas.config.curation import SourcesConfig
from schemas.errors import InputError, VideoDecodeError
from schemas.rows import Reject, Source

STAGE = "sources"


def list_videos(cfg: SourcesConfig) -> list[Path]:
    """Every configured video once, as absolute paths in sorted order.

    An input is a file (taken whatever its suffix), a folder (searched recursively for
    ``cfg.suffixes``) or a glob pattern (``**`` crosses folders; folders it matches are searched).
    Hidden files are left out of folders.

    Raises:
        InputError: An input matches nothing.
    """
    suffixes = {s.lower() for s in cfg.suffixes}
    found: set[Path] = set()
    for text in cfg.inputs:
        # A name may hold brackets or stars: what exists under that very name is no pattern.
        # glob.glob, for Path.glob takes no absolute patterns.
        names = [text] if Path(text).exists() else glob.glob(text, recursive=True)  # noqa: PTH207
        videos = [video for name in names for video in _videos_in(Path(name), suffixes)]
        if not videos:
            raise InputError(
                "an input of curation.sources.inputs matches no video",
                found=text,
                expected=f"a file, a folder with videos ({' '.join(sorted(suffixes))}) or a glob",
                do="correct or remove the input",
            )
        found.update(video.absolute() for video in videos)
    return sorted(found)


def _videos_in(path: Path, suffixes: set[str]) -> Iterable[Path]:
    if not path.is_dir():
        return [path]
    return [
        child
        for child in path.rglob("*")
        if child.suffix.lower() in suffixes
        and child.is_file()
        and not any(part.startswith(".") for part in child.relative_to(path).parts)
    ]


def read_source(path: Path) -> Source | Reject:
    """Probe one file; a file that is no usable video becomes a reject with its reason."""
    try:
        return probe(path)
    except VideoDecodeError as error:
        return defect(error, str(path), STAGE, str(path))


def defect(error: VideoDecodeError, record_id: str, stage: str, uri: str) -> Reject:
    """The reject row of a known defect of an input."""
    detail = error.what if error.found is None else f"{error.what}: {error.found}"
    return Reject(record_id, stage, error.reason, detail, uri, failed=False)


def reject_duplicates(sources: Iterable[Source]) -> tuple[list[Source], list[Reject]]:
    """Keep, of files with the same bytes, the one whose path sorts first."""
    kept: dict[str, Source] = {}
    rejects: list[Reject] = []
    for source in sorted(sources, key=lambda s: s.uri):
        first = kept.setdefault(source.source_id, source)
        if first is not source:
            detail = f"same bytes as {first.uri}"
            rejects.append(
                Reject(source.uri, STAGE, "duplicate_source", detail, source.uri, failed=False)
            )
    return list(kept.values()), rejects
