"""Captions of shots: what is seen, in whole sentences, and nothing of the hidden style.

An actor is described the same way in every caption of an episode. Source of the structure: the
Mask2DiT paper's captions, which number actors (Actor1, Actor2) and describe each before the action.
"""

from __future__ import annotations

from curation.toonworld.world import Accessory, Act, Action, Actor, Place, Shot

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


def caption(shot: Shot) -> str:
    """The caption of a shot."""
    told = [f"Actor{act.number} is {describe(act.actor)}." for act in shot.acts]
    first, *others = (_does(act) for act in shot.acts)
    place = _PLACES[shot.place]
    return " ".join([*told, f"{first} {place}{''.join(f' while {does}' for does in others)}."])


def describe(actor: Actor) -> str:
    """An actor in words, such as ``a red cat with a blue hat``."""
    extra = f"{actor.accessory_color} {actor.accessory}"
    if actor.accessory not in _PLURAL:
        extra = _with_article(extra)
    return f"{_with_article(f'{actor.color} {actor.species}')} with {extra}"


def _does(act: Act) -> str:
    return f"Actor{act.number} {_ACTIONS[act.action]}"


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
