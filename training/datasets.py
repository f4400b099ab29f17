"""What training reads: the rows of a step as tensors, from the latent cache or from videos.

Everything read is a pure function of the sample, the row's noise seed and the files, so it does not
matter who reads a row, when, or with which others.

Legend: S scenes, F latent frames, C channels, H W latent height width, T text tokens.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from curation.inputs import uris
from schemas.config.curation import SourcesConfig
from schemas.config.training import TrainingConfig
from schemas.errors import InputError, ManifestError, TriptychError
from schemas.layout import Workspace
from schemas.rows import Sample
from schemas.storage import fingerprint
from training.batches import Reading, ReadRow, make_batch
from training.cache import LatentCache, training_samples
from training.data import StepPlan, draw_int
from training.latents import Encoder, scene_reader
from training.noise import scene_generator
from training.shards import Shards, TensorName

log = logging.getLogger(__name__)

BAD_LISTED = 5
"""Samples that a failed check names."""


class SampleDataset(ABC):
    """The samples of a manifest, read by number.

    Args:
        samples: Samples whose scenes are all long enough.
        cache: Names frames, lengths and the VAE's scaling factor.
        sample_posterior: Draw latents from the VAE's posterior; else take its mean.
    """

    def __init__(
        self, samples: Sequence[Sample], cache: LatentCache, *, sample_posterior: bool
    ) -> None:
        self.samples = list(samples)
        self.cache = cache
        self.sample_posterior = sample_posterior

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def fingerprint(self) -> str:
        """Changes with the samples or their order."""
        return fingerprint([s.sample_id for s in self.samples])

    def scene_frames(self, index: int) -> tuple[int, ...]:
        """Latent frames of each scene of a sample."""
        return tuple(self.cache.latent_frames(s) for s in self.samples[index].scenes)

    def latents(self, index: int, seed: int) -> Tensor:
        """Latents of all scenes of a sample, (F, C, H, W), float32, times the VAE's scaling factor.

        Args:
            index: Which sample.
            seed: Decides all that is drawn; the noise seed of the row.

        Raises:
            InputError: A scene cannot be read.
        """
        scenes: list[Tensor] = []
        for place in range(len(self.samples[index].scenes)):
            mean, logvar = self._posterior(index, place, seed)
            scene = mean.float()
            if self.sample_posterior:
                generator = scene_generator(seed, place, "posterior")
                scene = scene + torch.exp(logvar.float() / 2) * torch.randn(
                    scene.shape, generator=generator
                )
            scenes.append(scene * self.cache.scaling_factor)
        return torch.cat(scenes)

    def text(self, index: int, dropped: bool = False) -> Tensor:
        """(S, T, text width); with ``dropped`` every caption is the empty one.

        Raises:
            InputError: A caption's embedding cannot be read.
        """
        scenes = self.samples[index].scenes
        return torch.stack([self._caption("" if dropped else s.caption) for s in scenes])

    @abstractmethod
    def _posterior(self, index: int, place: int, seed: int) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of one scene, (F, C, H, W) each."""

    @abstractmethod
    def _caption(self, caption: str) -> Tensor:
        """(T, text width)."""

    @abstractmethod
    def problems(self) -> list[str]:
        """What is wrong with which sample, as far as can be seen without reading any of them."""

    def read(self, plan: StepPlan, rows: Sequence[int]) -> Reading:
        """Some rows of a step as tensors on the CPU.

        Rows whose scenes have equal lengths share a batch, in the order of ``rows``; so do the
        batches, by their first rows. A row that cannot be read is in no batch.
        """
        groups: dict[tuple[int, ...], list[ReadRow]] = defaultdict(list)
        bad: dict[int, TriptychError] = {}
        for row in rows:
            draw = plan.draws[row]
            try:
                latents = self.latents(draw.index, draw.noise_seed)
                text = self.text(draw.index, draw.drop_text)
            except (InputError, OSError) as error:
                bad[row] = self._bad_sample(draw.index, error)
                continue
            groups[self.scene_frames(draw.index)].append((row, latents, text))
        return Reading([make_batch(plan, frames, group) for frames, group in groups.items()], bad)

    def _bad_sample(self, index: int, cause: Exception) -> TriptychError:
        error = InputError(
            "a sample cannot be read",
            where=f"sample {self.samples[index].sample_id}",
            found=cause,
            do="mend or remove what is named above, or allow for it with max_bad_samples",
        )
        error.__cause__ = cause
        return error


