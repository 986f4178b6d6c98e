"""FFCV's compiled decoders as a function: the indices of a batch, and the boxes to cut, to pixels. Imports FFCV.

The thread, the queue, the order and the randomness that FFCV puts around them are left out; `ffcv_loader` has its own.

Source: ffcv 1.0.2, `ffcv/loader/epoch_iterator.py` and `ffcv/fields/rgb_image.py`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from ffcv.fields.ndarray import NDArrayDecoder
from ffcv.fields.rgb_image import IMAGE_MODES, ResizedCropRGBImageDecoder
from ffcv.libffcv import imdecode, resize_crop
from ffcv.loader import Loader
from ffcv.loader.epoch_iterator import select_buffer
from ffcv.memory_managers.os_cache import OSCacheManager
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.compiler import Compiler
from ffcv.pipeline.state import State
from numpy.typing import NDArray
from torch import Tensor

from data.beton import Beton
from data.errors import DataError
from data.sampling import Indices

Buffers = dict[str, dict[int, Any]]
BOX = slice(4)  # columns of the decoder's third buffer: top, left, height, width
FAILED = 4  # and what libjpeg-turbo returned

_ONE_BATCH_AT_A_TIME = threading.Lock()  # numba's own threads abort the process on concurrent use


class Pipeline:
    """Decodes batches of a file.

    Args:
        beton: the file.
        batch_size: of the largest batch.
        workers: threads; no more than numba has.
    """

    def __init__(self, beton: Beton, batch_size: int, workers: int) -> None:
        OSCacheManager.compile_reader = _compile_reader
        self._beton = beton
        self._batch_size = batch_size
        self._workers = max(1, min(workers, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]  # more would raise
        self._decoder = NDArrayDecoder() if beton.shape else BoxCropDecoder((1, 1))
        self._loader = Loader(
            str(beton.path),
            batch_size=batch_size,
            num_workers=self._workers,
            os_cache=True,
            drop_last=False,
            pipelines={"image": [self._decoder], "label": None},
        )
        with self._loader.memory_manager.schedule_epoch([]) as context:
            self._storage = context.state

    def use_this_thread(self) -> None:
        """Prepare the calling thread: numba counts its workers for each thread anew."""
        numba.set_num_threads(self._workers)

    def allocate(self, resolution: int) -> Buffers:
        """Memory for a batch of photographs of that size; arrays have their own."""
        if self._beton.shape is None:
            self._decoder.output_size = (resolution, resolution)
        return self._loader.graph.allocate_memory(self._batch_size, 1)

    def run(self, indices: Indices, boxes: NDArray[np.int64] | None, buffers: Buffers, pin: bool) -> Tensor:
        """Decode a batch.

        Args:
            indices: of the samples, `int64[N]`.
            boxes: of photographs, `int64[N, 4]`: top, left, height and width of what to cut out.
            buffers: of `allocate`; free again when this returns.
            pin: put the result into page-locked memory, from where a GPU can copy it by itself.

        Returns:
            uint8 `Tensor[N, C, H, W]`.

        Raises:
            DataError: a JPEG is damaged.
        """
        arguments = {
            "batch_indices": indices.astype(np.uint64),
            "storage_state": self._storage,
            "metadata": self._loader.reader.metadata,
        }
        for kind, prefix in (("operation", "memory"), ("shared", "shared_memory")):
            for node, buffer in buffers[kind].items():
                arguments[f"{prefix}_{node}"] = select_buffer(buffer, 0, len(indices))
        node = self._loader.graph.operation_to_node[self._decoder][0].id
        if boxes is not None:
            arguments[f"memory_{node}"][2][:, BOX] = boxes

        (stage, _), *_rest = self._loader.code[0]
        with _ONE_BATCH_AT_A_TIME:
            images = torch.from_numpy(stage(**arguments)[0])
        if boxes is not None:
            images = images.permute(0, 3, 1, 2)
            failed = np.flatnonzero(arguments[f"memory_{node}"][2][:, FAILED])
            if len(failed):
                raise DataError(
                    f"image {indices[failed[0]]} of {self._beton.path} is not a whole JPEG; write the file again"
                )
        return images.pin_memory() if pin else images.clone()


class BoxCropDecoder(ResizedCropRGBImageDecoder):
    """Decodes an image, cuts a given box out of it and resizes that to `output_size`.

    FFCV's own random crop draws from numba's generator of whichever thread runs it, which no seed reaches; and it
    ignores what libjpeg-turbo returns, so that a damaged image is silently the rest of an earlier one.
    """

    get_crop_generator = None  # abstract in the base; boxes come from outside

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, tuple[AllocationQuery, ...]]:
        """Ask for a buffer of boxes beside the base's two for pixels."""
        state, (output, scratch) = super().declare_state_and_memory(previous_state)
        return state, (output, scratch, AllocationQuery((FAILED + 1,), np.dtype("<i8")))

    def generate_code(self) -> Callable[..., Any]:
        """The function that numba compiles."""
        jpeg = IMAGE_MODES["jpg"]
        read = self.memory_read
        parallel_range = Compiler.get_iterator()
        decode_jpeg = Compiler.compile(imdecode)
        resize = Compiler.compile(resize_crop)

        def decode(batch_indices, buffers, metadata, storage_state):  # type: ignore[no-untyped-def]
            destination, scratch, boxes = buffers
            for row in parallel_range(len(batch_indices)):
                field = metadata[batch_indices[row]]
                data = read(field["data_ptr"], storage_state)
                height, width = np.uint32(field["height"]), np.uint32(field["width"])
                boxes[row, FAILED] = 0
                if field["mode"] == jpeg:
                    pixels = scratch[row]
                    boxes[row, FAILED] = decode_jpeg(
                        data, pixels, height, width, height, width, 0, 0, 1, 1, False, False
                    )
                    pixels = pixels.reshape(-1)[: 3 * height * width].reshape(height, width, 3)
                else:
                    pixels = data.reshape(height, width, 3)
                top, left, box_height, box_width = boxes[row, 0], boxes[row, 1], boxes[row, 2], boxes[row, 3]
                resize(pixels, top, top + box_height, left, left + box_width, destination[row])
            return destination[: len(batch_indices)]

        decode.is_parallel = True  # type: ignore[attr-defined]
        return decode


def _compile_reader(_: OSCacheManager) -> Callable[..., Any]:
    """The function that finds an image's bytes in the mapped file.

    FFCV's own makes numba's type of all byte arrays read-only, in the whole process: the hashes under which numba keeps
    compiled functions change, and freeing a loader prints "Exception ignored in".
    """

    def read(address, mapped):  # type: ignore[no-untyped-def]
        data, pointers, sizes = mapped
        return data[address : address + sizes[np.searchsorted(pointers, address)]]

    return Compiler.compile(read)
