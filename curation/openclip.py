"""Any OpenCLIP model, from a folder with its config and weights as model hubs have them.

A clip is the unit mean of its frames' unit vectors. What OpenCLIP itself would fetch by name (a
text model or a tokenizer of Hugging Face) must lie in the folder, or is refused.

Shape legend: B clips, T frames, H W pixels, N texts, D vector length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from torch import Tensor
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
from schemas.storage import fingerprint, fingerprint_file, read_json

CLIP_CONFIG = "open_clip_config.json"
CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
"""Names of OpenCLIP's own layout on model hubs, the safer one first."""

_WHAT = "the OpenCLIP model"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json")
_FRAMES_AT_ONCE = 64
"""Frames per pass; a picture model has no use for the frames of one clip being together."""


@dataclass(frozen=True)
class LoadedClip:
    """A model in float32 on the CPU, for inference, and how it wants its pictures.

    Attributes:
        model: With ``encode_image`` and ``encode_text``.
        config: ``model_cfg`` of its config.
        image_px: Height and width of a picture.
        mode: How frames are brought to that size.
        mean: Of the channels, (3, 1, 1), for pixels from 0 to 1.
        std: Likewise.
    """

    model: Any
    config: dict[str, Any]
    image_px: int
    mode: ResizeMode
    mean: Tensor
    std: Tensor

    def pixels(self, frames: Frames, device: torch.device) -> Tensor:
        """(T, H, W, 3) uint8 RGB to (T, 3, H, W), centred and scaled."""
        pixels = torch.from_numpy(frames).to(device).permute(0, 3, 1, 2)
        std = self.std.to(device)
        return pixels * (1 / (255 * std)) - self.mean.to(device) / std


class OpenClipEmbedder:
    """Unit vectors of clips and captions by one OpenCLIP model.

    Args:
        folder: With the model.
        long_text: What is done to captions longer than its context.
        device: Where it runs; None = a GPU if this process sees one, else the CPU.

    Raises:
        CheckpointError: A file is missing or cannot be used.
    """

    model_id = "openclip-1"

    def __init__(self, folder: Path, long_text: LongText, device: str | None = None) -> None:
        self.weights_sha256 = clip_hash(folder)
        self._clip = load_clip(folder)
        self.image_px = self._clip.image_px
        self.mode: ResizeMode = self._clip.mode
        self.dim = int(self._clip.config["embed_dim"])
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._clip.model.to(self._device)
        self._long_text: LongText = long_text
        self._context = int(self._clip.config["text_cfg"].get("context_length", 77))
        self._tokenizer = _tokenizer(folder, self._clip.config["text_cfg"])
        self._check(clip_files(folder)[1])

    def embed_clips(self, frames: Frames) -> Vector:
        """(B, T, H, W, 3) uint8 RGB to (B, D) float32 unit vectors; T >= 1."""
        flat = frames.reshape(-1, *frames.shape[2:])
        with torch.inference_mode():
            each = torch.cat(
                [
                    self._encode_frames(flat[i : i + _FRAMES_AT_ONCE])
                    for i in range(0, len(flat), _FRAMES_AT_ONCE)
                ]
            )
            mean = each.unflatten(0, frames.shape[:2]).mean(1)
            return F.normalize(mean, dim=-1).cpu().numpy()

    def embed_texts(self, texts: Sequence[str]) -> list[Vector | None]:
        """One (D,) unit vector per text."""
        return [*embed_long(texts, self._long_text, self._fits, self._encode)]

    def text_chunks(self, text: str) -> int:
        """How many pieces a text is read in."""
        return len(text_pieces(text, self._long_text, self._fits))

    def _encode_frames(self, frames: Frames) -> Tensor:
        return self._clip.model.encode_image(
            self._clip.pixels(frames, self._device), normalize=True
        )

    def _encode(self, texts: list[str]) -> Vector:
        tokens = self._tokenizer(texts, self._context).to(self._device)
        with torch.inference_mode():
            return self._clip.model.encode_text(tokens, normalize=True).cpu().numpy()

    def _fits(self, text: str) -> bool:
        tokenizer = self._tokenizer
        if isinstance(tokenizer, SimpleTokenizer):
            return len(tokenizer.encode(text)) + 2 <= self._context
        own: Any = tokenizer.tokenizer
        bare = len(own(tokenizer.clean_fn(text), add_special_tokens=False).input_ids)
        added = 3 if tokenizer.tokenizer_mode == "clips" else own.num_special_tokens_to_add()
        return bare + added <= self._context

    def _check(self, weights: Path) -> None:
        """Both sides tell inputs apart."""
        pictures = black_and_noise(1, self.image_px)
        check_tells_apart(weights, torch.from_numpy(self.embed_clips(pictures)), _WHAT)
        texts = self._encode(["a red ball", "two dogs run along the beach at night"])
        check_tells_apart(weights, torch.from_numpy(texts), _WHAT)


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
            do="fetch both files of the model from its model hub, for example those of "
            "timm/vit_large_patch14_clip_224.openai",
        )
    return folder / CLIP_CONFIG, weights[0]


