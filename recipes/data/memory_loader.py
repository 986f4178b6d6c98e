"""The loader of small images: all of them in memory, augmented a whole batch at a time on the device."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b

import torch
from torch import Tensor

from data.datasets import Arrays
from data.sampling import Sampler
from data.transforms import Pixels


class MemoryLoader:
    """Batches of images held on the device; see `data.Loader`."""

    kind = "memory"

    def __init__(self, arrays: Arrays, sampler: Sampler, pixels: Pixels, classes: int) -> None:
        self._images = torch.from_numpy(arrays.images).to(pixels.device)
        self._labels = torch.from_numpy(arrays.labels).to(pixels.device)
        self._sampler = sampler
        self._pixels = pixels
        self.samples = len(sampler.indices)
        self.classes = classes
        self.channels = arrays.images.shape[1]
        digest = blake2b(arrays.labels.tobytes(), digest_size=16)
        digest.update(arrays.images.data)
        self.listing = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._sampler)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """See `data.Loader.epoch`."""
        for indices in self._sampler.batches(epoch)[start:]:
            rows = torch.from_numpy(indices).to(self._pixels.device)
            yield self._pixels(self._images[rows], epoch, indices), self._labels[rows]

    def close(self) -> None:
        """Nothing to end: no thread or process is used."""
