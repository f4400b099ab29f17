"""Random choices that depend on names alone: no global state, no order of calls between things."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


class Draw:
    """The choices of one named thing.

    Everything comes from uniform numbers: NumPy promises the bits behind them to be the same in all
    its versions, which it does not for its other distributions.

    Args:
        names: What the choices are for, from the outside in, such as a seed, ``"episode"``, 3.
    """

    def __init__(self, *names: str | int) -> None:
        key = hashlib.sha256("/".join(map(str, ("toonworld", *names))).encode()).digest()
        self._generator = np.random.Generator(np.random.PCG64(int.from_bytes(key[:16], "little")))

    def number(self, low: float = 0.0, high: float = 1.0) -> float:
        """A number in ``[low, high)``."""
        return low + (high - low) * float(self._generator.random())

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.number() < probability

    def choice(self, options: Sequence[T]) -> T:
        """One of the options, each as likely."""
        return options[int(self.number(0, len(options)))]
