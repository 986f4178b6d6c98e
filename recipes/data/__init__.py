"""The data of the recipes: data sets, and loaders that give the same batches whichever of them reads.

`data.loader` has `make_loader`. Nothing here takes time to import: settings name what a loader can be
asked for.
"""

from typing import Literal

from data.errors import DataError

LoaderChoice = Literal["auto", "ffcv", "torch"]
Augment = Literal["auto", "none", "crop-flip", "resized-crop-flip"]

__all__ = ["Augment", "DataError", "LoaderChoice"]
