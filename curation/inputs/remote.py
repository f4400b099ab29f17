"""Remote files: what version they are of, and their bytes, from where an interrupted read stopped.

Each kind of place is a small class with ``version``, ``size_bytes`` and ``fill``;
``inputs.downloads`` keeps what they give. Errors carry a reason: those in
``defects.TRANSIENT`` may pass.
"""

from __future__ import annotations

import functools
import tarfile
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

import fsspec
import fsspec.exceptions
import httpx
from fsspec.spec import AbstractFileSystem

from curation.defects import TRANSIENT
from schemas.errors import ConfigError, VideoDecodeError

PAUSES_S = (0.5, 2.0, 8.0)
"""Pauses between attempts, in seconds; an attempt that got further starts the count anew."""

_TIMEOUT_S = 30.0
"""A server that sends nothing for so long is given up."""

_BLOCK_BYTES = 8 * 1024 * 1024
_VERSION_KEYS = ("ETag", "etag", "generation", "mtime", "LastModified", "updated", "created")
"""Where the backends of fsspec tell that a file has changed, surest first."""

T = TypeVar("T")


class RemoteFile(Protocol):
    """One version of a file elsewhere."""

    @property
    def uri(self) -> str:
        """Where it is."""
        ...

    @property
    def version(self) -> str:
        """Changes whenever the bytes do; empty where the place does not tell."""
        ...

    @property
    def size_bytes(self) -> int | None:
        """None where the place does not tell."""
        ...

    def fill(self, file: BinaryIO, limit_bytes: int) -> None:
        """Append what is missing to ``file``, which stands at its end.

        Raises:
            VideoDecodeError: With the reason.
        """
        ...


def failure(reason: str, uri: str, found: object) -> VideoDecodeError:
    """The error of a file that could not be fetched."""
    return VideoDecodeError(
        "the file could not be fetched",
        reason=reason,
        where=uri,
        found=" ".join(str(found).split()),
    )


def too_large(uri: str, size_bytes: int, limit_bytes: int) -> VideoDecodeError:
    """The error of a file over ``max_file_gb``."""
    return failure("too_large", uri, f"{size_bytes} bytes or more, limit {limit_bytes}")


def persist(attempt: Callable[[], T], progress: Callable[[], int] = lambda: 0) -> T:
    """Repeat an attempt whose error may pass, with pauses.

    Args:
        attempt: Raises ``VideoDecodeError``.
        progress: How far it has got; an attempt that got further than any before starts the count
            of failures anew.
    """
    failures, best = 0, progress()
    while True:
        try:
            return attempt()
        except VideoDecodeError as error:
            if (now := progress()) > best:
                failures, best = 0, now
            if error.reason not in TRANSIENT or failures >= len(PAUSES_S):
                raise
        time.sleep(PAUSES_S[failures])
        failures += 1


@dataclass(frozen=True)
class HttpFile:
    """A file on a web server, as the headers of a GET describe it."""

    uri: str
    version: str
    size_bytes: int | None
    content_type: str

    @classmethod
    def ask(cls, uri: str) -> HttpFile:
        """Ask the server. With GET and no more than the headers: signed URLs allow no HEAD.

        Raises:
            VideoDecodeError: reason ``not_found``, ``forbidden``, ``http_error`` or transient.
        """

        def headers() -> HttpFile:
            with _get(uri, {}) as response:
                length = response.headers.get("content-length", "")
                return cls(
                    uri=uri,
                    version=_http_version(response),
                    size_bytes=int(length) if length.isdigit() else None,
                    content_type=response.headers.get("content-type", "").split(";")[0].lower(),
                )

        return persist(headers)

    @property
    def is_page(self) -> bool:
        """Whether it is a web page rather than a file."""
        return self.content_type in {"text/html", "application/xhtml+xml"}

    def fill(self, file: BinaryIO, limit_bytes: int) -> None:
        """See :meth:`RemoteFile.fill`."""
        persist(lambda: self._append(file, limit_bytes), file.tell)

    def _append(self, file: BinaryIO, limit_bytes: int) -> None:
        held = file.tell()
        if held and held == self.size_bytes:
            return
        # If-Range: a server whose file has changed sends all of the new one instead.
        resume = {"Range": f"bytes={held}-", "If-Range": self.version} if held else {}
        with _get(self.uri, resume) as response:
            if _http_version(response) not in ("", self.version):
                file.seek(0)
                file.truncate()
                raise failure("server_error", self.uri, "it changes while it is read")
            if held and not response.headers.get("content-range", "").startswith(f"bytes {held}-"):
                file.seek(0)
                file.truncate()
            try:
                for block in response.iter_raw():  # as it comes: nothing waits to be lost
                    file.write(block)
                    if file.tell() > limit_bytes:
                        raise too_large(self.uri, file.tell(), limit_bytes)
            except httpx.HTTPError as error:
                raise failure(
                    _http_reason(error), self.uri, str(error) or type(error).__name__
                ) from error
        if self.size_bytes is not None and file.tell() != self.size_bytes:
            # Longer or shorter than announced: nothing of it can be trusted.
            found = f"{file.tell()} bytes, announced {self.size_bytes}"
            file.seek(0)
            file.truncate()
            raise failure("unreachable", self.uri, found)


