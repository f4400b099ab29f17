"""``triptych model``: model folders from training runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from flows.console import out
from flows.options import ConfigFile, InWorkspace, Preset, Set, settings_of
from schemas.errors import CheckpointError
from schemas.layout import Workspace

model = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Make model folders from any checkpoint of a training run.",
)


@model.command("export")
def export_model(
    run: Annotated[
        str, typer.Argument(help="Name of the run, a folder in WORKSPACE/runs, or 'latest'.")
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The model folder to write.")],
    step: Annotated[
        int | None, typer.Option(help="Checkpoint to take; default: the newest whole one.")
    ] = None,
    average: Annotated[
        bool | None,
        typer.Option(
            "--average/--weights",
            help="The moving average, or the weights themselves. Default: the average if any.",
        ),
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Type of the stored weights. Default: the one it was trained in."),
    ] = None,
    max_shard_mb: Annotated[
        float | None,
        typer.Option(min=0.1, help="Largest weights file in MB. Default: 10,000, as diffusers."),
    ] = None,
    config: ConfigFile = None,
    preset: Preset = "tiny",
    set_: Set = None,
    workspace: InWorkspace = None,
) -> None:
    """Write a model folder from a checkpoint of a run, also one that is still training.

    The folder has diffusers' CogVideoX layout, with a README that says what it was trained on.
    Adapters (LoRA) are merged, and lie beside the weights as diffusers reads them.

    [bold]Examples[/bold]

      triptych model export latest my-model
      triptych model export sft-1f0c… my-model --step 2000 --weights
      triptych model export latest my-model --dtype bfloat16 --max-shard-mb 2000
    """
    from schemas.storage import latest
    from training.checkpoints import newest_complete
    from training.export import export_checkpoint
    from training.job import Job

    settings = settings_of(config, preset, set_, workspace)
    runs = Workspace(Path(settings.workspace)).runs
    folder = latest(runs) if run == "latest" else runs / run
    if folder is None or not (folder / "job.json").is_file():
        raise CheckpointError(
            "there is no such training run",
            where=folder or runs,
            found=", ".join(sorted(p.parent.name for p in runs.glob("*/job.json"))) or "no runs",
            do="give one of the runs found, or the workspace it is in",
        )
    job = Job.model_validate_json((folder / "job.json").read_text(encoding="utf-8"))
    if step is None:
        newest = newest_complete(job.checkpoints)
        checkpoint = newest[1] if newest else job.checkpoints
    else:
        checkpoint = job.checkpoints / f"step_{step:08d}"
    if not (checkpoint / "_DONE.json").is_file():
        there = [p.name for p in sorted(job.checkpoints.glob("step_*"))]
        raise CheckpointError(
            "there is no such checkpoint",
            where=checkpoint,
            found=", ".join(there) or "no checkpoints",
            do="choose one of them with --step",
        )
    export_checkpoint(job, checkpoint, target, average, dtype, max_shard_mb)
    out.print(f"{target}: {folder.name}, {checkpoint.name}")
