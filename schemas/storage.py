"""Durable files: atomic writes, finished-dataset markers, the LATEST pointer, and fingerprints.

A reader never sees half a file: data goes to a temporary name in the same folder, is flushed to
disk, and
is renamed. A dataset counts as finished only when its ``_DONE.json`` exists, and that is written
last.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DONE = "_DONE.json"
LATEST = "LATEST"


@contextmanager
def atomic_path(path: Path) -> Generator[Path]:
    """Give a temporary path; on success it is synced and renamed to ``path``, on error removed.

    The temporary name keeps the suffix (writers such as PyAV choose the format by it) and holds
    the process
    id, so two processes writing the same content do not meet.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield tmp
        with tmp.open("rb+") as f:
            os.fsync(f.fileno())
        tmp.replace(path)
    finally:
        tmp.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically (UTF-8)."""
    with atomic_path(path) as tmp:
        tmp.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically: sorted keys, two spaces, final newline."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, default=str) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def mark_done(folder: Path, record: Mapping[str, Any]) -> None:
    """Mark a dataset folder as finished. Call it last: what it names must already be on disk."""
    write_json(folder / DONE, dict(record))


def read_done(folder: Path) -> dict[str, Any] | None:
    """The record of a finished dataset folder, or None if it is not finished."""
    marker = folder / DONE
    return read_json(marker) if marker.is_file() else None


def point_latest(folder: Path, name: str) -> None:
    """Make ``folder/LATEST`` name the newest finished child, in one atomic step."""
    write_text(folder / LATEST, name + "\n")


def latest(folder: Path) -> Path | None:
    """The child that ``folder/LATEST`` names, or None if there is none yet."""
    pointer = folder / LATEST
    return folder / pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else None


def fingerprint_file(path: Path) -> str:
    """SHA-256 of a file's bytes, first 32 hex digits (128 bits)."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()[:32]


def fingerprint(*values: Any) -> str:
    """Fingerprint of JSON-able values, first 16 hex digits."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def fingerprint_folder(folder: Path, pattern: str = "**/*") -> str:
    """Fingerprint of the names and bytes of a folder's files, first 32 hex digits.

    Markdown does not count: a model stays the same model when its card is edited.
    """
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.glob(pattern) if p.is_file() and p.suffix != ".md"):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
        digest.update(fingerprint_file(path).encode())
    return digest.hexdigest()[:32]
