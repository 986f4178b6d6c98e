"""The data of the recipes: data sets, and loaders that give the same batches whichever of them reads."""

from data.errors import DataError
from data.loader import Loader, make_loader

__all__ = ["DataError", "Loader", "make_loader"]
