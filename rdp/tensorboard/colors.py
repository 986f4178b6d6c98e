"""The colours of all panels: safe for colour-blind readers, and for print in grey where only magnitude matters."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib.colors import LinearSegmentedColormap

Image = npt.NDArray[np.uint8]
"""`uint8[height, width, 3]`, RGB."""

Floats = npt.NDArray[np.float32]

SIGNED = LinearSegmentedColormap.from_list(
    "rdp_signed", ["#7f3b08", "#e08214", "#fdd0a2", "#ffffff", "#b3d3ea", "#3f8fc5", "#053061"]
)
"""Orange is negative, blue positive, white zero: the pair that all common kinds of colour blindness tell apart."""

MAGNITUDE = "cividis"
"""matplotlib's colour map for distances and similarities."""

UNDEFINED = "#d0d0d0"
"""Where there is nothing to compare."""

LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
"""For curves; from Okabe and Ito, Color Universal Design (2008)."""

INK = (34, 34, 34)
PAPER = (255, 255, 255)

_TABLE: Image = np.rint(SIGNED(np.linspace(0, 1, 511))[:, :3] * 255).astype(np.uint8)


@dataclass(frozen=True)
class SignedScale:
    """A colour scale for values of both signs over several orders of magnitude: linear near 0, then logarithmic.

    Attributes:
        limit: Magnitude that gets full colour; larger ones get the same.
        linear: Magnitude up to which the scale is linear.
    """

    limit: float
    linear: float

    @staticmethod
    def of(values: npt.NDArray[np.floating], orders: float = 3) -> SignedScale:
        """The scale that is linear for the smallest tenth of the nonzero values and saturated for the largest 1 %.

        Both limits are round numbers, so that pictures of one training mostly share their scale.

        Args:
            values: Any shape.
            orders: Factors of ten that the logarithmic part spans at most.
        """
        magnitudes = np.abs(values[values != 0])
        if not magnitudes.size:
            return SignedScale(1.0, 1.0)
        low, high = np.quantile(magnitudes, (0.1, 0.99)).tolist()
        limit = rounded(high)
        return SignedScale(limit, min(max(rounded(low), limit / 10**orders), limit))

    def positions(self, values: Floats) -> Floats:
        """Map values to [-1, 1]."""
        scaled = np.arcsinh(values / self.linear) / np.arcsinh(self.limit / self.linear)
        positions: Floats = np.clip(scaled, -1, 1).astype(np.float32)
        return positions

    def value(self, position: float) -> float:
        """The value that lies at a position in [-1, 1]."""
        return float(np.sinh(position * np.arcsinh(self.limit / self.linear)) * self.linear)


def rounded(value: float) -> float:
    """The least of 1, 2, 5, 10, ... times a power of ten that is not below a positive value (but for rounding)."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(factor * power for factor in (1, 2, 5, 10) if value <= factor * power * (1 + 1e-9))


def signed_colors(positions: Floats) -> Image:
    """The colours of positions in [-1, 1], any shape, as `uint8[..., 3]`."""
    return _TABLE[np.rint(255 + 255 * positions).astype(np.int16)]
