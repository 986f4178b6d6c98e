"""Models that are called with something else than a tensor of rows, each with an input; what they share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

WIDTH = 6


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


class Net(nn.Module):
    """`call(net, ...)` is its forward; `net.rows` takes a tensor whose last axis has 4 numbers."""

    def __init__(self, call: Callable[..., Any] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(4, WIDTH)
        self.body = nn.Sequential(Block(), Block(), Block())
        self.head = nn.Linear(WIDTH, 3)
        self.call = call

    def rows(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        assert self.call is not None
        return self.call(self, *args, **kwargs)


@dataclass
class Batch:
    x: Tensor
    name: str = "batch"


class Plain:
    """An object that torch knows nothing of."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


class Data(Plain):
    """As a batch of graphs: its tensors are in a store, and the model writes to it."""

    def __init__(self, **store: Tensor) -> None:
        self.store = store


class Registered(Plain):
    """An object that torch's pytree knows."""


pytree.register_pytree_node(Registered, lambda given: ([given.x], None), lambda parts, _: Registered(*parts))


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in what is drawn or returned here."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)
    elif dataclasses.is_dataclass(value) or isinstance(value, Plain):
        yield from tensors(vars(value))


class Graph(Net):
    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        x = self.stem(x)
        source, target = edge_index
        for block in self.body:
            x = block(x + torch.zeros_like(x).index_add(0, target, x[source].tanh() / 9))
        return self.head(x)


class Detector(Net):
    """Losses in training, boxes else, of images of any size."""

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        high, wide = (max(image.shape[axis] for image in images) for axis in (1, 2))
        padded = [nn.functional.pad(i, (0, wide - i.shape[2], 0, high - i.shape[1])) for i in images]
        found = self.rows(nn.functional.pad(torch.stack(padded), (0, 0, 0, 0, 0, 1)).mean((2, 3)))
        if not self.training:
            return [{"boxes": row} for row in found]
        assert targets is not None
        losses = [(row.mean() - target["boxes"].mean()).square() for row, target in zip(found, targets, strict=True)]
        return {"loss": torch.stack(losses).sum()}


class Crops(Net):
    """Runs its backbone once for each size, as DINO's."""

    def forward(self, crops: list[Tensor]) -> Tensor:
        groups = [torch.cat([c for c in crops if c.shape[1] == size]) for size in sorted({c.shape[1] for c in crops})]
        return torch.cat([self.rows(group.mean(1)) for group in groups])


class Bank(Net):
    def forward(self, bank: Tensor, x: Tensor) -> Tensor:
        return self.rows(x) @ self.head(self.stem(bank)).T


class Tempered(Net):
    def forward(self, temperature: Tensor, x: Tensor) -> Tensor:
        return self.rows(x) / temperature


class Neighbours(Net):
    """Needs three rows."""

    def forward(self, x: Tensor) -> Tensor:
        return self.rows(x) + x.topk(3, dim=0).values.mean()


class OneByHand(Net):
    """In training, a normalisation of its own that takes no single row."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and len(x) == 1:
            raise ValueError("expected more than 1 value")
        return self.rows(x)


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.images, self.texts = Net(), Net()

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        return self.images.rows(images), self.texts.rows(texts)


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.LazyLinear(WIDTH)
        self.norm = nn.LazyBatchNorm1d()
        self.body = nn.Sequential(Block(), Block(), Block())
        self.head = nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.norm(self.stem(x))))


class InTraining(Net):
    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            raise NotImplementedError("this model is for training alone")
        return self.rows(x)


def write(net: Net, data: Data) -> Tensor:
    data.store["x"] = net.rows(data.store["x"])
    return data.store["x"]
