"""The ``triptych`` command: one subcommand per flow, and those around them.

Heavy imports (torch, Ray, Prefect) happen inside the commands, so that ``--help`` is quick.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.console import err, out, show_counts, show_error, show_logs
from flows.manifest_commands import manifest
from flows.model_commands import model
from flows.options import ConfigFile, InWorkspace, Preset, Set, Verbose
from flows.options import settings_of as _settings
from flows.prompt_commands import prompts
from flows.reproduce_command import reproduce
from flows.toonworld_command import toonworld
from schemas.config import PRESETS, dump_yaml, load_config, preset
from schemas.errors import TriptychError
from schemas.layout import Workspace

if TYPE_CHECKING:
    from schemas.counts import StageCount

app = typer.Typer(
    name="triptych",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    help="Curate video into three-scene data, train the masked diffusion transformer on it, "
    "and generate multi-scene videos.\n\n"
    "Every command takes the same settings: a preset, a YAML file over it, and --set over "
    "both. Everything is kept in one workspace folder; running a command again does only what "
    "is missing.",
)

app.add_typer(manifest, name="manifest")
app.add_typer(model, name="model")
app.add_typer(prompts, name="prompts")
app.command()(toonworld)
app.command()(reproduce)


def _run(flow: Callable[[], Any], verbose: bool) -> Any:
    """Run a flow with the stages' lines shown and Prefect's own lines kept quiet."""
    if not verbose:
        os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")  # errors are shown once, by us
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    show_logs(verbose)
    if "PREFECT_API_URL" not in os.environ:
        err.print(
            "starting Prefect's temporary server (about 30 s; set PREFECT_API_URL to use your own)"
        )
    try:
        return flow()
    except KeyboardInterrupt:
        err.print("interrupted; finished work is kept: run the same command again to go on")
        raise typer.Exit(130) from None


def _finish(counts: list[StageCount], title: str, **where: object) -> None:
    show_counts(counts, title)
    if counts and all(c.reused >= c.kept for c in counts):
        out.print("Nothing was missing: every result is from an earlier run.")
    for name, value in where.items():
        out.print(f"{name.replace('_', ' ')}: {value}", soft_wrap=True, highlight=False)


@app.command()
def config(
    name: Annotated[str, typer.Argument(metavar="PRESET", help=f"One of {', '.join(PRESETS)}.")],
    set_: Set = None,
) -> None:
    """Print a preset as commented YAML: [bold]triptych config tiny > my.yaml[/bold]."""
    sys.stdout.write(dump_yaml(load_config(None, set_ or [], base=preset(name))))


@app.command()
def refresh(
    config: ConfigFile = None,
    preset: Preset = "tiny",
    set_: Set = None,
    workspace: InWorkspace = None,
    verbose: Verbose = False,
) -> None:
    """Build a dataset snapshot: sources, shots, clips, similarities, pretrain and sft manifests."""
    settings = _settings(config, preset, set_, workspace)

    def run() -> None:
        from flows.refresh import refresh_dataset

        result = refresh_dataset(settings)
        _finish(result.counts, "refresh-dataset", snapshot=result.snapshot)

    _run(run, verbose)


@app.command()
def diff(
    old: Annotated[
        str | None, typer.Argument(help="Earlier snapshot; default: the one that NEW replaced.")
    ] = None,
    new: Annotated[str | None, typer.Argument(help="Later snapshot; default: the newest.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all of it as JSON.")] = False,
    config: ConfigFile = None,
    preset: Preset = "tiny",
    set_: Set = None,
    workspace: InWorkspace = None,
) -> None:
    """Show what a refresh added, what it dropped and why, and how far the dataset drifted."""
    from curation.snapshot_diff import diff_snapshots
    from flows.diff import find_pair, show_diff

    settings = _settings(config, preset, set_, workspace)
    dataset = Workspace(Path(settings.workspace)).dataset(settings.curation.dataset)
    found = diff_snapshots(*find_pair(dataset, old, new))
    if as_json:
        sys.stdout.write(json.dumps(found.to_dict(), indent=2) + "\n")
    else:
        show_diff(found)


@app.command()
def ablate(
    low: Annotated[
        list[float] | None,
        typer.Option("--low", help="A low threshold; repeatable (key: curation.ablation.lows)."),
    ] = None,
    statistic: Annotated[
        list[str] | None,
        typer.Option(
            "--statistic",
            help="min_adjacent, mean_adjacent, min_pairwise or mean_pairwise; repeatable "
            "(key: curation.ablation.statistics).",
        ),
    ] = None,
    config: ConfigFile = None,
    preset: Preset = "tiny",
    set_: Set = None,
    workspace: InWorkspace = None,
    verbose: Verbose = False,
) -> None:
    """Show what each similarity threshold would keep, from one scoring pass.

    The page shows plots, the overlap of thresholds, and windows just below and just above each:

    [bold]triptych ablate --low 0.2 --low 0.4 --low 0.6 --statistic mean_adjacent[/bold]

    With -s curation.ablation.truth=FILE also precision and recall; with
    -s curation.ablation.train_cells=3 three cells are trained on, and their videos scored.
    """
    changes = list(set_ or [])
    if low:
        changes.append(f"curation.ablation.lows={low}")
    if statistic:
        changes.append(f"curation.ablation.statistics={statistic}")
    settings = _settings(config, preset, changes, workspace)

    def run() -> None:
        from flows.ablate import ablate_thresholds, show_cells

        result = ablate_thresholds(settings)
        show_cells(result.cells)
        if result.unchanged:
            out.print("Nothing was missing: every result is from an earlier run.")
        if result.left_out:
            cells = ", ".join(map(str, result.left_out))
            out.print(f"Not trained, as the time was up: cells {cells}. Run again to go on.")
        out.print(f"results: {result.folder}", soft_wrap=True, highlight=False)
        out.print(f"page: {result.folder / 'index.html'}", soft_wrap=True, highlight=False)

    _run(run, verbose)


@app.command()
def train(
    config: ConfigFile = None,
    preset: Preset = "tiny",
    set_: Set = None,
    workspace: InWorkspace = None,
    dry: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Show what would be read, the memory of each rank, FLOPs and predicted time of a "
            "step, where it would resume, and the launch command; start and write nothing.",
        ),
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Pre-train, then fine-tune (SFT), on the newest snapshot; resumes where it stopped.

    Leave a stage out with -s training.pretrain.steps=0 or -s training.sft.steps=0.

    Before a long run, see whether it fits and how long it takes:

    [bold]triptych train -c my.yaml --dry-run[/bold]

    A run may be resumed with other numbers of processes, ZeRO stage, offload or launcher, and with
    more steps: [bold]-s training.sft.steps=20000[/bold].
    """
    settings = _settings(config, preset, set_, workspace)
    if dry:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        from flows.dry_run import dry_run

        dry_run(settings)
        return

    def run() -> None:
        from flows.train import train as flow

        result = flow(settings)
        _finish(result.counts, "train", model=result.model)

    _run(run, verbose)


