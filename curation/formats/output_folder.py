"""A folder that is written whole or not at all, and replaces nothing but its own earlier self."""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from schemas.errors import InputError
from schemas.storage import DONE, mark_done, read_done


@contextmanager
def written_folder(folder: Path, form: str) -> Generator[tuple[Path, dict[str, Any]]]:
    """Give a hidden folder to write to and a record to fill; on success it becomes ``folder``.

    ``_DONE.json`` then holds the record, ``form`` and the names of the files. On an error nothing
    has changed.

    Raises:
        InputError: ``folder`` holds anything but an earlier output of the same form.
    """
    _check_replaceable(folder, form)
    building = folder.with_name(f".{folder.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    record: dict[str, Any] = {}
    try:
        yield building, record
        files = sorted(_files(building))
        mark_done(building, {"form": form, "files": files} | record)
        _check_replaceable(folder, form)  # again: writing may have taken hours
        _replace(folder, building)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _replace(folder: Path, building: Path) -> None:
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.is_dir():
        folder.rename(old)
    try:
        building.rename(folder)
    except OSError:
        if old.is_dir():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _check_replaceable(folder: Path, form: str) -> None:
    if not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir())):
        return
    found: object = "a file"
    if folder.is_dir():
        done = read_done(folder) or {}
        foreign = sorted(_files(folder) - {DONE, *done.get("files", [])})
        if done.get("form") == form and not foreign:
            return
        found = f"form {done.get('form')!r}, foreign files {foreign[:3]}" if done else "other files"
    raise InputError(
        "the output folder is not empty and not an earlier output of this export",
        where=folder,
        found=found,
        expected=f"a new or empty folder, or an earlier export of form {form!r}",
        do="give another folder, or remove what is in this one",
    )


def _files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()}
