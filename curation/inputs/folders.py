"""Finding files in folders and globs, local and remote, whatever state the folders are in."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path, PurePosixPath

from fsspec.utils import glob_translate

from curation.defects import os_reject
from curation.inputs import uris
from curation.inputs.remote import open_store
from curation.sources import STAGE
from schemas.errors import InputError
from schemas.rows import Reject

_MAGIC = re.compile(r"[*?\[]")


def find_files(text: str, suffixes: Collection[str]) -> Iterator[str | Reject]:
    """Names of the files that ``text`` means, with rejects of what cannot be looked into.

    ``text`` is a file (taken whatever its suffix), a folder (searched recursively for ``suffixes``)
    or a glob (``**`` crosses folders; folders it matches are searched). Hidden files are left out
    of folders. An http(s) URI is always one file, for the web has no folders.

    Raises:
        InputError: A remote folder cannot be listed.
    """
    path = uris.path_of(text)
    if path is None:
        yield from _find_remote(text, suffixes)
    elif os.path.lexists(path):  # a name may hold brackets or stars
        yield from _walk(path, suffixes) if path.is_dir() else [uris.uri_of(path)]
    elif "**" in path.parts:
        yield from _find_deep(path, suffixes)
    else:
        # glob.glob, for Path.glob takes no absolute patterns.
        for name in sorted(glob.glob(str(path))):  # noqa: PTH207
            found = Path(name)
            yield from _walk(found, suffixes) if found.is_dir() else [uris.uri_of(found)]


def _find_deep(pattern: Path, suffixes: Collection[str]) -> Iterator[str | Reject]:
    # glob follows links that lead back up until the system stops it, which two links make
    # exponential; so the tree is walked once and matched.
    pattern = pattern.absolute()
    fixed = next(i for i, part in enumerate(pattern.parts) if _MAGIC.search(part))
    matches = re.compile(glob_translate(str(pattern))).match
    for found in _walk(Path(*pattern.parts[:fixed]), None):
        path = None if isinstance(found, Reject) else uris.path_of(found)
        inside = path is not None and any(matches(str(p)) for p in path.parents)
        if path is None or matches(str(path)) or (inside and _wanted(path, suffixes)):
            yield found


def _walk(root: Path, suffixes: Collection[str] | None) -> Iterator[str | Reject]:
    """Files below a folder, each folder once even where links lead to it again."""
    trail: dict[str, tuple[int, int]] = {}
    seen: set[tuple[int, int]] = set()
    refused: list[OSError] = []
    for folder, names, files in os.walk(root, onerror=refused.append, followlinks=True):
        here = Path(folder)
        try:
            found = here.stat()
        except OSError as error:  # gone since it was listed
            refused.append(error)
            names.clear()
            continue
        identity = (found.st_dev, found.st_ino)
        if identity in seen:
            names.clear()
            if identity in (trail.get(str(p)) for p in here.parents):
                uri = uris.uri_of(here)
                detail = "the link leads back to a folder above it"
                yield Reject(uri, STAGE, "symlink_loop", detail, uri, failed=False)
            continue
        seen.add(identity)
        trail[folder] = identity
        names[:] = sorted(n for n in names if not n.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and _wanted(here / name, suffixes):
                yield uris.uri_of(here / name)
    for error in refused:
        yield os_reject(error, STAGE, uris.uri_of(os.fsdecode(error.filename)))


def _wanted(path: PurePosixPath | Path, suffixes: Collection[str] | None) -> bool:
    return suffixes is None or path.suffix.lower() in suffixes


def _find_remote(uri: str, suffixes: Collection[str]) -> Iterator[str]:
    if uri.startswith(("http://", "https://", "tar://")):
        yield uri
        return
    store, root = open_store(uri)
    try:
        if _MAGIC.search(root) and not store.exists(root):
            tops = sorted(str(p) for p in store.glob(root))
        else:
            tops = [root]
        for top in tops:
            if not store.isdir(top):
                yield str(store.unstrip_protocol(top))
                continue
            for name in _visible(top, store.find(top)):
                if _wanted(PurePosixPath(name), suffixes):
                    yield str(store.unstrip_protocol(name))
    # Every backend of fsspec has errors of its own.
    except Exception as error:
        raise InputError(
            "a remote folder of curation.sources.inputs cannot be listed",
            where=uri,
            found=f"{type(error).__name__}: {error}",
            do="check the name, the credentials and the network",
        ) from error


def _visible(top: str, names: Iterable[str]) -> Iterator[str]:
    for name in sorted(names):
        below = name.removeprefix(top).split("/")
        if not any(part.startswith(".") for part in below):
            yield name
