"""A batch of stories beside the official way of generating them.

Usage: python -m benchmarks.generate [--gpu] [--stories 8] [--steps 4] [--repeat 3]
    [--out build/bench/generate.json]

The same transformer, VAE and text encoder, the same stories of three scenes, float32, all cores:

- ``ours``: ``triptych generate`` as it is: every text encoded once, a worker per core, one story
  denoised while the one before is decoded and written;
- ``official way``: a loop over the stories in one process with torch's threads on all cores: texts
  encoded for each story, keys and values copied for every scene, then decoded, then written.

Every side is a program of its own; they take turns. Seconds per video are those that pass in steady
state: from the first videos (one per worker) to the last, so that neither side's start counts.
Memory is resident memory, the largest sum over all processes at one time, and that of the largest
process.

With --gpu instead: CogVideoX-5B's transformer with random weights and all layers, bfloat16, 49
frames of 480 x 720 per scene: time of a guided step and peak memory with 3 and 6 scenes, and the
share of the rate of a large matrix product.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.attention import matrix_rate
from benchmarks.official import attend_the_official_way
from benchmarks.tables import target, write_report
from inference.batch import run_batch
from inference.outputs import VideoFiles, VideoWriter
from inference.pipeline import Mask2DiTPipeline
from inference.prompts import write_prompts
from schemas.config.files import dump_yaml, load_config
from schemas.config.generation import GenerationConfig
from schemas.config.root import EngineConfig, TriptychConfig
from schemas.config.training import ModelConfig, TrainingConfig
from schemas.layout import Workspace
from schemas.rows import Prompt
from training.base_model import make_tiny_base
from training.cost import Tokens, layer_flops, outside_flops
from training.transformer import Mask2DiTTransformer3DModel
from training.weights import load_transformer

SIDES = ("ours", "official way")
SHAPE = ModelConfig(frames=17, height_px=96, width_px=160, text_tokens=96)
WIDTH = {"num_attention_heads": 8, "attention_head_dim": 64, "num_layers": 6}
"""Of the transformer on a CPU; the VAE and the text encoder are those of the tiny base."""


def main() -> None:
    """Measure, print tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--stories", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4, help="of denoising")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("build/bench/generate.json"))
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--config", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        run = run_ours if args.side == "ours" else run_official
        print("\n" + json.dumps(run(load_config(args.config))))
        return
    if args.gpu:
        rows, targets, machine = measure_gpu(args.steps, args.repeat)
        write_report(args.out, "Generation", _about(gpu=True), rows, targets, machine)
        return
    with tempfile.TemporaryDirectory(prefix="triptych-bench-") as folder:
        found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
        for turn in range(args.repeat):
            for side in SIDES:
                config = prepare(Path(folder), f"{side}-{turn}", args.stories, args.steps)
                found[side].append(_turn(side, config))
                print(side, found[side][-1], flush=True)
    report(found, args.out)


def prepare(folder: Path, name: str, stories: int, steps: int) -> Path:
    """A model, a prompt manifest and a config of a fresh workspace; returns the config's file."""
    base = make_tiny_base(folder / "model", SHAPE)
    if load_transformer(base).config["num_layers"] != WIDTH["num_layers"]:
        known = {k: v for k, v in load_transformer(base).config.items() if not k.startswith("_")}
        torch.manual_seed(0)
        wide = Mask2DiTTransformer3DModel(**known | WIDTH | {"time_embed_dim": 512})
        wide.save_pretrained(base / "transformer")
    prompts = folder / "prompts.parquet"
    write_prompts(prompts, [_story(i) for i in range(stories)])
    config = TriptychConfig(
        workspace=str(folder / name),
        training=TrainingConfig(model=SHAPE),
        generation=GenerationConfig(prompts=str(prompts), model=str(base), steps=steps),
        engine=EngineConfig(num_cpus=os.cpu_count() or 1),
    )
    file = folder / f"{name}.yaml"
    file.write_text(dump_yaml(config))
    return file


def _story(number: int) -> Prompt:
    places = ("by the river", "in the kitchen", "on the roof")
    prompts = [f"Actor1 with hat number {number} waits {place}." for place in places]
    return Prompt(f"story-{number}", prompts, negative_prompt="blurred", seed=number)


def _turn(side: str, config: Path) -> dict[str, Any]:
    """One side in a process of its own, watched from outside."""
    command = [sys.executable, "-m", "benchmarks.generate", "--side", side]
    process = subprocess.Popen(
        [*command, "--config", str(config)], stdout=subprocess.PIPE, text=True
    )
    together = largest = 0
    while process.poll() is None:
        sizes = _sizes(process.pid)
        together, largest = max(together, sum(sizes)), max(largest, *sizes, 0)
        time.sleep(0.2)
    assert process.stdout is not None
    said = process.stdout.read()
    assert process.returncode == 0, f"{side} failed: {said[-2000:]}"
    seconds = json.loads(said.splitlines()[-1])["seconds_per_video"]
    return {"seconds": seconds, "together": together / 1e9, "largest": largest / 1e9}


def _sizes(pid: int) -> list[int]:
    """Resident bytes of a process and of everything it started."""
    try:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return [0]
    sizes = [0]
    for process in family:
        try:
            sizes.append(process.memory_info().rss)
        except psutil.NoSuchProcess:
            continue
    return sizes


def run_ours(config: TriptychConfig) -> dict[str, float]:
    """Seconds per video of a batch as the command makes it."""
    times: list[float] = []

    def note(done: int, *_: Any) -> None:
        times.extend([time.monotonic()] * (done - len(times)))

    run_batch(config, Path(str(config.generation.model)), Workspace(Path(config.workspace)), note)
    return {"seconds_per_video": _steady(times, config.engine.num_cpus)}


