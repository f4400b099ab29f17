"""ViCLIP: clips of eight frames and captions in one space, from the official checkpoints.

The blocks and the text encoder are OpenCLIP's; the names of all weights are those of the official
files. Sizes (B/16, L/14) are told from the weights' shapes. Only the encoding of test time is here:
no patch is masked, nothing is dropped.

A checkpoint trained on few words, such as ours of ``assets/tiny/viclip``, may hold the rows of its
own tokens alone: tensor ``text_encoder.token_ids`` then names them, in rising order, and
``text_encoder.token_embedding.weight`` has one more row in front, that of every other token.

Source: InternVid (arXiv 2307.06942); OpenGVLab/InternVideo, Data/InternVid/viclip (viclip.py,
viclip_vision.py, viclip_text.py, simple_tokenizer.py) and its demo. Unlike there, all tokens of a
frame follow each other (which attention does not notice), long captions may be read in pieces, and
weights are never unpickled.

Shape legend: B clips, T frames, H W pixels, L patches per frame, N texts, D vector length.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import QuickGELU, TextTransformer, Transformer
from torch import Tensor, nn
from torch.nn import functional as F

from curation.long_text import LongText, Vector, embed_long, text_pieces
from curation.video import Frames, ResizeMode
from curation.weights import (
    black_and_noise,
    check_filled,
    check_tells_apart,
    check_weights,
    read_weights,
)
from schemas.errors import CheckpointError
from schemas.storage import fingerprint_file

FRAMES = 8
"""Frames of a clip: as many temporal positions there are."""
CONTEXT = 32
"""Tokens of a text, its start and end among them."""

_WHAT = "ViCLIP"
_VOCABULARY = 49408
_TOKENS = "text_encoder.token_embedding.weight"
TOKEN_IDS = "text_encoder.token_ids"
"""Which tokens' rows a checkpoint holds, if not all of them."""
_HEAD = 64
"""Width of an attention head, in all sizes of CLIP."""
_LAYERS = {"vision_encoder": {1024: 24, 768: 12}, "text_encoder": {768: 12, 512: 12}}
"""Layers of the official widths, so that a missing last layer is noticed."""
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""ImageNet's, not CLIP's, as in ViCLIP's training code and demo."""
_CHECKED_PATCHES = 32
"""Of the first frame; enough to see whether the encoder works at all, and quick on a CPU."""
_TELLING = (
    "vision_encoder.conv1.weight",
    "vision_encoder.positional_embedding",
    "vision_encoder.proj",
    _TOKENS,
)
"""Weights whose shapes tell the sizes."""


@dataclass(frozen=True)
class Sizes:
    """What the official sizes differ in."""

    patch_px: int
    grid: int
    vision_width: int
    vision_layers: int
    text_width: int
    text_layers: int
    dim: int

    @property
    def image_px(self) -> int:
        """Height and width of a frame; 224 in the official sizes."""
        return self.patch_px * self.grid


class VisionEncoder(nn.Module):
    """All patches of all frames and one class token, through one transformer."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width, patch = sizes.vision_width, (1, sizes.patch_px, sizes.patch_px)
        self.conv1 = nn.Conv3d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(sizes.grid**2 + 1, width))
        self.temporal_positional_embedding = nn.Parameter(torch.empty(1, FRAMES, width))
        self.ln_pre = nn.LayerNorm(width)
        # OpenCLIP's "custom" block has the same weights as its default one. It never makes the
        # matrix of all attentions, which the default one does in inference (2 GB for 8 clips).
        self.transformer = Transformer(
            width, sizes.vision_layers, width // _HEAD, act_layer=QuickGELU, block_type="custom"
        )
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.empty(width, sizes.dim))

    def tokens(self, pixels: Tensor) -> Tensor:
        """(B, T, 3, H, W) to (B, 1 + T * L, width); the class token has no place in time."""
        # The kernel is one frame deep.
        patches = F.conv2d(pixels.flatten(0, 1), self.conv1.weight[:, :, 0], stride=self._stride)
        x = patches.flatten(2).mT.unflatten(0, pixels.shape[:2])  # (B, T, L, width)
        x = x + self.positional_embedding[1:] + self.temporal_positional_embedding[0][:, None]
        first = self.class_embedding + self.positional_embedding[0]
        return torch.cat([first.expand(len(x), 1, -1), x.flatten(1, 2)], dim=1)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, any number of tokens, width) to (B, D), not scaled."""
        x = self.transformer(self.ln_pre(tokens))
        return self.ln_post(x[:, 0]) @ self.proj

    @property
    def _stride(self) -> tuple[int, int]:
        return self.conv1.weight.shape[-2], self.conv1.weight.shape[-1]


