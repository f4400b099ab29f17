"""Reading weights of networks: nothing is unpickled, and names and shapes are checked."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from schemas.errors import CheckpointError


def read_weights(path: Path) -> dict[str, Tensor]:
    """Named tensors of a ``.safetensors`` file, or of a PyTorch file that holds nothing else.

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
