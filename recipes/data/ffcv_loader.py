"""The FFCV loader: FFCV's compiled decoders, with the thread, the order and the randomness around them ours.

FFCV 1.0.2 is fast and unforgiving; `docs/data.md` lists what it does wrong and how each is mended here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from data.beton import Beton
from data.errors import DataError
from data.sampling import Indices, Sampler
from data.transforms import Crop, Pixels

if TYPE_CHECKING:
    from data.ffcv_pipeline import Buffers, Pipeline

BATCHES_AHEAD = 3  # FFCV's own default
APT_PACKAGES = "libopencv-imgproc-dev libturbojpeg0-dev pkg-config g++"


def ffcv_is_installed() -> bool:
    """Whether FFCV can be imported, without the seconds that importing takes."""
    return find_spec("ffcv") is not None


class FFCVLoader:
    """Batches of a `.beton` file; see `data.Loader`.

    Compiling its decoder takes some seconds, at the first batch: make a loader once, not once an epoch.
    """

    kind = "ffcv"

    def __init__(
        self,
        beton: Beton,
        sampler: Sampler,
        pixels: Pixels,
        crop: Crop,
        resolution: Callable[[int], int],
        classes: int,
        workers: int,
    ) -> None:
        self._beton = beton
        self._labels = torch.from_numpy(beton.labels)
        self._sampler = sampler
        self._pixels = pixels
        self._crop = crop
        self._resolution = resolution
        self._pipeline = _compile(beton, sampler.batch_size, workers)
        self._thread = ThreadPoolExecutor(1, "ffcv", initializer=self._pipeline.use_this_thread)
        self.samples = len(sampler.indices)
        self.classes = classes
        self.channels = beton.shape[0] if beton.shape else 3
        self.listing = beton.listing()

    def __len__(self) -> int:
        return len(self._sampler)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """See `data.Loader.epoch`."""
        buffers = self._pipeline.allocate(self._resolution(epoch))
        pending: deque[tuple[Indices, Future[Tensor]]] = deque()
        try:
            for indices in self._sampler.batches(epoch)[start:]:
                pending.append((indices, self._thread.submit(self._decode, epoch, indices, buffers)))
                if len(pending) > BATCHES_AHEAD:
                    yield self._finish(epoch, *pending.popleft())
            while pending:
                yield self._finish(epoch, *pending.popleft())
        finally:  # also where the consumer breaks out of its loop
            for _, batch in pending:
                batch.cancel()

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)

    def _decode(self, epoch: int, indices: Indices, buffers: Buffers) -> Tensor:
        boxes = None
        if self._beton.shape is None:
            heights, widths = self._beton.heights[indices], self._beton.widths[indices]
            boxes = self._crop.boxes(epoch, indices, heights, widths, self._resolution(epoch))
        return self._pipeline.run(indices, boxes, buffers, pin=self._pixels.device.type == "cuda")

    def _finish(self, epoch: int, indices: Indices, batch: Future[Tensor]) -> tuple[Tensor, Tensor]:
        images = batch.result()  # raises here what was raised in the thread
        return self._pixels(images, epoch, indices), self._labels[torch.from_numpy(indices)].to(self._pixels.device)


def _compile(beton: Beton, batch_size: int, workers: int) -> Pipeline:
    with _torch_threads_kept():
        try:
            import numba

            # Its own threads, not TBB's, which it prefers: a process that forked after using those (DataLoader does)
            # waits forever when it exits. FFCV starts them when it is imported.
            numba.config.THREADING_LAYER = "workqueue"  # type: ignore[attr-defined]
            from data.ffcv_pipeline import Pipeline
        except ImportError as error:
            raise DataError(
                f"FFCV cannot be imported ({error}); install it with `apt-get install {APT_PACKAGES}` and "
                "`bash tools/install_ffcv.sh`, or use --loader torch"
            ) from error
        return Pipeline(beton, batch_size, workers)


@contextmanager
def _torch_threads_kept() -> Iterator[None]:
    """FFCV sets torch's thread count to its own, when it is imported and when a loader is made."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
