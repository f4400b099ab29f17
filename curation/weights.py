"""Reading weights of networks: nothing is unpickled, and names and shapes are checked."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from schemas.errors import CheckpointError

_LEAST_SPREAD = 1e-4
"""Of unit vectors in any component; rounding errors are a hundred times smaller."""


def read_weights(path: Path, inside: str | None = None) -> dict[str, Tensor]:
    """Named tensors of a ``.safetensors`` file, or of a PyTorch file that holds nothing else.

    Args:
        path: The file.
        inside: A PyTorch file may hold other things; the tensors are under this key.

    Raises:
        CheckpointError: The file cannot be read, or holds other things than tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _unreadable(path, "objects other than tensors, or no PyTorch file") from error
    # torch.load says in many ways that a file is not one of its own.
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, SafetensorError) as error:
        raise _unreadable(path, " ".join(str(error).split())[:300]) from error
    if inside is not None:
        if not isinstance(found, dict) or inside not in found:
            raise _unreadable(path, f"no key {inside!r}")
        found = found[inside]
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise _unreadable(path, type(found).__name__)
    return found


def _unreadable(path: Path, found: str) -> CheckpointError:
    return CheckpointError(
        "the weights cannot be read",
        where=path,
        found=found,
        expected="a dict of tensors, as .safetensors or as a plain PyTorch state dict",
        do="fetch the file again",
    )


def check_weights(
    path: Path, state: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str
) -> None:
    """Compare names and shapes.

    Raises:
        CheckpointError: One differs.
    """
    missing = sorted(expected.keys() - state.keys())
    extra = sorted(state.keys() - expected.keys())
    if missing or extra:
        raise CheckpointError(
            f"the weights are not those of {what}",
            where=path,
            found=f"{len(missing)} missing {missing[:5]}, {len(extra)} not expected {extra[:5]}",
            expected=f"exactly {len(expected)} names",
            do="give the file that belongs to the configured model",
        )
    for key, tensor in expected.items():
        if state[key].shape != tensor.shape:
            raise CheckpointError(
                f"the weights have another shape than those of {what}",
                where=f"{path}, {key}",
                found=tuple(state[key].shape),
                expected=tuple(tensor.shape),
                do="give the file that belongs to the configured model",
            )


def check_filled(path: Path, model: nn.Module, what: str) -> None:
    """See that every weight of a model really came from a file, and from a trained one.

    A model whose weights silently were not loaded gives one similarity for everything
    (InternVideo issue 255).

    Raises:
        CheckpointError: A tensor has no numbers yet (it is on the meta device) or holds some that
            are not finite, or a tensor of two or more dimensions is constant.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise _unfilled(path, what, f"{name} was not loaded")
        if not bool(torch.isfinite(tensor).all()) and not name.endswith("attn_mask"):
            raise _unfilled(path, what, f"{name} holds numbers that are not finite")
        if tensor.ndim > 1 and bool((tensor == tensor.flatten()[0]).all()):
            raise _unfilled(
                path, what, f"{name} is {float(tensor.detach().flatten()[0]):g} everywhere"
            )


def check_tells_apart(path: Path, outputs: Tensor, what: str) -> None:
    """See that a model gives different unit vectors (N, D) for N inputs that differ much.

    Raises:
        CheckpointError: Two are the same.
    """
    spread = float((outputs[1:] - outputs[:1]).abs().amax(-1).min())
    if not spread > _LEAST_SPREAD:
        raise _unfilled(path, what, f"different inputs give vectors at most {spread:.1e} apart")


def black_and_noise(num_frames: int, image_px: int) -> npt.NDArray[np.uint8]:
    """Two clips (2, T, H, W, 3) that no trained model takes for one: black, and noise."""
    frames = np.zeros((2, num_frames, image_px, image_px, 3), np.uint8)
    frames[1] = np.random.default_rng(0).integers(0, 256, frames.shape[1:], np.uint8)
    return frames


def _unfilled(path: Path, what: str, found: str) -> CheckpointError:
    return CheckpointError(
        f"these cannot be the trained weights of {what}",
        where=path,
        found=found,
        expected="weights as they were published",
        do="fetch the file again",
    )
