"""ViCLIP against a slow re-statement, and the official layouts, on small random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import save_file
from torch import Tensor

from curation.embeddings import load_embedder, name_model
from curation.long_text import text_pieces
from curation.viclip import ViCLIP, ViCLIPEmbedder, sizes_of
from curation.weights import check_filled, check_weights
from schemas.config.curation import EmbeddingConfig
from schemas.config.generation import EvaluationConfig
from schemas.errors import CheckpointError, ConfigError
from tests.curation.viclip_restatement import clip_vector, drawn, names_and_shapes, text_vector

PX = 24
GOLDEN_CLIP = [-0.392776, 0.038438, -0.159277, 0.086017]
GOLDEN_TEXT = [-0.083747, 0.025179, -0.010296, -0.334121]
"""First numbers by the re-statement, in float64."""
TEXTS = ["A red ball rolls.", "Two dogs run along the beach at night, und ein Käuzchen ruft!"]
LONG = (
    "Actor1, a woman with short black hair and sunglasses, spreads out a blanket by the river. "
    "Actor2 (a tall man in a green coat) arrives. They share snacks and talk about the weather, "
    "the price of bread, and a dog that neither of them has ever seen, until the sun goes down "
    "behind the old mill on the far side. Night falls."
)
TOKENIZER = SimpleTokenizer(context_length=32)


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return drawn("tiny")


@pytest.fixture(scope="module")
def pth(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("official") / "ViCLIP-T_InternVid-FLT-10M.pth"
    torch.save({"model": state}, path)
    return path


@pytest.fixture(scope="module")
def model(pth: Path) -> ViCLIPEmbedder:
    return ViCLIPEmbedder(pth, "truncate", "cpu")


@pytest.fixture
def write(tmp_path: Path) -> Callable[[dict[str, Tensor]], Path]:
    def write(state: dict[str, Tensor]) -> Path:
        save_file(state, tmp_path / "model.safetensors")
        return tmp_path

    return write


def clips(count: int = 2, frames: int = 8) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (count, frames, PX, PX, 3), np.uint8)


def fits(text: str) -> bool:
    return len(TOKENIZER.encode(text)) <= 30


@pytest.mark.parametrize("layout", ["pth", "safetensors", "folder"])
def test_both_encoders_equal_the_restatement_in_every_layout(
    state: dict[str, Tensor], pth: Path, write: Callable[..., Path], layout: str
) -> None:
    path = pth if layout == "pth" else write(state)
    path = path / "model.safetensors" if layout == "safetensors" else path
    model = ViCLIPEmbedder(path, "truncate", "cpu")
    frames = clips()
    for got, one in zip(model.embed_clips(frames), frames, strict=True):
        expected = clip_vector(state, torch.from_numpy(one)).numpy()
        assert np.linalg.norm(got - expected) <= 1e-5
    for got, tokens in zip(model.embed_texts(TEXTS), TOKENIZER(TEXTS).tolist(), strict=True):
        assert got is not None
        assert np.linalg.norm(got - text_vector(state, tokens).numpy()) <= 1e-5
    assert (model.dim, model.image_px, model.mode) == (32, PX, "stretch")


def test_golden_vectors(model: ViCLIPEmbedder) -> None:
    [clip] = model.embed_clips(clips(1))
    [text] = model.embed_texts(TEXTS[:1])
    assert text is not None
    assert clip[:4] == pytest.approx(GOLDEN_CLIP, abs=1e-5)
    assert text[:4] == pytest.approx(GOLDEN_TEXT, abs=1e-5)


def test_order_and_colour_of_frames_matter_and_a_batch_does_not(model: ViCLIPEmbedder) -> None:
    frames = clips(3)
    vectors = model.embed_clips(frames)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-6)
    each = np.concatenate([model.embed_clips(f[None]) for f in frames])
    assert np.abs(vectors - each).max() <= 1e-6
    for changed in (frames[:, ::-1], frames[..., ::-1]):
        assert np.abs(model.embed_clips(np.ascontiguousarray(changed)) - vectors).max() > 1e-3


def test_a_single_frame_is_repeated(model: ViCLIPEmbedder) -> None:
    still = clips(2, 1)
    assert np.array_equal(model.embed_clips(still), model.embed_clips(still.repeat(8, axis=1)))


@pytest.mark.parametrize("section", [EmbeddingConfig, EvaluationConfig])
def test_what_the_config_lacks_is_told_with_its_key(
    pth: Path, tmp_path: Path, section: type[EmbeddingConfig] | type[EvaluationConfig]
) -> None:
    key = "frames_per_clip" if section is EmbeddingConfig else "frames_per_scene"
    name = "curation.embedding" if section is EmbeddingConfig else "evaluation"
    for weights in (None, str(tmp_path / "nothing.pth")):
        with pytest.raises(ConfigError, match=rf"(?s)needs its weights.*{name}\.weights"):
            load_embedder(section(model="viclip", weights=weights))
    many = section(model="viclip", weights=str(pth)).model_copy(update={key: 16})
    with pytest.raises(ConfigError, match=rf"(?s)another number of frames.*{name}\.{key}"):
        load_embedder(many)
    with pytest.raises(CheckpointError, match="no weights of ViCLIP"):
        load_embedder(section(model="viclip", weights=str(tmp_path)))


def test_results_are_named_by_the_weights_content(pth: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere.pth"
    moved.write_bytes(pth.read_bytes())
    name = name_model(EmbeddingConfig(model="viclip", weights=str(pth)))
    assert name == name_model(EmbeddingConfig(model="viclip", weights=str(moved), batch_clips=3))
    loaded = load_embedder(EmbeddingConfig(model="viclip", weights=str(moved)), "cpu")
    assert (loaded.model_id, loaded.weights_sha256) == (name.model_id, name.weights_sha256)
    torch.save({"model": drawn("tiny", 1)}, moved)
    assert name != name_model(EmbeddingConfig(model="viclip", weights=str(moved)))


@pytest.mark.parametrize("size", ["B/16", "L/14"])
def test_the_whole_official_layout_is_known(size: str) -> None:
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, shape in names_and_shapes(size).items()}
        sizes = sizes_of(Path("official.pth"), state)
        model = ViCLIP(sizes)
    check_weights(Path("official.pth"), state, model.state_dict(), "ViCLIP")
    assert sizes.image_px == 224
    assert (sizes.vision_layers, sizes.dim) == ((24, 768) if size == "L/14" else (12, 512))
    assert len(state) == 15 + 12 * (sizes.vision_layers + 12)


@pytest.mark.parametrize("size", ["B/16", "L/14"])
def test_a_missing_last_layer_of_an_official_size_is_noticed(size: str) -> None:
    last = 23 if size == "L/14" else 11
    for encoder, layer in (("vision", last), ("text", 11)):
        gone = f"{encoder}_encoder.transformer.resblocks.{layer}."
        with torch.device("meta"):
            shapes = {k: v for k, v in names_and_shapes(size).items() if not k.startswith(gone)}
            state = {name: torch.empty(shape) for name, shape in shapes.items()}
            model = ViCLIP(sizes_of(Path("cut.pth"), state))
        with pytest.raises(CheckpointError, match=rf"12 missing \['{gone}"):
            check_weights(Path("cut.pth"), state, model.state_dict(), "ViCLIP")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"text_encoder.ln_final.bias": None}, r"missing \['text_encoder.ln_final.bias'\]"),
        ({"vision_encoder.proj": None}, "the weights are not those of ViCLIP"),
        ({"vision_encoder.head": torch.zeros(1)}, r"not expected \['vision_encoder.head'\]"),
        ({"vision_encoder.ln_post.bias": torch.zeros(5)}, r"(?s)ln_post.bias.*\(5,\).*\(128,\)"),
        (
            {"vision_encoder.temporal_positional_embedding": torch.ones(1, 4, 128)},
            r"(?s)\(1, 4, 128\).*\(1, 8, 128\)",
        ),
        ({"vision_encoder.conv1.weight": torch.zeros(100, 3, 1, 8, 8)}, "not those of ViCLIP"),
    ],
    ids=["missing", "missing_telling", "extra", "shape", "frames", "width"],
)
def test_other_weights_are_refused(
    state: dict[str, Tensor],
    write: Callable[..., Path],
    change: dict[str, Tensor | None],
    found: str,
) -> None:
    changed = {k: v for k, v in (state | change).items() if v is not None}
    with pytest.raises(CheckpointError, match=found):
        ViCLIPEmbedder(write(changed), "truncate", "cpu")


def test_a_pth_without_the_key_model_is_refused(state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(state, tmp_path / "bare.pth")
    with pytest.raises(CheckpointError, match="no key 'model'"):
        ViCLIPEmbedder(tmp_path / "bare.pth", "truncate", "cpu")


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("vision_encoder.temporal_positional_embedding", 0.0, "is 0 everywhere"),
        ("text_encoder.text_projection", 0.25, "is 0.25 everywhere"),
        ("vision_encoder.ln_post.weight", 0.0, "different inputs give vectors"),
        ("text_encoder.ln_final.weight", 0.0, "different inputs give vectors"),
        ("vision_encoder.ln_pre.bias", float("nan"), "not finite"),
    ],
)
def test_weights_nobody_trained_are_noticed(
    state: dict[str, Tensor], write: Callable[..., Path], name: str, value: float, found: str
) -> None:
    with pytest.raises(CheckpointError, match=rf"(?s)cannot be the trained weights.*{found}"):
        ViCLIPEmbedder(write(state | {name: torch.full_like(state[name], value)}), "chunk", "cpu")


def test_weights_that_were_not_loaded_are_noticed(state: dict[str, Tensor]) -> None:
    with torch.device("meta"):
        model = ViCLIP(sizes_of(Path("w.pth"), state))
    partly = {k: v for k, v in state.items() if k != "vision_encoder.proj"}
    model.load_state_dict(partly, strict=False, assign=True)
    with pytest.raises(CheckpointError, match=r"vision_encoder\.proj was not loaded"):
        check_filled(Path("w.pth"), model, "ViCLIP")


def test_a_long_caption_is_cut_off_or_read_in_pieces(
    state: dict[str, Tensor], pth: Path, model: ViCLIPEmbedder
) -> None:
    chunked = ViCLIPEmbedder(pth, "chunk", "cpu")
    [short], [cut], [whole] = (
        model.embed_texts(TEXTS[:1]), model.embed_texts([LONG]), chunked.embed_texts([LONG]),
    )  # fmt: skip
    assert short is not None
    assert np.array_equal(chunked.embed_texts(TEXTS[:1])[0], short)
    [tokens] = TOKENIZER([LONG]).tolist()
    assert tokens[-1] == max(tokens)
    assert np.linalg.norm(cut - text_vector(state, tokens).numpy()) <= 1e-5
    assert (model.text_chunks(LONG), chunked.text_chunks(TEXTS[0])) == (1, 1)
    pieces = text_pieces(LONG, "chunk", fits)
    assert chunked.text_chunks(LONG) == len(pieces) == 4
    each = np.mean([text_vector(state, t).numpy() for t in TOKENIZER(pieces).tolist()], axis=0)
    assert np.linalg.norm(whole - each / np.linalg.norm(each)) <= 1e-5
    # the end of a caption counts only where it is read
    shorter = LONG.removesuffix(" Night falls.")
    assert np.array_equal(model.embed_texts([shorter])[0], cut)
    assert np.abs(chunked.embed_texts([shorter])[0] - whole).max() > 1e-4


WORDS = st.lists(st.text("abc.!", min_size=1, max_size=12), min_size=1, max_size=30)


@given(WORDS, st.integers(12, 40))
def test_pieces_fit_are_full_and_lose_nothing(words: list[str], limit: int) -> None:
    def short(text: str) -> bool:
        return len(text) <= limit

    text = " ".join(words)
    pieces = text_pieces(text, "chunk", short)
    assert " ".join(pieces) == text
    assert all(map(short, pieces))
    assert text_pieces(text, "truncate", short) == [text]
    if short(text):
        assert pieces == [text]


def test_sentences_stay_whole_where_they_fit() -> None:
    def short(text: str) -> bool:
        return len(text) <= 20

    text = "One two. Three four! A sentence that is far too long. Five? Incomprehensibilities-all."
    assert text_pieces(text, "chunk", short) == [
        "One two. Three four!", "A sentence that is", "far too long. Five?",
        "Incomprehensibilities-all.",
    ]  # fmt: skip
    assert text_pieces("", "chunk", short) == [""]