class ViCLIP(nn.Module):
    """Both encoders and the temperature of training, named as in the official checkpoints."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.vision_encoder = VisionEncoder(sizes)
        self.text_encoder = TextTransformer(
            context_length=CONTEXT,
            vocab_size=_VOCABULARY,
            width=sizes.text_width,
            heads=sizes.text_width // _HEAD,
            layers=sizes.text_layers,
            output_dim=sizes.dim,
            act_layer=QuickGELU,
            block_type="custom",
        )
        self.temp = nn.Parameter(torch.empty(()))


class ViCLIPEmbedder:
    """Unit vectors of clips and captions.

    Args:
        path: Official weights: a ``.pth`` file, a ``.safetensors`` file, or a folder with
            ``model.safetensors``.
        long_text: What is done to captions of more than ``CONTEXT`` tokens.
        device: Where it runs; None = a GPU if this process sees one, else the CPU.

    Raises:
        CheckpointError: The weights are not those of ViCLIP, all of them, and trained.
    """

    model_id = "viclip-1"
    mode: ResizeMode = "stretch"

    def __init__(self, path: Path, long_text: LongText, device: str | None = None) -> None:
        file = weights_file(path)
        self.weights_sha256 = weights_hash(path)
        model, sizes = load_viclip(file)
        self.dim = sizes.dim
        self.image_px = sizes.image_px
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._model = model.to(self._device)
        self._long_text: LongText = long_text
        self._tokenizer = SimpleTokenizer(context_length=CONTEXT)
        std = torch.tensor(STD, device=self._device).view(3, 1, 1)
        self._scale = 1 / (255 * std)
        self._offset = torch.tensor(MEAN, device=self._device).view(3, 1, 1) / std
        self._check(file)

    def embed_clips(self, frames: Frames) -> Vector:
        """(B, 8, H, W, 3) uint8 RGB to (B, D) float32 unit vectors; a single frame is repeated."""
        if frames.shape[1] == 1:
            frames = np.repeat(frames, FRAMES, axis=1)
        assert frames.shape[1] == FRAMES, "load_embedder refuses another number"
        vision = self._model.vision_encoder
        with torch.inference_mode():
            return _unit(vision(vision.tokens(self._pixels(frames))))

    def embed_texts(self, texts: Sequence[str]) -> list[Vector | None]:
        """One (D,) unit vector per text."""
        return [*embed_long(texts, self._long_text, self._fits, self._encode)]

    def text_chunks(self, text: str) -> int:
        """How many pieces a text is read in."""
        return len(text_pieces(text, self._long_text, self._fits))

    def _pixels(self, frames: Frames) -> Tensor:
        """(B, T, H, W, 3) uint8 to (B, T, 3, H, W), centred and scaled."""
        pixels = torch.from_numpy(frames).to(self._device).permute(0, 1, 4, 2, 3)
        return pixels * self._scale - self._offset

    def _fits(self, text: str) -> bool:
        return len(self._tokenizer.encode(text)) + 2 <= CONTEXT

    def _encode(self, texts: list[str]) -> Vector:
        tokens = self._tokenizer(texts).to(self._device)
        with torch.inference_mode():
            return _unit(self._model.text_encoder(tokens))

    def _check(self, file: Path) -> None:
        """Both encoders tell inputs apart; of the first frame's patches only, which is quick."""
        pixels = self._pixels(black_and_noise(FRAMES, self.image_px))
        vision = self._model.vision_encoder
        with torch.inference_mode():
            first = vision.tokens(pixels)[:, : 1 + _CHECKED_PATCHES]
            check_tells_apart(file, F.normalize(vision(first), dim=-1), _WHAT)
        texts = self._encode(["a red ball", "two dogs run along the beach at night"])
        check_tells_apart(file, torch.from_numpy(texts), _WHAT)


