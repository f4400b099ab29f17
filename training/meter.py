"""Measuring steps, and where the figures go: ``metrics.jsonl``, DeepSpeed's monitors, MLflow.

What a line holds is said in :mod:`training.metrics`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, TextIO

import psutil
import torch
from torch import Tensor

from schemas.config.training import TrainingConfig, TrainStageConfig
from schemas.errors import ConfigError
from training.batches import Batch
from training.cost import flops_per_step
from training.data import StepPlan
from training.engine import Ranks
from training.job import METRICS, Job

BINS = 4
"""Parts of the timesteps whose losses are told apart."""


class Meter:
    """Measures one step after the other.

    Args:
        model: Config of the transformer.
        stage: Batch size.
        training: Compute type.
        ranks: All ranks.
        num_timesteps: Diffusion timesteps.
    """

    def __init__(
        self,
        model: Mapping[str, Any],
        stage: TrainStageConfig,
        training: TrainingConfig,
        ranks: Ranks,
        num_timesteps: int,
    ) -> None:
        self._model = model
        self._stage = stage
        self._ranks = ranks
        self._bin = num_timesteps / BINS
        rate = matrix_rate(ranks.device, getattr(torch, training.dtype))
        self._rate = float(ranks.sum(torch.tensor(rate)))
        self._flops: dict[Any, float] = {}
        self.start()

    def start(self) -> None:
        """Begin a step."""
        self._started = time.perf_counter()
        self._sums = torch.zeros(2, BINS, dtype=torch.float64)  # losses, rows
        self._work = torch.zeros(2, dtype=torch.float64)  # tokens, floating-point operations

    def add(self, batch: Batch, losses: Tensor) -> None:
        """Take in the (B,) losses of a micro-batch."""
        for timestep, loss in zip(batch.timestep.tolist(), losses.detach().tolist(), strict=True):
            place = int(timestep / self._bin)
            self._sums[0, place] += loss
            self._sums[1, place] += 1
        rows = len(batch.timestep)
        _, frames, _, height, width = batch.latents.shape
        patch = int(self._model["patch_size"])
        frames //= int(self._model.get("patch_size_t") or 1)
        text = batch.text.shape[1] * batch.text.shape[2]
        self._work[0] += rows * (text + frames * (height // patch) * (width // patch))
        key = (batch.scene_frames, height, width, batch.text.shape[2], rows)
        if key not in self._flops:
            shape, rest = key[:4], key[4]
            self._flops[key] = flops_per_step(
                self._model, *shape, batch_size=rest, activation_checkpointing=0
            )
        self._work[1] += self._flops[key]

    def line(self, plan: StepPlan, waited_s: float) -> dict[str, Any]:
        """What the step came to, the same on all ranks but for times."""
        ranks = self._ranks
        together = torch.cat([self._sums.flatten(), self._work])
        total = ranks.sum(together) / ranks.sequence_parallel
        losses, rows = total[:BINS], total[BINS : 2 * BINS]
        seconds = time.perf_counter() - self._started
        by_timestep = [
            float(loss / count) if count else None for loss, count in zip(losses, rows, strict=True)
        ]
        return {
            "loss": float(losses.sum() / rows.sum()),
            "loss_by_timestep": by_timestep,
            "conditional": plan.conditional,
            "samples_per_s": round(self._stage.batch_size / seconds, 4),
            "tokens_per_s": round(float(total[-2]) / seconds, 1),
            "mfu": round(float(total[-1]) / seconds / self._rate, 4),
            "memory_gb": round(self._memory_gb(), 3),
            "seconds": round(seconds, 4),
            "data_seconds": round(waited_s, 4),
        }

    def _memory_gb(self) -> float:
        device = self._ranks.device
        if device.type == "cuda":
            own = torch.cuda.max_memory_allocated(device)
        else:
            own = psutil.Process().memory_info().rss
        return self._ranks.max(own) / 1e9


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large square matrix product."""
    size = 8192 if device.type == "cuda" else 768
    a = torch.randn(size, size, device=device).to(dtype)
    times: list[float] = []
    for _ in range(4):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        torch.mm(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return 2 * size**3 / min(times[1:])


class Monitors:
    """Where the lines go: ``metrics.jsonl``, DeepSpeed's monitors (TensorBoard, W&B, CSV), MLflow.

    Args:
        job: The run's.
        engine: The DeepSpeed engine, whose monitors are used.
        ranks: All ranks; the first one writes.
    """

    def __init__(self, job: Job, engine: Any, ranks: Ranks) -> None:
        self._job = job
        self._monitor = engine.monitor
        self._ranks = ranks
        self._file: TextIO | None = None
        self._mlflow: Any = None

    def __enter__(self) -> Monitors:
        """Open what is written to."""
        if self._ranks.is_first:
            self._file = (self._job.run_dir / METRICS).open("a", encoding="utf-8")
            if "mlflow" in self._job.training.monitors:
                self._mlflow = _mlflow_run(self._job)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close it."""
        if self._file is not None:
            self._file.close()
        if self._mlflow is not None:
            self._mlflow.end_run("FINISHED" if kind is None else "FAILED")

    def write(self, line: Mapping[str, Any]) -> None:
        """Write the line of a step."""
        if self._file is None:
            return
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        values = dict(_numbers(line))
        step = int(line["step"])
        if self._monitor.enabled:
            self._monitor.write_events([(f"train/{k}", v, step) for k, v in values.items()])
        if self._mlflow is not None:
            self._mlflow.log_metrics(values, step=step)


def _numbers(line: Mapping[str, Any]) -> Mapping[str, float]:
    """A line as plain numbers: bins one by one, and the loss apart for both kinds of step."""
    found: dict[str, float] = {}
    for name, value in line.items():
        if name == "loss_by_timestep":
            found |= {f"loss_timestep_{i}": v for i, v in enumerate(value) if v is not None}
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and name != "step":
            found[name] = float(value)
    found["loss_conditional" if line["conditional"] else "loss_plain"] = float(line["loss"])
    return found


def _mlflow_run(job: Job) -> Any:
    try:
        import mlflow  # an extra that most installations lack
    except ImportError as error:
        raise ConfigError(
            "MLflow is not installed",
            where="training.monitors",
            found=error,
            do="pip install mlflow-skinny, or take mlflow off training.monitors",
        ) from error
    mlflow.set_experiment("triptych")
    mlflow.start_run(run_name=job.run_dir.name)
    mlflow.log_params(job.settings.model_dump())
    return mlflow