@app.command()
def generate(
    prompts: Annotated[
        Path | None,
        typer.Argument(
            help="Prompt manifest: Parquet, CSV, JSONL or JSON; default: generation.prompts."
        ),
    ] = None,
    model: Annotated[
        Path | None, typer.Option("--model", help="Model folder; default: the newest SFT run's.")
    ] = None,
    config: ConfigFile = None,
    preset: Preset = "tiny",
    set_: Set = None,
    workspace: InWorkspace = None,
    dry: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Check every row, and show what would be made and what it costs; load nothing.",
        ),
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Generate a multi-scene video for every row of a prompt manifest; nothing is made twice.

    A row is a story. Two columns are needed: [bold]prompt_id[/bold], its name, and
    [bold]prompts[/bold], one text per scene: a list, JSON in a CSV cell, or columns
    [bold]prompt_1, prompt_2[/bold], ... For example, as CSV:

    [bold]prompt_id,prompt_1,prompt_2,seed,guidance[/bold]

    [bold]bird,Actor1 (a blue bird) wakes.,Actor1 flies off.,7,4.5[/bold]

    or as JSONL:

    [bold]{"prompt_id": "bird", "prompts": ["It wakes.", "It flies off."], "seed": 7}[/bold]

    Other columns, as needed: [bold]extend_prompts[/bold] (scenes added one by one behind the last
    ones), [bold]negative_prompt[/bold] or [bold]negative_prompts[/bold], [bold]seed[/bold] or
    [bold]seeds[/bold], [bold]frames[/bold] (1 + a multiple of 4), [bold]given[/bold] (video files
    of scenes that are not generated), and any sampling setting, such as [bold]steps[/bold],
    [bold]guidance[/bold] or [bold]scheduler[/bold]. Bad rows are listed with their line and left
    out; the rest is made.

    Run it again after anything that stopped it: what is finished is kept.
    [bold]-s generation.actors=2[/bold] works with two copies of the model,
    [bold]-s generation.micro_batch=4[/bold] denoises four stories at once.
    """
    changes = list(set_ or [])
    if prompts is not None:
        changes.append(f"generation.prompts={prompts}")
    if model is not None:
        changes.append(f"generation.model={model}")
    settings = _settings(config, preset, changes, workspace)
    if dry:
        from flows.generate import show_plan

        show_plan(settings)
        return

    def run() -> None:
        from flows.generate import generate_batch, show_batch_rejects

        result = generate_batch(settings)
        where = {"videos": result.videos, "gallery": result.gallery}
        _finish(result.counts, "generate-batch", batch=result.batch, **where)
        show_batch_rejects(result.batch)

    _run(run, verbose)


@app.command()
def evaluate(
    config: ConfigFile = None,
    preset: Preset = "tiny",
    set_: Set = None,
    workspace: InWorkspace = None,
    verbose: Verbose = False,
) -> None:
    """Score the newest batch: visual, semantic and sequence consistency."""
    settings = _settings(config, preset, set_, workspace)

    def run() -> None:
        from flows.evaluate import evaluate_batch, show_scores

        result = evaluate_batch(settings)
        show_scores(result.summary)
        _finish(result.counts, "evaluate", batch=result.batch)

    _run(run, verbose)


@app.command()
def report(
    config: ConfigFile = None,
    preset: Preset = "tiny",
    set_: Set = None,
    workspace: InWorkspace = None,
) -> None:
    """Write one self-contained HTML page about everything in the workspace."""
    from flows.report import build_report

    settings = _settings(config, preset, set_, workspace)
    path = build_report(settings, Workspace(Path(settings.workspace)))
    out.print(f"report: {path}", soft_wrap=True, highlight=False)


@app.command()
def demo(
    config: ConfigFile = None,
    preset: Preset = "toonworld",
    set_: Set = None,
    workspace: InWorkspace = None,
    verbose: Verbose = False,
) -> None:
    """Run the whole pipeline here: curate, train, generate, evaluate, report.

    Cartoon films are drawn on the spot, cut into shots and joined to manifests of three scenes; the
    embedded model, which knows such cartoons, is trained on for some steps, and then draws four
    stories that it has never seen. With [bold]-p tiny[/bold] the films are real ones and the model
    is new, so that what it makes is texture.
    """
    settings = _settings(config, preset, set_, workspace)

    def run() -> None:
        from flows.demo import with_films
        from flows.end_to_end import end_to_end

        result = end_to_end(with_films(settings))
        where = {"videos": result.videos, "gallery": result.gallery, "report": result.report}
        _finish(result.counts, "end-to-end", **where)
        if settings.training.model.base == "tiny":
            out.print(
                "This model is tiny and was trained for seconds: it makes texture, not film. "
                "`triptych config cogvideox_5b` shows the settings of the real one."
            )

    _run(run, verbose)


@app.command()
def doctor() -> None:
    """Say what works on this machine: decoders, Ray, Prefect, DeepSpeed, GPU, disk, memory."""
    from flows.doctor import examine, show

    findings = examine()
    show(findings)
    raise typer.Exit(0 if all(f.ok is not False for f in findings) else 1)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """SIGTERM as Ctrl-C: what the command started (Prefect's server, Ray, training) ends too."""
    del number, frame
    raise KeyboardInterrupt


def main() -> None:
    """Entry point: our own errors end as one clear message, not as a traceback."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        app()
    except TriptychError as error:
        sys.exit(show_error(error))


if __name__ == "__main__":
    main()