def weights_file(path: Path) -> Path:
    """The file with the weights: ``path`` itself, or ``model.safetensors`` in it.

    Raises:
        CheckpointError: There is none.
    """
    file = path / "model.safetensors" if path.is_dir() else path
    if file.is_file():
        return file
    raise CheckpointError(
        f"no weights of {_WHAT}",
        where=path,
        found=sorted(p.name for p in path.iterdir())[:10] if path.is_dir() else "no file",
        expected="an official .pth or .safetensors file, or a folder with model.safetensors",
        do="give the file itself, or the folder it is in",
    )


def weights_hash(path: Path) -> str:
    """Hash of that file."""
    return fingerprint_file(weights_file(path))


def load_viclip(file: Path) -> tuple[ViCLIP, Sizes]:
    """The model in float32 on the CPU, for inference.

    Raises:
        CheckpointError: The file cannot be read, names are missing or not expected, a shape is
            another one, or the weights are not trained ones.
    """
    state = _with_all_tokens(
        file, read_weights(file, None if file.suffix == ".safetensors" else "model")
    )
    sizes = sizes_of(file, state)
    # On the meta device nothing is allocated or drawn at random before the weights come.
    with torch.device("meta"):
        model = ViCLIP(sizes)
    check_weights(file, state, model.state_dict(), _WHAT)
    model.load_state_dict({name: value.float() for name, value in state.items()}, assign=True)
    text: Any = model.text_encoder
    text.attn_mask = text.build_causal_mask()  # of no weights, so still on the meta device
    check_filled(file, model, _WHAT)
    return model.eval().requires_grad_(False), sizes


def _with_all_tokens(file: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights with a row for every token of the vocabulary; see the text of this module."""
    if TOKEN_IDS not in state or _TOKENS not in state:
        return state
    ids, rows = state[TOKEN_IDS], state[_TOKENS]
    if (
        ids.dtype != torch.int64
        or ids.ndim != 1
        or rows.shape[:1] != (len(ids) + 1,)
        or not bool(((ids >= 0) & (ids < _VOCABULARY)).all() and (ids.diff() > 0).all())
    ):
        raise CheckpointError(
            "the rows of tokens are not named as they must be",
            where=f"{file}, {TOKEN_IDS}",
            found=f"{ids.dtype} of shape {tuple(ids.shape)}, rows of shape {tuple(rows.shape)}",
            expected=f"rising int64 from 0 to {_VOCABULARY - 1}, one fewer than there are rows",
            do="fetch the file again",
        )
    every = rows[:1].repeat(_VOCABULARY, 1)
    every[ids] = rows[1:]
    return {k: v for k, v in state.items() if k != TOKEN_IDS} | {_TOKENS: every}


def sizes_of(file: Path, state: Mapping[str, Tensor]) -> Sizes:
    """The sizes that shapes tell; ``check_weights`` then sees whether all others agree.

    Raises:
        CheckpointError: One of the weights that tell them is missing, or has no such shape.
    """
    shapes = {name: tuple(state[name].shape) for name in _TELLING if name in state}
    try:
        width, _, _, patch, _ = shapes[_TELLING[0]]
        positions, _ = shapes[_TELLING[1]]
        _, dim = shapes[_TELLING[2]]
        _, text_width = shapes[_TELLING[3]]
        if width % _HEAD or text_width % _HEAD:
            raise ValueError("heads have another width")
        grid = round((positions - 1) ** 0.5)
        return Sizes(
            patch_px=patch,
            grid=grid,
            vision_width=width,
            vision_layers=_num_layers(state, "vision_encoder", width),
            text_width=text_width,
            text_layers=_num_layers(state, "text_encoder", text_width),
            dim=dim,
        )
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"the weights are not those of {_WHAT}",
            where=file,
            found=shapes,
            expected=f"weights {', '.join(_TELLING)}",
            do="give an official checkpoint of ViCLIP, such as ViCLIP-L_InternVid-FLT-10M.pth",
        ) from error


def _num_layers(state: Mapping[str, Tensor], encoder: str, width: int) -> int:
    found = (re.match(rf"{encoder}\.transformer\.resblocks\.(\d+)\.", name) for name in state)
    counted = max((int(match[1]) + 1 for match in found if match), default=0)
    return _LAYERS[encoder].get(width, counted)


def _unit(vectors: Tensor) -> Vector:
    return F.normalize(vectors.float(), dim=-1).cpu().numpy()
