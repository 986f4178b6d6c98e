"""What the feature panel of any network is told: how its features are laid out, and what they were made from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rdp import trees
from rdp.handle import ResidualDropPath
from rdp.tensorboard.maps import Layer, layer_of
from rdp.tensorboard.probe import Images, Probe, Text


class Probing:
    """Knows the probe of a network.

    Args:
        handle: Of the model.
        inputs: The probe, as `extract_features` takes it.
        grid_size: Side of the grid that the inputs are the points of, or None.
        tokens: The first input as text, token by token; default: the numbers of the tokens.
    """

    def __init__(
        self, handle: ResidualDropPath, inputs: Any, grid_size: int | None, tokens: Sequence[str] | None
    ) -> None:
        self._handle, self._grid_size = handle, grid_size
        self._given = next(iter(trees.tensors(inputs)), torch.zeros(0))
        given = self._given
        self._is_text = tokens is not None or (given.dim() == 2 and not given.is_floating_point())
        self.shown: Probe | None = None
        if self._is_text:
            self.shown = Text(tokens or [str(number) for number in given[0].tolist()])
        elif given.dim() == 4 and given.is_floating_point():
            self.shown = Images(given)

    @property
    def unit(self) -> str:
        """What one feature is called: those of vectors are nodes."""
        return "node" if self.shown is None and self._given.dim() == 2 else "channel"

    def enters(self, features: Sequence[Tensor]) -> str:
        """What the first of the features is: the input itself, perhaps with zeros beside it; or what is made of it."""
        first, given = features[0].flatten(1), self._given.flatten(1)
        same = given.shape[1] <= first.shape[1] and torch.equal(first[:, : given.shape[1]], given.to(first))
        if same and not first[:, given.shape[1] :].any():
            return "input"
        if self._handle.branches[0].kind == "projection":
            return "shortcut"  # of the first layer, which does not add what enters it, but a projection of that
        return "embedding" if self._is_text else "stem"

    def layers(self, features: Sequence[Tensor]) -> list[Layer] | None:
        """The features of `extract_features`, in order, as layers of a panel; None of those that are no pictures."""
        if self._grid_size is None and any(values.dim() > 4 for values in features):
            return None
        branches = self._handle.branches
        parameters = dict(self._handle.model.named_parameters())
        weights = [None, *branch_weights(self._handle)]
        # What enters is as wide as the first sum, or its channels cannot be told.
        widths = [_width([parameters.get(name) for name in branch.parameters]) for branch in branches]
        names = [self.enters(features), *[""] * len(branches)]
        return [
            layer_of(
                values,
                self._grid_size,
                width=width,
                text=self._is_text and values.dim() == 3,
                weights=weight,
                name=name,
            )
            for values, width, weight, name in zip(features, [widths[0], *widths], weights, names, strict=True)
        ]


def branch_weights(handle: ResidualDropPath) -> list[Tensor | None]:
    """The weight matrix, `Tensor[H, H']`, of each branch that has exactly one; None for the others."""
    parameters = dict(handle.model.named_parameters())
    matrices = [
        [p for name in b.parameters if (p := parameters.get(name)) is not None and p.dim() > 1] for b in handle.branches
    ]
    return [found[0].detach() if len(found) == 1 and found[0].dim() == 2 else None for found in matrices]


def _width(parameters: Sequence[Tensor | None]) -> int | None:
    """How many channels a branch ends with: as its last parameter has."""
    known = [p for p in parameters if p is not None and p.dim()]
    return known[-1].shape[0] if known else None
