"""The loader of photographs without FFCV: decoded by PIL, cropped and resized by torchvision, in worker processes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.errors import DataError
from data.folder import Folder, read_image
from data.lifetime import die_with
from data.sampling import Indices, Sampler
from data.transforms import Crop, Pixels

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)  # that ask a whole process group to stop


@dataclass(frozen=True)
class _Request:
    """A batch for a worker to make; it holds all that the images depend on."""

    epoch: int
    indices: Indices
    resolution: int


def _begin_worker(worker: int) -> None:
    """A worker ends with its main process and only with it.

    Ctrl-C, schedulers and torchrun signal the whole process group; the main process still wants batches, to save and
    end. It ends its workers by SIGKILL: they hold nothing that could be lost.
    """
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)  # of `_signals_wait`
    parent = multiprocessing.parent_process()
    assert parent is not None
    if parent.pid == os.getppid():
        die_with(parent.pid)
    else:  # Python's "forkserver" started it for the main process
        threading.Thread(target=_end_after, args=(parent,), daemon=True).start()


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """Within the context, signals to this thread wait, and so do those to processes that it forks, which inherit that.

    A worker would otherwise be ended by one that comes before it ignores them, some hundredths of a second after its
    start. Python's "forkserver" keeps what it inherits for all later processes of anyone, so there they do not wait.
    """
    if multiprocessing.get_start_method() != "fork":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_after(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _end_workers(loader: DataLoader[Any]) -> None:
    """Kill a loader's workers, in any state that they are in.

    DataLoader's own way asks them to end, by a lock that one of them may hold as it dies (of memory, say), waits
    seconds for each, and is left out when Python exits; and Python then waits for what ignores SIGTERM.
    """
    iterator: Any = loader._iterator
    if iterator is None or iterator._shutdown:
        return
    iterator._shutdown = True  # so its own way is not taken any more
    if iterator._worker_pids_set:  # so torch's SIGCHLD handler does not report them as lost
        torch._C._remove_worker_pids(id(iterator))
        iterator._worker_pids_set = False
    if hasattr(iterator, "_pin_memory_thread"):
        iterator._pin_memory_thread_done_event.set()
    for worker in iterator._workers:
        worker.kill()
    for worker in iterator._workers:
        worker.join()
    for queue in iterator._index_queues:
        queue.cancel_join_thread()
        queue.close()


def lost_worker(error: RuntimeError) -> DataError | None:
    """What to say of an error if it is DataLoader's of a worker that was killed; it may be raised anywhere."""
    if not str(error).startswith("DataLoader worker"):
        return None
    return DataError(
        f"a worker process that reads images has ended ({str(error).partition('. ')[0]}), as when the system runs out "
        "of memory and kills one: give fewer --workers, then go on with --resume"
    )


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
        loader: DataLoader[Any] = DataLoader(
            _Images(folder.paths, crop),
            sampler=self._requests,
            batch_size=None,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=pixels.device.type == "cuda",
            prefetch_factor=2 if workers > 0 else None,
            worker_init_fn=_begin_worker,
            generator=torch.Generator(),  # each epoch draws from it; from torch's own it would change a model's dropout
        )
        self._loader: DataLoader[Any] | None = loader
        self._end = weakref.finalize(self, _end_workers, loader)  # also when Python exits, before it waits for them
        self.listing = _listing(folder)
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
        with _signals_wait():
            made = iter(self._loader)
        for indices, images in zip(batches, made, strict=True):
            if isinstance(images, DataError):
                raise images
            labels = self._labels[torch.from_numpy(indices)].to(self._pixels.device)
            yield self._pixels(images, epoch, indices), labels

    def close(self) -> None:
        """End the worker processes."""
        self._end()
        self._loader = None


def _listing(folder: Folder) -> str:
    digest = blake2b(digest_size=16)
    for path, label in zip(folder.paths, folder.labels.tolist(), strict=True):
        digest.update(f"{folder.classes[label]}/{path.name}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


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
