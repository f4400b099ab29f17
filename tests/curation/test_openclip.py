"""OpenCLIP models from a folder, against OpenCLIP's own preprocessing and encoders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from curation.embeddings import load_embedder, name_model
from curation.openclip import OpenClipEmbedder, load_clip
from schemas.config.curation import EmbeddingConfig
from schemas.errors import CheckpointError, ConfigError
from tests.curation.tiny_weights import CLIP, write_clip

PX, DIM, CONTEXT = 32, 24, 12
TEXT = {"context_length": CONTEXT, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
CAPTIONS = ["A red ball rolls.", "Two dogs run."]
LONG = "Two dogs run along the beach at night. A red ball rolls. The tide comes in slowly now."


def write(folder: Path, **config: Any) -> Any:
    """A random model with OpenCLIP's own words."""
    torch.manual_seed(0)
    settings = CLIP | {"text_cfg": TEXT | config.pop("text_cfg", {})}
    kind = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
    model = kind(**settings)
    folder.mkdir(parents=True, exist_ok=True)
    if kind is open_clip.CustomTextCLIP:
        settings = settings | {"custom_text": True}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": settings} | config))
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    return model.eval()


def clips(count: int = 2, frames: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, frames, PX, PX, 3), np.uint8)


@pytest.mark.parametrize("custom_text", [False, True])
def test_vectors_are_those_of_openclip(tmp_path: Path, custom_text: bool) -> None:
    model = write(tmp_path, custom_text=custom_text)
    embedder = OpenClipEmbedder(tmp_path, "truncate", "cpu")
    to_tensor: Any = open_clip.image_transform(PX, is_train=False)
    with torch.inference_mode():
        for got, clip in zip(embedder.embed_clips(clips()), clips(), strict=True):
            each = model.encode_image(
                torch.stack([to_tensor(Image.fromarray(f)) for f in clip]), normalize=True
            )
            mean = each.mean(0) / each.mean(0).norm()
            assert np.linalg.norm(got - mean.numpy()) <= 1e-5
        tokens = open_clip.tokenize(CAPTIONS, context_length=CONTEXT)
        expected = model.encode_text(tokens, normalize=True).numpy()
    for got, vector in zip(embedder.embed_texts(CAPTIONS), expected, strict=True):
        assert got is not None
        assert np.linalg.norm(got - vector) <= 1e-5
    assert (embedder.dim, embedder.image_px, embedder.mode) == (DIM, PX, "cover")


def test_a_batch_equals_one_by_one_and_any_number_of_frames_will_do(tmp_path: Path) -> None:
    write(tmp_path)
    embedder = OpenClipEmbedder(tmp_path, "truncate", "cpu")
    frames = clips(3, 30)  # more frames than are encoded at once
    each = np.concatenate([embedder.embed_clips(f[None]) for f in frames])
    assert np.abs(embedder.embed_clips(frames) - each).max() <= 1e-6
    assert embedder.embed_clips(clips(2, 1)).shape == (2, DIM)


def test_long_captions(tmp_path: Path) -> None:
    model = write(tmp_path)
    cut = OpenClipEmbedder(tmp_path, "truncate", "cpu")
    chunked = OpenClipEmbedder(tmp_path, "chunk", "cpu")
    assert (cut.text_chunks(LONG), chunked.text_chunks(LONG), chunked.text_chunks("A")) == (1, 3, 1)
    pieces = ["Two dogs run along the beach at night.", "A red ball rolls.",
              "The tide comes in slowly now."]  # fmt: skip
    with torch.inference_mode():
        tokens = open_clip.tokenize([LONG, *pieces], context_length=CONTEXT)
        whole, *each = model.encode_text(tokens, normalize=True).numpy()
    mean = np.mean(each, axis=0)
    assert np.linalg.norm(cut.embed_texts([LONG])[0] - whole) <= 1e-5
    assert np.linalg.norm(chunked.embed_texts([LONG])[0] - mean / np.linalg.norm(mean)) <= 1e-5


def test_the_config_says_how_pictures_are_prepared(tmp_path: Path) -> None:
    preprocess = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.25, 1.0], "resize_mode": "squash"}
    write(tmp_path, preprocess_cfg=preprocess)
    loaded = load_clip(tmp_path)
    assert loaded.mode == "stretch"
    got = loaded.pixels(np.full((1, 2, 2, 3), 255, np.uint8), torch.device("cpu"))
    assert torch.allclose(got[0, :, 0, 0], torch.tensor([1.8, 3.2, 0.7]))


def test_it_is_named_by_content_and_missing_weights_by_their_key(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b")
    names = [name_model(config(tmp_path / folder)) for folder in "ab"]
    assert names[0] == names[1]
    embedder = load_embedder(config(tmp_path / "a"), "cpu")
    assert embedder.weights_sha256 == names[0].weights_sha256
    path = tmp_path / "b" / "open_clip_config.json"
    path.write_text(path.read_text().replace('"quick_gelu": true', '"quick_gelu": false'))
    assert name_model(config(tmp_path / "b")) != names[0]
    with pytest.raises(ConfigError, match=r"curation\.embedding\.weights"):
        load_embedder(EmbeddingConfig(model="openclip"))
    with pytest.raises(CheckpointError, match="not a folder with an OpenCLIP model"):
        load_embedder(config(tmp_path))


def config(folder: Path) -> EmbeddingConfig:
    return EmbeddingConfig(model="openclip", weights=str(folder))


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    write_clip(tmp_path / "words")  # knows 50 words
    with pytest.raises(CheckpointError, match="does not belong to its tokenizer"):
        OpenClipEmbedder(tmp_path / "words", "truncate", "cpu")
    write(tmp_path / "hub", text_cfg={"hf_tokenizer_name": "somebody/something"})
    with pytest.raises(CheckpointError, match=r"(?s)tokenizer.*missing.*somebody/something"):
        OpenClipEmbedder(tmp_path / "hub", "truncate", "cpu")
    model = write(tmp_path / "dull")
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    state["visual.proj"] = torch.full_like(state["visual.proj"], 0.5)
    save_file(state, tmp_path / "dull" / "open_clip_model.safetensors")
    with pytest.raises(CheckpointError, match=r"(?s)cannot be the trained.*0\.5 everywhere"):
        OpenClipEmbedder(tmp_path / "dull", "truncate", "cpu")


def test_a_tokenizer_of_another_library_comes_from_the_folder(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "a", "red", "ball", "rolls", "."])}
    own = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    own.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=own, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(tmp_path)
    model = write(tmp_path, text_cfg={"hf_tokenizer_name": "somebody/something"})
    embedder = OpenClipEmbedder(tmp_path, "chunk", "cpu")
    with torch.inference_mode():
        tokens = torch.tensor([[2, 3, 4, 5, 6] + [0] * (CONTEXT - 5)])
        expected = model.encode_text(tokens, normalize=True)[0].numpy()
    [got] = embedder.embed_texts(["a red ball rolls."])
    assert np.linalg.norm(got - expected) <= 1e-5
    assert embedder.text_chunks("a red ball rolls. " * 2) == 1
    assert embedder.text_chunks("a red ball rolls. " * 4) == 2
