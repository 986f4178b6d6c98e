"""What is looked at once, at the end of a run whose `examine` asks for it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from data import Loader
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

import rdp
from engine.evaluate import evaluate
from rdp.analysis import extract_features, feature_reuse

PROBE = 64  # test images on which features are compared


def examine(
    model: nn.Module,
    handle: rdp.ResidualDropPath | None,
    train_data: Loader,
    test_data: Loader,
    *,
    epochs: int,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[object]],
) -> dict[str, float]:
    """Test on training images, test with BatchNorm's statistics taken anew, and measure feature reuse.

    BatchNorm's statistics were taken in DROP's forwards too, in which branches are missing: an average over the
    training images through the plain network shows what that costs.

    Args:
        model: trained; its BatchNorm is changed.
        handle: what is attached, if anything is.
        train_data: the images of the epoch after the last one are taken, augmented as in training.
        test_data: the test split.
        epochs: how many were trained.
        device: of the model.
        autocast: a context for forwards.

    Returns:
        "train_top1" and so on; "bn_top1" and so on, if there is BatchNorm; "reused" and "recreated".
    """

    def tested(prefix: str, loader: Loader, epoch: int) -> dict[str, float]:
        batches = loader.epoch(epoch)
        found = evaluate(model.eval(), batches, classes=loader.classes, device=device, autocast=autocast)
        return {prefix + name.removeprefix("test_"): value for name, value in found.items()}

    numbers = tested("train_", train_data, epochs)
    images = next(iter(test_data.epoch(0)))[0][:PROBE]
    own = handle or rdp.attach(model, 0.0, example_inputs=images[:2], verify=False)
    numbers |= feature_reuse(list(extract_features(own, images).values()))._asdict()
    if handle is None:
        own.remove()
    if any(isinstance(module, _BatchNorm) for module in model.modules()):
        with torch.no_grad(), own.paused():  # the plain network, in training mode
            update_bn((images for images, _ in train_data.epoch(epochs)), model.train(), device=device)
        numbers |= tested("bn_", test_data, 0)
    return numbers
