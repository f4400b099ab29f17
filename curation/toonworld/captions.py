"""Captions of shots: what is seen, in whole sentences, and nothing of the hidden style.

An actor is described the same way in every caption of an episode. Source of the structure: the
Mask2DiT paper's captions, which number actors (Actor1, Actor2) and describe each before the action.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from curation.toonworld.world import (
    ACCESSORIES,
    COLORS,
    SPECIES,
    Accessory,
    Act,
    Action,
    Actor,
    Place,
    Shot,
)
from schemas.errors import InputError

_ACTIONS: dict[Action, str] = {
    "walk_left": "walks to the left",
    "walk_right": "walks to the right",
    "jump": "jumps up and down",
    "wave": "waves hello",
    "spin": "spins around",
    "dance": "dances",
}
_PLACES: dict[Place, str] = {
    "meadow": "in a meadow",
    "beach": "on a beach",
    "city": "in a city street",
    "snow": "in a snowy field",
    "forest": "in a forest",
    "desert": "in a desert",
    "night": "on a hill at night",
    "moon": "on the moon",
}
_PLURAL: tuple[Accessory, ...] = ("glasses",)
_COLOR = "|".join(COLORS)
_IS = re.compile(
    rf"Actor([12]) is an? ({_COLOR}) ({'|'.join(SPECIES)})"
    rf" with (?:an? )?({_COLOR}) ({'|'.join(ACCESSORIES)})\. "
)
_DOES = re.compile(rf"Actor([12]) ({'|'.join(_ACTIONS.values())})\b")
_WHERE = re.compile("|".join(_PLACES.values()))


@dataclass(frozen=True)
class Told:
    """What a caption tells of a shot: who does what, by number, and where."""

    acts: tuple[Act, ...]
    place: Place


def caption(shot: Shot) -> str:
    """The caption of a shot."""
    return _sentences(shot.acts, shot.place)


def attributes_of(text: str) -> Told:
    """What a caption tells: the inverse of :func:`caption`.

    Raises:
        InputError: It is not a caption of ToonWorld.
    """
    who = [(int(n), Actor(species, color, extra, tint))  # type: ignore[arg-type]
           for n, color, species, tint, extra in _IS.findall(text)]  # fmt: skip
    does = {int(number): words for number, words in _DOES.findall(text)}
    where = _WHERE.search(text)
    actions: dict[str, Action] = {words: action for action, words in _ACTIONS.items()}
    places: dict[str, Place] = {words: place for place, words in _PLACES.items()}
    if where and [number for number, _ in who] == list(does):
        acts = tuple(Act(number, actor, actions[does[number]]) for number, actor in who)
        told = Told(acts, places[where.group()])
        if acts and _sentences(told.acts, told.place) == text:
            return told
    raise InputError(
        "this is not a caption of ToonWorld",
        found=text,
        expected="such as 'Actor1 is a red cat with a blue hat. Actor1 dances in a forest.'",
    )


def describe(actor: Actor) -> str:
    """An actor in words, such as ``a red cat with a blue hat``."""
    extra = f"{actor.accessory_color} {actor.accessory}"
    if actor.accessory not in _PLURAL:
        extra = _with_article(extra)
    return f"{_with_article(f'{actor.color} {actor.species}')} with {extra}"


def _sentences(acts: tuple[Act, ...], place: Place) -> str:
    told = [f"Actor{act.number} is {describe(act.actor)}." for act in acts]
    first, *others = (_does(act) for act in acts)
    where = _PLACES[place]
    return " ".join([*told, f"{first} {where}{''.join(f' while {does}' for does in others)}."])


def _does(act: Act) -> str:
    return f"Actor{act.number} {_ACTIONS[act.action]}"


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
