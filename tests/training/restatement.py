"""The masked DiT written a second time, slowly: one sample, one token at a time.

It takes a state dict and plain numbers and shares no code with the model. Float64 throughout, but
for two steps that CogVideoX defines in float32: the sinusoids of the timestep, and the division of
a spatial position by its scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Token:
    scene: int
    is_video: bool
    frame: int = 0  # index of its (grouped) frame in the whole sample
    time: int = 0  # temporal position
    row: int = 0
    column: int = 0


class Restatement:
    """A model of a config and a state dict.

    Args:
        config: Keyword arguments of the model.
        weights: Its state dict.
    """

    def __init__(self, config: dict, weights: dict[str, Tensor]) -> None:
        self.c = config
        self.w = {k: v.double() for k, v in weights.items()}
        self.heads = config["num_attention_heads"]
        self.head = config["attention_head_dim"]
        self.width = self.heads * self.head
        self.group = config.get("patch_size_t") or 1
        self.patch = 2

    def __call__(
        self,
        video: Tensor,
        text: Tensor,
        timestep: int,
        scene_frames: Sequence[int],
        generated: Sequence[bool],
    ) -> Tensor:
        """(F, C, H, W) and (S, T, W) to v, (F, C, H, W)."""
        grid = (video.shape[2] // self.patch, video.shape[3] // self.patch)
        scenes = len(scene_frames)
        steps = [f // self.group for f in scene_frames]
        tokens = [Token(s, False) for s in range(scenes) for _ in range(text.shape[1])]
        times, length = self.timeline(steps)
        frame = 0
        for scene, count in enumerate(steps):
            for _ in range(count):
                tokens += [
                    Token(scene, True, frame, times[frame], r, c)
                    for r in range(grid[0])
                    for c in range(grid[1])
                ]
                frame += 1
        embeddings = [self.time_embedding(timestep if g else 0) for g in generated]

        words = iter(text.flatten(0, 1))
        x = [
            self.video_token(video, token)
            if token.is_video
            else self.linear("patch_embed.text_proj", next(words))
            for token in tokens
        ]
        if not self.c["use_rotary_positional_embeddings"]:
            for i, token in enumerate(tokens):
                if token.is_video:
                    x[i] = x[i] + self.sincos(token, max(steps), length)
        for layer in range(self.c["num_layers"]):
            x = self.layer(f"transformer_blocks.{layer}.", x, tokens, embeddings, grid)
        return self.output(x, tokens, embeddings, video.shape)

    def timeline(self, steps: Sequence[int]) -> tuple[list[int], int]:
        policy, gap = self.c.get("position_policy", "continuous"), self.c.get("position_gap", 0)
        times: list[int] = []
        for scene, count in enumerate(steps):
            before = 0 if policy == "reset" else sum(steps[:scene]) + gap * scene
            times += [before + i for i in range(count)]
        return times, (max(steps) if policy == "reset" else sum(steps) + gap * (len(steps) - 1))

    def linear(self, name: str, x: Tensor) -> Tensor:
        y = self.w[f"{name}.weight"] @ x
        return y + self.w[f"{name}.bias"] if f"{name}.bias" in self.w else y

    def norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        centred = x - x.mean()
        unit = centred / torch.sqrt((centred**2).mean() + eps)
        return unit * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def time_embedding(self, timestep: int) -> Tensor:
        half = self.width // 2
        exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32) / half
        angle = torch.tensor([float(timestep)]) * torch.exp(exponent)
        waves = torch.cat([torch.cos(angle), torch.sin(angle)]).double()
        hidden = self.linear("time_embedding.linear_1", waves)
        return self.linear("time_embedding.linear_2", hidden * torch.sigmoid(hidden))

    def video_token(self, video: Tensor, token: Token) -> Tensor:
        p, g = self.patch, self.group
        rows = slice(token.row * p, token.row * p + p)
        columns = slice(token.column * p, token.column * p + p)
        box = video[token.frame * g : token.frame * g + g, :, rows, columns]  # (g, C, p, p)
        weight = self.w["patch_embed.proj.weight"]
        weight = weight.reshape(self.width, video.shape[1], g, p, p)
        summed = (weight * box.transpose(0, 1)).sum((1, 2, 3, 4))
        return summed + self.w["patch_embed.proj.bias"]

    def sincos(self, token: Token, longest: int, length: int) -> Tensor:
        """Time of the longest scene stretched over the timeline; columns; rows."""
        quarter = self.width // 4
        if length == longest:
            in_time = waves(token.time, quarter)
        else:
            at = max(0.0, (token.time + 0.5) * longest / length - 0.5)
            low = int(at)
            high = min(low + 1, longest - 1)
            in_time = (1 - (at - low)) * waves(low, quarter) + (at - low) * waves(high, quarter)
        half = (self.width - quarter) // 2
        scale = np.float32(self.c.get("spatial_interpolation_scale", 1.875))
        across, down = (float(np.float32(n) / scale) for n in (token.column, token.row))
        return torch.cat([in_time, waves(across, half), waves(down, half)])

    def rotate(self, x: Tensor, token: Token, grid: tuple[int, int]) -> Tensor:
        """Pairs of neighbours are turned: a quarter by time, then by row, then by column."""
        if not self.c["use_rotary_positional_embeddings"] or not token.is_video:
            return x
        row, column = self.spatial(token, grid)
        widths = (self.head // 4, self.head * 3 // 8, self.head * 3 // 8)
        angles = [
            position / 10000 ** (i / width)
            for position, width in zip((float(token.time), row, column), widths, strict=True)
            for i in range(0, width, 2)
        ]
        cos = torch.tensor([math.cos(a) for a in angles], dtype=torch.float64)
        sin = torch.tensor([math.sin(a) for a in angles], dtype=torch.float64)
        turned = torch.empty_like(x)
        turned[0::2] = x[0::2] * cos - x[1::2] * sin
        turned[1::2] = x[0::2] * sin + x[1::2] * cos
        return turned

    def spatial(self, token: Token, grid: tuple[int, int]) -> tuple[float, float]:
        if self.group > 1:
            return float(token.row), float(token.column)
        base = (self.c["sample_height"] // self.patch, self.c["sample_width"] // self.patch)
        # the grid is scaled into the trained one with its aspect kept, and centred there
        scale = min(base[0] / grid[0], base[1] / grid[1])
        found: list[float] = []
        for place, count, room in zip((token.row, token.column), grid, base, strict=True):
            size = round(scale * count)
            low = round((room - size) / 2)
            last = (low + size) * (count - 1) / count
            found.append(low + place * (last - low) / (count - 1))
        return found[0], found[1]

    def sees(self, q: Token, k: Token) -> bool:
        mask = self.c["mask"]
        if q.scene == k.scene or mask == "v5":
            return True
        return mask == "v2" and q.is_video and k.is_video

    def modulation(self, name: str, token: Token, embeddings: list[Tensor]) -> list[Tensor]:
        """Shift, scale and gate of a token."""
        time = embeddings[token.scene]
        rows = self.linear(f"{name}.linear", time * torch.sigmoid(time)).chunk(6)
        return list(rows[:3] if token.is_video else rows[3:])

    def layer(
        self,
        name: str,
        x: list[Tensor],
        tokens: list[Token],
        embeddings: list[Tensor],
        grid: tuple[int, int],
    ) -> list[Tensor]:
        queries, keys, values, gates = [], [], [], []
        for token, value in zip(tokens, x, strict=True):
            shift, scale, gate = self.modulation(f"{name}norm1", token, embeddings)
            normed = self.norm(f"{name}norm1.norm", value, 1e-5) * (1 + scale) + shift
            gates.append(gate)
            for kind, into in (("q", queries), ("k", keys), ("v", values)):
                heads = self.linear(f"{name}attn1.to_{kind}", normed).reshape(self.heads, self.head)
                if kind != "v":
                    normed_heads = [self.norm(f"{name}attn1.norm_{kind}", h, 1e-6) for h in heads]
                    heads = torch.stack([self.rotate(h, token, grid) for h in normed_heads])
                into.append(heads)
        all_keys, all_values = torch.stack(keys), torch.stack(values)
        out = []
        for i, token in enumerate(tokens):
            seen = torch.tensor([self.sees(token, other) for other in tokens])
            scores = (queries[i] * all_keys[seen]).sum(-1) / math.sqrt(self.head)  # (keys, heads)
            mixed = (torch.softmax(scores, 0)[..., None] * all_values[seen]).sum(0)
            out.append(x[i] + gates[i] * self.linear(f"{name}attn1.to_out.0", mixed.flatten()))
        return [self.feed_forward(name, t, v, embeddings) for t, v in zip(tokens, out, strict=True)]

    def feed_forward(self, name: str, token: Token, x: Tensor, embeddings: list[Tensor]) -> Tensor:
        shift, scale, gate = self.modulation(f"{name}norm2", token, embeddings)
        h = self.norm(f"{name}norm2.norm", x, 1e-5) * (1 + scale) + shift
        h = self.linear(f"{name}ff.net.0.proj", h)
        h = h / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        return x + gate * self.linear(f"{name}ff.net.2", h)

    def output(
        self, x: list[Tensor], tokens: list[Token], embeddings: list[Tensor], shape: Sequence[int]
    ) -> Tensor:
        video = torch.zeros(*shape, dtype=torch.float64)
        p, g = self.patch, self.group
        for token, value in zip(tokens, x, strict=True):
            if not token.is_video:
                continue
            time = embeddings[token.scene]
            shift, scale = self.linear("norm_out.linear", time * torch.sigmoid(time)).chunk(2)
            h = self.norm("norm_out.norm", self.norm("norm_final", value, 1e-5), 1e-5)
            box = self.linear("proj_out", h * (1 + scale) + shift).reshape(shape[1], g, p, p)
            rows = slice(token.row * p, token.row * p + p)
            columns = slice(token.column * p, token.column * p + p)
            frames = slice(token.frame * g, token.frame * g + g)
            video[frames, :, rows, columns] = box.transpose(0, 1)
        return video


def waves(position: float, width: int) -> Tensor:
    """``width / 2`` sines, then as many cosines."""
    angles = [position / 10000 ** (i / (width // 2)) for i in range(width // 2)]
    sines, cosines = [math.sin(a) for a in angles], [math.cos(a) for a in angles]
    return torch.tensor(sines + cosines, dtype=torch.float64)


def official_sincos(
    width: int, trained: tuple[int, int, int], scenes: int, grid: tuple[int, int]
) -> Tensor:
    """The official code's 2B positions, (frames * h * w, width): its buffer resized in all axes.

    The buffer has the configured size ``trained`` (frames, rows, columns) and is resized to
    ``frames * scenes``, whatever the number of frames of the video.
    """
    size = (trained[0] * scenes, *grid)
    quarter = width // 4
    half = (width - quarter) // 2
    scale = np.float32(1.875)
    table = torch.stack(
        [
            torch.cat(
                [waves(f, quarter), *(waves(float(np.float32(n) / scale), half) for n in (c, r))]
            )
            for f in range(trained[0])
            for r in range(trained[1])
            for c in range(trained[2])
        ]
    ).unflatten(0, trained)
    for axis, (old, new) in enumerate(zip(trained, size, strict=True)):
        places = [max(0.0, (i + 0.5) * old / new - 0.5) for i in range(new)]
        table = torch.stack(
            [
                torch.lerp(
                    table.select(axis, int(at)),
                    table.select(axis, min(int(at) + 1, old - 1)),
                    at - int(at),
                )
                for at in places
            ],
            axis,
        )
    return table.flatten(0, 2)
