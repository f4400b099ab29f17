"""The embedded tokenizer and text encoder: a T5 that knows which word of a caption is about whom.

Usage: python -m training.tiny.text [--steps 2000] [--out assets/tiny/model]

A T5 of this size learns little from text alone, so it is taught what a text encoder is for here.
From every token's output, throw-away linear layers must tell the actor whose clause the token is in
(species, colour, accessory, its colour, action), the place, and the word itself. Captions are drawn
without end from all that ToonWorld could show; nothing is rendered. Afterwards the weights are
frozen: training the DiT reads them and never changes them.

CogVideoX feeds padding to the text encoder unmasked. Ours learns nothing about it, for it cannot
see it: two of the 64 channels are fixed so that padding gets no attention (:func:`seal`).

Shape legend: B captions, T text tokens, V words of the vocabulary.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from curation.toonworld.draws import Draw
from curation.toonworld.world import draw_episode
from training.tiny.stories import HELD_OUT_SEED, TRAIN_SEED
from training.tiny.text_lessons import (
    FACTS,
    FORMS,
    NOTHING,
    Lessons,
    Text,
    draw_shot,
    make_tokenizer,
    tell,
)

log = logging.getLogger(__name__)

OUT = Path("assets/tiny/model")
WIDTH, HEAD_WIDTH, LAYERS = 64, 16, 2
_WORD_WEIGHT = 0.5
"""Of the loss for the word itself, which is the easiest to tell."""
HELD_OUT_EPISODES = 300


def make_encoder(words: int) -> Any:
    """A T5 encoder whose outputs have a mean square of one and that does not see padding."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=words,
        d_model=WIDTH,
        d_kv=HEAD_WIDTH,
        d_ff=2 * WIDTH,
        num_layers=LAYERS,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
    )
    encoder: Any = T5EncoderModel(config)
    encoder.encoder.final_layer_norm.weight.requires_grad_(False)  # ones
    seal(encoder)
    return encoder


@torch.no_grad()
def seal(encoder: Any) -> None:
    """Fix what keeps padding out of sight; to be called after every step.

    Channel 0 says "padding" and channel 1 is constant; no layer writes to them. Each head spends
    one channel on their product, which is hugely negative where the key is padding.
    """
    embedding = encoder.shared.weight
    embedding[:, 0] = 0
    embedding[0] = 0
    embedding[0, 0] = 100
    embedding[:, 1] = 1
    for block in encoder.encoder.block:
        attention, forward = block.layer[0], block.layer[1]
        for norm in (attention.layer_norm, forward.layer_norm):
            norm.weight[:2] = 1
        attention.SelfAttention.o.weight[:2] = 0
        forward.DenseReluDense.wo.weight[:2] = 0
        for linear, channel, factor in (("q", 1, 16.0), ("k", 0, -16.0)):
            weight = getattr(attention.SelfAttention, linear).weight
            weight[::HEAD_WIDTH] = 0
            weight[::HEAD_WIDTH, channel] = factor


class Reader(nn.Module):
    """The throw-away linear layers.

    Their rows have unit length, so a fact is told clearly only if it makes up a good part of the
    output. Free rows would find it in a thousandth of the variance, where no DiT would look.

    Args:
        words: V.
    """

    def __init__(self, words: int) -> None:
        super().__init__()
        self._sizes = [*map(len, FACTS.values()), words]
        self._rows = nn.Parameter(torch.randn(sum(self._sizes), WIDTH))

    def forward(self, told: Tensor) -> tuple[Tensor, ...]:
        """Scores (B, T, kinds) for each fact, and for the word itself."""
        return (told @ functional.normalize(self._rows, dim=1).T).split(self._sizes, dim=-1)


def train(lessons: Lessons, encoder: Any, held_out: set[str], steps: int, batch: int) -> Reader:
    """Teach the encoder; returns what reads it."""
    reader = Reader(encoder.config.vocab_size)
    wanted = [p for p in [*encoder.parameters(), *reader.parameters()] if p.requires_grad]
    optimizer = torch.optim.AdamW(wanted, lr=3e-3, weight_decay=0.0, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 100) * (1 - step / steps)
    )
    draw = Draw("text", TRAIN_SEED)
    texts = (tell(draw_shot(draw), draw.choice(FORMS)) for _ in count())
    unseen = (text for text in texts if text.words not in held_out)
    for step in range(steps):
        ids, labels = lessons.batch(list(islice(unseen, batch)), draw)
        *facts, word = reader(encoder(ids).last_hidden_state)
        loss = _WORD_WEIGHT * functional.cross_entropy(
            word.flatten(0, 1), ids.flatten(), ignore_index=0
        )
        for k, scores in enumerate(facts):
            loss = loss + functional.cross_entropy(scores.flatten(0, 1), labels[..., k].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(wanted, 1.0)
        optimizer.step()
        schedule.step()
        seal(encoder)
        if step % 100 == 0 or step == steps - 1:
            log.info("text step=%d loss=%.4f", step, loss.item())
    return reader


@torch.no_grad()
def score(
    lessons: Lessons, encoder: Any, reader: Reader, texts: Sequence[Text]
) -> dict[str, float]:
    """Shares of tokens that tell a fact rightly, of captions where all do, and of variance.

    ``NAME share`` is how much of the outputs' variance lies between the means of a fact's kinds.
    """
    ids, labels = lessons.batch(texts)
    told = encoder(ids).last_hidden_state
    *facts, word = reader(told)
    spread = told[ids != 0].var(0, unbiased=False).sum()
    found: dict[str, float] = {}
    whole = torch.ones(len(ids), dtype=torch.bool)
    for k, (name, scores) in enumerate(zip(FACTS, facts, strict=True)):
        known = labels[..., k] != NOTHING
        right = scores.argmax(-1) == labels[..., k]
        if known.any():
            found[name] = right[known].float().mean().item()
            kinds = functional.one_hot(labels[..., k][known]).float()
            means = (kinds.T @ told[known]) / kinds.sum(0)[:, None].clamp(min=1)
            found[f"{name} share"] = ((kinds @ means).var(0, unbiased=False).sum() / spread).item()
        whole &= (right | ~known).all(1)
    found["whole caption"] = whole.float().mean().item()
    found["word"] = (word.argmax(-1) == ids)[ids != 0].float().mean().item()
    found["mean square"] = told[ids != 0].square().mean().item()
    return found


def main() -> None:
    """Train, score, write."""
    parser = argparse.ArgumentParser(description="Train the embedded text encoder.")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    torch.manual_seed(TRAIN_SEED)
    tokenizer = make_tokenizer()
    lessons = Lessons(tokenizer)
    shots = [s for i in range(HELD_OUT_EPISODES) for s in draw_episode(HELD_OUT_SEED, i).shots]
    held_out = {form: [tell(shot, form) for shot in shots] for form in FORMS}
    encoder = make_encoder(len(tokenizer))
    started = time.process_time()
    known = {text.words for form in ("whole", "short") for text in held_out[form]}
    reader = train(lessons, encoder, known, args.steps, args.batch)
    log.info("text trained cpu_s=%.0f", time.process_time() - started)
    for form, texts in held_out.items():  # actors alone are few: all are trained on
        scores = score(lessons, encoder, reader, texts)
        told = " ".join(f"{name.replace(' ', '_')}={value:.4f}" for name, value in scores.items())
        log.info("text form=%s captions=%d %s", form, len(texts), told)
    tokenizer.save_pretrained(args.out / "tokenizer")
    encoder.save_pretrained(args.out / "text_encoder")


if __name__ == "__main__":
    main()
