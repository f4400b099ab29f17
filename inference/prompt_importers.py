"""Stories in other forms as prompt manifests.

``talc``: the files of TALC (arXiv 2405.04682; repository Hritikbansal/talc): ``prompts/*.json``, an
object of lists of captions by name, and ``data/*.jsonl``, lines with ``captions`` and
``video_segments`` (the videos are not read).

``actors``: scripts with the structure of the Mask2DiT paper's test prompts, in which a figure is
``ActorN (what it looks like)`` wherever it appears, in the same words in every scene. The authors
published single prompts of this kind and no file format, so this one is ours. Text, with an empty
line between stories::

    # picnic
    Actor1: short black hair, wearing sunglasses
    Actor2: a long yellow dress, carrying a basket
    Actor1 spreads out a blanket by the riverside.
    Actor2 walks up to Actor1.
    Actor1 and Actor2 share snacks.

``# name`` and the descriptions may be left out; a description may also stand in a scene, in
parentheses. Where a scene has an actor without its description, the first mention gets it. JSON is
an array of ``{"prompt_id", "actors": {"Actor1": …}, "scenes": […]}``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from inference.prompt_columns import Mistakes
from inference.prompt_formats import Record, read_records, text_of, unique_keys
from schemas.errors import ManifestError

_ACTOR = re.compile(r"\b(Actor\d+)\b(?:\s*\(([^()]*)\))?", re.IGNORECASE)
_DESCRIPTION = re.compile(r"(Actor\d+)\s*:\s*(.+)", re.IGNORECASE)


def read_talc(path: Path) -> list[Record]:
    """The stories of a TALC file.

    Raises:
        ManifestError: It is not such a file.
    """
    if path.suffix.lower() == ".jsonl":
        return [_talc_line(record) for record in read_records(path)]
    try:
        stories = json.loads(text_of(path), object_pairs_hook=unique_keys)
    except (OSError, ValueError) as error:
        raise ManifestError("the TALC file cannot be read", where=path, found=error) from error
    if not isinstance(stories, dict):
        raise ManifestError(
            "this is not a TALC file",
            where=path,
            found=type(stories).__name__,
            expected='{"name": ["first caption", "second caption", …], …}',
        )
    named = enumerate(cast("dict[str, Any]", stories).items(), start=1)
    return [Record(f"row {n}", {"prompt_id": k, "prompts": v}) for n, (k, v) in named]


def _talc_line(record: Record) -> Record:
    captions, segments = (record.values.get(k) for k in ("captions", "video_segments"))
    if record.mistakes or not isinstance(segments, list) or not segments:
        missing = [("wrong_type", "a line holds the lists captions and video_segments")]
        return Record(record.place, {}, record.mistakes or missing)
    # The segments of one video are named <dataset>/<video>_<number>.mp4.
    name = str(cast("list[object]", segments)[0]).rpartition("_")[0]
    return Record(record.place, {"prompt_id": name, "prompts": captions or []})


def read_actors(path: Path) -> list[Record]:
    """The stories of a file of scripts.

    Raises:
        ManifestError: It cannot be read.
    """
    if path.suffix.lower() in (".json", ".jsonl"):
        return [_json_script(record) for record in read_records(path)]
    try:
        text = text_of(path)
    except OSError as error:
        raise ManifestError("the scripts cannot be read", where=path, found=error) from error
    return [_text_script(line, lines) for line, lines in _blocks(text)]


FORMATS: dict[str, Callable[[Path], list[Record]]] = {"talc": read_talc, "actors": read_actors}


def _blocks(text: str) -> Iterator[tuple[int, list[str]]]:
    """Lines that stand together, with the number of the first."""
    block: list[str] = []
    lines = [*text.split("\n"), ""]
    for number, line in enumerate(lines, start=1):
        if line.strip():
            block.append(line.strip())
        elif block:
            yield number - len(block), block
            block = []


def _text_script(line: int, lines: Sequence[str]) -> Record:
    name = f"story-{line}"
    if lines[0].startswith("#"):
        name, lines = lines[0].lstrip("# "), lines[1:]
    actors: dict[str, str] = {}
    scenes: list[str] = []
    mistakes: Mistakes = []
    for text in lines:
        match = _DESCRIPTION.fullmatch(text)
        if match is None:
            scenes.append(text)
        else:
            _describe(actors, match[1], match[2], mistakes)
    return _story(f"line {line}", name, actors, scenes, mistakes)


def _json_script(record: Record) -> Record:
    values, mistakes = record.values, list(record.mistakes)
    said, scenes = values.get("actors", {}), values.get("scenes", [])
    strange = sorted(values.keys() - {"prompt_id", "actors", "scenes"})
    if strange:
        mistakes.append(("unknown_column", f"a script has no {', '.join(strange)}"))
    texts = cast("list[object]", scenes) if isinstance(scenes, list) else [None]
    looks = cast("dict[str, object]", said) if isinstance(said, dict) else {"": None}
    if not all(isinstance(text, str) for text in (*texts, *looks.values())):
        mistakes.append(("wrong_type", "actors is an object of texts and scenes a list of texts"))
    if mistakes:
        return Record(record.place, {"prompt_id": values.get("prompt_id", "")}, mistakes)
    actors: dict[str, str] = {}
    for name, look in looks.items():
        _describe(actors, name, str(look), mistakes)
    return _story(record.place, values.get("prompt_id"), actors, [str(t) for t in texts], mistakes)


def _story(
    place: str, name: object, actors: dict[str, str], scenes: Sequence[str], mistakes: Mistakes
) -> Record:
    """A row from the scenes of a script; the descriptions found in them join ``actors``."""
    for scene in scenes:
        for actor, look in _ACTOR.findall(scene):
            if look.strip():
                _describe(actors, actor, look, mistakes)
    mentioned = {m[1].capitalize() for scene in scenes for m in _ACTOR.finditer(scene)}
    for actor in sorted(mentioned - actors.keys()):
        mistakes.append(("not_described", f"{actor} appears, but no line says what it looks like"))
    for actor in sorted(actors.keys() - mentioned):
        mistakes.append(("not_in_story", f"{actor} is described, but appears in no scene"))
    prompts = list(scenes) if mistakes else [_described(scene, actors) for scene in scenes]
    return Record(place, {"prompt_id": name, "prompts": prompts}, mistakes)


def _describe(actors: dict[str, str], actor: str, look: str, mistakes: Mistakes) -> None:
    """Note what an actor looks like; it must not be said in other words elsewhere."""
    look = " ".join(look.split()).rstrip(".")
    known = actors.setdefault(actor.capitalize(), look)
    if known != look:
        text = f"{actor.capitalize()} is described as {known!r} and as {look!r}"
        mistakes.append(("described_differently", text))


def _described(scene: str, actors: Mapping[str, str]) -> str:
    """The scene, each actor's description behind its first mention unless it stands there."""
    done = {actor.capitalize() for actor, look in _ACTOR.findall(scene) if look.strip()}

    def mention(match: re.Match[str]) -> str:
        actor = match[1].capitalize()
        if actor in done:
            return match[0]
        done.add(actor)
        return f"{match[1]} ({actors[actor]})"

    return _ACTOR.sub(mention, scene)
