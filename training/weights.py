"""Loading a transformer: diffusers' CogVideoX, the official Mask2DiT release, or our own.

All three name their weights alike; they differ in the config, in the files and in how a file is
wrapped. What a path holds is told from its content, never from its name:

* a model folder with ``transformer/`` in it, a folder with ``config.json``, or a file of weights
  beside a ``config.json``;
* ``_class_name`` in the config says whose it is. The official class keeps its mask as
  ``attn_msk_version``; ours keeps its mask and positions by name; diffusers' has neither;
* weights are an index with its shards, one file of diffusers' name, or, as the official code reads
  them, every ``*.safetensors`` file of the folder. Safetensors goes before ``.bin`` where a folder
  has both. A ``.bin`` or ``.pt`` file may hold the weights under ``state_dict``.

Source: diffusers' ``save_pretrained``; the official code's ``from_pretrained`` and its loading of
``transformer_path``. The official code skips what does not fit; here that is an error.
"""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from schemas.errors import CheckpointError
from training.transformer import Mask2DiTTransformer3DModel

log = logging.getLogger(__name__)

CLASSES = {
    "Mask2DiTTransformer3DModel": "ours",
    "CogVideoXTransformer3DModel": "diffusers",
    "MultiPromptCogVideoXTransformer3DModel": "official Mask2DiT",
}
"""Class names in config.json, and whose they are."""

OFFICIAL_ONLY = ("attn_msk_version", "add_noise_in_inpaint_model")
"""Config keys of the official code that our model has not (the first becomes ``mask``)."""

MAX_LISTED = 10
"""Keys of each kind that an error lists."""


def load_transformer(
    path: Path,
    *,
    mask: str | None = None,
    position_policy: str | None = None,
    position_gap: int | None = None,
    attention_backend: str | None = None,
    dtype: torch.dtype = torch.float32,
    allow_partial: bool = False,
) -> Mask2DiTTransformer3DModel:
    """Load a transformer of any of the three kinds.

    Args:
        path: Model folder, transformer folder, or file of weights beside a config.json.
        mask: Attention mask in place of the config's own (v2 where it has none).
        position_policy: Position policy in place of the config's own (continuous where it has
            none).
        position_gap: Gap of that policy.
        attention_backend: Backend in place of the config's own.
        dtype: Type of the weights in memory.
        allow_partial: Load what fits, log the rest, and leave what is missing at random values
            from torch's global seed.

    Raises:
        CheckpointError: There is no such model, or a weight is missing, unexpected or of another
            shape.
        ConfigError: The config is of a variant that is not supported, or a setting is unknown.
    """
    config_file, files = _find(path)
    config = _read_config(config_file)
    settings = {
        "mask": mask,
        "position_policy": position_policy,
        "position_gap": position_gap,
        "attention_backend": attention_backend,
    }
    config.update({k: v for k, v in settings.items() if v is not None})
    if position_policy is not None and position_gap is None:
        config["position_gap"] = 0  # the old gap belongs to the old policy
    with torch.device("meta"):
        model = _build(config)
    # a copy, because what is read may still be a view of the file
    weights = {key: tensor.to(dtype, copy=True) for key, tensor in _read(files)}
    misfit = Misfit.between(model.state_dict(), weights)
    if not misfit:
        model.load_state_dict(weights, assign=True)
    elif allow_partial:
        log.warning("partial_load path=%s %s", path, misfit)
        model = cast("Mask2DiTTransformer3DModel", cast("Any", _build(config)).to(dtype))
        model.load_state_dict({k: weights[k] for k in misfit.fitting}, strict=False)
    else:
        raise CheckpointError(
            "the weights do not fit the transformer",
            where=path,
            found=misfit,
            expected=f"exactly the keys and shapes of {config_file}",
            do="check that config.json and weights belong together; allow_partial=True loads what "
            "fits",
        )
    return model.eval()


