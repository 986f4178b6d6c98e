"""Writing `.beton` files: in parallel, atomically, and read back before they get their name. Needs no FFCV.

FFCV's own writer waits forever when reading an image raises, and leaves a file that looks whole when it is killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import zlib
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from PIL import Image
from tqdm import tqdm

from data import beton
from data.beton_checksum import checksum, store_checksum, store_images_checksum
from data.datasets import Arrays
from data.disk import sync_folder
from data.errors import DataError
from data.folder import Folder, read_image

PAGE_SIZE = 4 * beton.SMALLEST_PAGE  # FFCV's own default
LARGEST_SIDE = 65535  # FFCV stores height and width in 16 bits


@dataclass(frozen=True)
class Stored:
    """A sample as the file holds it."""

    data: bytes
    label: int
    height: int
    width: int
    mode: int


class Source(Protocol):
    """Samples that can be written."""

    image_field: int
    shape: tuple[int, ...] | None

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Stored: ...


class ArraySource:
    """Images in memory, stored as they are, `uint8[C, H, W]`."""

    image_field = beton.ARRAY_FIELD

    def __init__(self, arrays: Arrays) -> None:
        self._arrays = arrays
        self.shape: tuple[int, ...] | None = arrays.images.shape[1:]

    def __len__(self) -> int:
        return len(self._arrays)

    def __getitem__(self, index: int) -> Stored:
        image = self._arrays.images[index]
        height, width = image.shape[1:]
        return Stored(image.tobytes(), int(self._arrays.labels[index]), height, width, beton.RAW)


class FolderSource:
    """Images in files, checked by decoding each, stored as JPEG or as raw pixels.

    Args:
        folder: the files.
        max_resolution: longest side in pixels that is stored; larger images are reduced. None: as they are.
        shorter_side: in pixels of every stored image, as torchvision's `Resize` makes it. None: as it is.
        jpeg_share: of the images that are stored as JPEG, from 0 (all raw: largest, fastest to read) to 1.
        quality: of the JPEG encoding. A file that is RGB JPEG already and needs no reducing is kept byte for byte.
    """

    image_field = beton.RGB_FIELD
    shape: tuple[int, ...] | None = None

    def __init__(
        self,
        folder: Folder,
        max_resolution: int | None = None,
        jpeg_share: float = 1.0,
        quality: int = 90,
        shorter_side: int | None = None,
    ) -> None:
        if not 0 <= jpeg_share <= 1:
            raise ValueError(f"jpeg_share must be from 0 to 1, not {jpeg_share}")
        if max_resolution is not None and not 1 <= max_resolution <= LARGEST_SIDE:
            raise ValueError(f"max_resolution must be from 1 to {LARGEST_SIDE} pixels, not {max_resolution}")
        if shorter_side is not None and not 1 <= shorter_side <= LARGEST_SIDE:
            raise ValueError(f"shorter_side must be from 1 to {LARGEST_SIDE} pixels, not {shorter_side}")
        if shorter_side is not None and max_resolution is not None:
            raise ValueError("give either max_resolution or shorter_side: both decide the size")
        if not 1 <= quality <= 100:
            raise ValueError(f"quality must be from 1 to 100, not {quality}")
        self._folder = folder
        self._max_side = max_resolution or LARGEST_SIDE
        self._shorter_side = shorter_side
        self._quality = quality
        self._as_jpeg = np.random.default_rng(0).permutation(len(folder)) < jpeg_share * len(folder)

    def __len__(self) -> int:
        return len(self._folder)

    def __getitem__(self, index: int) -> Stored:
        path, label = self._folder.paths[index], int(self._folder.labels[index])
        image, data = read_image(path)
        stored_format = image.format
        size, resampling = self._size(image)
        unchanged = size == image.size
        if max(size) > LARGEST_SIDE:
            raise DataError(f"{path} would have {size[0]} x {size[1]} pixels, and a side has at most {LARGEST_SIDE}")
        if not unchanged:
            image = image.convert("RGB").resize(size, resampling)
        if not self._as_jpeg[index]:
            pixels = image.convert("RGB")
            return Stored(pixels.tobytes(), label, pixels.height, pixels.width, beton.RAW)
        if not (unchanged and stored_format == "JPEG" and image.mode == "RGB" and data.endswith(b"\xff\xd9")):
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, "JPEG", quality=self._quality)
            data = buffer.getvalue()
        return Stored(data, label, image.height, image.width, beton.JPEG)

    def _size(self, image: Image.Image) -> tuple[tuple[int, int], Image.Resampling]:
        """The width and height to store, and how they are made."""
        width, height = image.size
        if self._shorter_side is not None:  # rounded and resampled as torchvision does
            shorter = min(width, height)
            size = (width * self._shorter_side // shorter, height * self._shorter_side // shorter)
            return size, Image.Resampling.BILINEAR
        scale = min(1.0, self._max_side / max(width, height))
        return (max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.BOX  # as FFCV's writer


def write_beton(
    path: str | Path, source: Source, *, workers: int = 1, page_size: int = PAGE_SIZE, progress: bool = False
) -> beton.Beton:
    """Write samples to a file, which appears under its name only when it is whole, checked and on disk.

    Args:
        path: of the file.
        source: the samples.
        workers: threads that read and encode.
        page_size: in bytes, a power of two from 2 MiB; an image must fit into a page.
        progress: show a progress bar.

    Returns:
        The file, opened.

    Raises:
        DataError: an image cannot be read or does not fit, another process is writing the file, or the disk is full.
    """
    path = Path(path)
    if page_size < beton.SMALLEST_PAGE or page_size & (page_size - 1) or page_size >= 1 << 32:
        raise ValueError(f"page_size must be a power of two from {beton.SMALLEST_PAGE} to 2**31, not {page_size}")
    if len(source) == 0:
        raise DataError(f"there are no samples to write to {path}")
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "ab") as file:  # not "wb": nothing is cut before the lock is ours
            _lock(file, path)
            try:
                checksums = _write(file, source, workers, page_size, progress)
                _verify(partial, checksums)
                os.replace(partial, path)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
        sync_folder(path.parent)
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error.strerror or error}); nothing was left behind") from error
    return beton.open_beton(path)


def _lock(file: BinaryIO, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DataError(f"another process is writing {path}; wait for it") from None


def _write(file: BinaryIO, source: Source, workers: int, page_size: int, progress: bool) -> list[int]:
    samples = len(source)
    fields = beton.describe_fields(source.image_field, source.shape)
    metadata = np.zeros(samples, beton.metadata_type(source.image_field))
    table = np.zeros(samples, beton.TABLE)
    checksums, images = [], 0

    with open(file.name, "r+b") as out:
        out.truncate(0)
        position = _next_page(beton.HEADER.itemsize + fields.nbytes + metadata.nbytes, page_size)
        bar = tqdm(total=samples, unit="images", desc=Path(file.name).stem, disable=not progress)
        with contextlib.closing(_in_parallel(source, workers)) as stored_samples, bar:
            for index, stored in enumerate(stored_samples):
                size = len(stored.data)
                if size > page_size:
                    raise DataError(
                        f"image {index} takes {size} bytes and a page has {page_size}: "
                        "raise --page-size, reduce images with --max-resolution, or store more as JPEG"
                    )
                if position % page_size + size > page_size:
                    position = _next_page(position, page_size)
                out.seek(position)
                out.write(stored.data)
                table[index] = (index, position, size)
                image = (stored.mode, stored.width, stored.height, position)
                metadata[index] = (image if source.image_field == beton.RGB_FIELD else position, stored.label)
                checksums.append(zlib.crc32(stored.data))
                images = zlib.crc32(stored.data, images)
                position += size
                bar.update()
        position = _next_page(position, page_size)
        header = np.array((beton.VERSION, len(fields), page_size, samples, position), beton.HEADER)
        store_images_checksum(fields, images)
        store_checksum(fields, checksum(header, fields, metadata, table))
        out.seek(position)
        out.write(table.tobytes())
        out.seek(beton.HEADER.itemsize)
        out.write(fields.tobytes() + metadata.tobytes())
        out.flush()
        os.fsync(out.fileno())
        out.seek(0)
        out.write(header.tobytes())
        out.flush()
        os.fsync(out.fileno())
    return checksums


def _in_parallel(source: Source, workers: int) -> Generator[Stored, None, None]:
    """Encoded samples in order, a bounded number ahead. Threads suffice: PIL decodes without Python's lock."""
    with ThreadPoolExecutor(workers) as pool:
        pending: deque[Future[Stored]] = deque()
        try:
            for index in range(len(source)):
                pending.append(pool.submit(source.__getitem__, index))
                if len(pending) > 8 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _verify(path: Path, checksums: list[int]) -> None:
    written = beton.open_beton(path)
    with open(path, "rb") as file:
        for row, checksum in zip(written.table, checksums, strict=True):
            file.seek(int(row["pointer"]))
            if zlib.crc32(file.read(int(row["size"]))) != checksum:
                raise DataError(f"image {row['sample']} was read back from {path} other than written: check the disk")


def _next_page(position: int, page_size: int) -> int:
    return -(-position // page_size) * page_size
