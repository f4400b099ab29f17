"""One step of adding a scene to a story, with and without kept keys and values.

Usage: python -m benchmarks.extension [--gpu] [--repeat 7] [--out build/bench/extension.json]

Two clean scenes and a new one, by a model with the mask `scene_causal`: ours keeps keys and values
of the clean scenes' video (`training/scene_cache.py`) and computes the new scene's tokens alone.
Peers compute all three scenes at every step: `whole pass`, the same model, whose attention skips
what the mask hides, a third of all pairs of video tokens; `whole pass, dense mask`, the same with
the mask given to torch's attention as a matrix, which skips nothing; `v2`, a model with the paper's
mask, for which there is no exact cache. The new scene's queries need every key, a third of all
pairs: beside `whole pass` attention can gain a factor of 2 and linear layers 3, beside the other
two everything can gain 3.

Operations are those torch's counter counts, and for attention in pieces those that the mask lets
through. Times are medians of repetitions in turns, after a warm-up: processor seconds of one thread
on a CPU, wall-clock seconds on a GPU. A scene of 50 steps includes computing what is kept. A ratio
is the peer's figure over ours: above 1 ours needs less.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from benchmarks.tables import target, write_report
from training.cost import Tokens, layer_flops
from training.masks import pieces
from training.scene_cache import CachedDenoiser
from training.transformer import Mask2DiTTransformer3DModel

STEPS = 50
OURS, WHOLE, DENSE, PAPER = "kept", "whole pass", "whole pass, dense mask", "v2"
WANTED = 2.5

Step = Callable[[], Tensor]


@dataclass(frozen=True)
class Size:
    """Three equal scenes, and a model.

    Attributes:
        name: Heading of its rows.
        heads: Of 64 each.
        layers: Of the transformer.
        frames: Latent frames of a scene.
        latent: Their height and width.
        text: Tokens of a text.
    """

    name: str
    heads: int
    layers: int
    frames: int
    latent: tuple[int, int]
    text: int

    @property
    def config(self) -> dict[str, Any]:
        """The transformer's."""
        return {
            "num_attention_heads": self.heads,
            "num_layers": self.layers,
            "sample_height": self.latent[0],
            "sample_width": self.latent[1],
            "use_rotary_positional_embeddings": True,
        }

    def __str__(self) -> str:
        tokens = self.frames * self.latent[0] * self.latent[1] // 4
        width = 64 * self.heads
        return f"{self.name}: width {width}, {self.layers} layers, 3 x ({self.text} + {tokens})"


CPU = (
    Size("attention dominates", 2, 2, 2, (48, 64), 32),
    Size("linear layers dominate", 8, 2, 2, (24, 32), 32),
)
GPU = (Size("CogVideoX-5B, 480 x 720", 48, 2, 13, (60, 90), 226),)


def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gpu", action="store_true", help="the real size, on a CUDA device")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("build/bench/extension.json"))
    args = parser.parse_args()
    diffusers_logging.set_verbosity_error()  # it warns of an empty list at every .to(dtype)
    register_flop_formula(torch.ops.triptych.lse_attention)(_flop_in_pieces)
    device = torch.device("cuda" if args.gpu else "cpu")
    torch.set_num_threads(1)  # a second one would be counted while it waits for the first
    dtype = torch.bfloat16 if args.gpu else torch.float32
    rows: list[dict[str, Any]] = []
    differences: list[float] = []
    for size in GPU if args.gpu else CPU:
        found, difference = measure(size, args.repeat, device, dtype)
        rows += found
        differences.append(difference)
    rows += _at_real_size()
    machine: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    if args.gpu:
        machine["gpu"] = torch.cuda.get_device_name()
    about = " ".join((__doc__ or "").split("\n\n", 2)[2].split())
    about += f" {str(dtype).removeprefix('torch.')}, median of {args.repeat}."
    targets = _targets(rows, max(differences), 3e-2 if args.gpu else 1e-5)
    write_report(args.out, "Adding a scene", about, rows, targets, machine)


@torch.no_grad()
def measure(
    size: Size, repeat: int, device: torch.device, dtype: torch.dtype
) -> tuple[list[dict[str, Any]], float]:
    """The rows of one size, and the largest relative difference that keeping makes."""
    steps, prefill = _steps(size, device, dtype)
    flop: dict[str, float] = {}
    outputs: dict[str, Tensor] = {}
    for who, step in steps.items():
        outputs[who] = step()  # the warm-up, and what is kept is computed
        with FlopCounterMode(display=False) as counter:
            step()
        flop[who] = counter.get_total_flops()
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    spent: dict[str, list[float]] = {who: [] for who in (*steps, "prefill")}
    for _ in range(repeat):
        for who, step in (*steps.items(), ("prefill", prefill)):
            started = clock()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            spent[who].append(clock() - started)
    seconds = {who: statistics.median(times) for who, times in spent.items()}
    scene = {who: STEPS * seconds[who] for who in steps}
    scene[OURS] += seconds["prefill"] - seconds[OURS]
    new = slice(2 * size.frames, None)
    error = (outputs[OURS] - outputs[WHOLE])[:, new].abs().max() / outputs[WHOLE][
        :, new
    ].abs().max()
    rows = [
        _row(size, f"{what} {who}", figures[OURS] * scale, figures[who] * scale, unit)
        for what, figures, scale, unit in (
            ("operations of a step:", flop, 1e-9, "GFLOP"),
            ("time of a step:", seconds, 1.0, "s"),
            (f"time of a scene of {STEPS} steps:", scene, 1.0, "s"),
        )
        for who in (WHOLE, DENSE, PAPER)
        if who in figures
    ]
    return rows, float(error)


