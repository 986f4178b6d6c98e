"""Writing to TensorBoard, with a description beside every chart and picture, into a directory that is checked first.

What is written is what TensorBoard's own plugins write (`tensorboard.plugins.scalar.summary.scalar_pb` and so on, most
of which need TensorFlow): of anything else, default TensorBoard shows no description.
"""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as pil
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata  # type: ignore[import-untyped]
from tensorboard.compat.proto.tensor_pb2 import TensorProto  # type: ignore[import-untyped]
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto  # type: ignore[import-untyped]
from tensorboard.compat.proto.types_pb2 import DT_FLOAT, DT_STRING  # type: ignore[import-untyped]
from tensorboard.plugins.hparams import metadata as hparams  # type: ignore[import-untyped]
from tensorboard.plugins.hparams.api_pb2 import (  # type: ignore[import-untyped]
    DATA_TYPE_BOOL,
    DATA_TYPE_FLOAT64,
    DATA_TYPE_STRING,
    Experiment,
    MetricInfo,
    MetricName,
    Status,
)
from tensorboard.plugins.hparams.plugin_data_pb2 import (  # type: ignore[import-untyped]
    HParamsPluginData,
    SessionEndInfo,
    SessionStartInfo,
)
from tensorboard.plugins.image.metadata import (  # type: ignore[import-untyped]
    create_summary_metadata as image_metadata,
)
from tensorboard.plugins.scalar.metadata import (  # type: ignore[import-untyped]
    create_summary_metadata as scalar_metadata,
)
from torch.utils.tensorboard import SummaryWriter

from rdp.errors import ArgumentError
from rdp.tensorboard.colors import Image
from rdp.tensorboard.tags import LAYOUT, SORTED_BY, describe

Log = Callable[[int, Mapping[str, float], Mapping[str, Image]], None]
"""Takes a step, numbers by tag and pictures by tag, and keeps them: TensorBoard, Weights & Biases, MLflow, a list."""


class Events:
    """One TensorBoard run. It is a `Log`: `events(step, {"test/top1": 97.0}, {})`.

    Args:
        log_dir: Its directory, made if it is not there; or a `SummaryWriter`, which is then shared.

    Raises:
        ArgumentError: If the directory cannot be made or written.
    """

    def __init__(self, log_dir: str | Path | SummaryWriter) -> None:
        self._owns_writer = not isinstance(log_dir, SummaryWriter)
        self.writer = log_dir if isinstance(log_dir, SummaryWriter) else SummaryWriter(str(writable(log_dir)))
        self._described: set[str] = set()

    def __call__(self, step: int, numbers: Mapping[str, float], images: Mapping[str, Image]) -> None:
        """Add points to charts and pictures to sliders, with what `rdp.tensorboard.tags` says of them."""
        for tag, number in numbers.items():
            content = TensorProto(dtype=DT_FLOAT, tensor_shape=_shape(), float_val=[number])
            self._add(tag, content, scalar_metadata(None, self._description(tag)), step)
        for tag, image in images.items():
            height, width, _ = image.shape
            strings = [str(width).encode(), str(height).encode(), png(image)]
            content = TensorProto(dtype=DT_STRING, tensor_shape=_shape(3), string_val=strings)
            self._add(tag, content, image_metadata(None, self._description(tag)), step)

    def text(self, tag: str, markdown: str) -> None:
        """Add a page to the Text tab."""
        self.writer.add_text(tag, markdown)

    def layout(self) -> None:
        """Let the Custom Scalars tab show the charts that matter, together where they belong together."""
        self.writer.add_custom_scalars(LAYOUT)

    def settings(self, settings: Mapping[str, Any]) -> None:
        """Show the settings of the run in the Text tab, and as columns of the HParams tab beside the last numbers.

        Args:
            settings: By name; what is no number, string or truth is shown as Python prints it, and None left out.
        """
        rows = "".join(f"| {name} | `{value}` |\n" for name, value in settings.items())
        self.text("settings", f"| setting | value |\n|---|---|\n{rows}")
        # TensorBoard takes its columns from the first run that it finds; left to itself, it makes one of every scalar.
        columns = Experiment(metric_infos=[MetricInfo(name=MetricName(tag=tag)) for tag in SORTED_BY])
        info = SessionStartInfo(start_time_secs=time.time())
        for name, value in settings.items():
            if value is None:
                continue
            if isinstance(value, bool):
                kind, info.hparams[name].bool_value = DATA_TYPE_BOOL, value
            elif isinstance(value, (int, float)):
                kind, info.hparams[name].number_value = DATA_TYPE_FLOAT64, value
            else:
                kind, info.hparams[name].string_value = DATA_TYPE_STRING, str(value)
            columns.hparam_infos.add(name=name, type=kind)
        self._hparams(hparams.EXPERIMENT_TAG, HParamsPluginData(experiment=columns))
        self._hparams(hparams.SESSION_START_INFO_TAG, HParamsPluginData(session_start_info=info))

    def finished(self) -> None:
        """Say in the HParams tab that the run has come to its end."""
        info = SessionEndInfo(status=Status.STATUS_SUCCESS, end_time_secs=time.time())
        self._hparams(hparams.SESSION_END_INFO_TAG, HParamsPluginData(session_end_info=info))

    def flush(self) -> None:
        """Write everything out, so that TensorBoard shows it."""
        self.writer.flush()

    def close(self) -> None:
        """Flush, and close the writer unless it was given."""
        self.writer.flush()
        if self._owns_writer:
            self.writer.close()

    def _description(self, tag: str) -> str:
        # TensorBoard reads that of a tag's first point; in every one it would be most of the file.
        if tag in self._described:
            return ""
        self._described.add(tag)
        return describe(tag)

    def _hparams(self, tag: str, data: HParamsPluginData) -> None:
        self._add(tag, hparams.NULL_TENSOR, hparams.create_summary_metadata(data), None)

    def _add(self, tag: str, content: TensorProto, metadata: SummaryMetadata, step: int | None) -> None:
        writer = self.writer._get_file_writer()  # type: ignore[no-untyped-call]
        writer.add_summary(Summary(value=[Summary.Value(tag=tag, tensor=content, metadata=metadata)]), step)


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


def _shape(*sizes: int) -> TensorShapeProto:
    return TensorShapeProto(dim=[TensorShapeProto.Dim(size=size) for size in sizes])
