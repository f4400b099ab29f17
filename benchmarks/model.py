"""One step of the masked DiT beside diffusers' CogVideoX at equal token count.

Usage: python -m benchmarks.model [--gpu] [--layers 2] [--repeat 5] [--out build/bench/model.json]

Both models have CogVideoX-2B's width (30 heads x 64), the same weights and the same number of
tokens: ours takes S scenes with a text each, diffusers one scene as long with one text as long. The
peer therefore attends to everything; under v2 ours leaves out a few pairs, so the first row is the
like-for-like one. Without --gpu: float32 and 624 tokens. With --gpu: bfloat16, 480 x 720, 3 x 13
latent frames (53,328 tokens), and the peak memory as well.

Peer and ours take turns, after one warm-up each; figures are medians, of processor seconds (every
thread) on a CPU, which neighbours disturb less, and of wall-clock seconds on a GPU. A ratio is the
peer's time (or memory) over ours: above 1 ours needs less.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.utils import logging as diffusers_logging
from torch import Tensor

from benchmarks.tables import target, write_report
from training.transformer import Mask2DiTTransformer3DModel

SCENES = 3
TEXT_TOKENS = {"cpu": 64, "cuda": 226}
FRAMES_PER_SCENE = {"cpu": 3, "cuda": 13}
LATENT_SIZE = {"cpu": (12, 16), "cuda": (60, 90)}

Step = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """What is measured, and how ours is asked."""

    name: str
    mask: str
    conditional: bool
    train: bool


CASES = (
    Case("forward, v5", "v5", conditional=False, train=False),
    Case("forward, v2", "v2", conditional=False, train=False),
    Case("forward, v2, two conditions", "v2", conditional=True, train=False),
    Case("forward + backward with checkpointing, v5", "v5", conditional=False, train=True),
    Case("forward + backward with checkpointing, v2", "v2", conditional=False, train=True),
    Case(
        "forward + backward with checkpointing, v2, two conditions",
        "v2",
        conditional=True,
        train=True,
    ),
)
CONDITION_COST = 1.1
"""Target: conditions may cost a tenth of a training step at most."""


def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("build/bench/model.json"))
    args = parser.parse_args()
    diffusers_logging.set_verbosity_error()  # it warns of an empty list at every .to(dtype)
    device = torch.device("cuda" if args.gpu else "cpu")
    dtype = torch.bfloat16 if args.gpu else torch.float32

    rows: list[dict[str, Any]] = []
    for case in CASES:
        for shape in ("2b", "5b") if case.mask == "v5" else ("2b",):
            added = measure(shape, case, args.layers, args.repeat, device, dtype)
            rows += added
            print(*map(_line, added), sep="\n", flush=True)
    targets = _targets(rows)
    about = (
        f"{args.layers} layers of width 1920, {SCENES} scenes of {FRAMES_PER_SCENE[device.type]} "
        f"latent frames {LATENT_SIZE[device.type]}, {TEXT_TOKENS[device.type]} text tokens each, "
        f"{str(dtype).removeprefix('torch.')}; median of {args.repeat} interleaved repetitions; "
        "ratio = peer / ours"
    )
    machine: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    if args.gpu:
        machine["gpu"] = torch.cuda.get_device_name()
    title = "The masked DiT's step beside diffusers' CogVideoX"
    write_report(args.out, title, about, rows, targets, machine)


def measure(
    shape: str, case: Case, layers: int, repeat: int, device: torch.device, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """The rows of one case: time, and on a GPU peak memory."""
    steps = _steps(shape, case, layers, device, dtype)
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    spent: dict[str, list[float]] = {who: [] for who in steps}
    peak: dict[str, float] = {}
    for repetition in range(repeat + 1):
        for who, step in steps.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            started = clock()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
                peak[who] = (torch.cuda.max_memory_allocated() - before) / 2**30
            if repetition:
                spent[who].append(clock() - started)
    name = f"{shape}: {case.name}"
    rows = [_row(name, *(statistics.median(spent[w]) for w in ("ours", "peer")), "s")]
    if peak:
        rows.append(_row(f"{name}, peak memory of the step", peak["ours"], peak["peer"], "GiB"))
    return rows


def _steps(
    shape: str, case: Case, layers: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Step]:
    """Our step and the peer's, on the same weights and numbers."""
    frames, size = FRAMES_PER_SCENE[device.type], LATENT_SIZE[device.type]
    text_tokens = TEXT_TOKENS[device.type]
    config: dict[str, Any] = {
        "num_layers": layers,
        "sample_height": size[0],
        "sample_width": size[1],
        "use_rotary_positional_embeddings": shape == "5b",
    }
    torch.manual_seed(0)
    ours = Mask2DiTTransformer3DModel(**config, mask=case.mask).to(device, dtype)
    peer = CogVideoXTransformer3DModel(
        **config,
        sample_frames=4 * (SCENES * frames - 1) + 1,  # so that it makes its position table once
        max_text_seq_length=SCENES * text_tokens,
    ).to(device, dtype)
    peer.load_state_dict(ours.state_dict())
    for model in (ours, peer):
        model.train(case.train)
        if case.train:
            model.enable_gradient_checkpointing()

    video = torch.randn(1, SCENES * frames, 16, *size, device=device, dtype=dtype)
    text = torch.randn(1, SCENES, text_tokens, 4096, device=device, dtype=dtype)
    timestep = torch.tensor([500], device=device)
    generated = None
    if case.conditional:
        generated = torch.tensor([[False] * (SCENES - 1) + [True]], device=device)
    rotations = _peer_rotations(SCENES * frames, size, device) if shape == "5b" else None

    def our_step() -> Tensor:
        return ours(video, text, timestep, [frames] * SCENES, generated)

    def peer_step() -> Tensor:
        return peer(video, text.flatten(1, 2), timestep, image_rotary_emb=rotations).sample

    return {"ours": _whole(ours, our_step, case), "peer": _whole(peer, peer_step, case)}


def _whole(model: torch.nn.Module, forward: Callable[[], Tensor], case: Case) -> Step:
    def inference() -> None:
        with torch.no_grad():
            forward()

    def training() -> None:
        model.zero_grad(set_to_none=True)
        forward().float().square().mean().backward()

    return training if case.train else inference


def _peer_rotations(
    frames: int, size: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    grid = (size[0] // 2, size[1] // 2)
    return cast(
        "tuple[Tensor, Tensor]",
        get_3d_rotary_pos_embed(64, ((0, 0), grid), grid, frames, device=device),
    )


def _row(case: str, ours: float, peer: float, unit: str) -> dict[str, Any]:
    return {
        "case": case,
        "ours": round(ours, 4),
        "peer": round(peer, 4),
        "ratio": round(peer / ours, 3),
        "unit": unit,
    }


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['case']:62} ours {row['ours']:9.4f} {row['unit']}  peer {row['peer']:9.4f}  "
        f"ratio {row['ratio']:.3f}"
    )


def _targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    timed = {row["case"]: row for row in rows if row["unit"] == "s"}
    like_for_like = min(row["ratio"] for case, row in timed.items() if case.endswith("v5"))
    plain = "forward + backward with checkpointing, v2"
    conditional = "forward + backward with checkpointing, v2, two conditions"
    cost = timed[f"2b: {conditional}"]["ours"] / timed[f"2b: {plain}"]["ours"]
    like = "like for like (v5), ours is at least as fast as diffusers: least ratio"
    conditions = "conditions cost at most a tenth of a training step: ratio"
    return [
        target(like, like_for_like, 1.0),
        target(conditions, cost, CONDITION_COST, at_most=True),
    ]


if __name__ == "__main__":
    main()
