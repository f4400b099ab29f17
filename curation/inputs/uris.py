"""How a video is named in tables: one text per place, printable, and enough to find it again.

A local file is its absolute path. Where the path is not UTF-8 it is the ``file://`` URI with
percent signs, for Parquet and JSON hold no other bytes. A remote file is its URI; a member of a
plain tar file is ``tar://<member>::<name of the tar file>``, the form fsspec uses.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import quote_from_bytes, unquote_to_bytes

from schemas.errors import InputError

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def uri_of(path: Path | str) -> str:
    """The name of a local file: absolute, links not followed, ``..`` removed."""
    text = os.path.normpath(os.path.abspath(path))  # noqa: PTH100 (Path keeps "..")
    try:
        text.encode()
    except UnicodeEncodeError:
        return "file://" + quote_from_bytes(os.fsencode(text))
    return text


def path_of(uri: str) -> Path | None:
    """The local file of a name, or None where it must be fetched first."""
    if uri.startswith("file://"):
        return Path(os.fsdecode(unquote_to_bytes(uri.removeprefix("file://"))))
    return None if has_scheme(uri) else Path(uri)


def has_scheme(text: str) -> bool:
    """Whether a text is a URI rather than a path."""
    return _SCHEME.match(text) is not None


def normal(text: str) -> str:
    """The name of what a user or a list wrote: a path (relative to here) or any URI."""
    path = path_of(text)
    return text if path is None else uri_of(path)


def join(base: str, text: str) -> str:
    """The name of ``text`` in the folder ``base``; an absolute path or URI stays what it is."""
    if has_scheme(text) or text.startswith("/"):
        return normal(text)
    folder = path_of(base)
    return f"{base.rstrip('/')}/{text}" if folder is None else uri_of(folder / text)


def parent(uri: str) -> str:
    """The folder a file lies in."""
    path = path_of(uri)
    return uri.split("?")[0].rpartition("/")[0] if path is None else uri_of(path.parent)


def tar_member(member: str, tar_uri: str) -> str:
    """The name of a member of a tar file."""
    return f"tar://{printable(member)}::{tar_uri}"


def split_tar_member(uri: str) -> tuple[str, str] | None:
    """``(member, name of the tar file)``, or None where ``uri`` names no member of one."""
    if not uri.startswith("tar://"):
        return None
    member, separator, tar_uri = uri.removeprefix("tar://").partition("::")
    if not separator:
        raise InputError(
            "a tar URI names no tar file", found=uri, expected="tar://<member>::<tar file>"
        )
    return member, tar_uri


def printable(text: str) -> str:
    """The text with bytes that are not UTF-8 written as backslash escapes."""
    return text.encode("utf-8", "backslashreplace").decode()
