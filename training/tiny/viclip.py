"""viclip-tiny: ViCLIP in small, trained on ToonWorld from nothing.

Usage: python -m training.tiny.viclip [--steps 3200] [--seed 0] [--out assets/tiny/viclip]

Each step draws stories, and of each two shots that follow one another. Three losses are added up:

- shots and captions: each shot's vector is nearest to its own caption's, and the other way round
  (InfoNCE; ViCLIP's loss);
- shots and shots: each is nearest to the other shot of its story, among the other stories' shots,
  so that vectors carry what a story shares, which captions do not tell;
- a linear reading of the five hidden variables from the shot's vector, which is thrown away
  afterwards. It makes training on one core several times shorter.

As in ViCLIP's training most patches are left out, ever fewer of them. A caption is read as the
pipeline would: cut off, or a piece of it (``long_text``). Some words are exchanged for "any other",
so that the row which all unknown words share means something.

Shape legend: N shots, T frames, H W pixels, B stories in a step, L patches of a clip, K those kept.
"""

from __future__ import annotations

import argparse
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from curation.embeddings import spread_frames
from curation.long_text import text_pieces
from curation.toonworld.captions import caption
from curation.toonworld.draws import Draw
from curation.toonworld.render import film, stage
from curation.toonworld.world import (
    BUILDS,
    LIGHTS,
    OUTLINES,
    PALETTES,
    TEXTURES,
    Shot,
    draw_episode,
)
from curation.toonworld.write import LOOK
from curation.viclip import CONTEXT, FRAMES, MEAN, STD, TOKEN_IDS, Sizes, ViCLIP
from schemas.storage import atomic_path, fingerprint
from training.tiny.stories import FPS, PIXELS, TRAIN_SEED, load_stories
from training.tiny.stories import FRAMES as SCENE_FRAMES

log = logging.getLogger(__name__)

Frames = npt.NDArray[np.uint8]

SIZES = Sizes(
    patch_px=8, grid=PIXELS // 8, vision_width=64, vision_layers=3, text_width=64, text_layers=2,
    dim=64,
)  # fmt: skip
STORIES = 1000
"""The first episodes of the seed, as all embedded models see them: three scenes of nine frames."""
TAKES = 500
"""The next ones, two shots each, as clips of the pipeline are: any length, frames further apart."""
_BATCH = 32
_LR = 2.5e-3
_KEPT = (24, 96)
"""Patches kept in the first and in the last step."""
_STORY_TEMPERATURE = 0.15
_STYLE_WEIGHT = 0.5
_UNKNOWN = 0.05
"""Share of words exchanged for the row of unknown words."""
_HIDDEN = {
    "palette": PALETTES, "outline": OUTLINES, "texture": TEXTURES, "build": BUILDS, "light": LIGHTS,
}  # fmt: skip
_LOG_EVERY = 50
_SAVE_EVERY = 400


