"""A JSON array of any size, read one element at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from schemas.errors import InputError

_CHUNK = 1 << 20
_BEHIND = frozenset(" \t\n\r,]")
"""What may follow an element."""
_SPACE = re.compile(r"[ \t\n\r]*")


def read_array(path: Path) -> Iterator[Any]:
    """The elements of the array that a file holds.

    Raises:
        InputError: The file cannot be read, or holds no JSON array.
    """
    count = 0
    try:
        with path.open(encoding="utf-8-sig") as text:
            for element in _elements(_Window(text)):
                count += 1
                yield element
    except (OSError, ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise InputError(
            "the list cannot be read",
            where=path,
            found=f"{error}, after element {count}",
            expected="a JSON array in UTF-8",
        ) from error


class _Window:
    """The part of a text that is looked at: ``buffer`` from ``at``."""

    def __init__(self, text: TextIO) -> None:
        self._text = text
        self.buffer = ""
        self.at = 0

    def fill(self) -> bool:
        """Read on, at least as much again as there is; False at the end of the text."""
        more = self._text.read(max(_CHUNK, len(self.buffer) - self.at))
        if more:
            self.buffer, self.at = self.buffer[self.at :] + more, 0
        return bool(more)

    def next(self) -> str:
        """The next character that is no space, or nothing at the end."""
        while True:
            space = _SPACE.match(self.buffer, self.at)
            assert space is not None
            self.at = space.end()
            if self.at < len(self.buffer) or not self.fill():
                return self.buffer[self.at : self.at + 1]

    def take(self, expected: str) -> str:
        """Step over one of the expected characters."""
        found = self.next()
        if not found or found not in expected:
            raise ValueError(f"{found!r} where one of {expected!r} should be")
        self.at += 1
        return found


def _elements(window: _Window) -> Iterator[Any]:
    decoder = json.JSONDecoder()
    window.take("[")
    if window.next() == "]":
        window.take("]")
    else:
        while True:
            yield _element(window, decoder)
            if window.take(",]") == "]":
                break
    if window.next():
        raise ValueError("text behind the array")


def _element(window: _Window, decoder: json.JSONDecoder) -> Any:
    window.next()
    while True:
        try:
            value, end = decoder.raw_decode(window.buffer, window.at)
        except ValueError:
            if window.fill():
                continue
            raise
        # A number may go on behind what was read so far: "1.5" of "1.5e3", or even of "1.5e".
        if window.buffer[end : end + 1] in _BEHIND or not window.fill():
            window.at = end
            return value
