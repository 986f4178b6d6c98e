"""The features of an attached model, one layer a residual branch, without leaving a trace in the model.

Layer n is the value of the n-th residual sum, `y = S(x) + F(x)`: what the rest of the network sees of branch n. It is
caught where it is made, by following the output of the gated module to the addition that takes it in, so that it does
not matter whether that addition stands in a block of its own (ResNet, ViT) or in a loop of the model's forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rdp import trees
from rdp.analysis.similarity import check_features
from rdp.branches import GatePoint
from rdp.calls import arguments_of, calling, telling
from rdp.discovery import ops
from rdp.discovery.forwards import undisturbed
from rdp.errors import ArgumentError
from rdp.handle import ResidualDropPath

INPUT = "input"
"""Name of the first layer: the shortcut operand of the first residual sum, which is what enters the residual stream."""


def extract_features(handle: ResidualDropPath, inputs: Any) -> dict[str, Tensor]:
    """Run the plain model in eval mode and record the residual stream before the first branch and after each one.

    Parameters, buffers, gradients, training flags, hooks, masks, phase and the global RNG are afterwards as before.

    Args:
        handle: What `rdp.attach` returned.
        inputs: The model's arguments, as for `rdp.attach(example_inputs=...)`: a tensor, a tuple of positional or
            a dict of keyword arguments, with N inputs.

    Returns:
        Layers in forward order, by the name of their gated module, after `"input"`: each a detached `Tensor[N, ...]`.

    Raises:
        ArgumentError: If `handle` is not a live handle, its branches are not known yet, `inputs` is empty or not what
            the model takes, a branch is not reached, or a layer holds NaN or infinite values.
    """
    check_handle(handle)
    args, kwargs = arguments_of(inputs)
    if any(tensor.numel() == 0 for tensor in trees.tensors((args, kwargs))):
        raise ArgumentError("inputs is empty: there is nothing to extract features from")
    recorder = _ResidualSums()
    modules = dict(handle.model.named_modules())
    hooks = []
    with undisturbed(handle.model), handle.paused(), torch.no_grad():
        try:
            for branch in handle.branches:
                for gate in branch.gates:
                    hooks.append(modules[gate.module].register_forward_hook(recorder.follow(branch.name, gate)))
            with telling(handle.model, (args, kwargs), "inputs"), calling(), recorder:
                handle.model(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
    missing = [branch.name for branch in handle.branches if branch.name not in recorder.sums]
    if missing:
        raise ArgumentError(f"these branches were not reached in an eval forward on the given inputs: {missing}")
    features = {INPUT: recorder.sums.pop(INPUT)} | {
        branch.name: recorder.sums[branch.name] for branch in handle.branches
    }
    for name, values in features.items():
        if not values.isfinite().all():
            raise ArgumentError(f"the features after {name!r} hold NaN or infinite values; has training diverged?")
    check_features(list(features.values()))
    return features


def check_handle(handle: object, found: bool = True) -> None:
    """Raise `ArgumentError` unless `handle` is attached to a model and, if `found`, knows its branches."""
    if isinstance(handle, nn.Module):
        raise ArgumentError(
            f"got the model ({type(handle).__name__}) where its handle belongs; a model that was never attached has no "
            "known branches: pass handle = rdp.attach(model) (with rate=0 it trains as if nothing was attached)"
        )
    if not isinstance(handle, ResidualDropPath):
        raise ArgumentError(f"handle must be what rdp.attach(model) returned; got {type(handle).__name__}")
    if not handle.attached:
        raise ArgumentError("this handle was removed from its model; attach again with rdp.attach(model)")
    if found and not handle.branches:
        raise ArgumentError(
            "the branches of this model are not known yet: run one training forward, or call handle.discover(inputs)"
        )


class _ResidualSums(TorchFunctionMode):
    """Follows the output of each gated module, from one torch function to the next, to the sum that takes it in."""

    def __init__(self) -> None:
        super().__init__()
        self.sums: dict[str, Tensor] = {}
        # The tensor is kept beside the branches whose values it carries, so that its id stays its own.
        self._carried: dict[int, tuple[Tensor, tuple[str, ...]]] = {}

    def follow(self, name: str, gate: GatePoint) -> Callable[[nn.Module, Any, Any], None]:
        """A forward hook for a gated module of branch `name`."""

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            value = trees.tensor_at(output, gate.leaf)
            if gate.of_block:
                self._record((name,), next(trees.tensors(args)), value)
            else:
                self._carried[id(value)] = (value, (name,))

        return hook

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = list(trees.tensors((args, kwargs)))
        carried = [self._carried[id(tensor)][1] for tensor in given if id(tensor) in self._carried]
        names = tuple(dict.fromkeys(name for some in carried for name in some))
        if not names:
            return func(*args, **kwargs)
        others = [tensor for tensor in given if id(tensor) not in self._carried]
        is_add = getattr(func, "__name__", "") in ops.ADD
        shortcut = others[0].clone() if is_add and others and INPUT not in self.sums else None  # += may overwrite it
        output = func(*args, **kwargs)
        if is_add and others and others[0].is_floating_point() and others[0].shape == output.shape:
            self._record(names, shortcut, output)
        else:
            for tensor in trees.tensors(output):
                self._carried[id(tensor)] = (tensor, names)
        return output

    def _record(self, names: tuple[str, ...], shortcut: Tensor | None, value: Tensor) -> None:
        if shortcut is not None:
            self.sums.setdefault(INPUT, shortcut.detach().clone())
        for name in names:
            self.sums[name] = value.detach().clone()  # an in-place ReLU may follow
        # What was followed has arrived; the sum itself is the stream, and must not be followed.
        self._carried = {
            key: entry
            for key, entry in self._carried.items()
            if not set(entry[1]) & set(names) and entry[0] is not value
        }
