"""The loader of photographs without FFCV: decoded by PIL, cropped and resized by torchvision, in worker processes."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.errors import DataError
from data.folder import Folder, read_image
from data.sampling import Indices, Sampler
from data.transforms import Crop, Pixels


@dataclass(frozen=True)
class _Request:
    """A batch for a worker to make; it holds all that the images depend on."""

    epoch: int
    indices: Indices
    resolution: int


def _outlive_signals(worker: int) -> None:
    """Ctrl-C and torchrun signal the whole process group; the main process still wants batches, to save and end."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class FolderLoader:
    """Batches of a folder of images; see `data.Loader`."""

    kind = "folder"

    def __init__(
        self,
        folder: Folder,
        sampler: Sampler,
        pixels: Pixels,
        crop: Crop,
        resolution: Callable[[int], int],
        workers: int,
    ) -> None:
        self._labels = torch.from_numpy(folder.labels)
        self._sampler = sampler
        self._pixels = pixels
        self._resolution = resolution
        self._requests: list[_Request] = []
        # A request goes to a worker as one "index", so that workers live through all epochs and still know which it is.
        self._loader: DataLoader[Any] | None = DataLoader(
            _Images(folder.paths, crop),
            sampler=self._requests,
            batch_size=None,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=pixels.device.type == "cuda",
            prefetch_factor=2 if workers > 0 else None,
            worker_init_fn=_outlive_signals,
        )
        self.samples = len(sampler.indices)
        self.classes = len(folder.classes)
        self.channels = 3

    def __len__(self) -> int:
        return len(self._sampler)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """See `data.Loader.epoch`."""
        if self._loader is None:
            raise RuntimeError("this loader is closed")
        batches = self._sampler.batches(epoch)[start:]
        self._requests[:] = [_Request(epoch, indices, self._resolution(epoch)) for indices in batches]
        for indices, images in zip(batches, self._loader, strict=True):
            if isinstance(images, DataError):
                raise images
            labels = self._labels[torch.from_numpy(indices)].to(self._pixels.device)
            yield self._pixels(images, epoch, indices), labels

    def close(self) -> None:
        """End the worker processes."""
        self._loader = None


class _Images(Dataset[Tensor | DataError]):
    def __init__(self, paths: list[Path], crop: Crop) -> None:
        self._paths = paths
        self._crop = crop

    def __getitem__(self, request: _Request) -> Tensor | DataError:
        try:
            return torch.stack([self._image(request, index) for index in request.indices])
        except DataError as error:
            return error  # raised by the consumer: DataLoader would wrap it in a traceback of the worker

    def _image(self, request: _Request, index: int) -> Tensor:
        stored, _ = read_image(self._paths[index])
        image = stored if stored.mode == "RGB" else stored.convert("RGB")
        return self._crop.cut(image, request.epoch, int(index), request.resolution)