@contextmanager
def _get(uri: str, headers: Mapping[str, str]) -> Generator[httpx.Response]:
    """A streamed answer with a good status."""
    with httpx.Client(follow_redirects=True, timeout=_TIMEOUT_S) as client:
        try:
            request = client.build_request(
                "GET", uri, headers={"Accept-Encoding": "identity", **headers}
            )
            response = client.send(request, stream=True)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise failure(_http_reason(error), uri, str(error) or type(error).__name__) from error
        with closing(response):
            if response.status_code >= 300:
                status = f"{response.status_code} {response.reason_phrase}"
                raise failure(_status_reason(response.status_code), uri, status)
            yield response


def _http_version(response: httpx.Response) -> str:
    headers = response.headers
    return headers.get("etag") or headers.get("last-modified") or ""


def _http_reason(error: Exception) -> str:
    if isinstance(error, httpx.TimeoutException):
        return "fetch_timeout"
    return "unreachable" if isinstance(error, httpx.TransportError) else "http_error"


def _status_reason(status: int) -> str:
    if status in (404, 410):
        return "not_found"
    if status in (401, 403):
        return "forbidden"
    if status == 408:
        return "fetch_timeout"
    return "server_error" if status >= 500 or status == 429 else "http_error"


def open_store(uri: str) -> tuple[AbstractFileSystem, str]:
    """The fsspec file system of a URI, and the path in it; nothing remembered of earlier listings.

    Raises:
        ConfigError: No backend is installed for it.
    """
    try:
        store, path = fsspec.core.url_to_fs(uri)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            "a URI needs a file system that is not installed",
            where=uri,
            found=error,
            do="install the extra for it (s3: pip install 'triptych[s3]'), or correct the URI",
        ) from error
    store.invalidate_cache()
    return store, str(path)


@dataclass(frozen=True)
class StoredFile:
    """A file in object storage, or wherever else fsspec reads."""

    uri: str
    version: str
    size_bytes: int

    @classmethod
    def ask(cls, uri: str) -> StoredFile:
        """Ask the store.

        Raises:
            ConfigError: No backend is installed for it.
            VideoDecodeError: reason ``not_found``, ``forbidden`` or transient.
        """
        store, path = open_store(uri)
        info: dict[str, Any] = persist(lambda: _ask_store(uri, lambda: store.info(path)))
        if info.get("type") != "file" or info.get("size") is None:
            raise failure("not_a_file", uri, f"{info.get('type')} of size {info.get('size')}")
        versions = (str(info[k]) for k in _VERSION_KEYS if info.get(k) is not None)
        return cls(uri, next(versions, ""), int(info["size"]))

    def fill(self, file: BinaryIO, limit_bytes: int) -> None:
        """See :meth:`RemoteFile.fill`. The size was checked before: ``limit_bytes`` is kept."""
        store, path = open_store(self.uri)

        def append() -> None:
            while (start := file.tell()) < self.size_bytes:
                file.write(self._block(store, path, start))

        persist(append, file.tell)
        if (now := StoredFile.ask(self.uri)) != self:
            # Its blocks may be of both versions.
            file.seek(0)
            file.truncate()
            found = f"changed while it was read, from {self.version} to {now.version}"
            raise failure("server_error", self.uri, found)

    def _block(self, store: AbstractFileSystem, path: str, start: int) -> bytes:
        end = min(start + _BLOCK_BYTES, self.size_bytes)
        block: bytes = _ask_store(self.uri, lambda: store.cat_file(path, start=start, end=end))
        if len(block) != end - start:
            raise failure("unreachable", self.uri, f"{len(block)} of {end - start} bytes")
        return block


def _ask_store(uri: str, ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except FileNotFoundError as error:
        raise failure("not_found", uri, error) from error
    except PermissionError as error:
        raise failure("forbidden", uri, error) from error
    except (TimeoutError, fsspec.exceptions.FSTimeoutError) as error:
        raise failure("fetch_timeout", uri, str(error) or type(error).__name__) from error
    # Every backend of fsspec has errors of its own; what is none of the above may pass.
    except Exception as error:
        raise failure("unreachable", uri, f"{type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class TarMember:
    """A member of a plain tar file on this machine."""

    uri: str
    version: str
    size_bytes: int
    tar: Path
    offset: int

    @classmethod
    def ask(cls, uri: str, member: str, tar: Path, tar_version: str) -> TarMember:
        """Look the member up; a tar file's index is read once per process and version.

        Raises:
            VideoDecodeError: reason ``bad_tar`` or ``not_found``.
        """
        try:
            found = _tar_index(str(tar), tar_version).get(member)
        except (tarfile.TarError, OSError) as error:
            raise failure("bad_tar", uri, error) from error
        if found is None:
            raise failure("not_found", uri, f"no file {member} in {tar.name}")
        return cls(uri, tar_version, found[1], tar, found[0])

    def fill(self, file: BinaryIO, limit_bytes: int) -> None:
        """See :meth:`RemoteFile.fill`. The size was checked before: ``limit_bytes`` is kept."""
        with self.tar.open("rb") as tar:
            tar.seek(self.offset + file.tell())
            while missing := self.size_bytes - file.tell():
                block = tar.read(min(missing, _BLOCK_BYTES))
                if not block:
                    raise failure("bad_tar", self.uri, f"{missing} bytes are missing at its end")
                file.write(block)


@functools.lru_cache(maxsize=8)
def _tar_index(path: str, version: str) -> dict[str, tuple[int, int]]:
    """Offset and size of every file, by name. A tar file that breaks off has those before that."""
    assert version
    index: dict[str, tuple[int, int]] = {}
    with tarfile.open(path, "r:") as tar:
        try:
            for member in tar:
                if member.isreg():
                    index[member.name] = (member.offset_data, member.size)
        except tarfile.TarError:
            return index
    return index
