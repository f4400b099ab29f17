"""The two ground-truth scores of generated ToonWorld stories.

*Semantic accuracy* of a scene: the share of what its caption tells (how many actors, per actor its
species, colour, accessory, the accessory's colour and its action, and the place) that is read back
from its frames. *Style agreement* of a story: over all pairs of its scenes and the five hidden
variables, the share that are the same. Frames are read by a trained probe, so both scores have a
ceiling, what real scenes get, and a floor, what unrelated ones get (:func:`unrelated`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import numpy.typing as npt

from curation.toonworld.captions import Told, attributes_of
from curation.toonworld.probe import OF_ACTOR, STYLE, Probe, Reading, read_scenes
from schemas.errors import InputError


@dataclass(frozen=True)
class StoryScores:
    """The scores of one story, 0 to 1.

    Attributes:
        semantic: Semantic accuracy, the mean of its scenes'.
        style: Style agreement.
        same_style: Share of pairs of scenes that agree in all five hidden variables.
        told: Per captioned attribute, how often it was read right.
        styles: Per hidden variable, the share of pairs of scenes that agree.
    """

    semantic: float
    style: float
    same_style: float
    told: dict[str, float]
    styles: dict[str, float]


def score_stories(
    probe: Probe,
    stories: Sequence[Sequence[npt.NDArray[np.uint8]]],
    captions: Sequence[Sequence[str]],
    given: int = 0,
    left_out: Collection[str] = (),
) -> list[StoryScores]:
    """Score stories.

    Args:
        probe: From ``load_probe``.
        stories: Per story its scenes, each (T, H, W, 3), two or more.
        captions: Per story the caption of each scene.
        given: How many scenes at the beginning were not generated; see :func:`score_story`.
        left_out: Attributes that do not count, such as ``action`` where scenes are stills.

    Raises:
        InputError: A caption is not one of ToonWorld, or captions and scenes differ in number.
    """
    told = [[attributes_of(text) for text in story] for story in captions]
    if [len(story) for story in told] != [len(story) for story in stories]:
        raise InputError(
            "every scene needs a caption",
            found=f"{sum(map(len, told))} captions of {len(told)} stories",
            expected=f"{sum(map(len, stories))} of {len(stories)}, as many as scenes",
        )
    readings = iter(read_scenes(probe, [scene for story in stories for scene in story]))
    return [score_story([next(readings) for _ in story], story, given, left_out) for story in told]


def score_story(
    readings: Sequence[Reading],
    told: Sequence[Told],
    given: int = 0,
    left_out: Collection[str] = (),
) -> StoryScores:
    """Score one story of two or more scenes from what was read of them.

    Args:
        readings: Of each scene.
        told: Of each scene, by its caption.
        given: How many scenes at the beginning were not generated: they are not held against their
            captions, and count in the style agreement with generated scenes alone.
        left_out: Attributes of captions that do not count.
    """
    assert len(readings) == len(told) >= 2, "a story has scenes, each with what is told of it"
    assert 0 <= given < len(told), "some scene is generated"
    right = [
        [(name, ok) for name, ok in checked(*scene) if name not in left_out]
        for scene in list(zip(readings, told, strict=True))[given:]
    ]
    each = {
        name: [ok for scene in right for key, ok in scene if key == name] for name, _ in right[0]
    }
    styles_read = [reading.style for reading in readings]
    pairs = [(a, styles_read[k]) for k in range(given, len(told)) for a in styles_read[:k]]
    styles = {name: fmean(getattr(a, name) == getattr(b, name) for a, b in pairs) for name in STYLE}
    return StoryScores(
        semantic=fmean(fmean(ok for _, ok in scene) for scene in right),
        style=fmean(styles.values()),
        same_style=fmean(a == b for a, b in pairs),
        told={name: fmean(oks) for name, oks in each.items()},
        styles=styles,
    )


def checked(reading: Reading, told: Told) -> list[tuple[str, bool]]:
    """Per attribute that is told of a scene, its name and whether it was read.

    Actors are compared from left to right; one that is told but not seen is wrong in everything.
    """
    right = [
        ("actors", len(reading.acts) == len(told.acts)),
        ("place", reading.place == told.place),
    ]
    for k, act in enumerate(told.acts):
        wanted = {**vars(act.actor), "action": act.action}
        seen: dict[str, object] = {}
        if k < len(reading.acts):
            actor, action = reading.acts[k]
            seen = {**vars(actor), "action": action}
        right += [(name, seen.get(name) == wanted[name]) for name in OF_ACTOR]
    return right


def unrelated(
    readings: Sequence[Sequence[Reading]], told: Sequence[Sequence[Told]]
) -> list[StoryScores]:
    """The scores of chance: scenes of different stories put together, with another's captions.

    Args:
        readings: Per story, of each scene; all stories have as many scenes, and there are more
            stories than a story has scenes.
        told: Likewise.
    """
    count, scenes = len(readings), len(readings[0])
    assert count > scenes, "a story is made of scenes of different stories"
    return [
        score_story([readings[(i + k) % count][k] for k in range(scenes)], told[i - 1])
        for i in range(count)
    ]
