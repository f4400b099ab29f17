"""Checkpoints of a running training: one safetensors file per rank, alike for every ZeRO stage.

A checkpoint holds pieces of named weights in float32 and their optimizer state
(:mod:`training.zero_state`), so it can be read at another number of ranks and another ZeRO stage,
and no file needs unpickling. It is written under a name that is never read, marked with
``_DONE.json``, and renamed to ``step_00000020``: whatever bears that name was whole once. The mark
holds a hash of every file: before a run goes on, a checkpoint that has been damaged since is set
aside for the one before.

Writing goes on beside the next steps: a rank copies its pieces to the CPU's memory and leaves the
rest to a thread; the first rank's thread marks the checkpoint once every rank's file is there.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from schemas.errors import CheckpointError
from schemas.storage import fingerprint_file, mark_done, read_done, read_json, write_json
from training.zero_state import KINDS, MovingAverage, ShardedState

log = logging.getLogger(__name__)

EMA = "ema"
"""The moving average of the weights, beside :data:`training.zero_state.KINDS`."""

POLL_S = 0.05


def partial_folder(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of a step is written before it is whole."""
    return checkpoints / f".partial_step_{step:08d}"


class Saver:
    """Writes the checkpoints of one rank, one at a time, beside the training.

    Args:
        checkpoints: Folder of the checkpoints, on a file system all ranks share.
        rank: This rank; the first one marks what is whole.
        world_size: Ranks in all.
        keep: Newest checkpoints kept.
        keep_every: Checkpoints at multiples of this step are kept for ever; 0 = none.
    """

    def __init__(
        self, checkpoints: Path, rank: int, world_size: int, keep: int, keep_every: int
    ) -> None:
        self._checkpoints = checkpoints
        self._rank = rank
        self._world_size = world_size
        self._keep = (keep, keep_every)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._abandoned = threading.Event()

    def start(
        self,
        step: int,
        state: ShardedState,
        average: MovingAverage | None,
        record: Mapping[str, Any],
    ) -> None:
        """Copy the state of a step and begin to write it; waits for the checkpoint before it.

        Args:
            step: Steps done.
            state: The pieces this rank holds.
            average: Their moving average, if there is one.
            record: Goes into ``_DONE.json``.

        Raises:
            CheckpointError: The checkpoint before could not be written.
        """
        self.wait()
        tensors: dict[str, Tensor] = {}
        for place, piece in enumerate(state.fragments):
            if not piece.written:
                continue
            kinds = dict(piece.tensors)
            if average is not None:
                kinds[EMA] = average.tensors[place]
            for kind, tensor in kinds.items():
                copy = torch.empty_like(tensor, device="cpu").copy_(tensor)
                tensors[f"{kind}|{piece.start}|{piece.name}"] = copy
        self._thread = threading.Thread(
            target=self._run, args=(step, tensors, dict(record)), name=f"checkpoint-{step}"
        )
        self._thread.start()

    def wait(self) -> None:
        """Wait until the checkpoint that was started is whole.

        Raises:
            CheckpointError: It could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise CheckpointError(
                "a checkpoint could not be written",
                where=self._checkpoints,
                found=error,
                do="free space or mend the file system, and run again to go on from the last one",
            ) from error

    def abandon(self) -> None:
        """Stop waiting for other ranks; what is half-written stays unread."""
        self._abandoned.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self, step: int, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        try:
            partial = partial_folder(self._checkpoints, step)
            partial.mkdir(parents=True, exist_ok=True)
            file = partial / f"rank_{self._rank:05d}.safetensors"
            save_file(tensors, file, metadata={"step": str(step)})
            with file.open("rb+") as f:
                os.fsync(f.fileno())
            write_json(_mark(partial, self._rank), {file.name: fingerprint_file(file)})
            if self._rank == 0 and self._wait_for_all(partial):
                self._commit(step, partial, record)
        except BaseException as error:  # handed to the training's own thread
            self._error = error

    def _wait_for_all(self, partial: Path) -> bool:
        marks = [_mark(partial, rank) for rank in range(self._world_size)]
        while not all(mark.is_file() for mark in marks):
            if self._abandoned.is_set():
                return False
            time.sleep(POLL_S)
        return True

    def _commit(self, step: int, partial: Path, record: dict[str, Any]) -> None:
        """Make the written checkpoint the newest whole one, and remove what is not to be kept."""
        files: dict[str, str] = {}
        for rank in range(self._world_size):
            mark = _mark(partial, rank)
            files |= read_json(mark)
            mark.unlink()
        mark_done(partial, {"step": step, **record, "files": files})
        final = self._checkpoints / f"step_{step:08d}"
        shutil.rmtree(final, ignore_errors=True)
        partial.replace(final)
        newest, every = self._keep
        for old_step, old in list(_complete(self._checkpoints))[:-newest]:
            if not (every and old_step % every == 0):
                shutil.rmtree(old)
        log.info("checkpoint step=%d folder=%s", step, final.name)


def _mark(partial: Path, rank: int) -> Path:
    return partial / f"rank_{rank:05d}.json"


class StoredState:
    """A checkpoint, for reading any part of any weight.

    Args:
        folder: ``step_…`` folder.

    Raises:
        CheckpointError: A file is missing or cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.record = read_done(folder) or {}
        self._files: dict[Path, Any] = {}
        self._pieces: dict[tuple[str, str], list[tuple[int, int, Path, str]]] = {}
        for name in sorted(self.record.get("files", {})):
            self._index(folder / name)

    @property
    def names(self) -> list[str]:
        """Names of the weights."""
        return sorted({name for kind, name in self._pieces if kind == KINDS[0]})

    def has(self, kind: str) -> bool:
        """Whether the checkpoint holds this kind of tensor."""
        return any(k == kind for k, _ in self._pieces)

    def numel(self, name: str) -> int:
        """Number of elements stored of a weight."""
        return max(start + size for start, size, *_ in self._pieces[KINDS[0], name])

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Elements ``[start, start + numel)`` of a flattened weight or its state, float32.

        Raises:
            CheckpointError: Some of them are not in the checkpoint.
        """
        result = torch.empty(numel)
        covered = 0
        for begin, size, path, key in self._pieces.get((kind, name), ()):
            low, high = max(start, begin), min(start + numel, begin + size)
            if low >= high:
                continue
            piece = self._files[path].get_slice(key)[low - begin : high - begin]
            result[low - start : high - start] = piece
            covered += high - low
        if covered != numel:
            raise CheckpointError(
                "the checkpoint does not hold the whole of a weight",
                where=f"{self.folder}: {name} ({kind})",
                found=f"{covered} of elements {start} to {start + numel}",
                do="resume from another checkpoint, with the settings the run was started with",
            )
        return result

    def load_into(self, state: ShardedState, average: MovingAverage | None) -> int:
        """Fill a rank's pieces, and the weights the model computes with; returns the steps done.

        Raises:
            CheckpointError: The checkpoint holds other weights, or not all of them.
        """
        wanted = {name: _product(shape) for name, shape in state.shapes.items()}
        stored = {name: self.numel(name) for name in self.names}
        if stored != wanted:
            odd = sorted(set(stored.items()) ^ set(wanted.items()))[:5]
            raise CheckpointError(
                "the checkpoint holds other weights than are trained now",
                where=self.folder,
                found=f"{len(stored)} weights, {len(wanted)} are trained; differing: {odd}",
                do="resume with the settings the run was started with (lora, trainable, model)",
            )
        for place, piece in enumerate(state.fragments):
            for kind, tensor in piece.tensors.items():
                tensor.copy_(self.read(kind, piece.name, piece.start, piece.numel))
            if average is not None:
                kind = EMA if self.has(EMA) else KINDS[0]
                tensor = self.read(kind, piece.name, piece.start, piece.numel)
                average.tensors[place].copy_(tensor)
        step = int(self.record["step"])
        state.set_step(step)
        state.publish()
        return step

    def _index(self, path: Path) -> None:
        try:
            file = safe_open(path, framework="pt")
            self._files[path] = file
            for key in file.keys():  # noqa: SIM118  (not a dict)
                kind, start, name = key.split("|", 2)
                size = int(file.get_slice(key).get_shape()[0])
                self._pieces.setdefault((kind, name), []).append((int(start), size, path, key))
        except Exception as error:  # safetensors raises a plain Exception of its own
            raise CheckpointError(
                "a file of the checkpoint cannot be read",
                where=path,
                found=error,
                do="remove this checkpoint folder to resume from the one before",
            ) from error


def _product(shape: Iterable[int]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


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


def _hashes(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Hash of each of these files that is there."""
    files = [path for path in (folder / name for name in names) if path.is_file()]
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
