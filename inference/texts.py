"""Texts of a batch, encoded once and kept in the workspace's cache.

They lie where training keeps its captions (:mod:`training.cache`), under a key of text encoder,
tokenizer, length and type, so what either has encoded is never encoded again.

Legend: L text tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from inference.story import Story
from schemas.config import TriptychConfig
from schemas.layout import Workspace
from training.cache import LatentCache
from training.latents import Encoder, scene_reader
from training.shards import Shards

TEXTS_PER_SHARD = 64
"""A killed run encodes at most so many again for each actor."""


def text_cache(
    config: TriptychConfig, model_dir: Path, workspace: Workspace, transformer: dict[str, Any]
) -> LatentCache:
    """The cache of this model's texts, of the length that the transformer was made for."""
    length = {"text_tokens": transformer["max_text_seq_length"]}
    shape = config.training.model.model_copy(update=length)
    return LatentCache(workspace, model_dir, shape, config.training.dtype)


def missing_texts(cache: LatentCache, stories: Iterable[Story]) -> list[list[str]]:
    """Texts of stories that are not in the cache yet, once each, in pieces of a shard."""
    shards = Shards(cache.caption_folder)
    shards.remove_leftovers()
    texts = dict.fromkeys(text for story in stories for text in story.texts)
    missing = [text for text in texts if cache.caption_key(text) not in shards]
    return [missing[i : i + TEXTS_PER_SHARD] for i in range(0, len(missing), TEXTS_PER_SHARD)]


def text_encoder(cache: LatentCache, config: TriptychConfig) -> Encoder:
    """Writes shards of texts (``write_captions``); loads the text encoder at the first one."""
    return Encoder(cache, scene_reader(cache.workspace, config.curation.sources))


def read_texts(cache: LatentCache, shards: Shards, stories: Iterable[Story]) -> dict[str, Tensor]:
    """Encoded texts (L, D) of stories, mapped into memory.

    Raises:
        InputError: A shard is gone or damaged.
    """
    texts = dict.fromkeys(text for story in stories for text in story.texts)
    return {text: shards.tensor(cache.caption_key(text), "text") for text in texts}