@dataclass(frozen=True)
class Misfit:
    """How weights differ from what a model wants; false where they do not.

    Attributes:
        missing: Keys the model wants.
        unexpected: Keys it does not know.
        misshapen: Keys of another shape, each with both shapes.
        fitting: Keys that can be loaded.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshapen: tuple[str, ...]
    fitting: tuple[str, ...]

    @classmethod
    def between(cls, wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> Misfit:
        """Compare keys and shapes."""
        common = sorted(wanted.keys() & found.keys())
        fits = {k: found[k].shape == wanted[k].shape for k in common}
        return cls(
            tuple(sorted(wanted.keys() - found.keys())),
            tuple(sorted(found.keys() - wanted.keys())),
            tuple(
                f"{k} {tuple(found[k].shape)} for {tuple(wanted[k].shape)}"
                for k in common
                if not fits[k]
            ),
            tuple(k for k in common if fits[k]),
        )

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.misshapen)

    def __str__(self) -> str:
        kinds = {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "of another shape": self.misshapen,
        }
        parts: list[str] = []
        for kind, keys in kinds.items():
            if keys:
                more = f", and {len(keys) - MAX_LISTED} more" if len(keys) > MAX_LISTED else ""
                parts.append(f"{len(keys)} {kind}: {', '.join(keys[:MAX_LISTED])}{more}")
        return "; ".join(parts)


def _build(config: Mapping[str, Any]) -> Mask2DiTTransformer3DModel:
    return cast("Mask2DiTTransformer3DModel", Mask2DiTTransformer3DModel.from_config(dict(config)))


def _find(path: Path) -> tuple[Path, list[Path]]:
    """The config and the files of weights."""
    folder = path.parent if path.is_file() else path
    if path.is_dir() and (path / "transformer").is_dir():
        folder = path / "transformer"
    config = folder / "config.json"
    if not config.is_file():
        raise CheckpointError(
            "there is no transformer",
            where=path,
            expected="a model folder with transformer/ in it, a folder with config.json and "
            "weights, or a file of weights beside its config.json",
            do="give training.model.base a whole model folder, or 'tiny'",
        )
    return config, [path] if path.is_file() else _weight_files(folder)


def _weight_files(folder: Path) -> list[Path]:
    for ending in ("safetensors", "bin"):
        stem = folder / f"diffusion_pytorch_model.{ending}"
        index = stem.with_name(f"{stem.name}.index.json")
        if index.is_file():
            return _shards(index)
        if stem.is_file():
            return [stem]
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise CheckpointError(
            "the transformer has no weights",
            where=folder,
            found=sorted(p.name for p in folder.iterdir())[:MAX_LISTED],
            expected="diffusion_pytorch_model.safetensors or .bin, or an index with its shards",
        )
    return found


def _shards(index: Path) -> list[Path]:
    names = _read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError("the index lists no weights", where=index, expected="weight_map")
    files = sorted(
        {index.parent / Path(str(n)).name for n in cast("dict[str, str]", names).values()}
    )
    absent = [f.name for f in files if not f.is_file()]
    if absent:
        raise CheckpointError(
            "shards of the transformer are missing",
            where=index,
            found=f"{len(absent)} of {len(files)} missing: {', '.join(absent[:MAX_LISTED])}",
            do="download the folder again",
        )
    return files


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError("a file cannot be read as JSON", where=file, found=error) from error
    if not isinstance(content, dict):
        raise CheckpointError("a file is not a JSON object", where=file)
    return cast("dict[str, Any]", content)


def _read_config(file: Path) -> dict[str, Any]:
    """The config in our words."""
    config = _read_json(file)
    name = config.pop("_class_name", None)
    if name not in CLASSES:
        raise CheckpointError(
            "this is not a CogVideoX transformer",
            where=file,
            found=f"_class_name {name}",
            expected=", ".join(f"{k} ({v})" for k, v in CLASSES.items()),
            do="give the folder that holds transformer/, or that folder itself",
        )
    version = config.get("attn_msk_version")
    if version is not None:
        config.setdefault("mask", f"v{version}")
    return {k: v for k, v in config.items() if k not in OFFICIAL_ONLY}


def _read(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    """Every weight of every file, one at a time where the format allows it."""
    seen: dict[str, Path] = {}
    for file in files:
        for key, tensor in _read_file(file):
            if key in seen:
                raise CheckpointError(
                    "a weight is in two files",
                    where=file,
                    found=f"{key}, also in {seen[key].name}",
                    expected="the shards of one model in the folder",
                )
            seen[key] = file
            yield key, tensor


def _read_file(file: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as stored:
                for key in stored.keys():  # noqa: SIM118  (not a dict)
                    yield key, stored.get_tensor(key)
            return
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, EOFError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            "a file of weights cannot be read",
            where=file,
            found=error,
            expected="safetensors, or a .bin or .pt file that holds tensors only",
        ) from error
    weights = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(v, Tensor) for v in weights.values()):
        raise CheckpointError("a file of weights holds something else", where=file)
    yield from cast("dict[str, Tensor]", weights).items()
