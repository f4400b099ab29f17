"""Prompt manifests: read, checked row by row before any model is loaded, and written.

A manifest is Parquet. Needed columns: ``prompt_id`` (string) and ``prompts`` (list of strings, one
per scene). Optional: ``negative_prompt`` (string, default empty), ``seed`` (integer, default 0) and
``extend_prompts`` (list of strings, default none). Other columns are left alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.errors import ManifestError
from schemas.rows import Prompt, Reject
from schemas.tables import PROMPTS, read_arrow, write_table

log = logging.getLogger(__name__)

STAGE = "prompts"
MAX_SCENES = 16
"""Most scenes generated together; the same limit as ``training.model.scenes``."""
MAX_SEED = 2**63 - 1
_REQUIRED = ("prompt_id", "prompts")


def read_prompts(path: Path) -> tuple[list[Prompt], list[Reject]]:
    """Read a prompt manifest and check every row.

    Args:
        path: Parquet file written by :func:`write_prompts` or by anything else (see the module's
            columns).

    Returns:
        The good rows in file order, and one reject per bad row: ``detail`` gives the row number
        (from 1) and everything wrong with it, ``reason`` the first mistake.

    Raises:
        ManifestError: The file is missing, is not Parquet, is another table, or lacks a needed
            column.
    """
    data = _read_columns(path)
    prompts: list[Prompt] = []
    rejects: list[Reject] = []
    seen: dict[str, int] = {}
    for number, record in enumerate(data.to_pylist(), start=1):
        prompt, mistakes = _check_row(record)
        if prompt is not None:
            first = seen.setdefault(prompt.prompt_id, number)
            if first != number:
                mistakes = [("duplicate_prompt_id", f"{prompt.prompt_id!r} is already row {first}")]
        if mistakes or prompt is None:
            name = record.get("prompt_id")
            rejects.append(
                Reject(
                    record_id=name if isinstance(name, str) and name else f"row-{number}",
                    stage=STAGE,
                    reason=mistakes[0][0],
                    detail=f"row {number}: " + "; ".join(text for _, text in mistakes),
                    uri=str(path),
                    failed=False,
                )
            )
        else:
            prompts.append(prompt)
    log.info("prompts read path=%s good=%d bad=%d", path, len(prompts), len(rejects))
    return prompts, rejects


def write_prompts(path: Path, prompts: Iterable[Prompt]) -> int:
    """Write a prompt manifest. Returns the number of rows.

    Raises:
        ManifestError: Two rows share a ``prompt_id``.
    """
    return write_table(path, PROMPTS, prompts)


def _read_columns(path: Path) -> pa.Table:
    """The manifest as Arrow, ours or a plain file in which optional columns may be missing."""
    if not path.is_file():
        raise ManifestError(
            "the prompt manifest is not there",
            where=path,
            do="give a Parquet file in generation.prompts",
        )
    try:
        schema = pq.read_schema(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ManifestError(
            "the prompt manifest cannot be read as Parquet",
            where=path,
            found=error,
            expected="a Parquet file with the columns prompt_id and prompts",
        ) from error
    if b"triptych.table" in (schema.metadata or {}):
        return read_arrow(path, PROMPTS)
    missing = [c for c in _REQUIRED if c not in schema.names]
    if missing:
        raise ManifestError(
            "the prompt manifest lacks columns",
            where=path,
            found=f"columns {schema.names}",
            expected=f"{missing} too",
            do="add them: prompt_id (string) and prompts (list of strings, one per scene)",
        )
    return pq.read_table(path, columns=[c for c in PROMPTS.schema.names if c in schema.names])


def _check_row(record: Mapping[str, Any]) -> tuple[Prompt | None, list[tuple[str, str]]]:
    """One row as a Prompt, or None, with every mistake as (reason, text)."""
    mistakes: list[tuple[str, str]] = []
    prompt_id = record["prompt_id"]
    if not isinstance(prompt_id, str) or not prompt_id.strip():
        mistakes.append(("missing_prompt_id", f"prompt_id is {prompt_id!r}"))
    prompts = _check_texts(record["prompts"], "prompts", mistakes)
    if not prompts:
        if not any(reason == "wrong_type" for reason, _ in mistakes):
            mistakes.append(("empty_prompts", "prompts holds no scene"))
    elif len(prompts) > MAX_SCENES:
        text = f"{len(prompts)} prompts; a story starts with 1 to {MAX_SCENES} scenes"
        mistakes.append(("wrong_number_of_prompts", text))
    extend = _check_texts(record.get("extend_prompts"), "extend_prompts", mistakes)
    negative = record.get("negative_prompt")
    if negative is not None and not isinstance(negative, str):
        mistakes.append(("wrong_type", f"negative_prompt is {negative!r}, not text"))
    # A column with gaps comes back from pandas as floating point; whole numbers in it are still
    # seeds.
    seed = record.get("seed")
    seed = 0 if seed is None else seed
    whole = isinstance(seed, (int, float)) and not isinstance(seed, bool) and seed == seed // 1
    if not whole or not 0 <= seed <= MAX_SEED:
        mistakes.append(("invalid_seed", f"seed is {seed!r}, not an integer from 0 to 2^63 - 1"))
    if mistakes:
        return None, mistakes
    return Prompt(cast("str", prompt_id), prompts, negative or "", int(seed), extend), []


def _check_texts(value: object, column: str, mistakes: list[tuple[str, str]]) -> list[str]:
    """A list of non-empty texts; missing counts as empty."""
    if value is None:
        return []
    if not isinstance(value, list):
        mistakes.append(("wrong_type", f"{column} is {type(value).__name__}, not a list of texts"))
        return []
    items = cast("list[object]", value)
    for index, item in enumerate(items):
        if not isinstance(item, str):
            mistakes.append(("wrong_type", f"{column}[{index}] is {item!r}, not text"))
        elif not item.strip():
            mistakes.append(("empty_prompt_text", f"{column}[{index}] is empty"))
    return [item for item in items if isinstance(item, str)]
