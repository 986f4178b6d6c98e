"""FFCV's file format: what a `.beton` holds, and whether it is whole. Needs no FFCV.

FFCV itself trusts a file: one cut short gives "negative dimensions" or, cut by its last bytes, silently wrong images.
Files of our writer have a checksum of all but the images' bytes, where FFCV does not look (`beton_checksum`).

Source: ffcv 1.0.2, `ffcv/types.py`, `ffcv/fields/`, `ffcv/writer.py`.

    header | field descriptions | metadata of each sample | pages of image data | table of where each image lies
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from data.beton_checksum import LABEL, checksum, images_checksum, stored_checksum
from data.errors import DataError

VERSION = 2
HEADER = np.dtype(
    [("version", "<u2"), ("fields", "<u2"), ("page_size", "<u4"), ("samples", "<u8"), ("table", "<u8")], align=True
)
FIELD = np.dtype([("type", "<u1"), ("name", "S16"), ("arguments", "V1024")])
TABLE = np.dtype([("sample", "<u8"), ("pointer", "<u8"), ("size", "<u8")])
INT_FIELD, RGB_FIELD, ARRAY_FIELD = 1, 2, 4
KINDS = {0: "float", 1: "int", 2: "RGB image", 3: "bytes", 4: "array", 5: "JSON", 6: "tensor", 255: "custom"}
RGB = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("pointer", "<u8")])
JPEG, RAW = 0, 1
ARRAY_ARGUMENTS = np.dtype([("shape", "<u8", 32), ("type_length", "<u8")])
SMALLEST_PAGE = 1 << 21
MOST_FIELDS = 64  # as many as anyone has; it bounds what is read of a damaged header
_BYTE_ARRAY = json.dumps(np.dtype("u1").descr).encode()  # how FFCV writes the type of an array


@dataclass(frozen=True)
class Beton:
    """A checked file of images and labels.

    Args:
        path: of the file.
        labels: `int64[samples]`.
        shape: of every image, when they are stored as arrays; otherwise None.
        heights: of each image in pixels, `int64[samples]`.
        widths: of each image in pixels, `int64[samples]`.
        table: where each image's bytes lie, sorted by sample.
        images: checksum of their bytes; zeros if the file has none.
    """

    path: Path
    labels: NDArray[np.int64]
    shape: tuple[int, ...] | None
    heights: NDArray[np.int64]
    widths: NDArray[np.int64]
    table: NDArray[np.void]
    images: bytes

    def __len__(self) -> int:
        return len(self.labels)

    def listing(self) -> str:
        """A digest that tells files apart, wherever they lie, without reading their images.

        Of a file without a checksum of its images, other images of the same number of bytes are not noticed.
        """
        parts = (self.labels, self.heights, self.widths, self.table)
        return blake2b(b"".join(part.tobytes() for part in parts) + self.images, digest_size=16).hexdigest()


def metadata_type(image_field: int) -> np.dtype[np.void]:
    """The metadata of a sample: its image, then its label."""
    return np.dtype([("image", RGB if image_field == RGB_FIELD else "<u8"), ("label", "<i8")], align=True)


def describe_fields(image_field: int, shape: tuple[int, ...] | None) -> NDArray[np.void]:
    """The descriptions of the fields `image` and `label`; `shape` is that of an array field."""
    fields = np.zeros(2, FIELD)
    fields["type"], fields["name"] = (image_field, INT_FIELD), (b"image", b"label")
    if shape is not None:
        arguments = np.zeros((), ARRAY_ARGUMENTS)
        arguments["shape"][: len(shape)], arguments["type_length"] = shape, len(_BYTE_ARRAY)
        fields["arguments"][0] = (arguments.tobytes() + _BYTE_ARRAY).ljust(1024, b"\0")
    return fields


def open_beton(path: str | Path) -> Beton:
    """Read and check everything but the images' bytes: header, fields, metadata, table, and every pointer.

    Raises:
        DataError: the file is missing, cut short, damaged, or intact and of other fields than an image and a label.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"there is no file {path}; tools/write_beton.py makes it")
    return _Checker(path).beton()


