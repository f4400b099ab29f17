"""What ``triptych train --dry-run`` shows: what training would read, need, take and start.

Nothing is started and nothing is written, except that a tiny base model which is not there yet is
made in a temporary folder.
"""

from __future__ import annotations

import os
import shlex
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.markup import escape

from flows.console import narrow_table, out
from flows.train import STAGES, Stage, base_folder, newest_snapshot, run_folder, stage_config
from schemas.config import TriptychConfig
from schemas.layout import Snapshot, Workspace
from schemas.storage import read_done
from training.base_model import make_tiny_base
from training.cache import LatentCache, training_samples
from training.cost import Flops, Model, Rate, Tokens, measure_rate, read_model, step_flops
from training.footprint import Memory, memory_per_rank
from training.job import MODEL, Job
from training.launch import resume_step
from training.launchers import plan_start
from training.shards import Shards

UNITS = ("", "k", "M", "G", "T", "P", "E")


@dataclass(frozen=True)
class Read:
    """What a stage would read.

    Attributes:
        samples: Samples trained on.
        left_out: Samples with a scene that is too short.
        held_out: Samples of the validation split.
        scenes: Distinct scenes of all of them.
        to_encode: Those of them that are not in the cache.
        captions: Distinct captions, the empty one included.
        captions_to_encode: Those of them that are not in the cache.
        size_bytes: What the cache holds of all of them in the end.
    """

    samples: int
    left_out: int
    held_out: int
    scenes: int
    to_encode: int
    captions: int
    captions_to_encode: int
    size_bytes: int


@dataclass(frozen=True)
class StagePlan:
    """One stage of a dry run.

    Attributes:
        stage: Which.
        read: What it would read.
        memory: Of one rank.
        flops: Of a step over all ranks, with all that is computed twice.
        step_s: Predicted seconds of a step, in the model.
        run_dir: Where it would be written; None = named once the stage before is done.
        resume: The step it goes on from.
        steps: The step it ends with.
    """

    stage: Stage
    read: Read
    memory: Memory
    flops: Flops
    step_s: float
    run_dir: Path | None
    resume: int
    steps: int


def dry_run(config: TriptychConfig) -> None:
    """Print what training would do.

    Raises:
        ManifestError: There is no finished snapshot, or nothing to train on.
        ConfigError: The base model or what the launcher needs is missing, the batch does not divide
            over the ranks, or a run is past its steps.
    """
    workspace = Workspace(Path(config.workspace))
    snapshot = newest_snapshot(config, workspace)
    with _base(config) as base:
        model = read_model(base, config.training)
        tokens = _tokens(config, base, model)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        rate = _measure(config, base, model, device)
        plans = _plans(config, snapshot, base, model, tokens, rate)
        jobs = [_job(config, snapshot, base, p) for p in plans]
    out.print(f"snapshot: {snapshot.root}", soft_wrap=True, highlight=False)
    _show_read(config, plans)
    _show_memory(config, model, tokens, plans)
    _show_time(plans, rate, device)
    for plan, job in zip(plans, jobs, strict=True):
        _show_run(plan, job)


@contextmanager
def _base(config: TriptychConfig) -> Generator[Path]:
    """The base model's folder."""
    folder = base_folder(config)
    if config.training.model.base != "tiny" or read_done(folder) is not None:
        yield folder
        return
    with tempfile.TemporaryDirectory() as made:
        yield make_tiny_base(Path(made) / "tiny", config.training.model)


def _longest(config: TriptychConfig, base: Path) -> tuple[list[int], int, int, int]:
    """Latent frames of the longest sample's scenes, height and width of latents, text tokens."""
    cache, shape = LatentCache.of(config.training, base, Workspace(base)), config.training.model
    _, height, width = cache.frame_shape
    return [cache.encoded_frames(shape.frames)] * shape.scenes, height, width, shape.text_tokens


def _tokens(config: TriptychConfig, base: Path, model: Model) -> Tokens:
    return Tokens.of(model.config, *_longest(config, base))


def _measure(config: TriptychConfig, base: Path, model: Model, device: torch.device) -> Rate:
    dtype = getattr(torch, config.training.dtype)
    return measure_rate(model.config, *_longest(config, base), dtype, device)


