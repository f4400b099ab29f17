"""One row of an official list: what it says of a clip and, where it is ours, of the scene."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from curation.formats.collection import SPLITS
from curation.formats.official_export import OWN_CSV_COLUMNS
from curation.inputs import uris
from curation.inputs.lists import BadRow, number
from schemas.rows import Export, Scene

R = TypeVar("R")


@dataclass(frozen=True)
class Use:
    """One place of a pretrain clip: scene ``scene`` (from 0) of ``of``, sample ``number``."""

    sample_id: str
    number: int
    scene: int
    of: int
    split: str
    similarity: float | None
    trainable: bool


@dataclass(frozen=True)
class Entry:
    """One row; ``scene`` and ``export`` are None where the file alone says what it shows."""

    uri: str
    caption: str
    num_frames: int | None
    scene: Scene | None = None
    export: Export | None = None
    uses: tuple[Use, ...] = ()


def csv_entry(row: Mapping[str, Any], base: str, *, whole_file: bool) -> Entry:
    """A row of the pretrain CSV.

    Raises:
        BadRow: It names no file, or says something that cannot be.
    """
    numbers = {name: number(row, name, None) for name in ("fps", "width", "height", "num_frame")}
    said = {name: row[name] for name in ("path", "caption")} | {
        name: value if name == "fps" or value is None else _whole(name, value)
        for name, value in numbers.items()
    }
    if whole_file or not all(row.get(name) for name in OWN_CSV_COLUMNS):
        return _entry(said, base)
    try:
        own = {name: json.loads(row[name]) for name in OWN_CSV_COLUMNS}
    except (ValueError, RecursionError) as error:
        raise BadRow("bad_json", "a cell is not JSON", error) from error
    uses = own["samples"]
    if not isinstance(uses, list) or not uses:
        raise BadRow("bad_samples", "the clip is in no sample", repr(uses)[:80])
    entry = dataclasses.replace(
        _restored(said, own, base), uses=tuple(typed(Use, use) for use in uses)
    )
    for use in entry.uses:
        check_split(use.split)
    return entry


def sft_entry(value: Any, base: str, *, whole_file: bool) -> Entry:
    """A value of a group of the SFT JSON.

    Raises:
        BadRow: It names no file, or says something that cannot be.
    """
    if not isinstance(value, dict):
        raise BadRow("bad_row", "the value is no object", repr(value)[:80])
    said = {"path": value.get("url")} | {
        name: value.get(name) for name in ("caption", "fps", "width", "height", "num_frame")
    }
    return _entry(said, base) if whole_file or not is_ours(value) else _restored(said, value, base)


def is_ours(value: Any) -> bool:
    """Whether a value of the SFT JSON says all of its scene and file."""
    return isinstance(value, dict) and "scene" in value and "file" in value


def _entry(said: Mapping[str, Any], base: str) -> Entry:
    path, caption, frames = said["path"], said["caption"], said["num_frame"]
    if not isinstance(path, str) or not path:
        raise BadRow("missing_path", "the row names no video", path)
    if not isinstance(caption, str | None):
        raise BadRow("bad_caption", "the caption is no text", repr(caption)[:80])
    if not isinstance(frames, int | None):
        raise BadRow("bad_number", "num_frame is no whole number", repr(frames)[:80])
    return Entry(uris.join(base, path), caption or "", frames)


def _restored(said: Mapping[str, Any], own: Mapping[str, Any], base: str) -> Entry:
    entry = _entry(said, base)
    for name in ("scene", "file"):
        if not isinstance(own[name], dict):
            raise BadRow("bad_row", f"{name} is no object", repr(own[name])[:80])
    scene = typed(Scene, own["scene"] | {"caption": entry.caption})
    file = {
        "clip_id": scene.clip_id,
        "uri": entry.uri,
        "num_frames": entry.num_frames,
        "fps": said["fps"],
        "width_px": said["width"],
        "height_px": said["height"],
    }
    return dataclasses.replace(entry, scene=scene, export=typed(Export, own["file"] | file))


_CHECKS: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (float, int),
    "bool": (bool,),
    "float | None": (float, int, type(None)),
}


def typed(row_type: type[R], values: Any) -> R:
    """A row of values that come from outside; keys it does not know are left alone.

    Raises:
        BadRow: One is missing, or not of its type.
    """
    if not isinstance(values, dict):
        raise BadRow("bad_row", f"no {row_type.__name__.lower()}", repr(values)[:80])
    taken: dict[str, Any] = {}
    for field in dataclasses.fields(row_type):  # pyright: ignore[reportArgumentType]
        value = values.get(field.name)
        wanted = _CHECKS.get(str(field.type))
        if wanted is not None:
            if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
                found = f"{field.name} {value!r}"[:80]
                raise BadRow("bad_value", f"{row_type.__name__.lower()} of other types", found)
            value = float(value) if isinstance(value, int) and float in wanted else value
        taken[field.name] = value
    return row_type(**taken)


def check_split(name: str) -> None:
    """Check that a split is one of ours.

    Raises:
        BadRow: It is another.
    """
    if name not in SPLITS:
        raise BadRow("bad_split", f"the split is none of {', '.join(SPLITS)}", name)


def _whole(name: str, value: float) -> int:
    if not value.is_integer():
        raise BadRow("bad_number", f"{name} is no whole number", value)
    return int(value)
