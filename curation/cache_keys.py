"""Where the workspace's cache keeps each result: under all that the result depends on.

A key is a fingerprint of contents, settings and the version of the code, never of times or paths of
weights. What has another key is made anew; what has the same one is used again.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from curation.embeddings import ModelName, name_model
from curation.filters import SCORES_STAGE
from curation.inputs import uris
from curation.scorers import NamedScorer
from curation.shots import models_behind
from schemas.config.root import TriptychConfig
from schemas.layout import Workspace
from schemas.storage import fingerprint

STAGE_VERSION = {
    "sources": 2,
    "shots": 5,
    "clips": 3,
    "filters": 1,
    "scores": 1,
    "embeddings": 2,
    "dedup": 1,
    "windows": 2,
    "manifests": 2,
    "export": 1,
}
"""Raise one when its stage's code gives other results: what was made before is then redone."""


@dataclass(frozen=True)
class CacheKeys:
    """Keys of one config's results.

    Raises:
        ConfigError: Weights of the similarity model, or of the detector, are missing.
    """

    config: TriptychConfig
    workspace: Workspace
    scorers: tuple[NamedScorer, ...]

    def probe(self, uri: str) -> Path:
        """What a file says about itself, by its name and stat.

        The change time is part of them: it moves with the content even where the modification time
        was set back.
        """
        path = uris.path_of(uri)
        stat = _stat(path) if path is not None else ()
        key = fingerprint(STAGE_VERSION["sources"], uri, stat)
        return self.workspace.cache("sources") / f"{key}.json"

    def shots(self, source_id: str) -> Path:
        """The shots of one source."""
        cfg = self.config.curation.shots
        key = fingerprint(STAGE_VERSION["shots"], cfg.hash(), *self.shot_models)
        return self.workspace.cache("shots") / f"{source_id}-{key}.json"

    def scores(self, scorer: NamedScorer) -> Path:
        """Folder of the scores one scorer gives."""
        key = fingerprint(STAGE_VERSION[SCORES_STAGE], dataclasses.astuple(scorer))
        return self.workspace.cache(SCORES_STAGE) / key

    def embeddings(self) -> Path:
        """Folder of the clips' vectors."""
        frames = self.config.curation.embedding.frames_per_clip
        key = fingerprint(STAGE_VERSION["embeddings"], dataclasses.astuple(self.embedder), frames)
        return self.workspace.cache("embeddings") / key

    def captions(self) -> Path:
        """Folder of the captions' vectors."""
        model, long_text = self.embedder, self.config.curation.embedding.long_text
        key = fingerprint(
            STAGE_VERSION["embeddings"], model.model_id, model.weights_sha256, long_text
        )
        return self.workspace.cache("captions") / key

    def export(self, clip_id: str) -> Path:
        """What is known of one clip's file; the file itself lies in the folder above."""
        key = fingerprint(STAGE_VERSION["export"], self.config.curation.export.hash())
        return self.workspace.cache("exports") / key / f"{clip_id}.json"

    def snapshot(self) -> dict[str, Any]:
        """What a snapshot's tables depend on besides the sources and captions themselves."""
        curation = self.config.curation.model_dump(mode="json")
        used = ("shots", "clips", "filters", "dedup", "windows", "manifests", "export")
        embedding = self.config.curation.embedding
        model = self.config.training.model
        return {k: curation[k] for k in used} | {
            "frames": model.lengths[-1],
            "max_stride": model.max_stride,
            "shot_models": self.shot_models,
            "embedder": dataclasses.astuple(self.embedder),
            "embedding": [embedding.frames_per_clip, embedding.long_text],
            "scorers": [dataclasses.asdict(s) for s in self.scorers],
            "stages": STAGE_VERSION,
        }

    @cached_property
    def embedder(self) -> ModelName:
        """The similarity model, by the content of its weights."""
        return name_model(self.config.curation.embedding)

    @cached_property
    def shot_models(self) -> list[str]:
        """The models behind the detector, by content."""
        return models_behind(self.config.curation.shots, self.config.curation.embedding)


def _stat(path: Path) -> tuple[int, ...]:
    try:
        stat = path.stat()
    except OSError:
        return ()
    return (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
