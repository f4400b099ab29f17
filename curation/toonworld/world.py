"""What there is in ToonWorld, and which episodes and compilations a seed draws.

An *episode* is a story: its shots share their actors and a hidden style that no caption mentions. A
*compilation* is a row of unrelated shots, each with actors and a style of its own. Video ``i`` of a
kind depends on the seed and on ``i`` alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from curation.toonworld.draws import Draw

Species = Literal["cat", "dog", "bear", "rabbit", "fox", "robot", "penguin", "frog"]
Color = Literal["red", "orange", "yellow", "green", "blue", "purple", "pink"]
Accessory = Literal["hat", "scarf", "glasses", "bow", "balloon"]
Place = Literal["meadow", "beach", "city", "snow", "forest", "desert", "night", "moon"]
Action = Literal["walk_left", "walk_right", "jump", "wave", "spin", "dance"]
Framing = Literal["wide", "close"]
Palette = Literal["plain", "warm", "cool", "pastel"]
Outline = Literal["none", "ink", "sticker"]
Texture = Literal["smooth", "halftone", "hatched", "grainy"]
Build = Literal["bigheaded", "stout", "lanky"]
Light = Literal["morning", "noon", "evening"]
TransitionKind = Literal["cut", "dissolve", "fade"]
VideoKind = Literal["episode", "compilation"]

SPECIES: tuple[Species, ...] = (
    "cat", "dog", "bear", "rabbit", "fox", "robot", "penguin", "frog",
)  # fmt: skip
COLORS: tuple[Color, ...] = ("red", "orange", "yellow", "green", "blue", "purple", "pink")
ACCESSORIES: tuple[Accessory, ...] = ("hat", "scarf", "glasses", "bow", "balloon")
PLACES: tuple[Place, ...] = (
    "meadow", "beach", "city", "snow", "forest", "desert", "night", "moon",
)  # fmt: skip
ACTIONS: tuple[Action, ...] = ("walk_left", "walk_right", "jump", "wave", "spin", "dance")
PALETTES: tuple[Palette, ...] = ("plain", "warm", "cool", "pastel")
OUTLINES: tuple[Outline, ...] = ("none", "ink", "sticker")
TEXTURES: tuple[Texture, ...] = ("smooth", "halftone", "hatched", "grainy")
BUILDS: tuple[Build, ...] = ("bigheaded", "stout", "lanky")
LIGHTS: tuple[Light, ...] = ("morning", "noon", "evening")

# Ours: long enough for a clip of 9 frames at 8 frames per second with its trim, short enough that
# an episode stays below half a minute.
_SHOT_S = (2.0, 4.0)
_SOFT_S = (0.6, 1.2)
_SHOTS = (3, 4, 5, 6, 7, 8)
_KINDS: tuple[TransitionKind, ...] = (
    "cut", "cut", "cut", "cut", "cut", "cut", "cut", "dissolve", "dissolve", "fade",
)  # fmt: skip


@dataclass(frozen=True)
class Actor:
    """Who a caption describes."""

    species: Species
    color: Color
    accessory: Accessory
    accessory_color: Color


@dataclass(frozen=True)
class Style:
    """The hidden style: seen in every shot of an episode, told in no caption.

    Attributes:
        palette: Shift of all colours.
        outline: Line around actors.
        texture: Paper that everything is printed on.
        build: Proportions of the actors.
        light: Where the sun (or moon, or earth) stands: left, above, right; shadows fall away.
    """

    palette: Palette
    outline: Outline
    texture: Texture
    build: Build
    light: Light


@dataclass(frozen=True)
class Act:
    """What one actor does in a shot; ``number`` is that of its name, Actor1 or Actor2."""

    number: int
    actor: Actor
    action: Action


@dataclass(frozen=True)
class Shot:
    """One take.

    Attributes:
        acts: One or two actors, by number, which is also from left to right.
        place: Where.
        framing: How near the camera is.
        style: The hidden style.
        scenery: Name of the scenery's draws: shots of one episode in one place share it.
        camera: Where along the scenery the camera stands, in periods of it, 0 to 1.
        pan: How fast it moves to the right, in heights of the frame per second.
        seconds: Length without transitions.
    """

    acts: tuple[Act, ...]
    place: Place
    framing: Framing
    style: Style
    scenery: str
    camera: float
    pan: float
    seconds: float


@dataclass(frozen=True)
class Join:
    """How two shots follow one another; a cut has no length."""

    kind: TransitionKind
    seconds: float


@dataclass(frozen=True)
class Video:
    """An episode or a compilation.

    Attributes:
        name: Such as ``episode_00007``; the file's name without its ending.
        kind: Which of the two.
        shots: In order, three to eight.
        joins: Between them, one fewer.
        stories: Per shot the story it belongs to: one and the same in an episode, all different in
            a compilation.
    """

    name: str
    kind: VideoKind
    shots: tuple[Shot, ...]
    joins: tuple[Join, ...]
    stories: tuple[str, ...]


def draw_episode(seed: int, index: int) -> Video:
    """Episode ``index`` of a seed."""
    name = f"episode_{index:05d}"
    draw = Draw(seed, name)
    style = _style(draw)
    cast = _cast(draw, 2 if draw.chance(0.75) else 1)
    shots: list[Shot] = []
    for k in range(draw.choice(_SHOTS)):
        shots.append(_shot(Draw(seed, name, k), cast, style, f"{seed}/{name}", shots))
    joins = _joins(Draw(seed, name, "joins"), len(shots) - 1)
    return Video(name, "episode", tuple(shots), joins, (name,) * len(shots))


def draw_compilation(seed: int, index: int) -> Video:
    """Compilation ``index`` of a seed: no two shots share an actor, styles differ much."""
    name = f"compilation_{index:05d}"
    count = Draw(seed, name).choice(_SHOTS)
    shots: list[Shot] = []
    attempt = 0
    while len(shots) < count:
        draw = Draw(seed, name, attempt)
        attempt += 1
        style, cast = _style(draw), _cast(draw, 2)
        known = {(act.actor.species, act.actor.color) for shot in shots for act in shot.acts}
        if any((actor.species, actor.color) in known for actor in cast):
            continue
        if any(style_agreement(style, shot.style) > 2 for shot in shots):
            continue
        scenery = f"{seed}/{name}/{attempt}"
        shots.append(_shot(draw, cast, style, scenery, shots))
    joins = _joins(Draw(seed, name, "joins"), count - 1)
    return Video(
        name, "compilation", tuple(shots), joins, tuple(f"{name}_{k}" for k in range(count))
    )


def style_agreement(a: Style, b: Style) -> int:
    """How many of the five hidden variables two styles share."""
    return sum(getattr(a, name) == getattr(b, name) for name in Style.__dataclass_fields__)


def _style(draw: Draw) -> Style:
    return Style(
        palette=draw.choice(PALETTES),
        outline=draw.choice(OUTLINES),
        texture=draw.choice(TEXTURES),
        build=draw.choice(BUILDS),
        light=draw.choice(LIGHTS),
    )


def _cast(draw: Draw, count: int) -> tuple[Actor, ...]:
    """Actors that differ in species, and whose four colours all differ."""
    species, colors = list(SPECIES), list(COLORS)
    cast: list[Actor] = []
    for _ in range(count):
        mine = draw.choice(species)
        color, other = _take(draw, colors), _take(draw, colors)
        species.remove(mine)
        cast.append(Actor(mine, color, draw.choice(ACCESSORIES), other))
    return tuple(cast)


def _take(draw: Draw, colors: list[Color]) -> Color:
    color = draw.choice(colors)
    colors.remove(color)
    return color


def _shot(
    draw: Draw, cast: Sequence[Actor], style: Style, scenery: str, before: Sequence[Shot]
) -> Shot:
    """A shot in another place than the one before.

    In the same place and style even people would hardly see a cut, only figures that jump.
    """
    framing: Framing = draw.choice(("wide", "close"))
    place: Place = draw.choice([p for p in PLACES if not before or p != before[-1].place])
    present = draw.choice([(0,), (1,), (0, 1)]) if len(cast) == 2 else (0,)
    acts = tuple(Act(i + 1, cast[i], draw.choice(ACTIONS)) for i in present)
    return Shot(
        acts=acts,
        place=place,
        framing=framing,
        style=style,
        scenery=f"{scenery}/{place}",
        camera=draw.number(),
        pan=draw.choice((0.0, 0.0, -0.05, 0.05)),
        seconds=draw.number(*_SHOT_S),
    )


def _joins(draw: Draw, count: int) -> tuple[Join, ...]:
    joins: list[Join] = []
    for _ in range(count):
        kind, seconds = draw.choice(_KINDS), draw.number(*_SOFT_S)
        joins.append(Join(kind, 0.0 if kind == "cut" else seconds))
    return tuple(joins)