class LatentDataset(SampleDataset):
    """Samples whose scenes and captions are all in the latent cache."""

    def __init__(
        self,
        samples: Sequence[Sample],
        cache: LatentCache,
        scenes: Shards,
        captions: Shards,
        *,
        sample_posterior: bool = False,
    ) -> None:
        super().__init__(samples, cache, sample_posterior=sample_posterior)
        self._scenes = scenes
        self._captions = captions

    def _posterior(self, index: int, place: int, seed: int) -> tuple[Tensor, Tensor]:
        del seed  # the frames were chosen when the scene was encoded
        key = self.cache.scene_key(self.samples[index].scenes[place])
        return self._scenes.tensor(key, "mean"), self._scenes.tensor(key, "logvar")

    def _caption(self, caption: str) -> Tensor:
        return self._captions.tensor(self.cache.caption_key(caption), "text")

    def problems(self) -> list[str]:
        """Tensors that are not there or have a wrong shape, by the headers of the shards."""
        cache = self.cache
        scenes: dict[TensorName, tuple[int, ...]] = {}
        captions: dict[TensorName, tuple[int, ...]] = {}
        of_sample: dict[TensorName, str] = {}
        for sample in self.samples:
            for scene in sample.scenes:
                shape = (cache.latent_frames(scene), *cache.frame_shape)
                for what in ("mean", "logvar"):
                    name = (cache.scene_key(scene), what)
                    scenes[name] = shape
                    of_sample.setdefault(name, sample.sample_id)
            for caption in ("", *(s.caption for s in sample.scenes)):
                name = (cache.caption_key(caption), "text")
                captions[name] = cache.text_shape
                of_sample.setdefault(name, sample.sample_id)
        wrong = self._scenes.mismatches(scenes) | self._captions.mismatches(captions)
        return [f"sample {s}: {wrong[name]}" for name, s in of_sample.items() if name in wrong]


class PixelDataset(SampleDataset):
    """Samples read from their videos at every visit, from a random start frame.

    As the official trainer does, but with the start a function of the row's noise seed.

    Args:
        samples: Samples whose scenes are all long enough.
        encoder: Decodes, and runs the VAE and the text encoder.
        sample_posterior: Draw latents from the VAE's posterior; else take its mean.
    """

    def __init__(
        self, samples: Sequence[Sample], encoder: Encoder, *, sample_posterior: bool = False
    ) -> None:
        super().__init__(samples, encoder.cache, sample_posterior=sample_posterior)
        self._encoder = encoder

    def _posterior(self, index: int, place: int, seed: int) -> tuple[Tensor, Tensor]:
        scene = self.samples[index].scenes[place]
        frames = self.cache.frames(scene, draw_int("start", seed, place))
        assert frames is not None, "samples with scenes that are too short are left out"
        return self._encoder.scene(scene, frames)

    def _caption(self, caption: str) -> Tensor:
        return self._encoder.caption(caption)

    def problems(self) -> list[str]:
        """Local videos that are not there. Others are asked for only when they are read."""
        found: list[str] = []
        is_there: dict[str, bool] = {}
        for sample in self.samples:
            for uri in dict.fromkeys(s.uri for s in sample.scenes):
                path = uris.path_of(uri)
                if path is not None and not is_there.setdefault(uri, path.is_file()):
                    found.append(f"sample {sample.sample_id}: {uri} is not there")
        return found


def open_dataset(
    config: TrainingConfig,
    manifest: Path,
    init_model: Path,
    workspace: Workspace,
    split: str = "train",
    sources: SourcesConfig | None = None,
    device: torch.device | None = None,
) -> LatentDataset | PixelDataset:
    """The samples of a manifest's split that can be trained on.

    Left out, and counted in the log, are those with a scene that is too short or could not be
    encoded. Nothing is loaded yet.

    Args:
        config: ``latents.source`` says whether latents come from the cache or from videos.
        manifest: SAMPLES table.
        init_model: Model folder with the VAE and the text encoder.
        workspace: Whose cache is read.
        split: ``train``, or ``val``, which may be empty.
        sources: How remote videos are fetched; for ``pixels``.
        device: Where VAE and text encoder run; for ``pixels``. None = a GPU where there is one.

    Raises:
        ManifestError: Nothing to train on, or samples that were never encoded.
    """
    cache = LatentCache.of(config, init_model, workspace)
    samples = training_samples(manifest, config.model.scenes, split)
    sampled = config.latents.sample_posterior
    if config.latents.source == "pixels":
        ready = [s for s in samples if all(cache.frames(scene) for scene in s.scenes)]
        encoder = Encoder(cache, scene_reader(workspace, sources or SourcesConfig()), device)
        data = PixelDataset(ready, encoder, sample_posterior=sampled)
        left_out = len(samples) - len(ready)
    else:
        shards = Shards(cache.scene_folder), Shards(cache.caption_folder)
        ready, left_out = cache.split_by_readiness(samples, *shards)
        data = LatentDataset(ready, cache, *shards, sample_posterior=sampled)
    if left_out:
        log.warning(
            "samples_left_out split=%s count=%d of=%d reason=scene_not_encodable",
            split,
            left_out,
            len(samples),
        )
    if samples and not ready and split == "train":
        raise ManifestError(
            "no sample could be encoded",
            where=manifest,
            found=f"all {len(samples)} samples have a scene that is too short or unreadable",
            do="see the latents stage's rejects; lower training.model.frames or mend them",
        )
    return data


def check_dataset(dataset: SampleDataset) -> None:
    """See that every sample's tensors, or videos, are there, without reading them.

    Raises:
        ManifestError: Some are not; the first ones are listed.
    """
    found = dataset.problems()
    if found:
        more = f"\n  and {len(found) - BAD_LISTED} more" if len(found) > BAD_LISTED else ""
        raise ManifestError(
            "samples cannot be read",
            found="\n  ".join(found[:BAD_LISTED]) + more,
            expected="what the manifest names and the encode step wrote",
            do="delete the shards named above and encode again, or refresh the dataset",
        )