def clip_hash(folder: Path) -> str:
    """Hash of config, weights and tokenizer files.

    Raises:
        CheckpointError: The config or the weights are missing.
    """
    tokenizer = [folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    return fingerprint([fingerprint_file(p) for p in (*clip_files(folder), *tokenizer)])


def load_clip(folder: Path) -> LoadedClip:
    """An OpenCLIP model with all its weights.

    Raises:
        CheckpointError: A file is missing or unreadable, lacks keys or has others, the weights are
            not trained ones, or OpenCLIP cannot build the model.
    """
    path, weights = clip_files(folder)
    config = _read_config(path)
    model = _build(path, config["model_cfg"])
    state = read_weights(weights)
    check_weights(weights, state, model.state_dict(), _WHAT)
    model.load_state_dict({key: value.float() for key, value in state.items()}, assign=True)
    _make_masks(model)
    check_filled(weights, model, _WHAT)
    size = model.visual.image_size
    preprocess = config.get("preprocess_cfg", {})
    return LoadedClip(
        model=model.eval().requires_grad_(False),
        config=config["model_cfg"],
        image_px=int(size[0] if isinstance(size, tuple | list) else size),
        mode="stretch" if preprocess.get("resize_mode") == "squash" else "cover",
        mean=torch.tensor(preprocess.get("mean", OPENAI_DATASET_MEAN)).view(3, 1, 1),
        std=torch.tensor(preprocess.get("std", OPENAI_DATASET_STD)).view(3, 1, 1),
    )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = read_json(path)
        return config | {"model_cfg": dict(config["model_cfg"])}
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            "the config of the OpenCLIP model cannot be read",
            where=path,
            found=repr(error),
            expected="JSON with a key model_cfg",
            do="fetch the file again",
        ) from error


def _build(path: Path, config: dict[str, Any]) -> Any:
    """The model of a config, with nothing in it yet."""
    settings = dict(config)
    custom = settings.pop("custom_text", False)
    text = dict(settings.get("text_cfg", {}))
    try:
        if "hf_model_name" in text or "multimodal_cfg" in settings:
            raise ValueError("its text side is another library's model, or it writes captions")
        # On the meta device nothing is allocated or drawn at random before the weights come.
        with torch.device("meta"):
            return (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**settings)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            "OpenCLIP cannot build this model",
            where=path,
            found=error,
            expected="a CLIP model such as ViT-L-14",
            do="give another model, for example OpenAI's ViT-L/14",
        ) from error


def _make_masks(model: Any) -> None:
    """Causal masks are no weights: files do not hold them."""
    for module in model.modules():
        if isinstance(getattr(module, "attn_mask", None), Tensor):
            module.attn_mask = torch.full(module.attn_mask.shape, float("-inf")).triu(1)


def _tokenizer(folder: Path, text: dict[str, Any]) -> SimpleTokenizer | HFTokenizer:
    """The model's tokenizer: OpenCLIP's own, or the one whose files are in the folder.

    Raises:
        CheckpointError: Its files are not there, or it has more words than the model.
    """
    path = folder / CLIP_CONFIG
    if text.get("hf_tokenizer_name") and not (folder / _TOKENIZER_FILES[0]).is_file():
        raise CheckpointError(
            "the tokenizer of the OpenCLIP model is missing",
            where=folder,
            found=f"no {_TOKENIZER_FILES[0]}",
            expected=f"the files of {text['hf_tokenizer_name']} (nothing is fetched by name)",
            do="fetch tokenizer.json and tokenizer_config.json from the model's hub, too",
        )
    tokenizer: Any = open_clip.get_tokenizer(f"local-dir:{folder}")
    own = isinstance(tokenizer, SimpleTokenizer)
    words = tokenizer.vocab_size if own else len(tokenizer.tokenizer)
    known = int(text.get("vocab_size", 49408))
    if words > known:
        raise CheckpointError(
            "the OpenCLIP model does not belong to its tokenizer",
            where=path,
            found=f"vocab_size {known}, a tokenizer of {words} words",
            expected="at least as many",
            do="fetch the model's files again, its tokenizer among them",
        )
    return tokenizer
