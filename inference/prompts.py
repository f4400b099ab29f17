"""Prompt manifests: one story per row, checked row by row before any model is loaded.

Parquet, CSV, JSONL or JSON (an array of objects), all with the same columns:

=================== ===============================================================================
``prompt_id``       Name of the story; each only once.
``prompts``         List of texts: the scenes generated together, 1 to 16.
``extend_prompts``  List of texts: scenes added one by one behind them.
``negative_prompt`` Text: what guidance leads away from.
``seed``            Whole number from 0; default 0.
``frames``          Frames of every scene: 1 + a multiple of 4; default: the model's.
``given``           List over ``prompts``: video file of a scene that is not generated, "" for the
                    others. A path is relative to the manifest.
``settings``        Object of sampling settings in place of the configured ones.
=================== ===============================================================================

Only ``prompt_id`` and ``prompts`` are needed. Where scenes differ, lists over all scenes stand in
place of one value: ``negative_prompts``, ``seeds``, and ``frames`` as a list. A list may also be
numbered columns (``prompt_1``, ``prompt_2``, …, ``seed_1``, …) or JSON in one cell, a setting a
column of its own (``steps``, ``guidance``, …). Other columns are notes, unless the name is so like
one of these that it is probably meant.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from curation.inputs import uris
from inference.prompt_columns import (
    SETTINGS,
    Mistakes,
    frames_of,
    is_column,
    is_said,
    misspelt,
    nearest,
    optional_texts,
    scene_texts,
    seed_of,
    seeds_of,
)
from inference.prompt_formats import Record, is_nothing, read_records, write_text_records
from inference.story import sampling_of
from schemas.config import TriptychConfig
from schemas.errors import ManifestError
from schemas.rows import Prompt, Reject
from schemas.tables import PROMPTS, from_arrow, to_arrow, write_table

log = logging.getLogger(__name__)

STAGE = "prompts"
MAX_SCENES = 16
"""Most scenes generated together; the same limit as ``training.model.scenes``."""


def read_prompts(path: Path, config: TriptychConfig) -> tuple[list[Prompt], list[Reject]]:
    """Read a prompt manifest and check every row.

    Args:
        path: The manifest (see the module's columns).
        config: ``generation`` holds the sampling settings that a row may override.

    Returns:
        The good rows in file order, and one reject per bad row: ``detail`` gives its place (line of
        CSV and JSONL, number of the row otherwise) and everything wrong with it, ``reason`` the
        first mistake.

    Raises:
        ManifestError: The file cannot be read (see ``read_records``) or lacks a needed column.
    """
    return check_records(path, read_records(path), config)


def check_records(
    path: Path, records: Sequence[Record], config: TriptychConfig
) -> tuple[list[Prompt], list[Reject]]:
    """:func:`read_prompts` of what was read from ``path``, in whatever way."""
    _check_needed(path, records)
    prompts: list[Prompt] = []
    rejects: list[Reject] = []
    seen: dict[str, str] = {}
    folder = uris.parent(uris.uri_of(path))
    for record in records:
        mistakes = list(record.mistakes)
        if not mistakes:
            prompt = _check_row(record.values, config, folder, mistakes)
            first = record.place if mistakes else seen.setdefault(prompt.prompt_id, record.place)
            if first != record.place:
                text = f"{prompt.prompt_id!r} is already {first}"
                mistakes.append(("duplicate_prompt_id", text))
            elif not mistakes:
                prompts.append(prompt)
        if mistakes:
            rejects.append(_reject(record, mistakes, path))
    names = {n for r in records for n in r.values if not is_column(n) and n[0] != "_"}
    notes = sorted(n for n in names if misspelt(n) is None)
    if notes:
        log.warning("columns not read path=%s columns=%s", path, ",".join(notes))
    log.info("prompts read path=%s good=%d bad=%d", path, len(prompts), len(rejects))
    return prompts, rejects


def write_prompts(path: Path, prompts: Iterable[Prompt]) -> int:
    """Write a prompt manifest in the format of the name's ending. Returns the number of rows.

    Raises:
        ManifestError: Two rows share a ``prompt_id``, or the ending is not known.
    """
    if path.suffix.lower() == ".parquet":
        return write_table(path, PROMPTS, prompts)
    rows = from_arrow(PROMPTS, to_arrow(PROMPTS, prompts))  # checked, and in the table's order
    records = [{k: v for k, v in asdict(row).items() if v} for row in rows]
    for record in records:
        if "settings" in record:
            record["settings"] = json.loads(record["settings"])
    write_text_records(path, records)
    return len(records)


def _check_needed(path: Path, records: Sequence[Record]) -> None:
    names = sorted({name for record in records for name in record.values})
    missing = [c for c in ("prompt_id", "prompts") if not is_said(c, names)]
    if missing and names:
        near = [text for name in names if (text := misspelt(name)) is not None]
        raise ManifestError(
            "the prompt manifest lacks columns",
            where=path,
            found=f"columns {names}",
            expected=f"{missing} too",
            do="; ".join(near) or "add them: prompt_id (text), prompts (list, one text per scene)",
        )


def _reject(record: Record, mistakes: Mistakes, path: Path) -> Reject:
    name = str(record.values.get("prompt_id", "")).strip()
    return Reject(
        record_id=name or record.place.replace(" ", "-"),
        stage=STAGE,
        reason=mistakes[0][0],
        detail=f"{record.place}: " + "; ".join(text for _, text in mistakes),
        uri=str(path),
        failed=False,
    )


def _check_row(
    values: Mapping[str, Any], config: TriptychConfig, folder: str, mistakes: Mistakes
) -> Prompt:
    """One row as a Prompt, not to be used if there are mistakes."""
    mistakes += [("unknown_column", text) for n in values if (text := misspelt(n)) is not None]
    prompt_id = values.get("prompt_id")
    if isinstance(prompt_id, int) and not isinstance(prompt_id, bool):
        prompt_id = str(prompt_id)
    if not isinstance(prompt_id, str) or not prompt_id.strip():
        mistakes.append(("missing_prompt_id", f"prompt_id is {prompt_id!r}"))
    before = len(mistakes)
    prompts = scene_texts(values, "prompts", mistakes)
    if not prompts and len(mistakes) == before:
        mistakes.append(("empty_prompts", "prompts holds no scene"))
    if len(prompts) > MAX_SCENES:
        text = f"{len(prompts)} prompts, but a story begins with 1 to {MAX_SCENES} scenes"
        mistakes.append(("wrong_number_of_prompts", f"{text}: put the rest in extend_prompts"))
    extend = scene_texts(values, "extend_prompts", mistakes)
    negative = values.get("negative_prompt", "")
    if not isinstance(negative, str):
        mistakes.append(("wrong_type", f"negative_prompt is {negative!r}, not text"))
    scenes = len(prompts) + len(extend) if prompts else 0
    return Prompt(
        prompt_id=cast("str", prompt_id),
        prompts=prompts,
        negative_prompt=cast("str", negative),
        seed=seed_of(values.get("seed", 0), "seed", mistakes),
        extend_prompts=extend,
        negative_prompts=optional_texts(values, "negative_prompts", scenes, mistakes),
        seeds=seeds_of(values, scenes, mistakes),
        frames=frames_of(values, scenes, mistakes),
        given=_given(values, len(prompts), folder, bool(extend), mistakes),
        settings=_settings(values, config, mistakes),
    )


def _given(
    values: Mapping[str, Any], scenes: int, folder: str, is_extended: bool, mistakes: Mistakes
) -> list[str]:
    """The given files by full name; a row without any has no list."""
    names = optional_texts(values, "given", scenes, mistakes)
    given = [uris.join(folder, name) if name else "" for name in names]
    for index, uri in enumerate(given):
        path = uris.path_of(uri)
        if uri and (path is None or not path.is_file()):
            what = "is no file of this machine" if path is None else "is not there"
            mistakes.append(("given_not_found", f"given[{index}] {what}: {uri}"))
    if given and all(given) and not is_extended:
        mistakes.append(("nothing_to_generate", "every scene is given, and none is added"))
    return given if any(given) else []


def _settings(values: Mapping[str, Any], config: TriptychConfig, mistakes: Mistakes) -> str:
    """The row's own sampling settings as JSON, "" if it has none."""
    said = values.get("settings", {})
    if isinstance(said, str):
        try:
            said = json.loads(said)
        except ValueError as error:
            mistakes.append(("invalid_settings", f"settings is not JSON: {error}"))
            return ""
    if not isinstance(said, dict):
        mistakes.append(("invalid_settings", f"settings is {type(said).__name__}, not an object"))
        return ""
    own = {k: v for k, v in cast("dict[str, Any]", said).items() if not is_nothing(v)}
    columns = {name: values[name] for name in SETTINGS if name in values}
    for name in sorted(own.keys() & columns.keys()):
        mistakes.append(("said_twice", f"{name} stands in settings and in a column of its own"))
    own |= columns
    if not own:
        return ""
    try:
        sampling = sampling_of(config, own)
    except ValidationError as error:
        mistakes += [("invalid_settings", _phrase(dict(e))) for e in error.errors()]
        return ""
    checked = {name: getattr(sampling, name) for name in own}
    for name, value in checked.items():
        if isinstance(value, float) and not math.isfinite(value):
            mistakes.append(("invalid_settings", f"{name} is {value}, not a finite number"))
    return json.dumps(checked, sort_keys=True)


def _phrase(error: Mapping[str, Any]) -> str:
    """One of pydantic's errors in a few words."""
    name = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        meant = nearest(name, SETTINGS)
        return f"unknown setting {name!r}" + (f"; did you mean {meant!r}?" if meant else "")
    message = str(error["msg"])
    return f"{name}: {message[0].lower()}{message[1:]} (found {error['input']!r})"