def _plans(
    config: TriptychConfig,
    snapshot: Snapshot,
    base: Path,
    model: Model,
    tokens: Tokens,
    rate: Rate,
) -> list[StagePlan]:
    training = config.training
    plans: list[StagePlan] = []
    init: Path | None = base
    for stage in STAGES:
        settings = stage_config(config, stage)
        if settings.steps == 0:
            continue
        memory = memory_per_rank(
            training, settings, model.config, tokens, model.parameters, model.trainable
        )
        flops = step_flops(
            model.config,
            tokens,
            settings.batch_size,
            training.activation_checkpointing,
            recompute=True,
        )
        # on a CPU all ranks of a machine share what was measured with all its cores
        devices = training.world_size if torch.cuda.is_available() else training.launch.num_nodes
        run_dir = None if init is None else run_folder(config, stage, snapshot, init)
        plans.append(
            StagePlan(
                stage=stage,
                read=_what_is_read(config, snapshot.manifest(stage), base, model),
                memory=memory,
                flops=flops,
                step_s=flops.total / (rate.flops_per_s * devices),
                run_dir=run_dir,
                resume=0 if run_dir is None else resume_step(run_dir, settings.steps),
                steps=settings.steps,
            )
        )
        init = run_dir / MODEL if run_dir is not None and _is_done(plans[-1]) else None
    return plans


def _is_done(plan: StagePlan) -> bool:
    done = None if plan.run_dir is None else read_done(plan.run_dir)
    return done is not None and done["steps"] == plan.steps


def _what_is_read(config: TriptychConfig, manifest: Path, base: Path, model: Model) -> Read:
    training = config.training
    cache = LatentCache.of(training, base, Workspace(Path(config.workspace)))
    train, val = (
        training_samples(manifest, training.model.scenes, split) for split in ("train", "val")
    )
    left_out = sum(any(cache.frames(s) is None for s in sample.scenes) for sample in train)
    scenes = {s.clip_id: s for sample in (*train, *val) for s in sample.scenes}
    long_enough = [s for s in scenes.values() if cache.frames(s) is not None]
    captions = {"", *(s.caption for sample in (*train, *val) for s in sample.scenes)}
    known_scenes, known_captions = Shards(cache.scene_folder), Shards(cache.caption_folder)
    channels, height, width = cache.frame_shape
    value = 2 if training.dtype == "bfloat16" else 4
    frames = sum(cache.latent_frames(s) for s in long_enough)
    text = training.model.text_tokens * int(model.config["text_embed_dim"])
    return Read(
        samples=len(train) - left_out,
        left_out=left_out,
        held_out=len(val),
        scenes=len(long_enough),
        to_encode=sum(cache.scene_key(s) not in known_scenes for s in long_enough),
        captions=len(captions),
        captions_to_encode=sum(cache.caption_key(c) not in known_captions for c in captions),
        # the mean and the log-variance of each scene, and a row of text for each caption
        size_bytes=value * (2 * frames * channels * height * width + text * len(captions)),
    )


def _job(config: TriptychConfig, snapshot: Snapshot, base: Path, plan: StagePlan) -> Job | None:
    """The job as it would be started, less the fingerprints; None while its folder has no name."""
    if plan.run_dir is None:
        return None
    return Job(
        stage=plan.stage,
        training=config.training,
        workspace=Path(config.workspace).absolute(),
        manifest=snapshot.manifest(plan.stage).absolute(),
        init_model=base.absolute(),
        run_dir=plan.run_dir.absolute(),
        samples="",
        manifest_sha256="",
        init_sha256="",
        sources=config.curation.sources,
    )


def _show_read(config: TriptychConfig, plans: Sequence[StagePlan]) -> None:
    table = narrow_table("reads", "", *(p.stage for p in plans))
    reads = [p.read for p in plans]
    table.add_row("samples", *(f"{r.samples:,}" for r in reads))
    table.add_row("  left out, a scene is too short", *(f"{r.left_out:,}" for r in reads))
    table.add_row("  held out for validation", *(f"{r.held_out:,}" for r in reads))
    table.add_row("scenes", *(f"{r.scenes:,}" for r in reads))
    if config.training.latents.source == "cache":
        table.add_row("  to encode", *(f"{r.to_encode:,}" for r in reads))
        table.add_row("captions", *(f"{r.captions:,}" for r in reads))
        table.add_row("  to encode", *(f"{r.captions_to_encode:,}" for r in reads))
        table.add_row("cached latents and texts", *(f"{scaled(r.size_bytes)}B" for r in reads))
    else:
        table.add_row("  read and encoded at every visit", *("all" for _ in reads))
    out.print(table)


