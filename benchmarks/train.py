"""A training step beside the official way of training and beside plain PyTorch.

Usage: python -m benchmarks.train [--gpu] [--steps 8] [--repeat 3] [--out build/bench/train.json]

The same transformer on the same samples, one rank, float32 (bfloat16 with --gpu), AdamW, clipping:

- ``ours``: the training loop of ``triptych train`` as it is: DeepSpeed (without ZeRO in float32, as
  one rank has nobody to share with; ZeRO-2 in bfloat16), latents from the cache, averaged weights,
  metrics, monitors;
- ``official way``: as the paper's trainer works: frames, VAE and text encoder at every visit (from
  a random start frame, the posterior sampled), and keys and values copied for every scene;
- ``plain``: a loop of a few lines in PyTorch, without DeepSpeed, from the same cache.

Every side is a program of its own; they take turns, and a figure is the median over all their steps
but the first two of each turn, in processor seconds of all threads (wall-clock seconds on a GPU).
Peak memory is the largest resident set (allocated memory on a GPU).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.official import attend_the_official_way
from benchmarks.tables import target, write_report
from curation.mp4 import write_mp4
from schemas.config.curation import SourcesConfig
from schemas.config.root import TriptychConfig
from schemas.config.training import LatentsConfig, ModelConfig, TrainingConfig, TrainStageConfig
from schemas.layout import Workspace
from schemas.rows import Sample, Scene
from schemas.tables import SAMPLES, write_table
from training.base_model import load_scheduler, make_tiny_base, model_sha256
from training.data import plan_step
from training.datasets import open_dataset
from training.diffusion import diffusion_losses
from training.job import Job
from training.latents import scene_reader
from training.latents_job import encode_manifest
from training.launchers import free_port
from training.transformer import Mask2DiTTransformer3DModel
from training.weights import load_transformer

SIDES = ("ours", "official way", "plain")
WARM_UP = 2
SAMPLES_MADE = 4
SHAPE = ModelConfig(frames=17, height_px=96, width_px=160, text_tokens=96)
WIDTH = {"num_attention_heads": 8, "attention_head_dim": 64, "num_layers": 6}
"""Of the transformer on a CPU; the VAE and the text encoder are those of the tiny base."""


def main() -> None:
    """Measure, print tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--steps", type=int, default=8, help="of each turn, the first two apart")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--layers", type=int, default=8, help="of 5B's 42, with --gpu")
    parser.add_argument("--out", type=Path, default=Path("build/bench/train.json"))
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        run_side(args.side, Job.model_validate_json(args.job.read_text()), args.steps)
        return
    with tempfile.TemporaryDirectory(prefix="triptych-bench-") as folder:
        job = prepare(Path(folder), args.gpu, args.layers, args.steps + WARM_UP)
        found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
        for _ in range(args.repeat):
            for side in SIDES:
                found[side].append(_turn(side, job, args.steps))
                print(side, found[side][-1]["seconds"], flush=True)
    report(found, args.out, args.gpu)


def prepare(folder: Path, gpu: bool, layers: int, steps: int) -> Path:
    """Films, a manifest, a base model and its filled cache; returns the job's file."""
    workspace = Workspace(folder)
    shape = SHAPE
    if gpu:
        shape = ModelConfig(frames=49, height_px=480, width_px=720, text_tokens=226)
    base = make_tiny_base(workspace.model("base"), shape)
    _widen(base, gpu, layers, shape)
    manifest = folder / "sft.parquet"
    write_table(manifest, SAMPLES, [_sample(folder, i, shape) for i in range(SAMPLES_MADE)])
    stage = TrainStageConfig(
        steps=steps,
        batch_size=1,
        micro_batch_size=1,
        conditional_p=0.5,
        checkpoint_every=10_000,
        ema_decay=0.999,
        seed=1,
    )
    training = TrainingConfig(
        model=shape,
        sft=stage,
        zero_stage=2 if gpu else 0,
        dtype="bfloat16" if gpu else "float32",
        activation_checkpointing=int(gpu),
    )
    config = TriptychConfig(workspace=str(folder), training=training)
    read = scene_reader(workspace, config.curation.sources)
    encode_manifest(training, manifest, base, workspace, read)
    run_dir = folder / "run"
    run_dir.mkdir()
    job = Job(
        stage="sft",
        training=training,
        workspace=folder,
        manifest=manifest,
        init_model=base,
        run_dir=run_dir,
        samples=open_dataset(training, manifest, base, workspace).fingerprint,
        manifest_sha256="",
        init_sha256=model_sha256(base),
        sources=SourcesConfig(),
    )
    file = folder / "job.json"
    file.write_text(job.model_dump_json())
    return file


def _widen(base: Path, gpu: bool, layers: int, shape: ModelConfig) -> None:
    """Put a wider transformer into the tiny base."""
    config = dict(load_transformer(base).config)
    wide = {"num_attention_heads": 48, "attention_head_dim": 64, "num_layers": layers}
    config |= wide if gpu else WIDTH
    config |= {"time_embed_dim": 512, **shape.scene_settings}
    torch.manual_seed(0)
    known = {k: v for k, v in config.items() if not k.startswith("_")}
    Mask2DiTTransformer3DModel(**known).save_pretrained(base / "transformer")


