"""How good a picture looks, by LAION's aesthetic predictors over CLIP image embeddings.

Two kinds of head, told apart by their keys: the linear one (``sa_0_4_vit_l_14_linear.pth``) and the
layered one (``sac+logos+ava1-l14-linearMSE.pth``). Both were trained on unit embeddings of OpenAI's
CLIP ViT-L/14. Another CLIP model of the same width would give numbers that mean nothing, and no
check can tell; one of another width is refused.

Shape legend: T frames, H W pixels, D embedding width.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn

from curation.openclip import load_clip
from curation.video import Frames, ResizeMode
from curation.weights import check_weights, read_weights

_WIDTHS = (1024, 128, 64, 16, 1)
"""Of the layered head. Source: improved-aesthetic-predictor, simple_inference.py."""
_DROPOUTS = (0.2, 0.2, 0.1)
"""After the first three layers; they do nothing here, but count in the names of the keys."""


class Aesthetic:
    """The mean aesthetic score of a clip's frames, about 1 to 10.

    Frames are scaled by this project's reader, not by CLIP's bicubic filter.

    Args:
        clip: Folder with an OpenCLIP model: its config, and its weights.
        head: The predictor's weights.

    Raises:
        CheckpointError: A file is missing or unreadable, lacks keys or has others, or the head is
            for another width.
    """

    mode: ResizeMode = "cover"

    def __init__(self, clip: Path, head: Path) -> None:
        whole = load_clip(clip)
        self._clip = dataclasses.replace(whole, model=whole.model.visual)
        self.image_px = self._clip.image_px
        self._head = _load_head(head, int(self._clip.config["embed_dim"]))

    def frame_px(self, width_px: int, height_px: int) -> tuple[int, int]:
        """Height and width that frames are read with: a square, whatever the picture's size."""
        return self.image_px, self.image_px

    def score(self, frames: Frames) -> float:
        """(T, H, W, 3) uint8 RGB to the mean score."""
        with torch.inference_mode():
            return float(self._head(self.embed(frames)).mean())

    def embed(self, frames: Frames) -> Tensor:
        """(T, H, W, 3) uint8 RGB to (T, D) float32 unit vectors."""
        with torch.inference_mode():
            pixels = self._clip.pixels(frames, torch.device("cpu"))
            return nn.functional.normalize(self._clip.model(pixels), dim=-1)


def _load_head(path: Path, dim: int) -> nn.Module:
    state = read_weights(path)
    layered = any(key.startswith("layers.") for key in state)
    head = _layered_head(dim) if layered else nn.Linear(dim, 1)
    check_weights(path, state, head.state_dict(), f"an aesthetic head over {dim} numbers")
    head.load_state_dict({key: value.float() for key, value in state.items()})
    return head.eval()


def _layered_head(dim: int) -> nn.Module:
    layers: list[nn.Module] = []
    for i, (width, following) in enumerate(zip((dim, *_WIDTHS), _WIDTHS, strict=False)):
        layers.append(nn.Linear(width, following))
        layers += [nn.Dropout(p) for p in _DROPOUTS[i : i + 1]]
    return nn.Sequential(OrderedDict(layers=nn.Sequential(*layers)))