def _steps(size: Size, device: torch.device, dtype: torch.dtype) -> tuple[dict[str, Step], Step]:
    """A step of each, on the same weights and numbers; and one that computes what is kept, too."""
    torch.manual_seed(0)
    first = Mask2DiTTransformer3DModel(**size.config, mask="scene_causal").to(device, dtype).eval()

    def other(**changes: str) -> Mask2DiTTransformer3DModel:
        made = Mask2DiTTransformer3DModel(**{**size.config, "mask": "scene_causal", **changes})
        made.load_state_dict(first.state_dict())
        return made.to(device, dtype).eval()

    like: dict[str, Any] = {"device": device, "dtype": dtype}
    arguments = (
        torch.randn(1, 3 * size.frames, 16, *size.latent, **like),
        torch.randn(1, 3, size.text, 4096, **like),
        torch.tensor([500], device=device),
        [size.frames] * 3,
        torch.tensor([[False, False, True]], device=device),
    )
    models: dict[str, Callable[..., Tensor]] = {
        OURS: CachedDenoiser(first),
        WHOLE: first,
        PAPER: other(mask="v2"),
    }
    tokens = 3 * (size.text + size.frames * size.latent[0] * size.latent[1] // 4)
    if tokens < 20_000:  # the matrix alone would take gigabytes
        models[DENSE] = other(attention_backend="dense")
    steps = {who: lambda model=model: model(*arguments) for who, model in models.items()}
    return steps, lambda: CachedDenoiser(first)(*arguments)


def _flop_in_pieces(
    query: Any, key: Any, value: Any, mask: str, text: Any, video: Any, *_: Any, **__: Any
) -> int:
    """Two matrix products for every pair that the mask lets through; the arguments are shapes."""
    pairs = sum(
        (p.rows[1] - p.rows[0]) * (p.columns[1] - p.columns[0])
        for p in pieces(mask, tuple(text), tuple(video))
    )
    return 4 * query[0] * query[1] * query[3] * pairs


def _row(size: Size, case: str, ours: float, peer: float, unit: str) -> dict[str, Any]:
    return {
        "group": str(size),
        "case": case,
        "ours": round(ours, 4),
        "peer": round(peer, 4),
        "ratio": round(peer / ours, 3),
        "unit": unit,
    }


def _at_real_size() -> list[dict[str, Any]]:
    """What the arithmetic of `training/cost.py` says of CogVideoX-5B, where nothing is measured."""
    size, layers, batch = GPU[0], 42, 2
    group = f"by arithmetic, all {layers} layers of CogVideoX-5B, guided: 3 x (226 + 17550) tokens"

    def flops(mask: str, scenes: int) -> float:
        config = {"num_attention_heads": size.heads, "attention_head_dim": 64, "mask": mask}
        config |= {"time_embed_dim": 512, "patch_size": 2, "patch_size_t": None}
        tokens = Tokens.of(config, [size.frames] * scenes, *size.latent, size.text)
        return layers * batch * layer_flops(config, tokens).total

    ours = flops("scene_causal", 3) - flops("scene_causal", 2)
    rows = [
        _row(size, f"operations of a step: {who}", ours * 1e-15, flops(mask, 3) * 1e-15, "PFLOP")
        for who, mask in ((WHOLE, "scene_causal"), (PAPER, "v2"))
    ]
    video = 2 * size.frames * size.latent[0] * size.latent[1] // 4
    kept = 2 * layers * batch * video * 64 * size.heads * 2 / 2**30
    rows.append({"case": "keys and values kept, bfloat16", "ours": round(kept, 1), "unit": "GiB"})
    return [{**row, "group": group} for row in rows]


def _targets(
    rows: list[dict[str, Any]], difference: float, tolerance: float
) -> list[dict[str, Any]]:
    first = rows[0]["group"]
    ratios = {row["case"]: row["ratio"] for row in rows if row["group"] == first}
    found = [
        target(f"{first.split(':')[0]}, {what} of a step: {who} over {OURS}", ratio, WANTED)
        for what in ("operations", "time")
        for who in (WHOLE, DENSE, PAPER)
        if (ratio := ratios.get(f"{what} of a step: {who}"))
    ]
    largest = "largest difference that keeping makes, millionths of the largest value"
    return [*found, target(largest, 1e6 * difference, 1e6 * tolerance, at_most=True)]


if __name__ == "__main__":
    main()
