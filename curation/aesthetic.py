"""How good a picture looks, by LAION's aesthetic predictors over CLIP image embeddings.

Two kinds of head, told apart by their keys: the linear one (``sa_0_4_vit_l_14_linear.pth``) and the
layered one (``sac+logos+ava1-l14-linearMSE.pth``). Both were trained on unit embeddings of OpenAI's
CLIP ViT-L/14. Another CLIP model of the same width would give numbers that mean nothing, and no
check can tell; one of another width is refused.

Shape legend: T frames, H W pixels, D embedding width.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import Tensor, nn

from curation.video import Frames, ResizeMode
from curation.weights import check_weights, read_weights
from schemas.errors import CheckpointError
from schemas.storage import read_json

CLIP_CONFIG = "open_clip_config.json"
CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
"""Names of OpenCLIP's own layout on model hubs, the safer one first."""

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
        config = _read_config(clip)
        self._visual, self.image_px, dim = _load_visual(clip, config["model_cfg"])
        preprocess = config.get("preprocess_cfg", {})
        self._mean = torch.tensor(preprocess.get("mean", OPENAI_DATASET_MEAN)).view(3, 1, 1)
        self._std = torch.tensor(preprocess.get("std", OPENAI_DATASET_STD)).view(3, 1, 1)
        self._head = _load_head(head, dim)

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
            pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
            return nn.functional.normalize(self._visual((pixels - self._mean) / self._std), dim=-1)


def clip_files(folder: Path) -> tuple[Path, Path]:
    """Config and weights of an OpenCLIP model.

    Raises:
        CheckpointError: One is missing.
    """
    weights = [folder / name for name in CLIP_WEIGHTS if (folder / name).is_file()]
    if not weights or not (folder / CLIP_CONFIG).is_file():
        raise CheckpointError(
            "not a folder with an OpenCLIP model",
            where=folder,
            found=sorted(p.name for p in folder.iterdir())[:10] if folder.is_dir() else "no folder",
            expected=f"{CLIP_CONFIG} and {' or '.join(CLIP_WEIGHTS)}",
            do="fetch both files of timm/vit_large_patch14_clip_224.openai from its model hub",
        )
    return folder / CLIP_CONFIG, weights[0]


def _read_config(folder: Path) -> dict[str, Any]:
    path, _ = clip_files(folder)
    try:
        config = read_json(path)
        return {"model_cfg": dict(config["model_cfg"])} | config
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            "the config of the OpenCLIP model cannot be read",
            where=path,
            found=repr(error),
            expected="JSON with a key model_cfg",
            do="fetch the file again",
        ) from error


def _load_visual(folder: Path, model_cfg: dict[str, Any]) -> tuple[nn.Module, int, int]:
    """The image side, its picture size and D. The text side is checked and left out."""
    config, weights = clip_files(folder)
    try:
        # On the meta device nothing is allocated or drawn at random before the weights come.
        with torch.device("meta"):
            model: Any = open_clip.CLIP(**model_cfg)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            "OpenCLIP cannot build this model",
            where=config,
            found=error,
            expected="a CLIP model such as ViT-L-14",
            do="give OpenAI's ViT-L/14, on which the aesthetic heads were trained",
        ) from error
    state = read_weights(weights)
    check_weights(weights, state, model.state_dict(), "the OpenCLIP model")
    visual: Any = model.visual
    own = {
        key.removeprefix("visual."): value.float()
        for key, value in state.items()
        if key.startswith("visual.")
    }
    visual.load_state_dict(own, assign=True)
    size = visual.image_size
    return (
        visual.eval(),
        int(size[0] if isinstance(size, tuple | list) else size),
        int(model_cfg["embed_dim"]),
    )


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
