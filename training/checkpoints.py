"""Checkpoints of a running training, and the model folder it ends with.

A checkpoint is written under a name that is never read, marked with ``_DONE.json``, and renamed to
``step_00000020``. So whatever bears that name is whole.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from schemas.errors import CheckpointError
from schemas.storage import fingerprint_folder, mark_done, read_done
from training.base_model import PIECES
from training.transformer import Mask2DiTTransformer3DModel

log = logging.getLogger(__name__)

STATE = "state"
"""DeepSpeed's tag: its files lie in ``step_00000020/state/``."""


def partial_folder(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of a step is written before it is whole."""
    return checkpoints / f".partial_step_{step:08d}"


def commit(checkpoints: Path, step: int, record: Mapping[str, Any], keep: int) -> Path:
    """Make the written checkpoint the newest whole one; remove all but the ``keep`` newest."""
    partial = partial_folder(checkpoints, step)
    final = checkpoints / f"step_{step:08d}"
    for path in partial.rglob("*"):
        if path.is_file():
            with path.open("rb+") as f:
                os.fsync(f.fileno())
    mark_done(partial, {"step": step, **record})
    shutil.rmtree(final, ignore_errors=True)
    partial.replace(final)
    for _, old in list(_complete(checkpoints))[:-keep]:
        shutil.rmtree(old)
    log.info("checkpoint step=%d folder=%s", step, final.name)
    return final


def newest_complete(checkpoints: Path) -> tuple[int, Path] | None:
    """Step and folder of the newest whole checkpoint, or None if there is none."""
    return max(_complete(checkpoints), default=None)


def _complete(checkpoints: Path) -> Iterator[tuple[int, Path]]:
    for folder in sorted(checkpoints.glob("step_*")):
        record = read_done(folder)
        if record is not None:
            yield int(record["step"]), folder


def remove_partial(checkpoints: Path) -> None:
    """Remove what an interrupted write left behind."""
    for folder in checkpoints.glob(".partial_step_*"):
        shutil.rmtree(folder)


def export_model(
    transformer: Mask2DiTTransformer3DModel,
    weights: Mapping[str, Tensor],
    base: Path,
    target: Path,
) -> Path:
    """Write a model folder: this transformer, and all else from ``base``; read back to check.

    The other pieces are hard-linked where the file system allows it, else copied.

    Args:
        transformer: Gives the config.
        weights: Its full state dict (a sharded model's parameters are empty, so they come apart).
        base: Model folder the training started from.
        target: Folder to write; replaced if it is there.

    Raises:
        CheckpointError: What was written differs from ``weights``.
    """
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    saved = {k: v.detach().cpu().contiguous() for k, v in weights.items()}
    with torch.device("meta"):
        whole = Mask2DiTTransformer3DModel(**transformer.config)
    whole.load_state_dict(saved, assign=True)
    whole.save_pretrained(partial / "transformer")
    for piece in PIECES[1:]:
        shutil.copytree(base / piece, partial / piece, copy_function=_link_or_copy)
    shutil.copy2(base / "model_index.json", partial / "model_index.json")
    _compare(partial / "transformer", saved)
    shutil.rmtree(target, ignore_errors=True)
    partial.replace(target)
    return target


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copy2(source, target)


def _compare(folder: Path, weights: Mapping[str, Tensor]) -> None:
    left = set(weights)
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            for key in stored.keys():  # noqa: SIM118  (not a dict)
                if key not in left or not torch.equal(stored.get_tensor(key), weights[key]):
                    raise CheckpointError(
                        "a weight reads back differently from how it was written",
                        where=f"{file}, {key}",
                        do="check the disk and run again",
                    )
                left.discard(key)
    if left:
        raise CheckpointError("weights were not written", where=folder, found=sorted(left)[:10])


def model_sha256(folder: Path) -> str:
    """Fingerprint of a model folder: configs and weights of all its pieces."""
    return fingerprint_folder(folder, "*/*")
