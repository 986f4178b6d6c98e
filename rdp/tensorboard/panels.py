"""Panels for an existing training loop: one line a step, and TensorBoard shows features, similarity and training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from rdp.analysis.features import check_handle, extract_features
from rdp.analysis.lesions import Lesions
from rdp.analysis.reuse import feature_reuse
from rdp.errors import ArgumentError
from rdp.handle import ResidualDropPath
from rdp.tensorboard.charts import lesion_panel, similarity_panel
from rdp.tensorboard.colors import Image
from rdp.tensorboard.events import Events, Log, png, writable
from rdp.tensorboard.feature_panel import feature_panel
from rdp.tensorboard.probing import Probing
from rdp.tensorboard.scalars import Scalars, learns
from rdp.tensorboard.training import History, Learning, training_panel

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

T = TypeVar("T")


class Panels:
    """Scalars and pictures of an attached model, for any training loop.

    Example::

        with Panels(handle, probe, "runs/mine") as panels:
            for step, (x, y) in enumerate(loader):
                loss = criterion(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                panels.log(step, loss=loss)
                optimizer.step()

    Args:
        handle: What `rdp.attach` returned.
        inputs: The probe on which features are compared: inputs of the model, with N rows (at least 4), on its device;
            for an MLP on the plane, `rdp.analysis.grid()`.
        log_dir: Directory of the TensorBoard run, or a `SummaryWriter`. Or a function that takes a step, numbers by
            tag and pictures by tag, each `uint8[height, width, 3]`, for anything else: see docs/your_loop.md.
        scalars_every: Steps between two points of a chart, rounded up to whole cycles of phases.
        images_every: Steps between two pictures. One takes about a second of CPU time for a ResNet-50.
        grid_size: Side of the grid that `inputs` are the points of, or None if they are not.
        points: Training points, `Tensor[P, 2]`, to draw over the grid.
        labels: Their classes, `Tensor[P]`, 0 or 1.
        tokens: Of a text, the first input token by token, for the pictures.
        max_layers: Layers shown, evenly spaced; None shows all.
        max_nodes: Nodes or channels shown in each layer, evenly spaced; None shows all.
        name: What the pictures' titles begin with, such as the algorithm.
        settings: Of the run, by name: for TensorBoard's Text and HParams tabs.

    Raises:
        ArgumentError: If `handle` is not one, or `log_dir` cannot be written.
    """

    def __init__(
        self,
        handle: ResidualDropPath,
        inputs: Any,
        log_dir: str | Path | SummaryWriter | Log,
        *,
        scalars_every: int = 20,
        images_every: int = 1000,
        grid_size: int | None = None,
        points: Tensor | None = None,
        labels: Tensor | None = None,
        tokens: Sequence[str] | None = None,
        max_layers: int | None = 8,
        max_nodes: int | None = 6,
        name: str = "",
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        check_handle(handle, found=False)
        if scalars_every < 1 or images_every < 1:
            raise ArgumentError(
                f"scalars_every and images_every must be at least 1; got {scalars_every} and {images_every}"
            )
        self.handle = handle
        self.inputs = inputs
        self._write: Log = log_dir if callable(log_dir) else Events(log_dir)
        if isinstance(self._write, Events):
            self._write.layout()
            if settings is not None:
                self._write.settings(settings)
        self.images: dict[str, Image] = {}
        """The latest pictures, by tag."""
        self._scalars, self._images_every = Scalars(handle, scalars_every), images_every
        self._probing = Probing(handle, inputs, grid_size, tokens)
        self._points, self._labels = points, labels
        self._max_layers, self._max_nodes = max_layers, max_nodes
        self._prefix = f"{name}: " if name else ""
        self._history, self._learning = History(), Learning()
        self._lesions: Lesions | None = None
        self._calls = 0

    def log(self, step: int, **metrics: float | Tensor) -> None:
        """Record a training step: call it after `backward()`, before `optimizer.step()`.

        It waits for the device only where a point or a picture is due.

        Args:
            step: Its number.
            metrics: Whatever else belongs to it, such as `loss=loss` for `train/loss`; other groups by their whole
                name, `**{"mine/temperature": 0.3}`. Points are means over the steps since the last one.

        Raises:
            ArgumentError: If the model's branches are not known, or features are NaN or infinite.
        """
        check_handle(self.handle)
        if not self._calls and isinstance(self._write, Events):
            self._write.text("model", f"```\n{self.handle}\n```")
        self._learning.step(self.handle.phase, learns(self.handle), self.handle.rates)
        if point := self._scalars.step(_tags("train", metrics)):
            self._point(step, point)
        if self._calls % self._images_every == 0:
            self.draw(step)
        self._calls += 1

    def metrics(self, step: int, **metrics: float | Tensor) -> None:
        """Add points to charts at once, such as `top1=97.0` for `test/top1` after an evaluation.

        Args:
            step: Optimizer steps done.
            metrics: By name; in another group by the whole name, `**{"val/top1": 97.0}`.
        """
        self._point(step, {tag: float(value) for tag, value in _tags("test", metrics).items()})

    def draw(self, step: int) -> dict[str, Image]:
        """Extract features, draw all pictures, and write them.

        Returns:
            The pictures, by tag; also kept in `images`.

        Raises:
            ArgumentError: As `log`.
        """
        features = list(extract_features(self.handle, self.inputs).values())
        title = f"{self._prefix}step {step}"
        layers = self._probing.layers(features)
        self.images = {
            "features/similarity": similarity_panel(features, title=title, enters=self._probing.enters(features)),
            "training/overview": training_panel(
                self._learning.shares(), self._history, title=title, lesions=self._lesions
            ),
        }
        self._learning = Learning()
        if layers is not None:
            self.images["features/nodes"] = feature_panel(
                layers,
                title=title,
                points=self._points,
                labels=self._labels,
                probe=self._probing.shown,
                max_layers=self._max_layers,
                max_nodes=self._max_nodes,
                unit=self._probing.unit,
            )
        comparable = len({values.shape for values in features}) < len(features)
        reuse = feature_reuse(features)._asdict() if comparable else {}
        self._write(step, _tags("feature_reuse", reuse), self.images)
        if isinstance(self._write, Events):
            self._write.flush()
        return self.images

    def lesions(self, step: int, result: Lesions, metric: str = "metric") -> Image:
        """Draw and write what `rdp.analysis.lesions` found, after an evaluation.

        Args:
            step: Its number.
            result: What was found.
            metric: The name of what was measured.
        """
        self._lesions = result
        self.images["lesions"] = lesion_panel(result, title=f"{self._prefix}step {step}", metric=metric)
        self._write(step, {}, {"lesions": self.images["lesions"]})
        return self.images["lesions"]

    def save(self, directory: str | Path) -> list[Path]:
        """Write the latest pictures as PNG files and return their paths."""
        directory = writable(directory)
        paths = [directory / f"{tag.replace('/', '_')}.png" for tag in self.images]
        for path, image in zip(paths, self.images.values(), strict=True):
            path.write_bytes(png(image))
        return paths

    def close(self) -> None:
        """Write everything out; the writer is closed unless it was given."""
        if isinstance(self._write, Events):
            self._write.close()

    def __enter__(self) -> Panels:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _point(self, step: int, numbers: Mapping[str, float]) -> None:
        self._write(step, numbers, {})
        self._history.add(step, numbers)


def _tags(group: str, numbers: Mapping[str, T]) -> dict[str, T]:
    """Whole names."""
    return {name if "/" in name else f"{group}/{name}": value for name, value in numbers.items()}