class _Checker:
    """Reads a file front to back; each step relies on the ones before."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = path.stat().st_size

    def beton(self) -> Beton:
        header = self._header()
        fields = self._read(FIELD, int(header["fields"]), HEADER.itemsize)
        image_field, shape = self._fields(fields)
        metadata = self._read(metadata_type(image_field), int(header["samples"]), HEADER.itemsize + fields.nbytes)
        table = self._table(header, HEADER.itemsize + fields.nbytes + metadata.nbytes)
        found = checksum(header, fields, metadata, table)
        table = table[np.argsort(table["sample"], kind="stable")]
        image = metadata["image"]
        if shape is None:
            self._check_images(image, table)
            heights, widths = (image[side].astype(np.int64) for side in ("height", "width"))
        else:
            self._require(np.array_equal(image, table["pointer"]), "an image's pointer is not in the table")
            self._require(bool((table["size"] == math.prod(shape)).all()), f"an image is not of shape {shape}")
            heights, widths = (np.full(len(table), side) for side in shape[-2:])
        labels = metadata["label"].astype(np.int64)
        self._require(int(labels.min()) >= 0, "a label is negative")
        stored = stored_checksum(fields[LABEL])  # None: written by FFCV
        self._require(stored in (None, found), "its checksum does not fit its header, labels and table")
        return Beton(self.path, labels, shape, heights, widths, table, images_checksum(fields[LABEL]))

    def _header(self) -> np.void:
        header = self._read(HEADER, 1, 0)[0]
        page = int(header["page_size"])
        self._require(header["version"] == VERSION, f"its version is {header['version']}, not {VERSION}")
        self._require(page >= SMALLEST_PAGE and page & (page - 1) == 0, f"its page size is {page}")
        self._require(header["samples"] > 0, "it holds no samples")
        self._require(0 < header["fields"] <= MOST_FIELDS, f"it has {header['fields']} fields")
        return header

    def _fields(self, fields: NDArray[np.void]) -> tuple[int, tuple[int, ...] | None]:
        names, kinds = fields["name"].tolist(), fields["type"].tolist()
        known = all(name.isascii() and name.decode().isprintable() and name for name in names) and set(kinds) <= set(
            KINDS
        )
        self._require(known, f"it has {len(fields)} fields, not all of a name and a type that FFCV has")
        if names != [b"image", b"label"] or kinds not in ([RGB_FIELD, INT_FIELD], [ARRAY_FIELD, INT_FIELD]):
            pairs = zip(names, kinds, strict=True)
            self._is_foreign(
                fields, "its fields are " + ", ".join(f"{name.decode()} ({KINDS[kind]})" for name, kind in pairs)
            )
        if kinds[0] == RGB_FIELD:
            return RGB_FIELD, None
        described = fields["arguments"][0].tobytes()
        arguments = np.frombuffer(described[: ARRAY_ARGUMENTS.itemsize], ARRAY_ARGUMENTS)[0]
        sides = arguments["shape"].tolist()
        shape = tuple(sides[: sides.index(0)]) if 0 in sides else tuple(sides)
        self._require(any(shape) and not any(sides[len(shape) :]), f"its images are of shape {sides}")
        element = described[ARRAY_ARGUMENTS.itemsize :][: int(arguments["type_length"])]
        if len(shape) != 3 or element != _BYTE_ARRAY:
            self._is_foreign(fields, f"its images are arrays of {len(shape)} dimensions and of type {element!r}")
        return ARRAY_FIELD, shape

    def _table(self, header: np.void, data_start: int) -> NDArray[np.void]:
        samples, start, page = int(header["samples"]), int(header["table"]), int(header["page_size"])
        self._require(data_start <= start <= self.size, "its table lies outside of the file")
        rows, rest = divmod(self.size - start, TABLE.itemsize)
        self._require(rest == 0 and rows == samples, f"its table has {rows} whole rows for {samples} samples")
        table = self._read(TABLE, samples, start)
        self._require(
            np.array_equal(np.sort(table["sample"]), np.arange(samples)), "its table does not have every sample once"
        )
        pointer, size = table["pointer"], table["size"]
        inside = (
            (pointer >= data_start) & (pointer <= start) & (size > 0) & (size <= start - np.minimum(pointer, start))
        )
        self._require(bool(inside.all()), "an image lies outside of the data")
        self._require(bool((pointer // page == (pointer + size - 1) // page).all()), "an image crosses a page")
        order = np.argsort(pointer)
        self._require(bool((pointer[order][1:] >= (pointer + size)[order][:-1]).all()), "two images overlap")
        return table

    def _check_images(self, image: NDArray[np.void], table: NDArray[np.void]) -> None:
        self._require(np.array_equal(image["pointer"], table["pointer"]), "an image's pointer is not in the table")
        pixels = image["height"].astype(np.uint64) * image["width"] * 3
        self._require(bool((pixels > 0).all()), "an image has no pixels")
        self._require(bool(np.isin(image["mode"], (JPEG, RAW)).all()), "an image is neither JPEG nor raw")
        raw = image["mode"] == RAW
        self._require(np.array_equal(pixels[raw], table["size"][raw]), "an image has not as many bytes as pixels")

    def _read(self, dtype: np.dtype[np.void], count: int, offset: int) -> NDArray[np.void]:
        needed = offset + count * dtype.itemsize
        self._require(needed <= self.size, f"it ends after {self.size} bytes and needs more than {needed}")
        return np.fromfile(self.path, dtype, count, offset=offset)

    def _is_foreign(self, fields: NDArray[np.void], found: str) -> NoReturn:
        self._require(not any(stored_checksum(field) for field in fields), found)  # else it is ours, and was another
        raise DataError(
            f"{self.path} is a file of FFCV's that the recipes do not read: {found}; "
            "they read image (RGB image, or array of bytes [C, H, W]) and label (int), named so and in this order"
        )

    def _require(self, condition: bool | np.bool_, otherwise: str) -> None:
        if not condition:
            raise DataError(f"{os.fspath(self.path)} is cut short or damaged: {otherwise}; write it again")
