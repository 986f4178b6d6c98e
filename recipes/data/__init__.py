"""The data of the recipes: data sets, and loaders that give the same batches whichever of them reads."""

from data.errors import DataError
from data.folder_loader import lost_worker
from data.loader import Loader, make_loader

__all__ = ["DataError", "Loader", "lost_worker", "make_loader"]
