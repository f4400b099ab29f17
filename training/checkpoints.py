"""Checkpoints of a running training, and the model folder it ends with.

A checkpoint is written under a name that is never read, marked with ``_DONE.json``, and renamed to
``step_00000020``. So whatever bears that name was whole once. The mark holds a hash of every file:
before a run goes on, a checkpoint that has been damaged since is set aside for the one before.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from schemas.errors import CheckpointError
from schemas.storage import fingerprint_file, fingerprint_folder, mark_done, read_done
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
    mark_done(partial, {"step": step, **record, "files": _hashes(partial)})
    shutil.rmtree(final, ignore_errors=True)
    partial.replace(final)
    for _, old in list(_complete(checkpoints))[:-keep]:
        shutil.rmtree(old)
    log.info("checkpoint step=%d folder=%s", step, final.name)
    return final


def newest_complete(checkpoints: Path) -> tuple[int, Path] | None:
    """Step and folder of the newest whole checkpoint, or None if there is none."""
    return max(_complete(checkpoints), default=None)


def set_aside_damaged(checkpoints: Path) -> None:
    """Rename the newest checkpoints to ``damaged_step_…`` until the newest one is undamaged.

    Raises:
        CheckpointError: There are checkpoints, and all are damaged.
    """
    damaged: list[str] = []
    while (newest := newest_complete(checkpoints)) is not None:
        step, folder = newest
        what = _damage(folder)
        if what is None:
            return
        log.error("checkpoint step=%d state=damaged %s; going back to the one before", step, what)
        damaged.append(f"{folder.name}: {what}")
        shutil.rmtree(checkpoints / f"damaged_{folder.name}", ignore_errors=True)
        folder.replace(checkpoints / f"damaged_{folder.name}")
    if damaged:
        raise CheckpointError(
            "every checkpoint of this run is damaged",
            where=checkpoints,
            found="; ".join(damaged),
            expected="files as they were written",
            do="restore one from a copy and rename it to step_…, or run again to start over",
        )


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files; None where nothing is."""
    record = read_done(folder) or {}
    expected: dict[str, str] = record.get("files", {})
    found = _hashes(folder, expected)
    changed = sorted(name for name in expected if found.get(name) != expected[name])
    return f"missing or changed: {', '.join(changed[:5])}" if changed else None


def _hashes(folder: Path, names: Iterable[str] | None = None) -> dict[str, str]:
    """Hash of each file by its name; of those that are there, where names are given."""
    paths = sorted(folder.rglob("*")) if names is None else [folder / name for name in names]
    files = [path for path in paths if path.is_file()]
    with ThreadPoolExecutor() as pool:  # hashing leaves the interpreter's lock
        hashes = pool.map(fingerprint_file, files)
        return {p.relative_to(folder).as_posix(): h for p, h in zip(files, hashes, strict=True)}


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
