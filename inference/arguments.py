"""What callers may give the pipeline, brought into one form: a list per story, one entry per scene.

Shapes: B stories, S scenes, F latent frames of a scene, C channels, H W latent height and width, L
text tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from torch import Tensor

from schemas.errors import GenerationError

Texts = str | Sequence[str] | Sequence[Sequence[str]]
Seeds = int | Sequence[int] | Sequence[Sequence[int]]


def as_stories(prompts: Sequence[str] | Sequence[Sequence[str]]) -> list[list[str]]:
    """One story or several as a list of stories.

    Raises:
        GenerationError: One text instead of a list, no scene, or stories of unequal length.
    """
    if isinstance(prompts, str):
        raise GenerationError(
            "prompts is one text", found=prompts, expected="a list with one prompt per scene"
        )
    if all(isinstance(p, str) for p in prompts):
        stories = [list(cast("Sequence[str]", prompts))]
    else:
        stories = [list(story) for story in prompts]
    if not stories[0] or len({len(s) for s in stories}) != 1:
        raise GenerationError(
            "the stories of one batch need the same number of scenes, at least one",
            found=[len(s) for s in stories],
        )
    return stories


def spread_texts(texts: Texts, stories: int, scenes: int) -> list[list[str]]:
    """One text, one per scene, or one per story and scene, as B lists of S.

    Raises:
        GenerationError: Another number of texts.
    """
    if isinstance(texts, str):
        return [[texts] * scenes] * stories
    if all(isinstance(text, str) for text in texts):
        rows = [list(cast("Sequence[str]", texts))] * stories
    else:
        rows = [list(row) for row in texts]
    _check_grid("negative prompts", rows, stories, scenes, "one, or one per scene")
    return rows


def spread_seeds(seeds: Seeds, stories: int, scenes: int) -> list[list[int]]:
    """One seed, one per story, or one per story and scene, as B lists of S.

    Raises:
        GenerationError: Another number of seeds.
    """
    if isinstance(seeds, int):
        return [[seeds] * scenes] * stories
    if all(isinstance(seed, int) for seed in seeds):
        rows = [[seed] * scenes for seed in cast("Sequence[int]", seeds)]
    else:
        rows = [list(row) for row in cast("Sequence[Sequence[int]]", seeds)]
    _check_grid("seeds", rows, stories, scenes, "one, or one per story")
    return rows


def spread_frames(frames: int | Sequence[int], scenes: int) -> list[int]:
    """One number of frames, or one per scene, as S.

    Raises:
        GenerationError: Another number of them.
    """
    counts = [frames] * scenes if isinstance(frames, int) else list(frames)
    if len(counts) != scenes:
        raise GenerationError(
            "one number of frames per scene is needed",
            found=f"{len(counts)} numbers",
            expected=f"{scenes} (or a single one)",
        )
    return counts


def check_conditions(given: Mapping[int, Tensor], shapes: Sequence[tuple[int, ...]]) -> None:
    """Check given scenes against the (B, F, C, H, W) shapes of all scenes.

    Raises:
        GenerationError: One does not fit, or all are given.
    """
    for index, clean in given.items():
        inside = 0 <= index < len(shapes)
        if not inside or tuple(clean.shape) != shapes[index]:
            raise GenerationError(
                "a given scene does not fit the story",
                where=f"scene {index} of {len(shapes)}",
                found=f"latents of shape {tuple(clean.shape)}",
                expected=f"shape {shapes[index]}" if inside else f"an index below {len(shapes)}",
            )
    if len(given) == len(shapes):
        raise GenerationError("every scene is given, so there is nothing to generate")


def check_embeds(name: str, embeds: Tensor, wanted: tuple[int, ...]) -> None:
    """Check encoded texts against (B, S, L, D).

    Raises:
        GenerationError: They are of another shape.
    """
    if tuple(embeds.shape) != wanted:
        raise GenerationError(
            f"{name} do not fit", found=f"shape {tuple(embeds.shape)}", expected=wanted
        )


def check_names(what: str, found: Sequence[str], known: Sequence[str]) -> None:
    """Check names against those there are.

    Raises:
        GenerationError: One is unknown.
    """
    if unknown := [name for name in found if name not in known]:
        raise GenerationError(f"unknown {what}", found=unknown, expected=", ".join(known))


def _check_grid(
    what: str, rows: Sequence[Sequence[object]], stories: int, scenes: int, short: str
) -> None:
    if [len(row) for row in rows] != [scenes] * stories:
        raise GenerationError(
            f"the number of {what} does not fit the stories",
            found=[len(row) for row in rows],
            expected=f"{short}, or {stories} lists of {scenes}",
        )
