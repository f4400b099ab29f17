"""A folder of shards: tensors in safetensors files, and beside each a table that names them.

::

    <folder>/<name>.safetensors   <key>.mean and <key>.logvar of scenes, <key>.text of captions
    <folder>/<name>.parquet       table LATENTS: what the shard holds, and what could not be encoded

The table is written last and is what makes a shard count, so whatever a killed process leaves
behind is never read. The same key may have several rows: tensors win over a failure.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from schemas.errors import InputError
from schemas.rows import Latent
from schemas.storage import atomic_path, fingerprint
from schemas.tables import LATENTS, read_arrow, write_table

log = logging.getLogger(__name__)

TensorName = tuple[str, str]
"""Key, and mean, logvar or text."""

SHARD, PART = ".safetensors", ".parquet"
SHARDS_OPEN = 64
"""A shard that is open costs a mapping and its header, no memory for its tensors."""
LEFTOVER_AGE_S = 3600.0
"""A shard without a table is a leftover once it is this old; a live one gets its table at once."""


def write_shard(
    folder: Path, rows: Sequence[Latent], tensors: dict[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write tensors, then the rows that name them; rows without a reason get the shard's name.

    Args:
        folder: Folder of everything encoded the same way.
        rows: One per scene or caption, in any order.
        tensors: By name; those of failed rows are not among them.
        metadata: What to note in the table.
    """
    name = fingerprint(sorted(row.key for row in rows))
    if tensors:
        with atomic_path(folder / (name + SHARD)) as tmp:
            save_file(tensors, tmp)  # its own metadata would come in a random order
    named = [r if r.reason else dataclasses.replace(r, shard=name + SHARD) for r in rows]
    write_table(folder / (name + PART), LATENTS, named, metadata)


class Shards:
    """What a folder holds, by key. Tensors are mapped into memory when they are asked for.

    Any number of threads and processes may read at once, also while others write.

    Args:
        folder: Folder of everything encoded the same way; need not be there yet.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open = lru_cache(maxsize=SHARDS_OPEN)(_open_shard)
        self._shards: dict[str, str] = {}
        self._failures: dict[str, tuple[str, str]] = {}
        self._named: set[str | None] = set()
        self.look()

    def look(self) -> None:
        """Read all tables of the folder.

        Raises:
            ManifestError: One of them cannot be read.
        """
        there = set(self._names())
        parts = sorted(n for n in there if n.endswith(PART))
        columns = ["key", "shard", "reason", "detail"]
        with ThreadPoolExecutor() as pool:
            tables = pool.map(lambda n: read_arrow(self.folder / n, LATENTS, columns), parts)
            rows = pa.concat_tables(tables).to_pydict() if parts else dict.fromkeys(columns, ())
        self._shards.clear()
        self._failures.clear()
        self._named = set(rows["shard"])
        for key, shard, reason, detail in zip(*(rows[c] for c in columns), strict=True):
            if shard in there:
                self._shards.setdefault(key, shard)
            elif shard is None:
                self._failures[key] = (reason, detail)

    def __contains__(self, key: str) -> bool:
        return key in self._shards

    def failure(self, key: str) -> tuple[str, str] | None:
        """Reason and detail where the last try to encode failed and none succeeded."""
        return None if key in self._shards else self._failures.get(key)

    def path(self, key: str) -> Path:
        """The file that holds a key's tensors."""
        return self.folder / self._shards[key]

    def tensor(self, key: str, what: str) -> Tensor:
        """One tensor, mapped and not copied.

        Raises:
            InputError: The shard is gone or damaged, or lacks the tensor.
        """
        try:
            return self._open(self.path(key)).get_tensor(f"{key}.{what}")
        except (SafetensorError, OSError) as error:
            raise self._unreadable(key, what, error) from error

    def mismatches(self, expected: Mapping[TensorName, tuple[int, ...]]) -> dict[TensorName, str]:
        """What is wrong with tensors that should be there, from the headers of their shards.

        Args:
            expected: The shape of each.
        """
        wrong: dict[TensorName, str] = {}
        for name in sorted(expected, key=lambda n: self._shards[n[0]]):  # each file opened once
            key, what = name
            try:
                header = self._open(self.path(key)).get_slice(f"{key}.{what}")
            except (SafetensorError, OSError) as error:
                wrong[name] = str(self._unreadable(key, what, error))
                continue
            shape = tuple(header.get_shape())
            if shape != expected[name]:
                where = f"{self.path(key)}, tensor {key}.{what}"
                wrong[name] = f"{where} has shape {shape}, not {expected[name]}"
        return wrong

    def _unreadable(self, key: str, what: str, error: Exception) -> InputError:
        return InputError(
            "a tensor of the latent cache cannot be read",
            where=f"{self.path(key)}, tensor {key}.{what}",
            found=error,
            expected="the safetensors file as it was written",
            do="delete the file and encode again; only what it held is done anew",
        )

    def remove_leftovers(self) -> None:
        """Remove what killed processes left behind: shards that no table names, temporary files."""
        for name in self._names():
            path = self.folder / name
            if ".tmp." not in name and (not name.endswith(SHARD) or name in self._named):
                continue
            with suppress(FileNotFoundError):  # another process was first
                if time.time() - path.stat().st_mtime > LEFTOVER_AGE_S:
                    path.unlink()
                    log.info("leftover_removed path=%s", path)

    def _names(self) -> Iterable[str]:
        return [p.name for p in self.folder.iterdir()] if self.folder.is_dir() else []


def _open_shard(path: Path) -> Any:
    return safe_open(path, framework="pt")