def _sample(folder: Path, number: int, shape: ModelConfig) -> Sample:
    """Three scenes of a film of moving stripes, each of two seconds at 24 frames per second."""
    path = folder / f"film_{number}.mp4"
    length = max(48, shape.frames)
    y, x = np.mgrid[: shape.height_px, : shape.width_px]
    waves = [
        np.stack([np.sin((x + t * 2 + 40 * c) / 9 + (y + number * 11) / 13) for c in range(3)], 2)
        for t in range(3 * length)
    ]
    write_mp4(path, np.stack([(w * 100 + 128).astype(np.uint8) for w in waves]), 24)
    scenes = [
        Scene(
            clip_id=f"clip-{number}-{place}",
            source_id="",
            uri=str(path),
            start_pts=place * length * 512,
            end_pts=(place + 1) * length * 512,
            start_frame=place * length,
            end_frame=(place + 1) * length,
            num_frames=length,
            start_s=place * length / 24,
            end_s=(place + 1) * length / 24,
            fps=24.0,
            width_px=shape.width_px,
            height_px=shape.height_px,
            caption=f"Actor{place} in place {number}",
        )
        for place in range(3)
    ]
    return Sample(
        sample_id=f"sample-{number}",
        kind="sft",
        split="train",
        scenes=scenes,
        similarity=0.9,
        trainable=True,
    )


def _turn(side: str, job: Path, steps: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.train", "--side", side, "--job", str(job)]
    env = dict(os.environ) | {
        **{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())},
        **{"OMP_WAIT_POLICY": "PASSIVE", "TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1"},
    }
    if not torch.cuda.is_available():
        env["DS_ACCELERATOR"] = "cpu"
    done = subprocess.run(
        [*command, "--steps", str(steps)], env=env, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run_side(side: str, job: Job, steps: int) -> None:
    """In a process of its own: time the steps of one side, print them as JSON."""
    if side == "plain":
        times, extra = _timed(_plain(job), steps), {}
    else:
        times, extra = _deepspeed(side, job, steps)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    sys.stdout.flush()
    print("\n" + json.dumps({"seconds": times, "peak_bytes": peak, **extra}))


def _timed(step: Callable[[], object], steps: int) -> list[float]:
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    times: list[float] = []
    for number in range(steps + WARM_UP):
        started = clock()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if number >= WARM_UP:
            times.append(round(clock() - started, 4))
    return times


def _deepspeed(side: str, job: Job, steps: int) -> tuple[list[float], dict[str, Any]]:
    from training.engine import Ranks  # here: plain PyTorch shall not pay for DeepSpeed's import
    from training.loop import Trainer
    from training.meter import Monitors

    if side == "official way":
        latents = LatentsConfig(source="pixels", sample_posterior=True)
        stage = job.settings.model_copy(update={"ema_decay": 0.0})
        training = job.training.model_copy(update={"latents": latents, "sft": stage})
        job = job.model_copy(update={"training": training})
        attend_the_official_way()
    with Ranks.joined() as ranks:
        trainer = Trainer(job, ranks)
        lines: list[dict[str, Any]] = []
        with Monitors(job, trainer.engine, ranks) as monitors:

            def step() -> None:
                line = trainer.run_step()
                monitors.write(line)
                lines.append(line)

            times = _timed(step, steps)
        return times, {"mfu": [line["mfu"] for line in lines[WARM_UP:]]}


def _plain(job: Job) -> Callable[[], object]:
    """A training loop as one would write it in PyTorch alone."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, job.training.dtype)
    model: Any = load_transformer(job.init_model, **job.training.model.scene_settings).to(device)
    model.train()
    model.checkpoint_every = job.training.activation_checkpointing
    scheduler = load_scheduler(job.init_model)
    stage = job.settings
    optimizer = torch.optim.AdamW(
        model.parameters(), stage.lr, (stage.adam_beta1, stage.adam_beta2), stage.adam_eps, 0.03
    )
    data = open_dataset(job.training, job.manifest, job.init_model, Workspace(job.workspace))
    done = [0]

    def step() -> None:
        plan = plan_step(done[0], stage, len(data), 1000)
        batch = data.read(plan, range(stage.batch_size)).batches[0].to(device, dtype)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            losses = diffusion_losses(
                model,
                scheduler,
                batch.latents,
                batch.text,
                batch.noise,
                batch.timestep,
                batch.scene_frames,
                batch.generated,
            )
        losses.mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), stage.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        done[0] += 1

    return step


def report(found: dict[str, list[dict[str, Any]]], out: Path, gpu: bool) -> None:
    """Write the table and its targets."""
    seconds = {
        k: statistics.median(t for run in v for t in run["seconds"]) for k, v in found.items()
    }
    peak = {k: statistics.median(run["peak_bytes"] for run in v) / 1e9 for k, v in found.items()}
    rows = [
        {
            "case": f"step, beside {side}",
            "ours": round(seconds["ours"], 4),
            "peer": round(seconds[side], 4),
            "ratio": round(seconds[side] / seconds["ours"], 3),
            "unit": "s",
        }
        for side in SIDES[1:]
    ]
    rows += [
        {
            "case": f"peak memory, beside {side}",
            "ours": round(peak["ours"], 3),
            "peer": round(peak[side], 3),
            "ratio": round(peak[side] / peak["ours"], 3),
            "unit": "GB",
        }
        for side in SIDES[1:]
    ]
    targets = [
        target("speed over the official way", seconds["official way"] / seconds["ours"], 2.0),
        target("time over plain PyTorch", seconds["ours"] / seconds["plain"], 1.1, at_most=True),
    ]
    machine: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    if gpu:
        machine["gpu"] = torch.cuda.get_device_name()
        mfu = statistics.median(value for run in found["ours"] for value in run["mfu"])
        targets.append(target("model FLOPs over the matrix rate", mfu, 0.5))
    about = " ".join((__doc__ or "").split("\n\n", 2)[2].split())
    write_report(out, "Training steps", about, rows, targets, machine)


if __name__ == "__main__":
    main()
