"""Top-1, top-5 and loss over a whole split, exact however many processes share it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    classes: int,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[object]],
    flip: bool = False,
) -> dict[str, float]:
    """Test a model; torchmetrics adds the processes' counts, so every sample counts once.

    Args:
        model: in eval mode.
        batches: this process's share: images `Tensor[N, C, H, W]` and labels `Tensor[N]`; N may be 0.
        classes: outputs of the model; top-5 of fewer than five classes is top-`classes`.
        device: where the counts are kept.
        autocast: a context for the forward.
        flip: average the logits of an image and its mirror image.

    Returns:
        "top1" and "top5" in percent, and "test_loss".
    """
    metrics = MetricCollection(
        {
            "top1": MulticlassAccuracy(classes, top_k=1, average="micro"),
            "top5": MulticlassAccuracy(classes, top_k=min(5, classes), average="micro"),
        }
    ).to(device)
    loss = MeanMetric(nan_strategy="disable").to(device)  # its default leaves NaN out
    for images, labels in batches:
        with autocast():
            logits = (model(images) + model(images.flip(-1))) / 2 if flip else model(images)
        if len(labels):
            logits = logits.float()
            metrics.update(logits, labels)
            loss.update(functional.cross_entropy(logits, labels, reduction="none"))
    counted = metrics.compute()
    return {name: 100 * float(value) for name, value in counted.items()} | {"test_loss": float(loss.compute())}
