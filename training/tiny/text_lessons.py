"""What the embedded text encoder is taught: captions, their words, and what each word is about.

Shape legend: B captions, T text tokens.
"""

from __future__ import annotations

import csv
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from curation.toonworld.captions import caption, describe
from curation.toonworld.draws import Draw
from curation.toonworld.world import (
    ACCESSORIES,
    ACTIONS,
    COLORS,
    PLACES,
    SPECIES,
    Act,
    Actor,
    Shot,
    Style,
)

REAL_CAPTIONS = Path("assets/samples/captions.csv")
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
TOKENS = 226
"""Longest text; CogVideoX's."""

FACTS: dict[str, tuple[str, ...]] = {
    "species": SPECIES,
    "colour": COLORS,
    "accessory": ACCESSORIES,
    "accessory colour": COLORS,
    "action": ACTIONS,
    "place": PLACES,
}
"""What is told by each token; all but the last are an actor's."""
Form = Literal["whole", "short", "actor"]
FORMS: tuple[Form, ...] = ("whole", "short", "actor")
"""A caption as it is, one without names, and one actor's description alone."""
_STREWN = 0.5
"""Share of captions in which foreign words are strewn."""
NOTHING = -100
"""Label of a fact that a token has not."""
_ANY = Style("plain", "none", "smooth", "stout", "noon")


@dataclass(frozen=True)
class Text:
    """A caption, and the facts of the actors it names, in order, as numbers."""

    words: str
    facts: tuple[tuple[int, ...], ...]


def make_tokenizer() -> Any:
    """Whole words of ToonWorld and of the sample clips' captions; any other word by its letters.

    Lower case, punctuation apart, ``</s>`` at the end as in T5. Returns a
    ``PreTrainedTokenizerFast``.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [PAD, END, UNKNOWN, *own_words(), *foreign_words()]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words))}
    # Byte-pair encoding without pairs: what is no word as a whole falls into its letters.
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token=UNKNOWN, ignore_merges=True))
    tokenizer.normalizer = normalizers.Sequence(  # type: ignore[assignment]
        [normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=f"$A {END}", special_tokens=[(END, vocabulary[END])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        model_max_length=TOKENS,
    )


def own_words() -> list[str]:
    """All words of ToonWorld's captions, and the full stop."""
    draw = Draw("words")
    return sorted(set(_split(" ".join(caption(draw_shot(draw)) for _ in range(1000)))))


def foreign_words() -> list[str]:
    """Words of the sample clips' captions, letters and digits, less ToonWorld's own words."""
    with REAL_CAPTIONS.open(newline="", encoding="utf-8") as file:
        told = " ".join(row["caption"] for row in csv.DictReader(file))
    found = {*_split(told), *string.ascii_lowercase, *string.digits, *string.punctuation}
    return sorted(found - set(own_words()))


def draw_shot(draw: Draw) -> Shot:
    """A shot as captions see it: anyone, with anything, doing anything anywhere."""
    numbers = draw.choice([(1,), (2,), (1, 2), (1, 2)])
    acts = tuple(Act(number, _draw_actor(draw), draw.choice(ACTIONS)) for number in numbers)
    return Shot(acts, draw.choice(PLACES), "wide", _ANY, "", 0.0, 0.0, 2.0)


def tell(shot: Shot, form: Form = "whole") -> Text:
    """A shot's caption; ``short``: its last sentence, with descriptions in place of names."""
    words = caption(shot)
    facts = tuple(
        (
            SPECIES.index(act.actor.species),
            COLORS.index(act.actor.color),
            ACCESSORIES.index(act.actor.accessory),
            COLORS.index(act.actor.accessory_color),
            ACTIONS.index(act.action),
            PLACES.index(shot.place),
        )
        for act in shot.acts
    )
    if form == "short":
        words = words.split(". ")[-1]
        for act in shot.acts:
            words = words.replace(f"Actor{act.number}", describe(act.actor))
    if form == "actor":
        # "the" in every other one; nothing is said of action and place.
        words = describe(shot.acts[0].actor)
        if facts[0][-1] % 2:
            words = f"the {words.partition(' ')[2]}"
        facts = ((*facts[0][:4], NOTHING, NOTHING),)
    return Text(words, facts)


class Lessons:
    """Batches of captions with what each token should tell.

    Args:
        tokenizer: Of :func:`make_tokenizer`.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        number = tokenizer.get_vocab()
        self._second = {number["actor2"], number["while"]}
        self._first = number["actor1"]
        self._foreign = [number[word] for word in foreign_words()]

    def batch(self, texts: Sequence[Text], draw: Draw | None = None) -> tuple[Tensor, Tensor]:
        """Token numbers (B, T) and labels (B, T, facts), padded to the longest.

        Args:
            texts: B captions.
            draw: Strews foreign words into some of them; None: into none.
        """
        rows: list[tuple[list[int], list[list[int]]]] = []
        for text, ids in zip(texts, self._ids(texts), strict=True):
            labels = self._labels(ids, text.facts)
            if draw is not None and draw.chance(_STREWN):
                for _ in range(draw.choice(range(1, 9))):
                    at = draw.choice(range(len(ids)))
                    ids.insert(at, draw.choice(self._foreign))
                    labels.insert(at, labels[max(0, at - 1)])
            rows.append((ids, labels))
        longest = max(len(ids) for ids, _ in rows)
        blank = [NOTHING] * len(FACTS)
        return (
            torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rows]),
            torch.tensor([labels + [blank] * (longest - len(ids)) for ids, labels in rows]),
        )

    def _ids(self, texts: Sequence[Text]) -> list[list[int]]:
        return self._tokenizer([text.words for text in texts]).input_ids

    def _labels(self, ids: Sequence[int], facts: Sequence[Sequence[int]]) -> list[list[int]]:
        """A token is about the actor named last; ``while`` begins the second one's clause."""
        labels: list[list[int]] = []
        who = 0
        for word in ids:
            if word in self._second or word == self._first:
                who = min(int(word in self._second), len(facts) - 1)
            labels.append(list(facts[who]))
        labels[-1][:-1] = [NOTHING] * (len(FACTS) - 1)  # </s> is about nobody
        return labels


def _draw_actor(draw: Draw) -> Actor:
    return Actor(
        draw.choice(SPECIES), draw.choice(COLORS), draw.choice(ACCESSORIES), draw.choice(COLORS)
    )


def _split(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text.lower())
