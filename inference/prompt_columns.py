"""The columns of a prompt manifest: their names, and what stands in the cells of one row.

Each function adds what is wrong to a list of mistakes and returns something of the right type.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, cast

from inference.prompt_formats import LISTS
from schemas.config import SamplingConfig

MAX_FRAMES = 201
"""Most frames of a scene; the same limit as ``training.model.frames``."""
MAX_SEED = 2**63 - 1
Mistakes = list[tuple[str, str]]
"""What is wrong with a row: (reason in snake_case, what was found and what would be right)."""

SETTINGS = tuple(SamplingConfig.model_fields)
_KNOWN = ("prompt_id", *LISTS, "negative_prompt", "seed", "settings", *SETTINGS)
_NUMBERED = re.compile(rf"({'|'.join(LISTS.values())})_([1-9]\d{{0,2}})")
# Names that other programs use, and what is not a row's to say.
_MEANT = {
    "guidance_scale": "guidance",
    "num_inference_steps": "steps",
    "num_frames": "frames",
    "use_dynamic_cfg": "dynamic_guidance",
}
_CONFIG_ONLY = {
    "fps": "generation.fps",
    "height": "training.model.height_px",
    "height_px": "training.model.height_px",
    "width": "training.model.width_px",
    "width_px": "training.model.width_px",
}


def is_column(name: str) -> bool:
    """Whether a column is read, under this name."""
    return name in _KNOWN or _NUMBERED.fullmatch(name) is not None


def is_said(column: str, names: Iterable[str]) -> bool:
    """Whether these names hold a column, as it is or numbered."""
    numbered = LISTS.get(column)
    return any(n == column or ((m := _NUMBERED.fullmatch(n)) and m[1] == numbered) for n in names)


def misspelt(name: str) -> str | None:
    """What to say of a column that is probably another one misspelt, or None."""
    if is_column(name) or name.startswith("_"):
        return None
    if name in _CONFIG_ONLY:
        return f"{name!r} is the same for all rows: set {_CONFIG_ONLY[name]}"
    meant = nearest(name, (*_KNOWN, *(f"{n}_1" for n in LISTS.values())))
    if meant is None:
        return None
    return f"unknown column {name!r}; did you mean {meant!r}? (a note's name begins with '_')"


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The name that was probably meant, or None."""
    near = difflib.get_close_matches(name.lower().replace(" ", "_"), list(names), 1, cutoff=0.75)
    return _MEANT.get(name) or (near[0] if near else None)


def items_of(values: Mapping[str, Any], column: str, mistakes: Mistakes) -> list[Any]:
    """What a list column or its numbered columns hold, unchecked; nothing = empty.

    A gap between numbered columns is an empty text.
    """
    numbered = LISTS[column]
    matches = [m for name in values if (m := _NUMBERED.fullmatch(name)) and m[1] == numbered]
    found = {int(m[2]): values[m[0]] for m in matches}
    value = values.get(column)
    if value is None:
        return [found.get(i, "") for i in range(1, max(found, default=0) + 1)]
    if found:
        mistakes.append(("said_twice", f"{column} stands beside {numbered}_{min(found)}"))
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            advice = f'in one cell ["…", "…"] or in columns {numbered}_1, {numbered}_2, …'
            text = f"{column} is the text {value[:40]!r}, not a list: write {advice}"
            mistakes.append(("wrong_type", text))
            return []
    if not isinstance(value, list):
        mistakes.append(("wrong_type", f"{column} is {type(value).__name__}, not a list"))
        return []
    return cast("list[Any]", value)


def scene_texts(values: Mapping[str, Any], column: str, mistakes: Mistakes) -> list[str]:
    """The scenes of a list column; each needs a text."""
    texts = _texts(items_of(values, column, mistakes), column, mistakes)
    for index, text in enumerate(texts):
        if not text.strip() and not any(f"{column}[{index}]" in said for _, said in mistakes):
            mistakes.append(("empty_prompt_text", f"{column}[{index}] is empty"))
    return texts


def optional_texts(
    values: Mapping[str, Any], column: str, scenes: int, mistakes: Mistakes
) -> list[str]:
    """A list with a text, perhaps an empty one, for each of so many scenes; or no list."""
    texts = _texts(items_of(values, column, mistakes), column, mistakes)
    if texts and column not in values:
        texts += [""] * (scenes - len(texts))  # numbered columns that are empty at the row's end
    check_count(column, len(texts), scenes, mistakes)
    return texts


def _texts(items: Iterable[Any], column: str, mistakes: Mistakes) -> list[str]:
    texts: list[str] = []
    for index, item in enumerate(items):
        if not isinstance(item, str):
            mistakes.append(("wrong_type", f"{column}[{index}] is {item!r}, not text"))
        texts.append(item if isinstance(item, str) else "")
    return texts


def check_count(column: str, count: int, scenes: int, mistakes: Mistakes) -> None:
    """A list is as long as there are scenes, or empty. Without scenes, that is the mistake."""
    if scenes and count not in (0, scenes):
        mistakes.append(("wrong_count", f"{column} has {count} entries for {scenes} scenes"))


def seeds_of(values: Mapping[str, Any], scenes: int, mistakes: Mistakes) -> list[int]:
    """The seeds of the scenes; none = one seed for all."""
    items = items_of(values, "seeds", mistakes)
    check_count("seeds", len(items), scenes, mistakes)
    return [seed_of(item, f"seeds[{i}]", mistakes) for i, item in enumerate(items)]


def seed_of(value: object, name: str, mistakes: Mistakes) -> int:
    """One seed."""
    number = _whole(value)
    if number is None or not 0 <= number <= MAX_SEED:
        found = f"{name} is {value!r}, not a whole number from 0 to 2^63 - 1"
        mistakes.append(("invalid_seed", found))
        return 0
    return number


def frames_of(values: Mapping[str, Any], scenes: int, mistakes: Mistakes) -> list[int]:
    """Frames of the scenes, from a list or one number for all; none = the configured number."""
    said = values.get("frames", "[]")
    if isinstance(said, list) or (isinstance(said, str) and said.lstrip().startswith("[")):
        items = items_of(values, "frames", mistakes)
        check_count("frames", len(items), scenes, mistakes)
        return [_frame_count(item, f"frames[{i}]", mistakes) for i, item in enumerate(items)]
    return [_frame_count(said, "frames", mistakes)] * scenes


def _frame_count(value: object, name: str, mistakes: Mistakes) -> int:
    number = _whole(value)
    if number is None or not 1 <= number <= MAX_FRAMES or number % 4 != 1:
        rule = f"1 + a multiple of 4, at most {MAX_FRAMES} (the VAE's time compression)"
        mistakes.append(("invalid_frames", f"{name} is {value!r}, not {rule}"))
        return 1
    return number


def _whole(value: object) -> int | None:
    """A whole number, also as text or floating point (what pandas makes of a column with gaps)."""
    if isinstance(value, str):
        try:
            value = float(value) if "." in value or "e" in value.lower() else int(value)
        except ValueError:
            return None
    if isinstance(value, float):
        # Beyond 2^53 floating point has lost the last digits.
        return int(value) if value.is_integer() and abs(value) <= 2**53 else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None
