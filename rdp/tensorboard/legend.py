"""The legend below a composed image: colour scale, and keys for lines and dots."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image as pil
from PIL import ImageDraw, ImageFont

from rdp.tensorboard.colors import INK, PAPER, Image, SignedScale, signed_colors


@lru_cache
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib and so is on every machine."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", name)), size)


class Legend:
    """Entries are set in rows, left to right, in the order in which they were added.

    Args:
        unit: Size of the letters in pixels; everything else is a multiple of it.
    """

    def __init__(self, unit: int) -> None:
        self.unit = unit
        self._entries: list[tuple[int, Callable[[pil.Image, int, int], None]]] = []

    def scale(self, text: str, scale: SignedScale) -> None:
        """Add a colour bar with its values."""
        unit, bar = self.unit, 15 * self.unit

        def draw(image: pil.Image, x: int, y: int) -> None:
            pen = ImageDraw.Draw(image)
            ramp = signed_colors(np.linspace(-1, 1, bar, dtype=np.float32))
            image.paste(pil.fromarray(np.broadcast_to(ramp, (unit, bar, 3)).copy()), (x, y - unit // 2))
            pen.rectangle((x, y - unit // 2, x + bar, y + unit // 2), outline=INK)
            halves = (-0.5, 0.5) if self._width(short(-scale.value(0.5))) < bar // 5 else ()
            for position in (-1, 0, 1, *halves):
                at = x + int((position + 1) / 2 * bar)
                anchor = {-1: "la", 1: "ra"}.get(position, "ma")
                pen.line((at, y + unit // 2, at, y + unit // 2 + 6), fill=INK, width=2)
                value = short(scale.value(position))
                pen.text((at, y + unit // 2 + 6), value, fill=INK, font=font(unit), anchor=anchor)
            pen.text((x + bar + unit // 2, y), text, fill=INK, font=font(unit), anchor="lm")

        self._entries.append((bar + unit // 2 + self._width(text), draw))

    def lines(self, text: str) -> None:
        """Add a key of an orange and a blue line: negative and positive weights."""

        def mark(pen: ImageDraw.ImageDraw, x: int, y: int) -> None:
            unit = self.unit
            for sign, dy in ((-1, -unit // 4), (1, unit // 4)):
                r, g, b = signed_colors(np.full(1, 0.8 * sign, np.float32))[0].tolist()
                pen.line((x, y + dy, x + 2 * unit, y + dy), fill=(r, g, b), width=max(unit // 5, 2))

        self._key(text, mark)

    def zero(self, text: str) -> None:
        """Add a key of a thin dark line."""
        self._key(text, lambda pen, x, y: pen.line((x, y, x + 2 * self.unit, y), fill=INK, width=2))

    def dots(self, text: str) -> None:
        """Add a key of a black dot and a white one."""

        def mark(pen: ImageDraw.ImageDraw, x: int, y: int) -> None:
            unit, radius = self.unit, self.unit // 4
            for center, color in ((x + unit // 2, INK), (x + 3 * unit // 2, PAPER)):
                pen.ellipse((center - radius, y - radius, center + radius, y + radius), fill=color, outline=INK)

        self._key(text, mark)

    def cross(self, text: str) -> None:
        """Add a key of a crossed cell."""

        def mark(pen: ImageDraw.ImageDraw, x: int, y: int) -> None:
            half, grey = self.unit // 2, (150, 150, 150)
            pen.rectangle((x + half, y - half, x + 3 * half, y + half), outline=grey, width=2)
            pen.line((x + half, y - half, x + 3 * half, y + half), fill=grey, width=2)
            pen.line((x + half, y + half, x + 3 * half, y - half), fill=grey, width=2)

        self._key(text, mark)

    def squares(self, text: str) -> None:
        """Add a key of small squares left of a map."""

        def mark(pen: ImageDraw.ImageDraw, x: int, y: int) -> None:
            unit, grey = self.unit, (150, 150, 150)
            pen.rectangle((x + unit, y - unit // 2, x + 2 * unit, y + unit // 2), outline=grey, width=2)
            pen.rectangle((x + unit // 3, y - unit // 2, x + 3 * unit // 4, y - unit // 12), fill=INK)

        self._key(text, mark)

    @property
    def widest(self) -> int:
        """Pixels that the longest entry takes."""
        return max((size for size, _ in self._entries), default=0)

    def draw(self, width: int, margin: int) -> Image:
        """The legend as an image of the given width, `uint8[height, width, 3]`; what does not fit starts a new row."""
        places, x, y = [], margin, int(1.3 * self.unit)
        for size, entry in self._entries:
            if x > margin and x + size > width - margin // 2:
                x, y = margin, y + int(2.4 * self.unit)
            places.append((entry, x, y))
            x += size + 2 * self.unit
        image = pil.new("RGB", (width, y + int(1.8 * self.unit)), PAPER)
        for entry, left, middle in places:
            entry(image, left, middle)
        return np.asarray(image)

    def _key(self, text: str, mark: Callable[[ImageDraw.ImageDraw, int, int], None]) -> None:
        def draw(image: pil.Image, x: int, y: int) -> None:
            pen = ImageDraw.Draw(image)
            mark(pen, x, y)
            pen.text((x + int(2.5 * self.unit), y), text, fill=INK, font=font(self.unit), anchor="lm")

        self._entries.append((int(2.5 * self.unit) + self._width(text), draw))

    def _width(self, text: str) -> int:
        return int(font(self.unit).getlength(text))


def short(value: float) -> str:
    """A number in few letters: two digits, thousands with a k."""
    if abs(value) >= 1e6 or 0 < abs(value) < 1e-3:
        return f"{value:.0e}"
    if abs(value) >= 1e3:
        return f"{value / 1e3:.2g}k"
    return f"{value:.2g}" if abs(value) < 99.5 else f"{value:.0f}"