def main() -> None:
    """Train, and write ``model.safetensors``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=3200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=Path("build/tiny"))
    parser.add_argument("--out", type=Path, default=Path("assets/tiny/viclip"))
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    Training(Lessons(args.data), args.seed).run(args.steps, args.out)


def load_takes(folder: Path, name: str, shots: Sequence[Shot]) -> Frames:
    """(N, T, H, W, 3) a take of each shot, rendered on the first call, about 19 a second.

    Frames are those that the pipeline would read of a clip: the middles of equal parts of a span,
    which is as long as a generated scene or up to the whole shot.

    Args:
        folder: Keeps the frames, 98 kB a shot.
        name: Of these shots; decides with their number which spans are taken.
        shots: What to film.
    """
    shape = (len(shots), FRAMES, PIXELS, PIXELS, 3)
    path = folder / f"takes-{fingerprint('takes', LOOK, name, *shape)[:16]}.npy"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as tmp:
            frames = np.lib.format.open_memmap(tmp, "w+", np.uint8, shape)
            for i, shot in enumerate(shots):
                frames[i] = _take(shot, Draw("take", name, i))
            frames.flush()
        log.info("takes name=%s rendered=%d", name, len(shots))
    return np.load(path, mmap_mode="r")


def _take(shot: Shot, draw: Draw) -> Frames:
    length = draw.number(SCENE_FRAMES / FPS, shot.seconds)
    start = draw.number(0, shot.seconds - length)
    times = start + (np.arange(FRAMES) + 0.5) / FRAMES * length
    return film(stage(shot, PIXELS, PIXELS), times)


class Lessons:
    """What is trained on.

    Attributes:
        frames: (N, T, H, W, 3) uint8.
        firsts: (stories, 2) a shot whose next one is of the same story; two choices.
        hidden: (N, 5) the hidden variables by number.
        texts: Per shot, the (texts, CONTEXT) rows of its caption and of the pieces of it.
        ids: The tokens in them, rising; row ``k + 1`` is that of ``ids[k]``, row 0 any other's.
    """

    def __init__(self, folder: Path) -> None:
        stories = load_stories(folder, TRAIN_SEED, STORIES)
        further = [draw_episode(TRAIN_SEED, STORIES + i).shots[:2] for i in range(TAKES)]
        shots = [shot for story in (*stories.shots, *further) for shot in story]
        takes = [shot for story in further for shot in story]
        scenes = stories.frames[:, :, spread_frames(0, SCENE_FRAMES, FRAMES)]
        scenes = scenes.reshape(-1, *scenes.shape[2:])
        more = load_takes(folder, f"episodes/{TRAIN_SEED}/{STORIES}", takes)
        self.frames = torch.from_numpy(np.concatenate([scenes, more]))
        starts = np.arange(STORIES)[:, None] * 3 + [0, 1]
        pairs = len(scenes) + np.arange(TAKES)[:, None] * 2 + [0, 0]
        self.firsts = np.concatenate([starts, pairs])
        self.hidden = torch.tensor(
            [[v.index(getattr(s.style, k)) for k, v in _HIDDEN.items()] for s in shots]
        )
        tokenizer = SimpleTokenizer(context_length=CONTEXT)
        told = [_readings(caption(shot), tokenizer) for shot in shots]
        tokens = [tokenizer(texts) for texts in told]
        # Zeros after a text's end are no words: nothing looks at them.
        self.ids = torch.cat([t.flatten() for t in tokens]).unique()[1:]
        self.texts = [_rows(self.ids, t) for t in tokens]


class Training:
    """The model, its optimizer, and everything drawn at random."""

    def __init__(self, lessons: Lessons, seed: int) -> None:
        torch.manual_seed(seed)
        self.lessons = lessons
        self.generator = np.random.default_rng(seed)
        self.model = new_model(len(lessons.ids) + 1)
        self.head = nn.Linear(SIZES.dim, sum(map(len, _HIDDEN.values())))
        weights = [*self.model.parameters(), *self.head.parameters()]
        groups = [
            {"params": [w for w in weights if w.ndim > 1], "weight_decay": 0.05},
            {"params": [w for w in weights if w.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=_LR, betas=(0.9, 0.98))

    def run(self, steps: int, out: Path) -> None:
        """All steps; the weights are written now and then, and at the end."""
        started = time.process_time()
        recent: list[list[float]] = []
        for step in range(steps):
            recent.append(self.step(step / steps))
            if (step + 1) % _LOG_EVERY == 0:
                text, story, style = np.mean(recent, axis=0)
                log.info(
                    "viclip step=%d of=%d text=%.3f story=%.3f style=%.3f cpu_s=%.0f",
                    step + 1, steps, text, story, style, time.process_time() - started,
                )  # fmt: skip
                recent.clear()
            if (step + 1) % _SAVE_EVERY == 0 or step + 1 == steps:
                self.save(out)

    def step(self, done: float) -> list[float]:
        """One step, ``done`` being the share of steps before it; the three losses."""
        for group in self.optimizer.param_groups:
            group["lr"] = _LR * min(1.0, done / 0.05) * (1 + math.cos(math.pi * done)) / 2
        stories = self.generator.choice(len(self.lessons.firsts), _BATCH, replace=False)
        firsts = self.lessons.firsts[stories, self.generator.integers(0, 2, _BATCH)]
        shots = np.concatenate([firsts, firsts + 1])
        kept = round(_KEPT[0] * (_KEPT[1] / _KEPT[0]) ** done)
        clips = F.normalize(self._clips(self.lessons.frames[shots], kept), dim=-1)
        texts = F.normalize(self.model.text_encoder(self._texts(shots)), dim=-1)
        temperature = self.model.temp.clamp(0.01, 1)
        style = torch.stack(
            [
                F.cross_entropy(guess, self.lessons.hidden[shots, k])
                for k, guess in enumerate(
                    self.head(clips * 16).split([len(v) for v in _HIDDEN.values()], 1)
                )
            ]
        ).sum()
        text = matched(clips @ texts.T / temperature)
        story = matched(clips[:_BATCH] @ clips[_BATCH:].T / _STORY_TEMPERATURE)
        loss = text + story + _STYLE_WEIGHT * style
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return [text.item(), story.item(), style.item()]

    def save(self, out: Path) -> None:
        """Write the weights, with the rows of known tokens alone."""
        state = {k: v.detach().contiguous() for k, v in self.model.state_dict().items()}
        out.mkdir(parents=True, exist_ok=True)
        with atomic_path(out / "model.safetensors") as tmp:
            save_file(state | {TOKEN_IDS: self.lessons.ids}, tmp)

    def _clips(self, frames: Tensor, kept: int) -> Tensor:
        """Vectors of clips, of K patches of each, other ones in every clip."""
        vision = self.model.vision_encoder
        size, patch = SIZES.grid, SIZES.patch_px
        cut = frames.unflatten(3, (size, patch)).unflatten(2, (size, patch))
        flat = cut.permute(0, 1, 2, 4, 6, 3, 5).flatten(4).flatten(1, 3)  # (N, L, 3 * patch ** 2)
        at = torch.rand(flat.shape[:2]).argsort(1)[:, :kept]
        seen = flat.gather(1, at[..., None].expand(-1, -1, flat.shape[2]))
        mean, std = (torch.tensor(v)[:, None] for v in (MEAN, STD))
        scaled = (seen.unflatten(2, (3, -1)) / 255 - mean) / std
        places = vision.positional_embedding[1:] + vision.temporal_positional_embedding[0][:, None]
        tokens = scaled.flatten(2) @ vision.conv1.weight.flatten(1).T + places.flatten(0, 1)[at]
        first = vision.class_embedding + vision.positional_embedding[0]
        return vision(torch.cat([first.expand(len(tokens), 1, -1), tokens], dim=1))

    def _texts(self, shots: npt.NDArray[np.intp]) -> Tensor:
        """(N, CONTEXT) rows of one text for each shot; half of them whole captions."""
        rows: list[Tensor] = []
        for shot in shots:
            texts = self.lessons.texts[shot]
            whole = self.generator.random() < 0.5
            rows.append(texts[0 if whole else self.generator.integers(len(texts))])
        drawn = torch.stack(rows)
        # The text's end stays: its place is where the vector is read.
        lost = (torch.rand(drawn.shape) < _UNKNOWN) & (drawn != len(self.lessons.ids))
        return drawn.masked_fill(lost, 0)


def matched(logits: Tensor) -> Tensor:
    """InfoNCE, both ways: row k belongs to column k."""
    own = torch.arange(len(logits))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def new_model(num_rows: int) -> ViCLIP:
    """Random weights, of such sizes that signals stay as large as they come in."""
    model = ViCLIP(SIZES)
    text, vision = model.text_encoder, model.vision_encoder
    text.token_embedding = nn.Embedding(num_rows, SIZES.text_width)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            nn.init.zeros_(module.bias)
    nn.init.normal_(text.token_embedding.weight, std=0.1)
    nn.init.normal_(text.positional_embedding, std=0.05)
    nn.init.normal_(vision.conv1.weight, std=(3 * SIZES.patch_px**2) ** -0.5)
    for place in ("class_embedding", "positional_embedding", "temporal_positional_embedding"):
        nn.init.normal_(getattr(vision, place), std=0.3)
    nn.init.normal_(vision.proj, std=SIZES.vision_width**-0.5)
    nn.init.constant_(model.temp, 0.1)
    return model


def _readings(told: str, tokenizer: SimpleTokenizer) -> list[str]:
    """A caption, and the pieces it is read in where it is too long."""
    pieces = text_pieces(told, "chunk", lambda text: len(tokenizer.encode(text)) + 2 <= CONTEXT)
    return [told, *(piece for piece in pieces if piece != told)]


def _rows(ids: Tensor, tokens: Tensor) -> Tensor:
    """Rows of tokens; 0 for those that are not in ``ids``."""
    at = torch.searchsorted(ids, tokens).clamp(max=len(ids) - 1)
    return torch.where(ids[at] == tokens, at + 1, 0)


if __name__ == "__main__":
    main()
