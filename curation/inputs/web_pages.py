"""Videos shown on web pages (YouTube and the like), through yt-dlp: the extra ``youtube``.

One stream with the picture is taken, whatever its sound: joining streams would need ffmpeg.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from curation.inputs.remote import failure, persist, too_large
from schemas.errors import ConfigError, VideoDecodeError
from schemas.storage import fingerprint

log = logging.getLogger(__name__)

_FORMAT = "bestvideo*[height<=?1080]/best[height<=?1080]/worst"
"""Training pictures are 480 pixels high; 1080 leaves room for crops and saves the 4K download."""

_REASONS = {401: "forbidden", 403: "forbidden", 404: "not_found", 410: "not_found"}


@dataclass(frozen=True)
class WebPage:
    """The video of a web page."""

    uri: str
    version: str
    size_bytes: int | None

    @classmethod
    def ask(cls, uri: str, limit_bytes: int) -> WebPage:
        """Ask yt-dlp what the page shows.

        Raises:
            ConfigError: The extra is not installed.
            VideoDecodeError: reason ``no_video_on_page``, ``not_found``, ``forbidden``, ``live`` or
                transient.
        """
        info: dict[str, Any] = persist(lambda: _run(uri, {"max_filesize": limit_bytes}, False))
        if info.get("is_live"):
            raise failure("live", uri, "a live stream has no end")
        # What a page shows under one id and format does not change, or its size does.
        parts = [info.get(k) for k in ("extractor_key", "id", "format_id", "filesize", "timestamp")]
        size = info.get("filesize")
        return cls(uri, fingerprint(*parts), int(size) if size else None)

    def fill(self, file: BinaryIO, limit_bytes: int) -> None:
        """See :meth:`RemoteFile.fill`; yt-dlp itself continues what it began."""
        part = Path(file.name)
        page = part.with_suffix(".page")
        options = {"outtmpl": str(page).replace("%", "%%"), "max_filesize": limit_bytes}
        persist(lambda: _run(self.uri, options, True))
        if not page.is_file():  # yt-dlp only says so in its log
            raise too_large(self.uri, limit_bytes, limit_bytes)
        try:
            file.truncate(0)
            file.seek(0)
            with page.open("rb") as source:
                shutil.copyfileobj(source, file)
        finally:
            page.unlink()
        if file.tell() > limit_bytes:
            raise too_large(self.uri, file.tell(), limit_bytes)


def _run(uri: str, options: dict[str, Any], download: bool) -> dict[str, Any]:
    try:
        from yt_dlp import YoutubeDL
        from yt_dlp.utils import YoutubeDLError
    except ImportError as error:
        raise ConfigError(
            "curation.sources.ytdlp needs yt-dlp",
            where=uri,
            do="install the extra (pip install 'triptych[youtube]'), or switch it off",
        ) from error
    fixed = {
        "cachedir": False,
        "format": _FORMAT,
        "logger": log,
        "noplaylist": True,
        "noprogress": True,
        "overwrites": True,
        "playlist_items": "1",
        "quiet": True,
        "socket_timeout": 30,
        "updatetime": False,
    }
    try:
        with YoutubeDL({**fixed, **options}) as page:  # pyright: ignore[reportArgumentType]
            info: Any = page.extract_info(uri, download=download)
    except YoutubeDLError as error:
        raise _failure(uri, error) from error
    if info and info.get("_type") in ("playlist", "multi_video"):
        info = next(iter(info.get("entries") or ()), None)
    if not info:
        raise failure("no_video_on_page", uri, "nothing to download")
    return info


def _failure(uri: str, error: Exception) -> VideoDecodeError:
    import yt_dlp.networking.exceptions as network

    causes: list[BaseException] = [error]
    while (cause := _cause(causes[-1])) is not None and cause not in causes:
        causes.append(cause)
    for cause in causes:
        if isinstance(cause, network.HTTPError):
            reason = _REASONS.get(
                cause.status, "http_error" if cause.status < 500 else "server_error"
            )
            return failure(reason, uri, cause)
        if isinstance(cause, network.TransportError):
            return failure("unreachable", uri, cause)
    return failure("no_video_on_page", uri, error)


def _cause(error: BaseException) -> BaseException | None:
    wrapped = getattr(error, "exc_info", None) or (None, None)
    return wrapped[1] or getattr(error, "cause", None) or error.__cause__
