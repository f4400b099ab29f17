"""Stories of the embedded model on held-out prompts of ToonWorld, held against the ground truth.

Usage: python -m benchmarks.toonworld_stories [--model assets/tiny/model] [--stories 64]
    [--workspace build/bench/toonworld_stories] [--out build/bench/toonworld_stories.json]
    [--picture docs/stories.webp]

Each story is told by the captions of an episode of the held-out seed. Once all of its three scenes
are generated, and once the first two are given as real videos and the third is generated. A trained
probe reads the videos, as they were written. Beside them: what the probe reads of real scenes (the
ceiling), and of scenes of different stories with captions of another one (chance). ``--picture``
also writes the first stories, the good and the bad ones, as a moving picture for the README.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from benchmarks.tables import target, write_report
from curation.mp4 import write_mp4
from curation.toonworld.captions import attributes_of, caption
from curation.toonworld.probe import load_probe, read_scenes
from curation.toonworld.world import draw_episode
from flows.reproduce_work import scenes_of
from inference.batch import run_batch
from inference.prompts import write_prompts
from inference.toon_scores import StoryScores, score_stories, score_story, unrelated
from schemas.config import TriptychConfig
from schemas.config.presets import toonworld
from schemas.layout import Workspace
from schemas.rows import Prompt
from schemas.tables import GENERATIONS, read_table
from training.tiny.stories import HELD_OUT_SEED, SCENES, film_scene

MODELS = Path("assets/tiny")
LEAST = 0.8
GIVEN = 2
"""Scenes that the extended stories begin with."""
SHOWN, _SCALE, _GAP_PX, _PAPER = 4, 3, 6, 255
"""Of the moving picture: stories, enlargement, gaps between scenes and their grey."""

ABOUT = f"""
Prompts are the captions of episodes of the held-out seed {HELD_OUT_SEED}, {SCENES} scenes each;
sampling is the preset's (`-p toonworld`). `told` is semantic accuracy: the share of what captions
tell (number of actors, place, of each actor species, colour, accessory, its colour, action) that
the probe reads from the frames. `style` is style agreement: the share of the hidden variables
(palette, outline, texture, proportions, light) that two scenes of a story have in common. Extended
stories begin with {GIVEN} real scenes; only the generated one is held against its caption, and its
style against theirs.
"""

Scenes = list[npt.NDArray[np.uint8]]


def main() -> None:
    """Generate, score, print tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, default=MODELS / "model")
    parser.add_argument("--stories", type=int, default=64)
    parser.add_argument("--workspace", type=Path, default=Path("build/bench/toonworld_stories"))
    parser.add_argument("--out", type=Path, default=Path("build/bench/toonworld_stories.json"))
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    probe = load_probe(MODELS / "probe")
    config = toonworld().training.model
    step = config.max_stride
    episodes = [draw_episode(HELD_OUT_SEED, k).shots[:SCENES] for k in range(args.stories)]
    captions = [[caption(shot) for shot in shots] for shots in episodes]
    real = [
        [film_scene(shot, HELD_OUT_SEED, i, k)[::step] for k, shot in enumerate(shots)]
        for i, shots in enumerate(episodes)
    ]
    told = [[attributes_of(text) for text in story] for story in captions]
    flat = iter(read_scenes(probe, [scene for story in real for scene in story]))
    readings = [[next(flat) for _ in story] for story in real]
    scores = {
        "real scenes": [score_story(*pair) for pair in zip(readings, told, strict=True)],
        "chance": unrelated(readings, told),
    }
    for name, given in (("generated", 0), ("extended", GIVEN)):
        made = generate(args.workspace, args.model, captions, real, given)
        scores[name] = score_stories(probe, made, captions, given)
        if args.picture is not None and not given:
            write_picture(made[:SHOWN], args.picture)
    rows = [{"group": f"{args.stories} stories", "case": n, **mean(s)} for n, s in scores.items()]
    targets = [
        target(f"{what}, {name}", fmean(getattr(s, what) for s in scores[name]), LEAST)
        for name in ("generated", "extended")
        for what in ("semantic", "style")
    ]
    write_report(args.out, "Stories of ToonWorld", ABOUT, rows, targets)


def generate(
    workspace: Path, model: Path, captions: list[list[str]], real: list[Scenes], given: int
) -> list[Scenes]:
    """The scenes of all stories, the first ``given`` of each being real."""
    fps, prompts = toonworld().generation.fps, list[Prompt]()
    for i, (texts, scenes) in enumerate(zip(captions, real, strict=True)):
        files = [(workspace / "given" / f"{i}_{k}.mp4").absolute() for k in range(given)]
        for path, scene in zip(files, scenes, strict=False):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_mp4(path, scene, fps)
        videos = [*map(str, files), *[""] * (len(texts) - given)] if given else []
        prompts.append(Prompt(f"story_{i:03d}", texts, seed=i, given=videos))
    manifest = workspace / f"prompts_given{given}.jsonl"
    write_prompts(manifest, prompts)
    config = settings(workspace, manifest)
    folder, count = run_batch(config, model, Workspace(workspace))
    assert count.kept == len(prompts), f"not every story was generated: see {folder}"
    rows = {g.prompt_id: g for g in read_table(folder / "generations.parquet", GENERATIONS)}
    return [scenes_of(Workspace(workspace), rows[prompt.prompt_id]) for prompt in prompts]


def write_picture(stories: Sequence[Scenes], path: Path) -> None:
    """Animated WebP: a row per story, whose scenes play side by side, for ever."""
    count = min(len(scene) for story in stories for scene in story)
    frames = list[Image.Image]()
    for k in range(count):
        rows = [np.concatenate([_framed(scene[k]) for scene in story], axis=1) for story in stories]
        frames.append(Image.fromarray(np.concatenate(rows)))
    path.parent.mkdir(parents=True, exist_ok=True)
    ms = round(1000 / toonworld().generation.fps)
    frames[0].save(
        path, save_all=True, append_images=frames[1:], duration=ms, loop=0, quality=85, method=6
    )


def _framed(frame: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    large = frame.repeat(_SCALE, 0).repeat(_SCALE, 1)
    gap = ((_GAP_PX // 2,) * 2, (_GAP_PX // 2,) * 2, (0, 0))
    return np.pad(large, gap, constant_values=_PAPER)


def settings(workspace: Path, prompts: Path) -> TriptychConfig:
    """The preset's, with these prompts."""
    config = toonworld()
    generation = config.generation.model_copy(update={"prompts": str(prompts)})
    return config.model_copy(update={"workspace": str(workspace), "generation": generation})


def mean(scores: Sequence[StoryScores]) -> dict[str, Any]:
    """Means over stories, per cent."""
    told = {
        name: 100 * fmean(s.told[name] for s in scores if name in s.told)
        for name in dict.fromkeys(name for s in scores for name in s.told)
    }
    styles = {n: 100 * fmean(s.styles[n] for s in scores) for n in scores[0].styles}
    both = {
        "told": 100 * fmean(s.semantic for s in scores),
        "style": 100 * fmean(s.style for s in scores),
    }
    return {name: round(value, 1) for name, value in {**both, **told, **styles}.items()}


if __name__ == "__main__":
    main()
