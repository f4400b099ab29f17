"""A picture of a whole video: one row per scene, a few frames of it under its prompt."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from curation.video import Frames

COLUMNS = 4
MAX_ROWS = 24
"""More scenes are shown evenly chosen; a JPEG is at most 65,535 pixels high."""
_TILE_WIDTH_PX = 240
_GAP_PX = 6
_MARGIN_PX = 16
_FONT_PX = 15
_LINE_PX = 20
_CAPTION_LINES = 2
_INDENT_PX = 28
_PAPER, _INK, _MUTED = (24, 25, 28), (236, 233, 227), (150, 146, 138)


class ContactSheet:
    """Gathers tiles scene by scene, so that no more than one scene is in memory.

    Args:
        scenes: What each scene shows, as many as will be added.
    """

    def __init__(self, scenes: Sequence[str]) -> None:
        self._scenes = scenes
        shown = np.linspace(0, len(scenes) - 1, min(len(scenes), MAX_ROWS)).round().astype(int)
        self._shown = set(shown.tolist())
        self._rows: list[tuple[int, list[Image.Image]]] = []
        self._count = 0

    def add(self, frames: Frames) -> None:
        """Take the tiles of the next scene, (T, height, width, 3) uint8."""
        if self._count in self._shown:
            picks = np.linspace(0, len(frames) - 1, COLUMNS).round().astype(int)
            height = max(1, round(frames.shape[1] * _TILE_WIDTH_PX / frames.shape[2]))
            tiles = [Image.fromarray(frames[i]).resize((_TILE_WIDTH_PX, height)) for i in picks]
            self._rows.append((self._count, tiles))
        self._count += 1

    def image(self) -> Image.Image:
        """The sheet, as wide for every video."""
        font = ImageFont.load_default(_FONT_PX)
        inner = COLUMNS * (_TILE_WIDTH_PX + _GAP_PX) - _GAP_PX
        captions = [_caption(self._scenes[number], font, inner) for number, _ in self._rows]
        heights = [
            _LINE_PX * len(lines) + _GAP_PX + tiles[0].height + _MARGIN_PX
            for lines, (_, tiles) in zip(captions, self._rows, strict=True)
        ]
        sheet = Image.new("RGB", (inner + 2 * _MARGIN_PX, sum(heights) + _MARGIN_PX), _PAPER)
        draw = ImageDraw.Draw(sheet)
        top = _MARGIN_PX
        for lines, (number, tiles), height in zip(captions, self._rows, heights, strict=True):
            draw.text((_MARGIN_PX, top), f"{number + 1}", _MUTED, font)
            for i, line in enumerate(lines):
                draw.text((_MARGIN_PX + _INDENT_PX, top + i * _LINE_PX), line, _INK, font)
            for i, tile in enumerate(tiles):
                left = _MARGIN_PX + i * (_TILE_WIDTH_PX + _GAP_PX)
                sheet.paste(tile, (left, top + _LINE_PX * len(lines) + _GAP_PX))
            top += height
        return sheet


def _caption(
    text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> list[str]:
    """The prompt in at most two lines; one empty line where the font cannot write it.

    Pillow's own font knows Latin letters. Boxes in place of others would say nothing.
    """
    if any(
        c.isprintable() and not c.isspace() and _drawn(c, font) == _drawn("\uffff", font)
        for c in set(text)
    ):
        return [""]
    letter = font.getlength(text) / max(1, len(text))
    columns = max(8, int(0.96 * (width - _INDENT_PX) / max(1, letter)))
    return textwrap.wrap(text, columns, max_lines=_CAPTION_LINES, placeholder=" …") or [""]


def _drawn(character: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> bytes:
    """The pixels of a character; of all that the font does not know they are the same."""
    mask: Any = font.getmask(character)
    return bytes(mask)
