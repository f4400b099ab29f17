"""The shipped viclip-tiny: it tells stories apart, and a damaged copy is refused."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from curation.embeddings import Embedder, load_embedder
from curation.toonworld.captions import caption
from curation.toonworld.draws import Draw
from curation.toonworld.render import film, stage
from curation.toonworld.world import Shot, draw_compilation, draw_episode
from curation.viclip import TOKEN_IDS, ViCLIPEmbedder, load_viclip
from schemas.config.curation import EmbeddingConfig
from schemas.errors import CheckpointError

WEIGHTS = Path("assets/tiny/viclip")
FILE = WEIGHTS / "model.safetensors"
ROWS = "text_encoder.token_embedding.weight"
SEED = 77
"""Of neither the training nor the held-out stories."""


@pytest.fixture(scope="module")
def model() -> Embedder:
    return load_embedder(EmbeddingConfig(model="viclip", weights=str(WEIGHTS)), "cpu")


def vectors(model: Embedder, shots: tuple[Shot, ...]) -> np.ndarray:
    times = [(np.arange(8) + 0.5) / 8 * Draw(k).number(1, s.seconds) for k, s in enumerate(shots)]
    clips = [film(stage(s, 64, 64), t) for s, t in zip(shots, times, strict=True)]
    return model.embed_clips(np.stack(clips))


def test_shots_of_a_story_are_more_alike_than_others(model: Embedder) -> None:
    alike: list[list[float]] = []
    for draw in (draw_episode, draw_compilation):
        found = [vectors(model, draw(SEED, i).shots[:3]) for i in range(8)]
        alike.append([float(a @ b) for v in found for a, b in pairwise(v)])
    related, unrelated = (np.array(side) for side in alike)
    assert len(related) == len(unrelated) == 16
    assert (related[:, None] > unrelated).mean() >= 0.93
    assert related.mean() - unrelated.mean() >= 0.3


def test_a_caption_finds_its_shot(model: Embedder) -> None:
    shots = tuple(draw_episode(SEED, i).shots[0] for i in range(20))
    texts = np.stack([v for v in model.embed_texts([caption(s) for s in shots]) if v is not None])
    alike = texts @ vectors(model, shots).T
    better = (alike > np.diag(alike)[:, None]).sum(1)
    assert (better < 5).mean() >= 0.8


def test_it_is_a_viclip_of_its_own_size(model: Embedder) -> None:
    assert (model.model_id, model.image_px, model.mode) == (ViCLIPEmbedder.model_id, 64, "stretch")
    assert FILE.stat().st_size < 5e6


def test_words_it_never_read_share_one_row(model: Embedder) -> None:
    kept, every = load_file(FILE), load_viclip(FILE)[0].text_encoder.token_embedding.weight
    ids = kept[TOKEN_IDS]
    assert torch.equal(every[ids], kept[ROWS][1:])
    others = torch.ones(len(every), dtype=torch.bool)
    others[ids] = False
    assert (every[others] == kept[ROWS][0]).all()
    one, other, known = model.embed_texts(["a red zebra", "a red volcano", "a red cat"])
    assert np.array_equal(one, other)
    assert not np.array_equal(one, known)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"vision_encoder.ln_post.bias": None}, r"1 missing \['vision_encoder.ln_post.bias'\]"),
        ({"text_encoder.text_projection": torch.ones(64, 64)}, "is 1 everywhere"),
        (
            {"vision_encoder.temporal_positional_embedding": torch.ones(1, 4, 64)},
            r"(?s)another shape.*\(1, 4, 64\)",
        ),
        ({TOKEN_IDS: None}, r"(?s)another shape.*token_embedding"),
        ({TOKEN_IDS: torch.arange(3)}, "the rows of tokens"),
        ({TOKEN_IDS: "reversed"}, "the rows of tokens"),
    ],
    ids=["missing", "constant", "shape", "no_ids", "few_ids", "falling_ids"],
)
def test_a_damaged_copy_is_refused(
    tmp_path: Path, change: dict[str, Tensor | str | None], found: str
) -> None:
    state = load_file(FILE)
    for name, value in change.items():
        was = state.pop(name)
        if value is not None:
            state[name] = was.flip(0).contiguous() if isinstance(value, str) else value
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=found):
        ViCLIPEmbedder(tmp_path, "truncate", "cpu")


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(FILE.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="cannot be read"):
        ViCLIPEmbedder(tmp_path, "truncate", "cpu")
