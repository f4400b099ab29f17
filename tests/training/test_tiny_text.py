from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from curation.toonworld.draws import Draw
from schemas.config.training import ModelConfig
from training.base_model import load_text_encoder, load_tokenizer, make_tiny_base
from training.latents import encode_texts
from training.tiny.text import OUT, make_encoder
from training.tiny.text_lessons import FACTS, Lessons, draw_shot, make_tokenizer, tell

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(OUT)


@pytest.fixture(scope="module")
def encoder():
    return load_text_encoder(OUT)


def encode(tokenizer, encoder, *texts: str, tokens: int = 48) -> torch.Tensor:
    return encode_texts(tokenizer, encoder, texts, tokens)


def words(tokenizer, text: str) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)


def test_the_shipped_tokenizer_is_the_one_that_is_made(tokenizer):
    made = make_tokenizer()
    assert made.get_vocab() == tokenizer.get_vocab()
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<pad>", "</s>", "<unk>"]
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(made)))


def test_words_punctuation_and_letters(tokenizer):
    assert words(tokenizer, "Actor1 is a RED cat.") == [
        "actor1", "is", "a", "red", "cat", ".", "</s>"
    ]  # fmt: skip
    # "bow" must not be found in another word, and accents go.
    assert words(tokenizer, "bowl café") == [*"bowl", *"cafe", "</s>"]
    assert words(tokenizer, "") == ["</s>"]
    assert words(tokenizer, "雪 cat") == ["<unk>", "cat", "</s>"]


def test_captions_of_the_world_need_no_letters(tokenizer):
    draw = Draw("test")
    for _ in range(50):
        text = tell(draw_shot(draw)).words
        assert len(words(tokenizer, text)) == len(text.replace(".", " .").split()) + 1


def test_labels_follow_the_actor_whose_clause_it_is(tokenizer):
    lessons = Lessons(tokenizer)
    draw = Draw("two")
    shot = next(s for s in iter(lambda: draw_shot(draw), None) if len(s.acts) == 2)
    text = tell(shot)
    ids, labels = lessons.batch([text])
    told = tokenizer.convert_ids_to_tokens(ids[0])
    first, second = (torch.tensor(facts) for facts in text.facts)
    sentence = told.index("actor2")
    action = told.index("actor1", sentence)
    after = told.index("while")
    assert (labels[0, :sentence] == first).all()
    assert (labels[0, sentence:action] == second).all()
    assert (labels[0, action:after] == first).all()
    assert (labels[0, after:-1] == second).all()
    assert labels[0, -1].tolist() == [-100] * (len(FACTS) - 1) + [text.facts[0][-1]]


def test_strewn_words_change_no_other_label(tokenizer):
    lessons = Lessons(tokenizer)
    draw = Draw("strewn")
    texts = [tell(draw_shot(draw)) for _ in range(20)]
    plain, _ = lessons.batch(texts)
    strewn, labels = lessons.batch(texts, draw)
    own = set(plain.flatten().tolist())
    assert strewn.shape[1] > plain.shape[1]
    for row, more, told in zip(plain, strewn, labels, strict=True):
        kept = [word for word in more.tolist() if word in own]
        assert [w for w in kept if w] == [w for w in row.tolist() if w]
        assert (told[more == 0] == -100).all()


def test_padding_is_not_seen(tokenizer, encoder):
    text = "Actor1 is a red cat with a blue hat. Actor1 waves hello in a forest."
    long = encode(tokenizer, encoder, text, tokens=226)[0]
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        alone = encoder(ids)[0][0]
    torch.testing.assert_close(long[: len(alone)], alone, atol=1e-5, rtol=1e-5)
    assert torch.isfinite(long).all()


def test_colours_belong_to_their_things(tokenizer, encoder):
    texts = ("the red cat with a blue hat", "the blue cat with a red hat")
    told = encode(tokenizer, encoder, *texts)
    for word in ("the", "cat", "hat"):
        at = words(tokenizer, texts[0]).index(word)
        assert (told[0, at] - told[1, at]).square().mean() > 0.05


def test_outputs_are_of_order_one_and_in_half_precision_too(tokenizer, encoder):
    text = "Actor2 is an orange frog with pink glasses. Actor2 dances on the moon."
    length = len(words(tokenizer, text))
    told = encode(tokenizer, encoder, text)[0, :length]
    assert told.square().mean().item() == pytest.approx(1.0, abs=1e-3)
    half = encode(tokenizer, load_text_encoder(OUT, torch.bfloat16), text)[0, :length]
    assert (half.float() - told).square().mean() < 0.01


def test_unknown_words_work(tokenizer, encoder):
    told = encode(tokenizer, encoder, "A zebra 雪 juggles.", "A zebu 雪 juggles.")
    assert torch.isfinite(told).all()
    assert not torch.equal(told[0], told[1])


def test_a_sealed_encoder_does_not_see_padding_before_any_training():
    torch.manual_seed(3)
    encoder = make_encoder(20).eval()
    ids = torch.randint(1, 20, (2, 9))
    with torch.no_grad():
        alone = encoder(ids)[0]
        padded = encoder(torch.nn.functional.pad(ids, (0, 40)))[0][:, :9]
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_a_stock_pipeline_takes_both(tmp_path: Path):
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import CogVideoXPipeline

    model = ModelConfig(frames=5, height_px=32, width_px=32, text_tokens=16)
    base = make_tiny_base(tmp_path / "base", model)
    for piece in ("tokenizer", "text_encoder"):
        shutil.rmtree(base / piece)
        shutil.copytree(OUT / piece, base / piece)
    index = (base / "model_index.json").read_text()
    index = index.replace("ByT5Tokenizer", "PreTrainedTokenizerFast")
    (base / "model_index.json").write_text(index)
    pipe = CogVideoXPipeline.from_pretrained(base)
    told, _ = pipe.encode_prompt("a red cat", do_classifier_free_guidance=False)
    ours = encode_texts(load_tokenizer(OUT), load_text_encoder(OUT), ["a red cat"], told.shape[1])
    torch.testing.assert_close(told, ours)
