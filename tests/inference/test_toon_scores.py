from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest

from curation.toonworld.captions import Told, attributes_of, caption
from curation.toonworld.probe import Probe, Reading, load_probe, read_scenes
from curation.toonworld.world import Act, Actor, Style, draw_episode
from inference.toon_scores import checked, score_stories, score_story, unrelated
from schemas.errors import InputError
from training.tiny.stories import HELD_OUT_SEED, film_scene

SHIPPED = Path(__file__).parents[2] / "assets/tiny/probe"
LEAST = 0.95
CAT, FOX = Actor("cat", "red", "hat", "blue"), Actor("fox", "green", "bow", "pink")
INK = Style("plain", "ink", "smooth", "stout", "noon")
TOLD = Told((Act(1, CAT, "jump"), Act(2, FOX, "wave")), "city")
SEEN = Reading(((CAT, "jump"), (FOX, "wave")), "city", INK)


def share(reading: Reading, told: Told) -> float:
    return fmean(ok for _, ok in checked(reading, told))


def test_semantic_accuracy_counts_what_is_told() -> None:
    assert share(SEEN, TOLD) == 1
    assert share(replace(SEEN, place="moon"), TOLD) == pytest.approx(11 / 12)
    assert share(replace(SEEN, acts=SEEN.acts[::-1]), TOLD) == pytest.approx(2 / 12)
    assert share(replace(SEEN, acts=SEEN.acts[:1]), TOLD) == pytest.approx(6 / 12)
    spun = (SEEN.acts[0], (replace(FOX, accessory_color="blue"), "spin"))
    assert share(replace(SEEN, acts=spun), TOLD) == pytest.approx(10 / 12)
    # Someone who is not told of costs the number of actors alone.
    alone = Told((Act(2, CAT, "jump"),), "city")
    assert share(SEEN, alone) == pytest.approx(6 / 7)
    # The hidden style is told nowhere.
    assert share(replace(SEEN, style=replace(INK, light="evening")), TOLD) == 1


def test_style_agreement_is_over_pairs_and_variables() -> None:
    other = replace(SEEN, style=replace(INK, light="evening", palette="cool"))
    scores = score_story([SEEN, SEEN, other], [TOLD] * 3)
    assert scores.semantic == 1
    assert scores.same_style == pytest.approx(1 / 3)
    assert scores.styles == pytest.approx(
        {"palette": 1 / 3, "outline": 1, "texture": 1, "build": 1, "light": 1 / 3}
    )
    assert scores.style == pytest.approx((3 + 2 / 3) / 5)
    assert score_story([SEEN, SEEN], [TOLD] * 2).same_style == 1


def test_attributes_are_counted_by_name() -> None:
    wrong = replace(SEEN, acts=(SEEN.acts[0], (FOX, "spin")), place="moon")
    scores = score_story([SEEN, wrong], [TOLD] * 2)
    assert scores.told["action"] == pytest.approx(3 / 4)
    assert scores.told["place"] == pytest.approx(1 / 2)
    assert scores.told["species"] == scores.told["actors"] == 1


def test_given_scenes_count_in_the_style_of_generated_ones_alone() -> None:
    other = replace(SEEN, style=replace(INK, light="evening"), place="moon")
    scores = score_story([other, SEEN, SEEN], [TOLD] * 3, given=1)
    assert scores.semantic == 1  # the given one is not held against its caption
    assert scores.styles["light"] == pytest.approx(1 / 3)  # its pairs with both, and theirs
    last = score_story([other, SEEN, SEEN], [TOLD] * 3, given=2)
    assert last.styles["light"] == pytest.approx(1 / 2)
    assert score_story([SEEN, SEEN, other], [TOLD] * 3, given=2).told["place"] == 0


def test_unrelated_scenes_are_of_different_stories() -> None:
    styles = [replace(INK, palette=p) for p in ("plain", "warm", "cool", "pastel")]
    readings = [[replace(SEEN, style=style)] * 3 for style in styles]
    told = [[TOLD] * 3] * 4
    assert all(scores.styles["palette"] == 0 for scores in unrelated(readings, told))
    assert [score_story(r, t).styles["palette"] for r, t in zip(readings, told, strict=True)] == [
        1
    ] * 4


@pytest.fixture(scope="module")
def probe() -> Probe:
    return load_probe(SHIPPED)


def test_real_stories_score_high_and_unrelated_ones_low(probe: Probe) -> None:
    shots = [draw_episode(HELD_OUT_SEED, 800 + i).shots[:3] for i in range(12)]
    stories = [
        [film_scene(s, "scores", i, k) for k, s in enumerate(o)] for i, o in enumerate(shots)
    ]
    captions = [[caption(shot) for shot in story] for story in shots]
    real = score_stories(probe, stories, captions)
    assert fmean(s.semantic for s in real) >= LEAST
    assert fmean(s.style for s in real) >= LEAST
    readings = [read_scenes(probe, story) for story in stories]
    told = [[attributes_of(text) for text in story] for story in captions]
    assert [score_story(r, t) for r, t in zip(readings, told, strict=True)] == real
    chance = unrelated(readings, told)
    assert fmean(s.semantic for s in chance) < 0.4
    assert fmean(s.style for s in chance) < 0.5
    assert fmean(s.same_style for s in chance) < 0.1


def test_every_scene_needs_a_caption(probe: Probe) -> None:
    scene = np.zeros((9, 64, 64, 3), np.uint8)
    text = "Actor1 is a red cat with a blue hat. Actor1 dances in a forest."
    with pytest.raises(InputError, match="needs a caption"):
        score_stories(probe, [[scene, scene]], [[text]])
    with pytest.raises(InputError, match="not a caption"):
        score_stories(probe, [[scene, scene]], [[text, "a cat"]])


def test_what_is_left_out_does_not_count() -> None:
    still = replace(SEEN, acts=((CAT, "spin"), (FOX, "spin")))
    whole = score_story([still, SEEN], [TOLD, TOLD])
    part = score_story([still, SEEN], [TOLD, TOLD], left_out=("action",))
    assert whole.semantic < part.semantic == 1
    assert "action" not in part.told
