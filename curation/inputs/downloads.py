"""Fetched files on this machine: found again by version, limited in size, safe among processes.

::

    <folder>/<fingerprint of the URI>.json       which version was fetched last; its content's id
    <folder>/<source_id><suffix>                 the bytes; the name is their own fingerprint
    <folder>/<fingerprint of URI, version>.part  a fetch under way or interrupted; it is continued
    <folder>/names/<fingerprint of the URI>      a link to a local file with an unprintable name

Readers hold a shared lock on the bytes, whoever fetches an exclusive one on the part; what nobody
holds may be evicted, least recently used first. Locks end with their process, however it ends.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections import defaultdict
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO
from urllib.parse import urlsplit

from curation.defects import open_plain
from curation.inputs import uris
from curation.inputs.remote import HttpFile, RemoteFile, StoredFile, TarMember, failure, too_large
from curation.inputs.web_pages import WebPage
from schemas.config.curation import VIDEO_SUFFIXES, SourcesConfig
from schemas.errors import VideoDecodeError
from schemas.storage import fingerprint, fingerprint_file, read_json, write_json

log = logging.getLogger(__name__)

_GB = 1e9


@dataclass(frozen=True)
class _Record:
    uri: str
    version: str
    source_id: str
    file: str


class Downloads:
    """The folder of fetched files. Cheap to make; any number of processes may share a folder."""

    def __init__(self, folder: Path, cfg: SourcesConfig) -> None:
        self.folder = folder
        self.ytdlp = cfg.ytdlp
        self.max_file_bytes = int(cfg.max_file_gb * _GB)
        self.limit_bytes = int(cfg.cache_limit_gb * _GB)

    @contextmanager
    def opened(self, uri: str, source_id: str | None = None) -> Generator[Path]:
        """A path at which a source can be read while the context lasts; local files as they are.

        With ``source_id``, bytes fetched earlier are taken without asking whether the remote file
        has changed since, and fetched bytes must be those; without, the newest version is given.

        Raises:
            ConfigError: No backend is installed for the URI.
            VideoDecodeError: It cannot be fetched: reason ``not_found``, ``forbidden``,
                ``too_large``, ``fetch_timeout``, ``unreachable``, ``server_error``, ``http_error``,
                ``web_page``, ``bad_tar`` or ``changed_since``.
        """
        if (path := uris.path_of(uri)) is not None:
            yield path if uri == str(path) else self._link(uri, path)
            return
        while True:
            record = self._held(uri)
            if record is None or source_id is None or record.source_id != source_id:
                record = self._fetch(uri)
                if source_id is not None and record.source_id != source_id:
                    raise failure("changed_since", uri, f"content {record.source_id} now")
            path = self.folder / record.file
            with _locked(path, fcntl.LOCK_SH) as file:
                if file is None:  # evicted by another process in between
                    continue
                now = time.time_ns()  # the system's own "now" is coarser than two uses are apart
                os.utime(path, ns=(now, now))
                yield path
                return

    def _link(self, uri: str, path: Path) -> Path:
        """A link with a printable name: decoders and JSON take no bytes that are not UTF-8."""
        link = self.folder / "names" / fingerprint(uri)
        if not link.is_symlink():
            link.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError):  # another process was first, with the same link
                link.symlink_to(path)
        return link

    def _fetch(self, uri: str) -> _Record:
        inside = uris.split_tar_member(uri)
        if inside is not None:
            member, tar_uri = inside
            with self.opened(tar_uri) as tar:
                try:
                    open_plain(tar)
                except OSError as error:
                    raise failure("bad_tar", uri, error) from error
                return self._keep(TarMember.ask(uri, member, tar, self._tar_version(tar)))
        if not uri.startswith(("http://", "https://")):
            return self._keep(StoredFile.ask(uri))
        file = HttpFile.ask(uri)
        if not file.is_page:
            return self._keep(file)
        if not self.ytdlp:
            raise VideoDecodeError(
                "the address is of a web page, not of a video file",
                reason="web_page",
                where=uri,
                found=file.content_type,
                do="set curation.sources.ytdlp to fetch videos from pages",
            )
        return self._keep(WebPage.ask(uri, self.max_file_bytes))

    def _tar_version(self, tar: Path) -> str:
        if tar.parent == self.folder:
            return tar.name  # the fingerprint of its bytes; its times change with every use
        stat = tar.stat()
        return fingerprint(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)

    def _keep(self, remote: RemoteFile) -> _Record:
        """The bytes of this version, fetched unless they are here."""
        if (remote.size_bytes or 0) > self.max_file_bytes:
            raise too_large(remote.uri, remote.size_bytes or 0, self.max_file_bytes)
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / f"{fingerprint(remote.uri, remote.version)}.part"
        record = self._current(remote)
        while record is None:
            part.touch()
            with _locked(part, fcntl.LOCK_EX) as file:
                if file is None:  # another process has finished it in between
                    record = self._current(remote)
                    continue
                record = self._current(remote)
                if record is None:
                    if not remote.version:
                        file.truncate(0)  # it may be of other content than what comes now
                    file.seek(0, os.SEEK_END)
                    remote.fill(file, self.max_file_bytes)
                    record = self._store(remote, part, file)
                else:
                    part.unlink(missing_ok=True)
        return record

    def _store(self, remote: RemoteFile, part: Path, file: BinaryIO) -> _Record:
        file.flush()
        os.fsync(file.fileno())
        source_id = fingerprint_file(part)
        suffix = PurePosixPath(urlsplit(remote.uri.partition("::")[0]).path).suffix
        name = source_id + (suffix.lower() if suffix.lower() in VIDEO_SUFFIXES else "")
        record = _Record(remote.uri, remote.version, source_id, name)
        path = self.folder / record.file
        if path.is_file():
            part.unlink()  # the same bytes under another URI, perhaps being read
        else:
            part.replace(path)
        write_json(self._record_path(remote.uri), asdict(record))
        self._evict(path)
        return record

    def _current(self, remote: RemoteFile) -> _Record | None:
        record = self._held(remote.uri) if remote.version else None
        return record if record and record.version == remote.version else None

    def _held(self, uri: str) -> _Record | None:
        """What was fetched last, if its bytes are still here."""
        path = self._record_path(uri)
        record = _Record(**read_json(path)) if path.is_file() else None
        return record if record and (self.folder / record.file).is_file() else None

    def _record_path(self, uri: str) -> Path:
        return self.folder / f"{fingerprint(uri)}.json"

    def _evict(self, newest: Path) -> None:
        """Make room: the least recently used go, but never ``newest`` nor what a process holds."""
        groups: dict[str, list[tuple[int, str, int]]] = defaultdict(list)
        for entry in os.scandir(self.folder):
            if not entry.name.endswith(".json") and entry.is_file(follow_symlinks=False):
                with suppress(FileNotFoundError):  # just renamed or evicted by another process
                    stat = entry.stat()
                    # yt-dlp's files lie beside the part whose lock guards them.
                    name = entry.name.partition(".")[0]
                    groups[name].append((stat.st_mtime_ns, entry.name, stat.st_size))
        excess = sum(size for g in groups.values() for _, _, size in g) - self.limit_bytes
        for group in sorted(groups.values(), key=max):
            names = {name for _, name, _ in group}
            if excess <= 0:
                return
            if newest.name in names:
                continue
            guard = next((n for n in names if n.endswith(".part") and ".page" not in n), min(names))
            with _locked(self.folder / guard, fcntl.LOCK_EX | fcntl.LOCK_NB) as file:
                if file is not None:
                    for _, name, size in group:
                        (self.folder / name).unlink(missing_ok=True)
                        excess -= size
                        log.info("cache=downloads state=evicted file=%s size_bytes=%d", name, size)


@contextmanager
def _locked(path: Path, how: int) -> Generator[BinaryIO | None]:
    """Hold a lock on a file; None if it is not there (any more), or held by others (LOCK_NB)."""
    try:
        file = path.open("rb+")
    except FileNotFoundError:
        yield None
        return
    with file:
        try:
            fcntl.flock(file, how)
        except BlockingIOError:
            yield None
            return
        # Who waited for the lock may hold that of a file since renamed or removed.
        yield file if _same(path, file) else None


def _same(path: Path, file: BinaryIO) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
