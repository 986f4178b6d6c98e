"""A checksum of a `.beton` file, where FFCV does not look: in the room for arguments of the field `label`.

A flipped bit in the metadata is another label, and nothing else in the format would notice. The description of a field
has room for 1,024 bytes of arguments; FFCV's `IntField` has none, writes zeros there and ignores what it reads.

Source: ffcv 1.0.2, `ffcv/fields/basics.py`.
"""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray

LABEL = 1  # the second field
_MARK = b"residual-droppath crc32 "


def checksum(
    header: NDArray[np.void] | np.void, fields: NDArray[np.void], metadata: NDArray[np.void], table: NDArray[np.void]
) -> bytes:
    """CRC-32 of all but the images' bytes, as they are in the file, with zeros in the place of the checksum."""
    fields = fields.copy()
    fields["arguments"][LABEL] = bytes(1024)
    value = 0
    for part in (header, fields, metadata, table):
        value = zlib.crc32(part.tobytes(), value)
    return value.to_bytes(4, "little")


def store_checksum(fields: NDArray[np.void], value: bytes) -> None:
    """Put a checksum into the description of the label, in place."""
    fields["arguments"][LABEL] = (_MARK + value).ljust(1024, b"\0")


def stored_checksum(field: np.void) -> bytes | None:
    """The checksum in the description of a label: None if there are zeros; b"", which none equals, if it is damaged."""
    arguments = field["arguments"].tobytes()
    if not any(arguments):
        return None
    mark, value, rest = arguments[: len(_MARK)], arguments[len(_MARK) :][:4], arguments[len(_MARK) + 4 :]
    return value if mark == _MARK and not any(rest) else b""
