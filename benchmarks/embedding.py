"""The embedding path, frames in and unit vectors out, beside OpenCLIP's forward pass alone.

Usage: python -m benchmarks.embedding [--clips 2] [--repeat 3] [--out build/bench/embedding.json]

The peer is given its pictures as float32 tensors that are already centred and scaled, all in one
batch; ours is given uint8 frames of a clip each, as they come from the decoder, and gathers,
prepares, encodes, averages and scales them. Random weights of ViT-B/16: the time does not depend on
them. ViCLIP has no peer to install: its path is compared with its own encoder on ready tensors.

Peer and ours take turns, after one warm-up each; figures are medians of processor seconds (every
thread), which neighbours disturb less. A ratio is the peer's time over ours.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.tables import target, write_report
from curation.embeddings import Embedder
from curation.openclip import OpenClipEmbedder
from curation.viclip import FRAMES, Sizes, ViCLIP, ViCLIPEmbedder, load_viclip

OVERHEAD = 1.15
"""Target: what we do around the forward pass may cost 15 % of it at most."""
VICLIP_B16 = Sizes(16, 14, 768, 12, 512, 12, 512)
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

Step = Callable[[], object]


def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--clips", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("build/bench/embedding.json"))
    args = parser.parse_args()
    generator = np.random.default_rng(0)
    clips = [generator.integers(0, 256, (FRAMES, 224, 224, 3), np.uint8) for _ in range(args.clips)]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, prepare in (("OpenCLIP ViT-B/16", _openclip), ("ViCLIP B/16", _viclip)):
            row = _measure(name, prepare(Path(folder), clips), args.repeat)
            rows.append(row)
            print(f"{name:20} ours {row['ours']:.3f} s  peer {row['peer']:.3f} s", flush=True)
    write_report(
        args.out,
        "Embedding clips beside OpenCLIP's forward pass",
        f"{args.clips} clips of {FRAMES} frames of 224 pixels, float32 on the CPU; processor "
        f"seconds, median of {args.repeat} interleaved repetitions; ratio = peer / ours. The peer "
        "of ViCLIP is its encoder alone.",
        rows,
        [
            target(f"{row['case']}: ours over the forward pass alone", row["ours"] / row["peer"],
                   OVERHEAD, at_most=True)
            for row in rows
        ],
        {"torch": torch.__version__, "threads": torch.get_num_threads()},
    )  # fmt: skip


def _openclip(folder: Path, clips: list[np.ndarray]) -> dict[str, Step]:
    torch.manual_seed(0)
    config: dict[str, Any] = open_clip.get_model_config("ViT-B-16") or {}
    model = open_clip.CLIP(**config).eval()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    ready = _ready(clips, mean, std).flatten(0, 1).contiguous()
    embedder = OpenClipEmbedder(folder, "truncate", "cpu")
    return {"ours": _ours(embedder, clips), "peer": lambda: model.encode_image(ready)}


def _viclip(folder: Path, clips: list[np.ndarray]) -> dict[str, Step]:
    path = folder / "viclip.safetensors"
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in ViCLIP(VICLIP_B16).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    save_file({n: torch.randn(s, generator=generator) * 0.02 for n, s in shapes.items()}, path)
    vision = load_viclip(path)[0].vision_encoder
    ready = _ready(clips, *_IMAGENET).contiguous()
    embedder = ViCLIPEmbedder(path, "truncate", "cpu")
    return {"ours": _ours(embedder, clips), "peer": lambda: vision(vision.tokens(ready))}


def _ours(embedder: Embedder, clips: list[np.ndarray]) -> Step:
    return lambda: embedder.embed_clips(np.stack(clips))


def _ready(clips: list[np.ndarray], mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(B, T, 3, H, W) float32, centred and scaled."""
    pixels = torch.from_numpy(np.stack(clips)).permute(0, 1, 4, 2, 3).float() / 255
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def _measure(case: str, steps: dict[str, Step], repeat: int) -> dict[str, Any]:
    spent: dict[str, list[float]] = {who: [] for who in steps}
    for repetition in range(repeat + 1):
        for who, step in steps.items():
            started = time.process_time()
            with torch.inference_mode():
                step()
            if repetition:
                spent[who].append(time.process_time() - started)
    ours, peer = (statistics.median(spent[who]) for who in ("ours", "peer"))
    return {
        "case": case,
        "ours": round(ours, 4),
        "peer": round(peer, 4),
        "ratio": round(peer / ours, 3),
        "unit": "s",
    }


if __name__ == "__main__":
    main()
