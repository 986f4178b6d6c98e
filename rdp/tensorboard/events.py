"""Writing to TensorBoard, with a description beside every chart and picture, into a directory that is checked first."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image as pil
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata  # type: ignore[import-untyped]
from torch.utils.tensorboard import SummaryWriter

from rdp.errors import ArgumentError
from rdp.tensorboard.colors import Image


class Events:
    """One TensorBoard run.

    Args:
        log_dir: Its directory, made if it is not there; or a `SummaryWriter`, which is then shared.

    Raises:
        ArgumentError: If the directory cannot be made or written.
    """

    def __init__(self, log_dir: str | Path | SummaryWriter) -> None:
        self._owns_writer = not isinstance(log_dir, SummaryWriter)
        self.writer = log_dir if isinstance(log_dir, SummaryWriter) else SummaryWriter(str(writable(log_dir)))

    def scalar(self, tag: str, value: float, step: int, description: str) -> None:
        """Add a point to a chart."""
        self._add(Summary.Value(tag=tag, simple_value=value, metadata=_metadata(description)), step)

    def image(self, tag: str, image: Image, step: int, description: str) -> None:
        """Add a picture to the slider of `tag`."""
        height, width, _ = image.shape
        picture = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png(image))
        self._add(Summary.Value(tag=tag, image=picture, metadata=_metadata(description)), step)

    def text(self, tag: str, markdown: str) -> None:
        """Add a page to the Text tab."""
        self.writer.add_text(tag, markdown)

    def flush(self) -> None:
        """Write everything out, so that TensorBoard shows it."""
        self.writer.flush()

    def close(self) -> None:
        """Flush, and close the writer unless it was given."""
        self.writer.flush()
        if self._owns_writer:
            self.writer.close()

    def _add(self, value: Summary.Value, step: int) -> None:
        # SummaryWriter.add_scalar and add_image have no description.
        writer = self.writer._get_file_writer()  # type: ignore[no-untyped-call]
        writer.add_summary(Summary(value=[value]), step)


def writable(directory: str | Path) -> Path:
    """Make a directory and check that files can be written there.

    Raises:
        ArgumentError: If not; the message says why.
    """
    path = Path(directory)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ArgumentError(f"cannot write to {str(path)!r}: {error.strerror}; choose another directory") from error
    return path


def png(image: Image) -> bytes:
    """Encode an image as PNG: a palette of 256 colours, since all panels are drawings, at about a third of the size."""
    buffer = io.BytesIO()
    pil.fromarray(np.ascontiguousarray(image)).quantize(256, dither=pil.Dither.NONE).save(buffer, "PNG")
    return buffer.getvalue()


def _metadata(description: str) -> SummaryMetadata:
    return SummaryMetadata(summary_description=description)
