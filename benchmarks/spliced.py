"""Films spliced from real shots, with every transition known to the frame.

Pieces of verified shots follow one another by hard cuts, dissolves, fades through a colour and
wipes, both pictures moving on while they mix, and are encoded as H.264 with x264's own key-frame
placement. They are a check on films that no constant was set on: choose an unused seed.

Shape legend: T frames, H W pixels.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt

from curation.video import decode

Frames = npt.NDArray[np.uint8]

HEIGHT, WIDTH = 288, 512
_SAFE = 6
"""Frames left out around verified transitions, whose ends are a matter of opinion."""
_KINDS = ("cut", "cut", "cut", "dissolve", "dissolve", "fade", "wipe")


def make_films(media: Path, folder: Path, seed: int, count: int = 3) -> dict[str, Any]:
    """Write ``count`` films and their ``truth.json`` into ``folder``; returns the truth.

    Args:
        media: Folder with verified films and their ``cuts.json`` or ``truth.json``.
        folder: Where to write; created.
        seed: Decides everything.
        count: Number of films, each of twelve pieces.
    """
    draw = random.Random(seed)
    spans = pure_spans(read_truth(media))
    folder.mkdir(parents=True, exist_ok=True)
    truth: dict[str, Any] = {}
    for number in range(count):
        name = f"spliced_{seed}_{number}.mp4"
        frames, truth[name] = splice(media, spans, draw)
        _write(folder / name, frames)
    (folder / "truth.json").write_text(json.dumps(truth, indent=1) + "\n")
    return truth


def read_truth(media: Path) -> dict[str, Any]:
    """The ground truth of a folder of verified films."""
    names = (media / name for name in ("truth.json", "cuts.json"))
    return json.loads(next(p for p in names if p.is_file()).read_text())


def pure_spans(truth: dict[str, Any]) -> list[tuple[str, int, int]]:
    """(file, start, end) of stretches of at least 40 frames within one verified shot."""
    out: list[tuple[str, int, int]] = []
    for name, entry in truth.items():
        edges = [(0, 0), (entry["nframes"], entry["nframes"])]
        edges += [(c, c) for c in entry["cuts"]]
        edges += [(s, e + 1) for s, e in (*entry["soft"], *entry["ambiguous"])]
        edges.sort()
        free = 0
        for start, end in edges:
            if start - _SAFE - (free + _SAFE) >= 40:
                out.append((name, free + _SAFE, start - _SAFE))
            free = max(free, end)
    return out


def splice(
    media: Path, spans: Sequence[tuple[str, int, int]], draw: random.Random, pieces: int = 12
) -> tuple[Frames, dict[str, Any]]:
    """One film of ``pieces`` pieces, no two neighbours from one file, and its truth."""
    out = _piece(media, draw.choice(spans), draw)
    last = ""
    cuts: list[int] = []
    soft: list[list[int]] = []
    kinds: list[str] = []
    for _ in range(pieces - 1):
        span = draw.choice([s for s in spans if s[0].split("_")[1] != last])
        last = span[0].split("_")[1]
        piece, kind = _piece(media, span, draw), draw.choice(_KINDS)
        longest = min(48, len(piece) - 12, len(out) - (soft[-1][1] + 12 if soft else 12))
        if kind == "cut" or longest < 6:
            cuts.append(len(out))
            out = np.concatenate([out, piece])
            continue
        length = draw.randint(6, longest)
        start = len(out) - length
        middle = _mix(out[start:], piece[:length], kind, draw)
        out = np.concatenate([out[:start], middle, piece[length:]])
        soft.append([start, start + length - 1])
        kinds.append(kind)
    entry = {"nframes": len(out), "cuts": cuts, "soft": soft, "soft_kinds": kinds, "ambiguous": []}
    return out, entry


def _mix(a: Frames, b: Frames, kind: str, draw: random.Random) -> Frames:
    """(T, H, W, 3) of a transition from one moving picture to another."""
    weight = (np.arange(1, len(a) + 1) / (len(a) + 1)).astype(np.float32)[:, None, None, None]
    if kind == "dissolve":
        return (a * (1 - weight) + b * weight).astype(np.uint8)
    if kind == "fade":
        colour = np.float32(draw.choice((0, 0, 255)))
        there = a + (colour - a) * np.minimum(1, 2 * weight)
        back = b + (colour - b) * np.minimum(1, 2 - 2 * weight)
        return np.where(weight < 0.5, there, back).astype(np.uint8)
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float32)
    ramp = draw.choice((x / WIDTH, 1 - x / WIDTH, y / HEIGHT, (x / WIDTH + y / HEIGHT) / 2))
    return np.where(ramp[None, :, :, None] < weight, b, a).astype(np.uint8)


def _piece(media: Path, span: tuple[str, int, int], draw: random.Random) -> Frames:
    """(T, H, W, 3): 40 to 110 frames of a span, filling the frame."""
    name, start, end = span
    length = min(end - start, draw.randint(40, 110))
    start = draw.randint(start, end - length)
    out: list[npt.NDArray[np.uint8]] = []
    for number, frame in enumerate(decode(media / name)):
        if number >= start + length:
            break
        if number >= start:
            out.append(_cover(frame))
    return np.stack(out)


def _cover(frame: av.VideoFrame) -> npt.NDArray[np.uint8]:
    scale = max(WIDTH / frame.width, HEIGHT / frame.height)
    width, height = round(frame.width * scale), round(frame.height * scale)
    scaled = frame.reformat(width, height, "rgb24", interpolation="AREA")
    picture = np.asarray(scaled.to_ndarray(), np.uint8)
    top, left = (height - HEIGHT) // 2, (width - WIDTH) // 2
    return picture[top : top + HEIGHT, left : left + WIDTH]


def _write(path: Path, frames: Frames) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24, options={"preset": "fast", "crf": "23"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make spliced films with known transitions.")
    parser.add_argument("media", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=3)
    args = parser.parse_args()
    make_films(args.media, args.folder, args.seed, args.count)
