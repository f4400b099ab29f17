"""Where everything lies in a workspace. The only place that spells these paths.

::

    <workspace>/
      cache/<stage>/<key>.parquet        finished pieces of work, content-addressed; safe to delete
      cache/{latents,texts}/<key>/       shards of encoded scenes and captions: <shard>.safetensors,
                                         and <shard>.parquet, which says what is in it
      models/<name>/                     base models made on the spot
      datasets/<dataset>/LATEST          names the newest finished snapshot
      datasets/<dataset>/<snapshot_id>/  sources, shots, clips, embeddings, windows, rejects
                                         (.parquet), manifests/{pretrain,sft}.parquet,
                                         counts.json, config.yaml, _DONE.json
      runs/<stage>-<run_id>/             config.yaml, versions.json, metrics.jsonl, log.txt,
                                         checkpoints/, model/, _DONE.json
      runs/LATEST                        names the newest finished run
      generations/videos/                <generation_id>.mp4, .json, .jpg, .poster.jpg; if asked for
                                         .frames/, .scenes/, .latents/ (inference/outputs.py)
      generations/<batch_id>/            generations, scores, rejects (.parquet), scores.json,
                                         counts.json, index.html (gallery), _DONE.json
      generations/LATEST                 names the newest finished batch
      ablations/<ablation_id>/           results.parquet, overlap.parquet, index.html, _DONE.json
      ablations/<ablation_id>/cells/<n>/ sft.parquet, run/, generations/, _DONE.json
      ablations/LATEST                   names the newest ablation
      reproductions/<id>/                what `triptych reproduce` makes (flows/reproduce.py)
      reports/<name>.html
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Snapshot:
    """One immutable dataset snapshot."""

    root: Path

    def table(self, name: str) -> Path:
        """A stage table: sources, shots, clips, embeddings, windows or rejects."""
        return self.root / f"{name}.parquet"

    def manifest(self, kind: str) -> Path:
        """A manifest of samples: pretrain or sft."""
        return self.root / "manifests" / f"{kind}.parquet"

    @property
    def counts(self) -> Path:
        """List of stage counts."""
        return self.root / "counts.json"


@dataclass(frozen=True)
class Workspace:
    """Paths of a workspace."""

    root: Path

    def cache(self, stage: str) -> Path:
        """Finished pieces of work of one stage."""
        return self.root / "cache" / stage

    def model(self, name: str) -> Path:
        """A base model made on the spot."""
        return self.root / "models" / name

    def dataset(self, name: str) -> Path:
        """All snapshots of a dataset."""
        return self.root / "datasets" / name

    @property
    def runs(self) -> Path:
        """All training runs."""
        return self.root / "runs"

    @property
    def generations(self) -> Path:
        """All generation batches."""
        return self.root / "generations"

    @property
    def videos(self) -> Path:
        """Generated videos, by generation id."""
        return self.root / "generations" / "videos"

    @property
    def ablations(self) -> Path:
        """All threshold ablations."""
        return self.root / "ablations"

    @property
    def reproductions(self) -> Path:
        """All reproductions of the paper's tables."""
        return self.root / "reproductions"

    @property
    def reports(self) -> Path:
        """HTML reports."""
        return self.root / "reports"
