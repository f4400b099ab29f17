from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from curation.ground_truth import read_truth
from curation.inputs.lists import Listed, ListFile
from curation.inputs.panda70m import read_panda70m
from curation.toonworld.captions import caption, describe
from curation.toonworld.measure import measure_colors, measure_scene
from curation.toonworld.render import film, render, render_video, stage
from curation.toonworld.timeline import timeline, weights
from curation.toonworld.world import (
    ACTIONS,
    BUILDS,
    LIGHTS,
    OUTLINES,
    PALETTES,
    TEXTURES,
    Act,
    Action,
    Actor,
    Join,
    Shot,
    Style,
    Video,
    draw_compilation,
    draw_episode,
    style_agreement,
)
from curation.toonworld.write import LOOK, write_dataset
from curation.video import decode
from schemas.errors import InputError

LOOK_BLOCKS = [[192, 180, 201], [156, 133, 161], [193, 136, 130], [130, 107, 119]]
"""Mean colours of the second column of 16 x 16 blocks of one frame: sky, cat and road."""
STYLE = Style("plain", "ink", "smooth", "bigheaded", "noon")
CAT = Actor("cat", "red", "hat", "blue")
HIDDEN = {*PALETTES, *OUTLINES, *TEXTURES, *BUILDS, *LIGHTS, *Style.__dataclass_fields__}
HIDDEN |= {"sun", "shadow", "line", "paper", "proportions"}


def shot(action: Action = "wave", place: str = "city", seconds: float = 1.0) -> Shot:
    return Shot((Act(1, CAT, action),), place, "wide", STYLE, "test", 0.2, 0.0, seconds)  # type: ignore[arg-type]


def film_at(of: Shot, times: list[float], size: int = 64) -> np.ndarray:
    return film(stage(of, size, size), np.array(times))


def test_a_video_depends_on_seed_and_number_alone() -> None:
    alone = draw_episode(5, 3)
    assert [draw_episode(5, i) for i in range(6)][3] == alone
    assert draw_episode(6, 3) != alone
    assert draw_episode(5, 4).shots != alone.shots


def test_an_episode_shares_style_and_actors_and_changes_place() -> None:
    counts = set()
    for video in (draw_episode(0, i) for i in range(60)):
        counts.add(len(video.shots))
        assert len({s.style for s in video.shots}) == len(set(video.stories)) == 1
        assert len({(a.number, a.actor) for s in video.shots for a in s.acts}) <= 2
        places = [s.place for s in video.shots]
        assert all(a != b for a, b in pairwise(places))
        assert len(video.joins) == len(video.shots) - 1
    assert counts == {3, 4, 5, 6, 7, 8}


def test_shots_of_a_compilation_are_unrelated() -> None:
    for video in (draw_compilation(0, i) for i in range(40)):
        for k, a in enumerate(video.shots):
            for b in video.shots[:k]:
                assert style_agreement(a.style, b.style) <= 2
                assert not {x.actor for x in a.acts} & {x.actor for x in b.acts}
        assert len(set(video.stories)) == len(video.shots)


def test_captions_tell_what_is_seen_and_nothing_hidden() -> None:
    verbs: set[str] = set()
    for video in (draw_episode(1, i) for i in range(120)):
        for of in video.shots:
            text = caption(of)
            assert not set(re.findall(r"[a-z]+", text.lower())) & HIDDEN
            *told, last = text.split(". ")
            assert told == [f"Actor{a.number} is {describe(a.actor)}" for a in of.acts]
            named = re.findall(r"Actor(\d) ([a-z]+)", last)
            assert [int(number) for number, _ in named] == [a.number for a in of.acts]
            verbs |= {verb for _, verb in named}
    assert len(verbs) == len(ACTIONS) - 1  # both ways of walking are the same verb
    assert caption(shot()) == (
        "Actor1 is a red cat with a blue hat. Actor1 waves hello in a city street."
    )


def test_frames_do_not_depend_on_what_is_filmed_with_them() -> None:
    for of in draw_episode(2, 1).shots[:3]:
        times = [0.0, 0.4, 1.1]
        together = film_at(of, times)
        assert all(np.array_equal(together[i], film_at(of, [t])[0]) for i, t in enumerate(times))
        assert not np.array_equal(together[0], together[1])


def test_the_look_is_that_of_its_version() -> None:
    """Pictures that change need another ``LOOK``, or old and new ones would mix in a dataset."""
    assert LOOK == 1
    blocks = render(shot(), 0.5, 64, 64).reshape(4, 16, 4, 16, 3).mean((1, 3)).round()
    assert np.abs(blocks[:, 1] - LOOK_BLOCKS).max() <= 1


@pytest.mark.parametrize("size", [(64, 64), (64, 96), (96, 64), (48, 72), (480, 720)])
def test_any_size(size: tuple[int, int]) -> None:
    frame = render(shot(), 0.3, *size)
    assert frame.shape == (*size, 3)
    small = frame.reshape(16, size[0] // 16, 8, size[1] // 8, 3).mean((1, 3))
    assert small.std() > 20


@pytest.mark.parametrize("size", [(63, 64), (64, 30)])
def test_impossible_sizes_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="cannot be drawn"):
        stage(shot(), *size)


