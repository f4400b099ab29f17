"""Finding source videos: folders, globs, URIs, and lists of every kind."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath

from curation.captions import CaptionSpan, join_spans
from curation.defects import open_plain
from curation.inputs import uris
from curation.inputs.downloads import Downloads
from curation.inputs.folders import find_files
from curation.inputs.lists import LIST_SUFFIXES, Listed, ListFile, detect_kind, read_list
from curation.inputs.official import read_pretrain_csv, read_sft_json
from curation.inputs.panda70m import read_panda70m
from curation.inputs.video2dataset import is_video2dataset, read_video2dataset
from schemas.config.curation import SourcesConfig
from schemas.errors import InputError, VideoDecodeError
from schemas.rows import Reject, Source

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Listing:
    """What is to be read: each place once, in order, with all captions given for it.

    ``rejects`` are rows and folders that name no readable place; they count as inputs.
    """

    videos: tuple[Listed, ...]
    rejects: tuple[Reject, ...]


def list_videos(cfg: SourcesConfig, downloads: Downloads) -> Listing:
    """Every configured video, named as in ``inputs.uris``; the order of inputs does not matter.

    Remote lists are fetched here; the videos are not. Relative paths in a list are joined to
    ``cfg.media_root``, or to the list's folder. A Panda-70M table with a media root is joined to
    its files by name.

    Raises:
        ConfigError: No backend is installed for an input's URI.
        InputError: An input matches nothing, or a list or remote folder cannot be read.
    """
    suffixes = frozenset(s.lower() for s in cfg.suffixes)
    captions: dict[str, list[CaptionSpan]] = defaultdict(list)
    rejects: dict[str, Reject] = {}
    for text in cfg.inputs:
        before = len(captions) + len(rejects)
        matched = False
        for found in _read_input(text, cfg, suffixes, downloads):
            matched = True
            if isinstance(found, Reject):
                rejects[found.record_id] = found
            else:
                captions[found.uri] += found.captions
        if not matched:
            raise InputError(
                "an input of curation.sources.inputs matches no video",
                found=text,
                expected=f"a file, a folder with videos ({' '.join(sorted(suffixes))}), a glob, "
                "a URI, or a list with rows",
                do="correct or remove the input",
            )
        log.info("stage=sources input=%s new=%d", text, len(captions) + len(rejects) - before)
    if cfg.captions_csv is not None:
        _add_captions(cfg.captions_csv, downloads, captions, rejects)
    return Listing(
        tuple(Listed(uri, join_spans(captions[uri])) for uri in sorted(captions)),
        tuple(rejects[record_id] for record_id in sorted(rejects)),
    )


def _read_input(
    text: str, cfg: SourcesConfig, suffixes: frozenset[str], downloads: Downloads
) -> Iterator[Listed | Reject]:
    path = uris.path_of(text)
    if path is not None and path.is_dir() and cfg.format in ("auto", "video2dataset"):
        if cfg.format == "video2dataset" or is_video2dataset(path):
            log.info("stage=sources input=%s format=video2dataset", text)
            yield from read_video2dataset(path, suffixes)
            return
    elif cfg.format == "video2dataset":
        raise InputError(
            "an output of video2dataset is a local folder", found=text, expected="a folder"
        )
    is_list = PurePosixPath(text.split("?")[0]).suffix.lower() in LIST_SUFFIXES
    if cfg.format not in ("auto", "videos") or (cfg.format == "auto" and is_list):
        for name in find_files(text, LIST_SUFFIXES):
            if isinstance(name, Reject):
                yield name
                continue
            with _opened_list(name, cfg.media_root, downloads) as file:
                yield from _read_listed(file, cfg, suffixes)
        return
    log.info("stage=sources input=%s format=videos", text)
    for found in find_files(text, suffixes):
        yield found if isinstance(found, Reject) else Listed(found)


@contextmanager
def _opened_list(text: str, base: str | None, downloads: Downloads) -> Generator[ListFile]:
    uri = uris.normal(text)
    try:
        with downloads.opened(uri) as path:
            open_plain(path)
            folder = uris.parent(uri) if base is None else uris.normal(base)
            yield ListFile(uri, path, folder)
    except (OSError, VideoDecodeError) as error:
        raise InputError(
            "a list of videos cannot be read",
            where=uri,
            found=error,
            do="correct the name in curation.sources, or remove it",
        ) from error


def _read_listed(
    file: ListFile, cfg: SourcesConfig, suffixes: frozenset[str]
) -> Iterator[Listed | Reject]:
    kind, why = (cfg.format, "configured") if cfg.format != "auto" else detect_kind(file)
    log.info("stage=sources input=%s format=%s by=%r", file.uri, kind, why)
    match kind:
        case "panda70m":
            media = None
            if cfg.media_root is not None:
                found = list(find_files(cfg.media_root, suffixes))
                yield from (f for f in found if isinstance(f, Reject))
                media = _by_name(f for f in found if isinstance(f, str))
            yield from read_panda70m(file, media)
        case "pretrain_csv":
            yield from read_pretrain_csv(file)
        case "sft_json":
            yield from read_sft_json(file)
        case _:
            yield from read_list(file)


def _by_name(names: Iterable[str]) -> Mapping[str, str]:
    """Files by name and by name without ending; of several the first in order."""
    index: dict[str, str] = {}
    for uri in sorted(names):
        name = PurePosixPath(uri)
        index.setdefault(name.name, uri)
        index.setdefault(name.stem, uri)
    return index


def _add_captions(
    csv_uri: str,
    downloads: Downloads,
    captions: Mapping[str, list[CaptionSpan]],
    rejects: dict[str, Reject],
) -> None:
    """Add the captions of a table that describes videos given otherwise."""
    matched = 0
    with _opened_list(csv_uri, None, downloads) as file:
        for found in read_panda70m(file):
            if isinstance(found, Reject):
                rejects[found.record_id] = found
            elif found.uri in captions:
                captions[found.uri].extend(found.captions)
                matched += 1
    if not matched:
        log.warning("stage=sources captions=0 no caption of %s belongs to a source", csv_uri)


def captions_by_source(
    videos: Iterable[Listed], sources: Sequence[Source]
) -> dict[str, tuple[CaptionSpan, ...]]:
    """All captions by ``source_id``, those given for its duplicates included.

    Args:
        videos: What was listed.
        sources: What was found at those places, before ``reject_duplicates``.
    """
    given = {video.uri: video.captions for video in videos}
    spans: dict[str, list[CaptionSpan]] = defaultdict(list)
    for source in sources:
        spans[source.source_id] += given.get(source.uri, ())
    return {source_id: join_spans(found) for source_id, found in spans.items() if found}
