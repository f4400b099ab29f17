"""The model folder that a training ends with, or that is made from any of its checkpoints."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from schemas.errors import CheckpointError
from schemas.storage import write_text
from training.adapters import merge_lora
from training.base_model import PIECES
from training.checkpoints import EMA, StoredState
from training.job import Job
from training.transformer import Mask2DiTTransformer3DModel
from training.weights import load_transformer
from training.zero_state import KINDS

LORA_FILE = "pytorch_lora_weights.safetensors"
"""diffusers' name for adapters."""


def export_checkpoint(
    job: Job,
    checkpoint: Path,
    target: Path,
    average: bool | None = None,
    dtype: str | None = None,
    max_shard_mb: float | None = None,
) -> Path:
    """Write a model folder from a checkpoint, of any number of ranks and any ZeRO stage.

    Adapters are merged into the weights, and lie beside them as diffusers' LoRA file.

    Args:
        job: The run's.
        checkpoint: ``step_…`` folder.
        target: Folder to write; replaced if it is there.
        average: Take the moving average of the weights; None = where there is one.
        dtype: Type of the stored weights, torch's name; None = the one it was trained in.
        max_shard_mb: Largest weights file in MB (10^6 bytes); None = diffusers' own limit, 10 GB.

    Raises:
        CheckpointError: The checkpoint cannot be read, has no average, or does not fit the model.
    """
    stored = StoredState(checkpoint)
    if average and not stored.has(EMA):
        raise CheckpointError(
            "the checkpoint holds no moving average",
            where=checkpoint,
            do="train with ema_decay > 0, or export the weights themselves",
        )
    use_average = stored.has(EMA) if average is None else average
    kind = EMA if use_average else KINDS[0]
    transformer = load_transformer(job.init_model, **job.training.model.scene_settings)
    lora = job.training.lora
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    if lora is not None:
        adapters = _adapters(stored, kind, lora.rank)
        merge_lora(transformer, lora, adapters)
        partial.mkdir(parents=True)
        save_file(_diffusers_names(adapters), partial / LORA_FILE)
    else:
        weights = dict(transformer.named_parameters())
        for name in stored.names:
            if name not in weights or weights[name].numel() != stored.numel(name):
                raise CheckpointError(
                    "the checkpoint holds a weight that the model has not",
                    where=f"{checkpoint}: {name}",
                    do="export with the config.yaml and the base model of the run",
                )
            flat = stored.read(kind, name, 0, stored.numel(name))
            weights[name].data.copy_(flat.view_as(weights[name]))
    stored_as = getattr(torch, dtype or job.training.dtype)
    saved = {k: v.detach().to(stored_as).contiguous() for k, v in transformer.state_dict().items()}
    _write_model(transformer, saved, job.init_model, partial, max_shard_mb)
    write_text(partial / "README.md", model_card(job, stored.record, use_average))
    shutil.rmtree(target, ignore_errors=True)
    partial.replace(target)
    return target


def _adapters(stored: StoredState, kind: str, rank: int) -> dict[str, Tensor]:
    """The adapters' matrices; the first factor has ``rank`` rows, the second as many columns."""
    found: dict[str, Tensor] = {}
    for name in stored.names:
        flat = stored.read(kind, name, 0, stored.numel(name))
        found[name] = flat.view(rank, -1) if ".lora_A." in name else flat.view(-1, rank)
    return found


def _diffusers_names(adapters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"transformer.{k.replace('.default.', '.')}": v for k, v in adapters.items()}


def _write_model(
    transformer: Mask2DiTTransformer3DModel,
    saved: Mapping[str, Tensor],
    base: Path,
    folder: Path,
    max_shard_mb: float | None,
) -> None:
    """Write the transformer's weights and link the other pieces; read back to check."""
    with torch.device("meta"):
        whole = Mask2DiTTransformer3DModel(**transformer.config)
    whole.load_state_dict(saved, assign=True)
    limit = "10GB" if max_shard_mb is None else f"{round(1000 * max_shard_mb)}KB"
    whole.save_pretrained(folder / "transformer", max_shard_size=limit)
    for piece in PIECES[1:]:
        shutil.copytree(base / piece, folder / piece, copy_function=_link_or_copy)
    shutil.copy2(base / "model_index.json", folder / "model_index.json")
    _compare(folder / "transformer", saved)


def _below(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name


def model_card(job: Job, record: Mapping[str, Any], averaged: bool) -> str:
    """The model's README: what it was trained on, with which settings, and from what."""
    settings = yaml.safe_dump(
        job.training.model_dump(mode="json"), sort_keys=False, allow_unicode=True
    )
    model = job.training.model
    weights = "the moving average of the weights" if averaged else "the weights themselves"
    return f"""---
library_name: diffusers
pipeline_tag: text-to-video
base_model: {job.init_model.name}
---

# {job.run_dir.name}

A Mask²DiT transformer for {model.scenes} scenes (mask {model.mask}), trained by Triptych: stage
`{job.stage}`, step {record.get("step")} of {job.settings.steps}, {weights}.

| | |
| --- | --- |
| manifest | `{_below(job.manifest, job.workspace)}`, fingerprint `{job.manifest_sha256}` |
| samples | fingerprint `{job.samples}` |
| started from | `{job.init_model.name}`, fingerprint `{job.init_sha256}` |
| ranks, ZeRO stage of the checkpoint | {record.get("world_size")}, {record.get("zero_stage")} |

The folder has diffusers' CogVideoX layout.

## Settings

```yaml
{settings}```
"""


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
