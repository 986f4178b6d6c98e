"""From the pixels that a loader read to what a network takes: crop boxes before decoding, the rest after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as v2

from data import augment


@dataclass(frozen=True)
class Pixels:
    """Augments and normalizes a batch on its device.

    Args:
        mean: of each channel, for values in [0, 1].
        std: of each channel, for values in [0, 1].
        device: where the batch is put.
        crop: pad and crop at random.
        flip: mirror half of the images.
        seed: of the augmentation.
    """

    mean: Sequence[float]
    std: Sequence[float]
    device: torch.device
    crop: bool = False
    flip: bool = False
    seed: int = 0
    _shift: Tensor = field(init=False, repr=False)
    _scale: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        channels = (1, len(self.mean), 1, 1)
        shift = 255 * torch.tensor(self.mean, device=self.device).view(channels)
        scale = 1 / (255 * torch.tensor(self.std, device=self.device)).view(channels)
        object.__setattr__(self, "_shift", shift)
        object.__setattr__(self, "_scale", scale)

    def __call__(self, images: Tensor, epoch: int, indices: NDArray[np.int64]) -> Tensor:
        """Images as a normalized float32 `Tensor[N, C, H, W]`, from uint8 ones, which it may overwrite."""
        # FFCV decodes to channels-last; one memory format for all loaders keeps results bit-equal.
        images = images.to(self.device, non_blocking=True).contiguous()
        if self.crop or self.flip:
            draws = augment.uniforms(self.seed, epoch, indices)
            images = augment.crop(images, draws) if self.crop else images
            images = augment.flip_(images, draws) if self.flip else images
        return images.float().sub_(self._shift).mul_(self._scale)


@dataclass(frozen=True)
class Crop:
    """Which part of a photograph becomes the image.

    Args:
        random: a random-resized-crop; otherwise the centre.
        share: of the shorter side that the central square covers; 0.875 is 224 out of 256.
        seed: of the random boxes.
    """

    random: bool
    share: float = 0.875
    seed: int = 0

    def boxes(
        self, epoch: int, indices: NDArray[np.int64], heights: ArrayLike, widths: ArrayLike, resolution: int
    ) -> NDArray[np.int64]:
        """Top, left, height and width of the part to keep, `int64[N, 4]`."""
        if not self.random:
            return augment.central_boxes(heights, widths, self.share, resolution)
        return augment.random_boxes(augment.uniforms(self.seed, epoch, indices), heights, widths)

    def cut(self, image: Image.Image, epoch: int, index: int, resolution: int) -> Tensor:
        """The part of an RGB image, `uint8 Tensor[3, resolution, resolution]`; the centre is exactly torchvision's."""
        width, height = image.size
        if self.random:
            box = self.boxes(epoch, np.array([index]), [height], [width], resolution)[0].tolist()
            return v2.resized_crop(v2.pil_to_tensor(image), *box, [resolution] * 2, antialias=True)
        top, left, rows, columns = augment.central_windows([height], [width], self.share, resolution)[0].tolist()
        window = (left, top, min(left + columns, width), min(top + rows, height))  # a rounding error is outside
        return v2.pil_to_tensor(image.resize((resolution,) * 2, Image.Resampling.BILINEAR, box=window))
