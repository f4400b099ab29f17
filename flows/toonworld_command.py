"""``triptych toonworld``: cartoon videos with captions and ground truth, drawn on the spot."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer
from rich.progress import Progress

from flows.console import err, out, show_logs
from schemas.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

    from curation.toonworld.world import Video

SHEET = "contact_sheet.jpg"


def toonworld(
    folder: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder to write; created if missing.")
    ],
    episodes: Annotated[
        int, typer.Option(help="Stories: their shots share actors and a hidden style.", min=0)
    ] = 20,
    compilations: Annotated[
        int, typer.Option(help="Rows of unrelated shots, which curation should see through.", min=0)
    ] = 5,
    seed: Annotated[
        int,
        typer.Option(help="Decides everything. The embedded models are trained on 1, tested on 2."),
    ] = 0,
    height: Annotated[int, typer.Option(help="Pixels, even, 32 or more.")] = 128,
    width: Annotated[int, typer.Option(help="Pixels, even, 32 or more.")] = 192,
    fps: Annotated[int, typer.Option(help="Frames per second, 4 or more.", min=4)] = 8,
) -> None:
    """Draw cartoon videos of which everything is known: a dataset to try every command on.

    An [bold]episode[/bold] is a story of 3 to 8 shots, parted by cuts, dissolves and fades. Its
    captions tell who is seen (species, colour, accessory), what they do and where; they do not tell
    its style (palette, outline, paper, proportions, light), which all its shots share. A
    [bold]compilation[/bold] is a row of shots that have nothing to do with one another.

    Beside an mp4 per video OUT holds [bold]captions.csv[/bold] (in the form of Panda-70M),
    [bold]stories.csv[/bold] (which shots belong together), [bold]truth.json[/bold] (every shot,
    transition, attribute and style) and [bold]contact_sheet.jpg[/bold], a look at it all.

    The same seed and size give the same frames on every machine; videos already there are kept.

    [bold]Examples[/bold]

      triptych toonworld toons --episodes 100 --compilations 25

      triptych toonworld big --episodes 4 --compilations 0 --height 480 --width 720 --fps 24
    """
    from curation.toonworld.world import draw_compilation, draw_episode
    from curation.toonworld.write import write_dataset
    from schemas.storage import atomic_path

    videos = [
        *(draw_episode(seed, index) for index in range(episodes)),
        *(draw_compilation(seed, index) for index in range(compilations)),
    ]
    if not videos:
        raise InputError(
            "there is nothing to draw",
            where=folder,
            found="--episodes 0 --compilations 0",
            expected="one of them above 0",
        )
    show_logs(verbose=False)
    with Progress(console=err, transient=True, disable=not err.is_terminal) as bar:
        row = bar.add_task("drawing", total=len(videos))
        rendered = write_dataset(
            folder,
            seed,
            episodes,
            compilations,
            height,
            width,
            fps,
            tell=lambda done: bar.update(row, completed=done),
        )
    with atomic_path(folder / SHEET) as tmp:
        contact_sheet(videos, height, width).save(tmp, "JPEG", quality=90)
    kept = len(videos) - rendered
    _say(
        f"{folder}: {episodes} episodes and {compilations} compilations"
        f"{f' ({kept} were there already)' if kept else ''}; captions.csv, stories.csv, truth.json"
    )
    _say(f"look at it: {folder / SHEET}")
    _say(f"curate it:  triptych refresh {_settings(folder)}")


def contact_sheet(videos: Sequence[Video], height_px: int, width_px: int) -> Image.Image:
    """A row per video, evenly chosen if there are many: four moments under its name and cast."""
    from curation.toonworld.render import render
    from flows.sheets import evenly
    from inference.contact_sheet import COLUMNS, MAX_ROWS, ContactSheet

    shown = [videos[i] for i in evenly(len(videos), MAX_ROWS)]
    sheet = ContactSheet([_title(video) for video in shown])
    for video in shown:
        at = [(k + 0.5) * len(video.shots) / COLUMNS for k in range(COLUMNS)]
        shots = [video.shots[int(place)] for place in at]
        times = [place % 1 * shot.seconds for place, shot in zip(at, shots, strict=True)]
        stills = (render(s, t, height_px, width_px) for s, t in zip(shots, times, strict=True))
        sheet.add(np.stack(list(stills)))
    return sheet.image()


def _title(video: Video) -> str:
    from curation.toonworld.captions import describe

    if video.kind == "compilation":
        return f"{video.name}: {len(video.shots)} unrelated shots"
    acts = {act.number: act.actor for shot in video.shots for act in shot.acts}
    cast = ", ".join(f"Actor{number} {describe(acts[number])}" for number in sorted(acts))
    return f"{video.name}: {len(video.shots)} shots; {cast}"


def _settings(folder: Path) -> str:
    """What a refresh must be told; shots of two seconds make clips of nine frames or more."""
    where = str(folder.resolve())
    settings = (
        f"curation.sources.inputs={json.dumps([where])}",
        f"curation.sources.captions_csv={where}/captions.csv",
        "curation.clips.min_frames=9",
    )
    return " ".join(f"-s {shlex.quote(setting)}" for setting in settings)


def _say(text: str) -> None:
    out.print(text, markup=False, highlight=False, soft_wrap=True)