def run_official(config: TriptychConfig) -> dict[str, float]:
    """Seconds per video of a loop over the stories."""
    attend_the_official_way()
    torch.set_num_threads(os.cpu_count() or 1)
    pipeline = Mask2DiTPipeline.from_pretrained(str(config.generation.model))
    pipeline.set_progress_bar_config(disable=True)
    workspace, shape = Workspace(Path(config.workspace)), config.training.model
    times: list[float] = []
    for number in range(_rows(config)):
        story = _story(number)
        frames = pipeline(
            story.prompts,
            frames=shape.frames,
            height=shape.height_px,
            width=shape.width_px,
            negative_prompt=story.negative_prompt,
            num_inference_steps=config.generation.steps,
            guidance_scale=config.generation.guidance,
            seed=story.seed,
        ).frames
        files = VideoFiles.of(workspace, story.prompt_id)
        provenance = {"prompt_id": story.prompt_id}
        with VideoWriter(files, config.generation.fps, story.prompts, provenance) as video:
            for scene in frames or []:
                video.add_scene(scene[0], None)
            video.finish(0.0)
        times.append(time.monotonic())
    return {"seconds_per_video": _steady(times, 1)}


def _rows(config: TriptychConfig) -> int:
    import pyarrow.parquet as pq

    return int(pq.read_metadata(config.generation.prompts).num_rows)


def _steady(times: list[float], workers: int) -> float:
    """Seconds per video between the first of every worker and the last."""
    return (times[-1] - times[workers - 1]) / (len(times) - workers)


def report(found: dict[str, list[dict[str, Any]]], out: Path) -> None:
    """Write the table and its target."""

    def middle(side: str, what: str) -> float:
        return statistics.median(turn[what] for turn in found[side])

    rows: list[dict[str, Any]] = []
    for case, what, unit in (
        ("a video of three scenes", "seconds", "s"),
        ("peak memory, all processes", "together", "GB"),
        ("peak memory, largest process", "largest", "GB"),
    ):
        ours, peer = (middle(side, what) for side in SIDES)
        rows.append(
            {
                "case": case,
                "ours": round(ours, 3),
                "peer": round(peer, 3),
                "ratio": round(peer / ours, 3),
                "unit": unit,
            }
        )
    targets = [target("speed over the official way", rows[0]["ratio"], 1.3)]
    machine = {"torch": torch.__version__, "repetitions": len(found["ours"])}
    write_report(out, "Generation", _about(gpu=False), rows, targets, machine)


def _about(*, gpu: bool) -> str:
    parts = (__doc__ or "").split("\n\n")
    return " ".join((parts[-1] if gpu else " ".join(parts[2:-1])).replace("- ``", "``").split())


@torch.no_grad()
def measure_gpu(
    steps: int, repeat: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Any]]:
    """Rows, targets and machine of guided steps at 5B's shapes."""
    shape = ModelConfig(frames=49, height_px=480, width_px=720, text_tokens=226)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        transformer = Mask2DiTTransformer3DModel(
            num_attention_heads=48, num_layers=42, use_rotary_positional_embeddings=True
        ).eval()
    torch.set_default_dtype(torch.float32)
    with tempfile.TemporaryDirectory() as folder:  # the VAE only says how much it compresses
        base = make_tiny_base(Path(folder) / "model", shape)
        pipeline = Mask2DiTPipeline.from_pretrained(base, text_encoder=False)
    pipeline.register_modules(transformer=transformer)
    pipeline.to("cuda")
    rate = matrix_rate()
    rows: list[dict[str, Any]] = []
    targets: list[dict[str, Any]] = []
    for scenes in (3, 6):
        seconds, peak = _guided_steps(pipeline, shape, scenes, steps, repeat)
        tokens = Tokens.of(transformer.config, [13] * scenes, 60, 90, shape.text_tokens)
        layers = layer_flops(transformer.config, tokens) * transformer.config["num_layers"]
        flops = 2 * (layers + outside_flops(transformer.config, tokens)).total
        share = flops / seconds / rate
        case = f"guided step, {scenes} scenes"
        rows.append(
            {
                "case": case,
                "ours": round(seconds, 3),
                "peer": round(flops / rate, 3),
                "ratio": round(share, 3),
                "unit": "s",
                "petaflop": round(flops / 1e15, 2),
                "peak_gb": round(peak / 1e9, 2),
            }
        )
        targets.append(target(f"share of the matrix rate, {scenes} scenes", share, 0.6))
    machine = {"torch": torch.__version__, "gpu": torch.cuda.get_device_name()}
    return rows, targets, machine | {"matrix_tflops": round(rate / 1e12)}


def _guided_steps(
    pipeline: Mask2DiTPipeline, shape: ModelConfig, scenes: int, steps: int, repeat: int
) -> tuple[float, int]:
    """Median seconds of a guided step, and peak bytes; the first step of each call warms up."""
    text = torch.randn(1, scenes, shape.text_tokens, 4096, device="cuda", dtype=torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    seconds: list[float] = []
    for _ in range(repeat):
        times: list[float] = []

        def note(_: Any, step: int, t: Any, tensors: Any, times: list[float] = times) -> Any:
            torch.cuda.synchronize()
            times.append(time.perf_counter())
            return tensors

        pipeline(
            [""] * scenes,
            frames=shape.frames,
            height=shape.height_px,
            width=shape.width_px,
            num_inference_steps=steps,
            prompt_embeds=text,
            negative_prompt_embeds=text,
            output_type="latent",
            callback_on_step_end=note,
        )
        seconds += [b - a for a, b in pairwise(times)]
    return statistics.median(seconds), torch.cuda.max_memory_allocated()


if __name__ == "__main__":
    main()
