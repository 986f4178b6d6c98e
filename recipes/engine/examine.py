"""What is looked at once, at the end of a run that asks for it (`examine`, `lesions`)."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from data.loader import Loader
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

import rdp
from engine.config import Config
from engine.evaluate import evaluate
from engine.folder import write_json
from engine.lesions import measure_lesions
from rdp.analysis import cka_matrix, distance_matrix, extract_features, feature_reuse

PROBE = 64  # test images on which features are compared


@dataclass(frozen=True)
class Network:
    """A trained model and how it is tested."""

    model: nn.Module
    device: torch.device
    autocast: Callable[[], AbstractContextManager[object]]
    flip: bool = False

    def test(self, loader: Loader, epoch: int = 0, prefix: str = "") -> dict[str, float]:
        """As `evaluate`, with "test" left out of the names and `prefix` before them."""
        found = evaluate(
            self.model.eval(),
            loader.epoch(epoch),
            classes=loader.classes,
            device=self.device,
            autocast=self.autocast,
            flip=self.flip,
        )
        return {prefix + name.removeprefix("test_"): value for name, value in found.items()}


def examine(
    network: Network,
    handle: rdp.ResidualDropPath | None,
    train_data: Loader,
    test_data: Loader,
    *,
    config: Config,
    epochs: int,
    folder: Path | None,
) -> dict[str, Any]:
    """Measure what branches are worth (`lesions`), feature reuse, and accuracy in two other ways (`examine`).

    BatchNorm's statistics were taken in DROP's forwards too, in which branches are missing: an average over the
    training images through the plain network shows what that costs.

    Args:
        network: trained; its BatchNorm is changed.
        handle: what is attached, if anything is.
        train_data: the images of the epoch after the last one are taken, augmented as in training.
        test_data: the test split.
        config: `examine`, `lesions` and `progress`.
        epochs: how many were trained.
        folder: where the picture of lesions goes, of the process that writes; None for the others.

    Returns:
        For `result.json`: "lesions"; "train_top1" and so on; "bn_top1" and so on, if there is BatchNorm; "reused" and
        "recreated".
    """
    model, numbers = network.model, dict[str, Any]()
    images = next(iter(test_data.epoch(0)))[0][:PROBE]
    own = handle or rdp.attach(model, 0.0, example_inputs=images[:2], verify=False)
    try:
        if config.lesions:
            progress = config.progress and folder is not None
            numbers["lesions"] = measure_lesions(
                own, lambda: network.test(test_data)["top1"], folder, progress=progress
            )
        if config.examine:
            numbers |= network.test(train_data, epochs, "train_")
            numbers |= feature_reuse(list(extract_features(own, images).values()))._asdict()
            if any(isinstance(module, _BatchNorm) for module in model.modules()):
                with torch.no_grad(), own.paused():  # the plain network, in training mode
                    update_bn((images for images, _ in train_data.epoch(epochs)), model.train(), device=network.device)
                numbers |= network.test(test_data, prefix="bn_")
    finally:
        if handle is None:
            own.remove()
    return numbers


def keep_similarity(model: nn.Module, handle: rdp.ResidualDropPath | None, images: Tensor, folder: Path | None) -> None:
    """Write how alike the layers of a trained network are, for `tools/figures.py compare`.

    The run is finished, so what cannot be measured ends nothing: a network without branches, or too little memory.

    Args:
        model: in any mode.
        handle: what is attached, if anything is.
        images: on which features are compared, on the model's device.
        folder: where `similarity.json` goes, of the process that writes; None for the others.
    """
    try:
        with nullcontext(handle) if handle else rdp.attach(model, 0.0, example_inputs=images[:2], verify=False) as own:
            content = similarity(list(extract_features(own, images).values()))
    except (rdp.RdpError, torch.OutOfMemoryError):
        return
    if folder is not None:
        write_json(folder / "similarity.json", content)


def similarity(features: list[Tensor]) -> dict[str, object]:
    """What `similarity.json` holds: the distance and the linear CKA of each layer with the input (null: undefined), and
    the feature reuse.
    """
    numbers = {"distance": distance_matrix(features)[0], "cka": cka_matrix(features)[0]}
    lists = {name: [None if math.isnan(v) else v for v in values.tolist()] for name, values in numbers.items()}
    comparable = len({values.shape for values in features}) < len(features)
    return {**lists, **(feature_reuse(features)._asdict() if comparable else {})}