@pytest.mark.parametrize("action", ACTIONS)
def test_actions_are_seen_as_motion(action: Action) -> None:
    times = [k / 8 for k in range(9)]
    frames = film_at(shot(action), times).astype(int)
    moving = np.abs(np.diff(frames, axis=0)).max(axis=3) > 40
    assert (moving.mean(axis=(1, 2)) > 0.005).mean() > 0.5
    red = (frames[..., 0] > 150) & (frames[..., 1] < 90) & (frames[..., 2] < 90)
    y, x = ([np.nonzero(r)[axis].mean() for r in red] for axis in (0, 1))
    if action == "walk_left":
        assert x[-1] < x[0] - 8
    elif action == "walk_right":
        assert x[-1] > x[0] + 8
    else:
        assert max(x) - min(x) < 8
    assert (max(y) - min(y) > 6) == (action == "jump")


def test_transitions_lie_where_the_timeline_says() -> None:
    first, second, third = shot("wave", "city"), shot("dance", "snow"), shot("jump", "night")
    joins = (Join("dissolve", 1.0), Join("fade", 1.0))
    video = Video("test", "episode", (first, second, third), joins, ("test",) * 3)
    line = timeline(video, 8)
    assert [s.start for s in line.shots] == [0, *(s.end for s in line.shots[:-1])]
    assert line.num_frames == line.shots[-1].end == 3 * 8 + 2 * 8
    frames = render_video(video, 8, 64, 64)
    for of, span in zip(video.shots, line.shots, strict=True):
        pure = range(span.pure_start, span.pure_end)
        own = film_at(of, [(f - span.first) / 8 for f in pure])
        assert np.array_equal(frames[pure.start : pure.stop], own)
    dissolve, fade = line.transitions
    assert (dissolve.start, dissolve.end, fade.start, fade.end) == (8, 16, 24, 32)
    falling = weights(line.shots[0], None, dissolve)[-8:]
    assert falling + weights(line.shots[1], dissolve, fade)[:8] == pytest.approx(1)
    assert (np.diff(falling) < 0).all()
    middle = 0.5 * sum(
        film_at(of, [(12 - span.first) / 8])[0].astype(float) * share
        for of, span, share in zip(
            (first, second), line.shots, (2 * falling[4], 2 - 2 * falling[4]), strict=False
        )
    )
    assert np.abs(frames[12] - middle).max() <= 1
    dark = frames.mean(axis=(1, 2, 3))
    assert dark[fade.start : fade.end].min() == 0
    assert (dark == 0).sum() == 1


def test_a_dataset_is_whole_resumed_and_read_by_curation(tmp_path: Path) -> None:
    folder = tmp_path / "world"
    assert write_dataset(folder, 4, 1, 1, 64, 64, 8) == 2
    truth = json.loads((folder / "truth.json").read_text())
    assert set(truth) == {"episode_00000.mp4", "compilation_00000.mp4"}
    stories = read_truth(folder / "stories.csv")
    listed = list(read_panda70m(ListFile("captions.csv", folder / "captions.csv", str(folder))))
    for row, (name, entry) in zip(listed, sorted(truth.items(), reverse=True), strict=True):
        assert isinstance(row, Listed)
        assert row.uri == str(folder / name)
        assert sum(1 for _ in decode(folder / name)) == entry["nframes"]
        spans = [s["frames"] for s in entry["shots"]]
        assert [s.caption for s in row.captions] == [s["caption"] for s in entry["shots"]]
        seconds = [(s.start_s, s.end_s) for s in row.captions]
        assert np.array(seconds) == pytest.approx(np.array(spans) / 8, abs=6e-4)
        assert spans[0][0] == 0 and spans[-1][1] == entry["nframes"]
        assert len(entry["cuts"]) + len(entry["soft"]) == len(spans) - 1
    assert stories.num_rows == sum(len(entry["shots"]) for entry in truth.values())

    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert write_dataset(folder, 4, 1, 1, 64, 64, 8) == 0
    (folder / "episode_00000.mp4").write_bytes(b"half a file")
    assert write_dataset(folder, 4, 1, 1, 64, 64, 8) == 1
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert write_dataset(folder, 5, 1, 0, 64, 64, 8) == 1
    assert (folder / "episode_00000.mp4").read_bytes() != before["episode_00000.mp4"]


def test_attributes_are_read_back_from_frames() -> None:
    right: list[bool] = []
    for of in [s for i in range(6) for s in draw_compilation(11, i).shots[:3]]:
        frames = film_at(of, [0.5, 0.8, 1.1, 1.4, 1.7])
        found = measure_scene(frames)
        right += [found.place == of.place, found.palette == of.style.palette]
        right += [found.light == of.style.light, found.texture == of.style.texture]
        wanted = tuple(act.actor.color for act in of.acts)
        right.append(measure_colors(frames, found, len(of.acts)) == wanted)
    assert np.mean(right) >= 0.97