def _show_memory(
    config: TriptychConfig, model: Model, tokens: Tokens, plans: Sequence[StagePlan]
) -> None:
    training = config.training
    out.print(
        f"model: {scaled(model.parameters)} parameters, {scaled(model.trainable)} trained; "
        f"{tokens.total:,} tokens per sample ({sum(tokens.video):,} video)",
        highlight=False,
    )
    title = f"memory per rank, {training.world_size} ranks, ZeRO {training.zero_stage}"
    table = narrow_table(title, "", *(p.stage for p in plans))
    for name in ("weights", "gradients", "optimizer", "average", "activations", "buffers"):
        label = "buffers, reserved" if name == "buffers" else name
        table.add_row(label, *(f"{scaled(getattr(p.memory, name))}B" for p in plans))
    table.add_row("[bold]all[/bold]", *(f"{scaled(p.memory.device)}B" for p in plans))
    if training.offload != "none":
        table.add_row("in the CPU's memory", *(f"{scaled(p.memory.host)}B" for p in plans))
    if torch.cuda.is_available():
        there = torch.cuda.get_device_properties(0).total_memory
        table.add_row("this machine's GPU has", *(f"{scaled(there)}B" for _ in plans))
    out.print(table)


def _show_time(plans: Sequence[StagePlan], rate: Rate, device: torch.device) -> None:
    table = narrow_table("a step, over all ranks", "", *(p.stage for p in plans))
    for label, name in (
        ("linear layers", "linear"),
        ("attention among video", "attention"),
        ("attention with text", "text"),
        ("all", "total"),
    ):
        table.add_row(label, *(f"{scaled(getattr(p.flops, name))}FLOP" for p in plans))
    table.add_row("predicted time", *(duration(p.step_s) for p in plans))
    left = [f"{duration(p.step_s * (p.steps - p.resume))} for {p.steps - p.resume}" for p in plans]
    table.add_row("  all steps left", *left)
    out.print(table)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"
    out.print(
        f"measured: {scaled(rate.flops_per_s)}FLOP/s on {name}, one layer at {rate.tokens:,} "
        "tokens, forward and backward. The prediction is for devices like it and for the model "
        "alone, without communication, optimizer and reading.",
        highlight=False,
    )


def _show_run(plan: StagePlan, job: Job | None) -> None:
    if job is None:
        text = f"{plan.stage}: its run folder is named once the stage before it is done"
        out.print(text, highlight=False)
        return
    if _is_done(plan):
        out.print(f"{plan.stage}: done, in {job.run_dir}", soft_wrap=True, highlight=False)
        return
    goes = f"goes on from step {plan.resume}" if plan.resume else "starts at step 0"
    out.print(f"{plan.stage}: {goes}, in {job.run_dir}", soft_wrap=True, highlight=False)
    start = plan_start(job, os.environ, os.getpid())
    command = escape(shlex.join(start.command))
    out.print(f"command: {command}", soft_wrap=True, highlight=False)


def scaled(value: float) -> str:
    """Three digits and a decimal prefix with a space before it: 8.52 P, 950 , 1.68 M."""
    power = 0
    while value >= 999.5 and power < len(UNITS) - 1:
        value, power = value / 1000, power + 1
    digits = 0 if value >= 100 or (power == 0 and value == int(value)) else 1 if value >= 10 else 2
    return f"{value:.{digits}f} {UNITS[power]}"


def duration(seconds: float) -> str:
    """Seconds in the unit a reader thinks in."""
    for limit, unit, name in (
        (1, 1e-3, "ms"),
        (120, 1, "s"),
        (7200, 60, "min"),
        (172800, 3600, "h"),
    ):
        if seconds < limit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds / 86400:.3g} days"
