"""Texts longer than a model reads: cut off, or read in pieces.

Shape legend: N texts, D vector length.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float32]
LongText = Literal["truncate", "chunk"]

_TEXTS_AT_ONCE = 64
_SENTENCE_END = re.compile(r"(?<=[.!?。！？])\s+")


def text_pieces(text: str, mode: LongText, fits: Callable[[str], bool]) -> list[str]:
    """The pieces a text is read in; one where it fits, or where the rest is cut off.

    With ``chunk`` whole sentences are put together as long as they fit. A sentence that does not
    fit alone is put together from words likewise; only a single word may be too long for ``fits``.
    """
    if mode == "truncate" or fits(text):
        return [text]
    sentences: list[str] = []
    for sentence in _SENTENCE_END.split(text.strip()):
        sentences += [sentence] if fits(sentence) else _packed(sentence.split(), fits)
    return _packed(sentences, fits)


def embed_long(
    texts: Sequence[str],
    mode: LongText,
    fits: Callable[[str], bool],
    encode: Callable[[list[str]], Vector],
) -> list[Vector]:
    """One (D,) unit vector per text: that of its piece, or the unit mean of its pieces' vectors.

    Args:
        texts: Any number of texts.
        mode: What is done to long ones.
        fits: Whether the model reads all of a text.
        encode: N texts to (N, D) unit vectors; given a limited number at a time.
    """
    pieces = [text_pieces(text, mode, fits) for text in texts]
    flat = [piece for of_text in pieces for piece in of_text]
    encoded = [
        vector
        for i in range(0, len(flat), _TEXTS_AT_ONCE)
        for vector in encode(flat[i : i + _TEXTS_AT_ONCE])
    ]
    vectors: list[Vector] = []
    for of_text in pieces:
        own, encoded = encoded[: len(of_text)], encoded[len(of_text) :]
        vectors.append(own[0] if len(own) == 1 else unit(np.mean(own, axis=0)))
    return vectors


def unit(vector: npt.NDArray[np.floating]) -> Vector:
    """Scaled to length one."""
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def _packed(parts: Sequence[str], fits: Callable[[str], bool]) -> list[str]:
    packed: list[str] = []
    for part in parts:
        if packed and fits(f"{packed[-1]} {part}"):
            packed[-1] += f" {part}"
        else:
            packed.append(part)
    return packed
