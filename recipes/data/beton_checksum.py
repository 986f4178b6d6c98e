"""Checksums of a `.beton` file, where FFCV does not look: in the room for arguments of the field `label`.

A flipped bit in the metadata is another label, and nothing else in the format would notice. The description of a field
has room for 1,024 bytes of arguments; FFCV's `IntField` has none, writes zeros there and ignores what it reads. Ours:

    mark | checksum of all but the images' bytes, this field included | checksum of the images' bytes, or zeros

The first is compared when a file is opened; the second tells two files apart without reading them.

Source: ffcv 1.0.2, `ffcv/fields/basics.py`.
"""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray

LABEL = 1  # the second field
_MARK = b"residual-droppath crc32 "
_IMAGES = slice(len(_MARK) + 4, len(_MARK) + 8)


def checksum(
    header: NDArray[np.void] | np.void, fields: NDArray[np.void], metadata: NDArray[np.void], table: NDArray[np.void]
) -> bytes:
    """CRC-32 of all but the images' bytes, as they are in the file, with zeros in the place of mark and checksum."""
    fields = fields.copy()
    fields["arguments"][LABEL] = bytes(_IMAGES.start) + fields["arguments"][LABEL].tobytes()[_IMAGES.start :]
    value = 0
    for part in (header, fields, metadata, table):
        value = zlib.crc32(part.tobytes(), value)
    return value.to_bytes(4, "little")


def store_checksum(fields: NDArray[np.void], value: bytes) -> None:
    """Put a checksum into the description of the label, in place."""
    arguments = fields["arguments"][LABEL].tobytes()
    fields["arguments"][LABEL] = _MARK + value + arguments[_IMAGES.start :]


def store_images_checksum(fields: NDArray[np.void], value: int) -> None:
    """Put the CRC-32 of the images' bytes, in the order of the samples, into the description of the label, in place."""
    arguments = bytes(_IMAGES.start) + value.to_bytes(4, "little")
    fields["arguments"][LABEL] = arguments.ljust(1024, b"\0")


def images_checksum(field: np.void) -> bytes:
    """The checksum of the images' bytes in the description of a label; zeros if there is none."""
    return field["arguments"].tobytes()[_IMAGES]


def stored_checksum(field: np.void) -> bytes | None:
    """The checksum in the description of a label: None if there are zeros; b"", which none equals, if it is damaged."""
    arguments = field["arguments"].tobytes()
    if not any(arguments):
        return None
    mark, value, rest = arguments[: len(_MARK)], arguments[len(_MARK) : _IMAGES.start], arguments[_IMAGES.stop :]
    return value if mark == _MARK and not any(rest) else b""
