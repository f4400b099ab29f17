"""``triptych prompts``: manifests checked, and made from other systems' files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.console import err, out
from flows.options import ConfigFile, Preset, Set, settings_of

if TYPE_CHECKING:
    from schemas.rows import Prompt, Reject

MAX_LISTED = 50
"""Bad rows shown; the file may be large."""


class Source(StrEnum):
    """What a manifest can be made from."""

    TALC = "talc"
    ACTORS = "actors"


prompts = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Check prompt manifests, and make them from other systems' files.",
)


@prompts.command("check")
def check(
    manifest: Annotated[Path, typer.Argument(help="Parquet, CSV, JSONL or JSON.")],
    config: ConfigFile = None,
    preset: Preset = "tiny",
    set_: Set = None,
) -> None:
    """List every bad row of a prompt manifest with its place and what is wrong; load no model.

    Exit code 0: every row is good; 1: some are not, or there is none.
    """
    from inference.prompts import read_prompts

    good, bad = read_prompts(manifest, settings_of(config, preset, set_, None))
    _show_rejects(bad)
    scenes = sum(len(p.prompts) + len(p.extend_prompts) for p in good)
    _say(f"{_stories(len(good))} of {scenes} scenes can be generated; {len(bad)} rows cannot")
    raise typer.Exit(0 if good and not bad else 1)


@prompts.command("import")
def import_(
    source: Annotated[Path, typer.Argument(metavar="IN", help="The other system's file.")],
    target: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="Manifest to write: .parquet, .csv, .jsonl, .json."),
    ],
    from_: Annotated[Source, typer.Option("--from", help="What IN is.")],
    together: Annotated[
        int,
        typer.Option(
            help="Most scenes generated together; further ones are added one by one. Give what the "
            "model was trained with.",
            min=1,
            max=16,
        ),
    ] = 16,
) -> None:
    """Write the stories of another system's file as a prompt manifest, and list what it left out.

    [bold]talc[/bold]: prompts/*.json (lists of captions by name) or data/*.jsonl of TALC.

    [bold]actors[/bold]: scripts in which ActorN (what it looks like) is described in the same words
    in every scene, as in the Mask2DiT paper. Text, with an empty line between stories:

      # picnic
      Actor1: short black hair, wearing sunglasses
      Actor1 spreads out a blanket by the riverside.
      Actor1 shares snacks with Actor2 (a long yellow dress).

    or JSON: a list of objects with prompt_id, actors (by name) and scenes.

    [bold]Example[/bold]

      triptych prompts import --from talc single_character.json talc.csv --together 3
    """
    from inference.prompt_importers import FORMATS
    from inference.prompts import check_records, write_prompts
    from schemas.config import TriptychConfig

    good, bad = check_records(source, FORMATS[from_](source), TriptychConfig())
    written = write_prompts(target, [_parted(p, together) for p in good])
    _show_rejects(bad)
    _say(f"{target}: {_stories(written)} written; {len(bad)} left out")
    raise typer.Exit(0 if written and not bad else 1)


def _parted(prompt: Prompt, together: int) -> Prompt:
    first, rest = prompt.prompts[:together], prompt.prompts[together:]
    return replace(prompt, prompts=first, extend_prompts=rest)


def _show_rejects(rejects: Sequence[Reject]) -> None:
    for reject in rejects[:MAX_LISTED]:
        err.print(reject.detail, style="red", markup=False, highlight=False, soft_wrap=True)
    if len(rejects) > MAX_LISTED:
        reasons = Counter(r.reason for r in rejects).most_common()
        counts = ", ".join(f"{count} {reason}" for reason, count in reasons)
        err.print(f"… {len(rejects) - MAX_LISTED} more. In all: {counts}", highlight=False)


def _stories(count: int) -> str:
    return f"{count:,} {'story' if count == 1 else 'stories'}"


def _say(text: str) -> None:
    out.print(text, markup=False, highlight=False, soft_wrap=True)
