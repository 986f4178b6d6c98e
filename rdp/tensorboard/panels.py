"""Panels for an existing training loop: one line a step, and TensorBoard shows features, similarity and training."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rdp.analysis.features import check_handle, extract_features
from rdp.analysis.lesions import Lesions
from rdp.analysis.reuse import feature_reuse
from rdp.errors import ArgumentError
from rdp.handle import ResidualDropPath
from rdp.phases import Phase
from rdp.tensorboard.charts import History, lesion_panel, similarity_panel, training_panel
from rdp.tensorboard.colors import Image
from rdp.tensorboard.events import Events, png, writable
from rdp.tensorboard.feature_panel import Layer, feature_panel
from rdp.tensorboard.maps import node_maps

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_ABOUT = """
**Feature reuse, seen.** Each run is one training; compare runs by selecting several on the left.

* `features/nodes`: what every node computes, layer by layer. Move the slider to replay training; tick *Show actual
  image size* to read the small print.
* `features/similarity`: each layer against the input, and against each other layer.
* `feature_reuse`: that picture as two numbers. *Reused* is similarity that all layers in between carry, *recreated*
  similarity that was lost on the way and came back. `rdp/analysis/reuse.py` defines them.
* `lesions`: what each branch is worth, if the training loop measures it.
* `training`: what Residual DropPath does: which rows are dropped, what is frozen, how large gradients are.
"""

_DESCRIPTIONS = {
    "features/nodes": "Every node's output, layer by layer; the same colour is the same value. Lines are weights: "
    "colour shows the sign, width the magnitude. The slider replays training (the paper's Figures 1 and 4).",
    "features/similarity": "Left: Euclidean distance (root mean square over inputs). Right: linear CKA (unbiased) and "
    "cosine. Curves compare each layer with the input, heatmaps all pairs of layers (the paper's Figure 3).",
    "feature_reuse/reused": "Mean similarity of two layers that every layer in between carries; 1 if layers pass "
    "their input on.",
    "feature_reuse/recreated": "Mean similarity of two layers that was lost in between and came back; the paper's "
    "complaint.",
    "lesions": "Left: how much worse the network is without each branch. Right: with fewer and fewer branches, those "
    "that are worth least taken away first, or random ones.",
    "training/overview": "Rows dropped by branch since the last picture, gradient norm by phase, live and frozen "
    "parameters, metrics.",
    "training/live_parameters": "Parameters that a row of this step reached the loss through.",
    "training/frozen_parameters": "Parameters that the optimizer leaves alone in this step.",
    "training/phase": "0 is PLAIN, 1 is DROP, 2 is FREEZE.",
    "training/rate": "Drop rate of the deepest branch in this cycle, as the schedule and `handle.rate` make it.",
}

_PHASE_NUMBERS = {Phase.PLAIN: 0, Phase.DROP: 1, Phase.FREEZE: 2}


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
        log_dir: Directory of the TensorBoard run, or a `SummaryWriter`.
        scalars_every: Steps between two points of a chart, in each phase.
        images_every: Steps between two pictures. One takes about a second of CPU time for a ResNet-50.
        grid_size: Side of the grid that `inputs` are the points of, or None if they are not.
        points: Training points, `Tensor[P, 2]`, to draw over the grid.
        labels: Their classes, `Tensor[P]`, 0 or 1.
        max_layers: Layers shown, evenly spaced; None shows all.
        max_nodes: Nodes shown in each layer, evenly spaced; None shows all.
        name: What the pictures' titles begin with, such as the algorithm.

    Raises:
        ArgumentError: If `handle` is not one, or `log_dir` cannot be written.
    """

    def __init__(
        self,
        handle: ResidualDropPath,
        inputs: Any,
        log_dir: str | Path | SummaryWriter,
        *,
        scalars_every: int = 20,
        images_every: int = 1000,
        grid_size: int | None = None,
        points: Tensor | None = None,
        labels: Tensor | None = None,
        max_layers: int | None = 6,
        max_nodes: int | None = 6,
        name: str = "",
    ) -> None:
        check_handle(handle, found=False)
        if scalars_every < 1 or images_every < 1:
            raise ArgumentError(
                f"scalars_every and images_every must be at least 1; got {scalars_every} and {images_every}"
            )
        self.handle = handle
        self.inputs = inputs
        self.events = Events(log_dir)
        self.events.text("about", _ABOUT)
        self.images: dict[str, Image] = {}
        """The latest pictures, by tag."""
        self._scalars_every, self._images_every = scalars_every, images_every
        self._grid_size, self._points, self._labels = grid_size, points, labels
        self._max_layers, self._max_nodes = max_layers, max_nodes
        self._prefix = f"{name}: " if name else ""
        self._history = History()
        self._calls = 0
        self._last_point: dict[Phase, int] = {}
        self._dropped, self._expected, self._rows = torch.zeros(0), torch.zeros(0), 0

    def log(self, step: int, **metrics: float | Tensor) -> None:
        """Record a training step: call it after `backward()`, before `optimizer.step()`.

        Args:
            step: Its number.
            metrics: Whatever else belongs to it, such as `loss=loss`.

        Raises:
            ArgumentError: If the model's branches are not known, or features are NaN or infinite.
        """
        check_handle(self.handle)
        phase = self.handle.phase
        masks = self.handle.masks
        if phase is Phase.DROP:
            dropped, rows = (~masks).sum(dim=1), masks.shape[1]
            expected = torch.tensor(self.handle.rates) * rows
            self._dropped = self._dropped + dropped if self._rows else dropped
            self._expected = self._expected + expected if self._rows else expected
            self._rows += rows
        if self._calls - self._last_point.get(phase, -self._scalars_every) >= self._scalars_every:
            self._last_point[phase] = self._calls
            self._log_training(step, phase)
            self.metrics(step, **metrics)
        if self._calls % self._images_every == 0:
            self.draw(step)
        self._calls += 1

    def metrics(self, step: int, **metrics: float | Tensor) -> None:
        """Add points to charts at once, such as `accuracy=0.97` after an evaluation."""
        for name, value in metrics.items():
            number = float(value.detach() if isinstance(value, Tensor) else value)
            self._history.metrics.setdefault(name, []).append((step, number))
            self.events.scalar(f"metrics/{name}", number, step, "Given by the training loop.")

    def draw(self, step: int) -> dict[str, Image]:
        """Extract features, draw all pictures, and write them.

        Returns:
            The pictures, by tag; also kept in `images`.

        Raises:
            ArgumentError: As `log`.
        """
        features = list(extract_features(self.handle, self.inputs).values())
        title = f"{self._prefix}step {step}"
        self.images = {"features/similarity": similarity_panel(features, title=title)}
        layers = self._layers(features)
        if layers is not None:
            self.images["features/nodes"] = feature_panel(
                layers,
                title=title,
                points=self._points,
                labels=self._labels,
                max_layers=self._max_layers,
                max_nodes=self._max_nodes,
            )
        rates = (self._expected / self._rows).tolist() if self._rows else list(self.handle.rates)
        dropped = (self._dropped / self._rows).tolist() if self._rows else [0.0] * len(rates)
        self.images["training/overview"] = training_panel(rates, dropped, self._history, title=title)
        self._rows = 0
        for tag, image in self.images.items():
            self.events.image(tag, image, step, _DESCRIPTIONS[tag])
        if len({values.shape for values in features}) < len(features):
            for part, value in feature_reuse(features)._asdict().items():
                tag = f"feature_reuse/{part}"
                self.events.scalar(tag, value, step, _DESCRIPTIONS[tag])
        self.events.flush()
        return self.images

    def lesions(self, step: int, result: Lesions, metric: str = "metric") -> Image:
        """Draw and write what `rdp.analysis.lesions` found, after an evaluation.

        Args:
            step: Its number.
            result: What was found.
            metric: The name of what was measured.
        """
        self.images["lesions"] = lesion_panel(result, title=f"{self._prefix}step {step}", metric=metric)
        self.events.image("lesions", self.images["lesions"], step, _DESCRIPTIONS["lesions"])
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
        self.events.close()

    def __enter__(self) -> Panels:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _log_training(self, step: int, phase: Phase) -> None:
        norms = [p.grad.detach().float().norm() for p in self.handle.model.parameters() if p.grad is not None]
        norm = float(torch.stack(norms).norm()) if norms else 0.0
        live, frozen = parameter_counts(self.handle)
        name = phase.name
        for curves, value in (
            (self._history.gradient_norm, norm),
            (self._history.live, live),
            (self._history.frozen, frozen),
        ):
            curves.setdefault(name, []).append((step, value))
        description = f"Norm of the whole gradient in {name} steps."
        self.events.scalar(f"training/gradient_norm_{name.lower()}", norm, step, description)
        others = {
            "live_parameters": live,
            "frozen_parameters": frozen,
            "phase": _PHASE_NUMBERS[phase],
            "rate": max(self.handle.rates),
        }
        for tag, value in others.items():
            self.events.scalar(f"training/{tag}", value, step, _DESCRIPTIONS[f"training/{tag}"])

    def _layers(self, features: list[Tensor]) -> list[Layer] | None:
        if features[0].dim() == 2 and self._grid_size is None:
            return None  # vectors of inputs that lie on no grid: there is nothing to draw
        try:
            maps = [node_maps(values, self._grid_size) for values in features]
        except ArgumentError:
            if self._grid_size is not None:
                raise
            return None  # token sequences that are not images
        weights = [None, *branch_weights(self.handle)]
        return [Layer(values, weight) for values, weight in zip(maps, weights, strict=True)]


def parameter_counts(handle: ResidualDropPath) -> tuple[int, int]:
    """How many numbers may move in the current step, and how many stay frozen because no row reached the loss through
    them: those of branches that were dropped for all rows (DROP) or for none (FREEZE).

    Returns:
        (live, frozen); together the parameters that require gradients.
    """
    frozen_names = set(handle.frozen)
    sizes = {name: p.numel() for name, p in handle.model.named_parameters() if p.requires_grad}
    frozen = sum(size for name, size in sizes.items() if name in frozen_names)
    return sum(sizes.values()) - frozen, frozen


def branch_weights(handle: ResidualDropPath) -> list[Tensor | None]:
    """The weight matrix, `Tensor[H, H']`, of each branch that has exactly one; None for the others."""
    parameters = dict(handle.model.named_parameters())
    matrices = [
        [p for name in b.parameters if (p := parameters.get(name)) is not None and p.dim() > 1] for b in handle.branches
    ]
    return [found[0].detach() if len(found) == 1 and found[0].dim() == 2 else None for found in matrices]
