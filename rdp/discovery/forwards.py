"""Running a model without leaving a trace."""

from __future__ import annotations

import copy
import pickle
import random
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from rdp import trees
from rdp.calls import Inputs as Inputs
from rdp.calls import calling
from rdp.copies import Hook
from rdp.inputs import fresh

_CONTAINERS = (dict, OrderedDict, defaultdict, list, set)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run forwards in eval mode; training flags, attributes, buffers and random numbers are put back afterwards."""
    training = [(module, module.training) for module in model.modules()]
    # Of a sharded model, the parameters are others now and then, and somebody keeps count.
    ordinary = only_device(model) is not None
    held = [(module, contents(module)) for module in model.modules()] if ordinary else []
    fastpath = torch.backends.mha.get_fastpath_enabled()
    model.eval()
    # The fused inference kernels of nn.TransformerEncoderLayer would hide the additions.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        # Compiled parts of the model run as they were written: what is called can be seen in them, too.
        eager = torch.compiler.set_stance("force_eager")
        with own_random_numbers(model), same_buffers(model), same_followers(model, ordinary), eager:
            yield
    finally:
        for module, attributes in held:
            put_back(module, attributes)
        torch.backends.mha.set_fastpath_enabled(fastpath)
        model.train(training[0][1])  # lets modules drop what they cached for eval
        for module, was_training in training:
            module.training = was_training


def contents(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Every attribute with a copy of it, where it is a container that a forward may fill: a cache, say."""
    # Most containers are the empty ones of hooks, which take a while to copy.
    return {
        name: (value, (copy.copy(value) if value else ()) if type(value) in _CONTAINERS else None)
        for name, value in vars(module).items()
    }


def put_back(module: nn.Module, contents: dict[str, tuple[Any, Any]]) -> None:
    """Give a module back the attributes that it had."""
    attributes = vars(module)
    for name in attributes.keys() - contents.keys():
        del attributes[name]
    for name, (value, items) in contents.items():
        attributes[name] = value
        if items is not None and (items or value):
            value.clear()
            (value.extend if isinstance(value, list) else value.update)(items)


@contextmanager
def as_in_training(model: nn.Module) -> Iterator[None]:
    """Within `undisturbed`: train mode, but for norms with running statistics; buffers are put back afterwards."""
    for module in model.modules():
        module.training = not isinstance(module, nn.modules.batchnorm._NormBase)
    try:
        with own_random_numbers(model), same_buffers(model):
            yield
    finally:
        model.eval()


@contextmanager
def same_buffers(model: nn.Module) -> Iterator[None]:
    """The numbers in the buffers are put back afterwards."""
    buffers = [(buffer, buffer._version, buffer.clone()) for buffer in model.buffers() if not buffer.is_inference()]
    try:
        yield
    finally:
        for buffer, version, old in buffers:
            if buffer._version != version:
                buffer.data.copy_(old)


@contextmanager
def same_followers(model: nn.Module, ordinary: bool) -> Iterator[None]:
    """Parameters without gradients are put back afterwards: a forward may move those of a momentum encoder.

    It has no more parameters than what it follows, so there is memory for copies: gradients will need as much.
    """
    still = [p for p in model.parameters() if ordinary and not p.requires_grad]
    if sum(p.numel() for p in still) > sum(p.numel() for p in model.parameters() if p.requires_grad):
        still = []
    before = [(p, p.data, p.data.clone()) for p in still if not p.is_meta]
    try:
        yield
    finally:
        for parameter, data, old in before:
            if parameter.data_ptr() != data.data_ptr():
                parameter.data = data
            data.copy_(old)


@contextmanager
def own_random_numbers(model: nn.Module) -> Iterator[None]:
    """All global generators are put back afterwards: torch's on the CPU and wherever the model is, and the others."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=[device.index or 0 for device in devices]), own_generators():
        yield


@contextmanager
def own_generators() -> Iterator[None]:
    """Python's and numpy's global generators are put back afterwards."""
    numpy = sys.modules.get("numpy")
    states = random.getstate(), None if numpy is None else numpy.random.get_state(legacy=False)
    try:
        yield
    finally:
        random.setstate(states[0])
        if numpy is not None and states[1] is not None:
            numpy.random.set_state(states[1])


def generators() -> bytes:
    """The states of Python's and numpy's global generators."""
    numpy = sys.modules.get("numpy")
    return pickle.dumps((random.getstate(), None if numpy is None else numpy.random.get_state(legacy=False)))


def only_device(model: nn.Module) -> torch.device | None:
    """The device of a model that is nothing but ordinary modules and tensors, all on one device; None for others.

    Others (sharded, offloaded, quantized, scripted, with hooks of somebody else) run code around their modules that
    may need numbers, and forwards that come to their end.
    """
    tensors = [*model.parameters(), *model.buffers()]
    devices = {tensor.device for tensor in tensors}
    if len(devices) != 1 or any(type(tensor) not in (Tensor, nn.Parameter) for tensor in tensors):
        return None
    if not all(_is_ordinary(module) for module in model.modules()):
        return None
    device = devices.pop()
    return None if device.type == "meta" else device


def _is_ordinary(module: nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule) or type(module).__module__.startswith("torch.distributed."):
        return False
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    return all(isinstance(hook, Hook) for hook in hooks)


def varied(pair: Inputs, single: Inputs) -> tuple[Inputs, Inputs] | None:
    """Random numbers in the place of two rows, and of the first of them; None if none are floating point."""

    def floating(leaves: Mapping[Any, Any]) -> dict[Any, Tensor]:
        return {key: x for key, x in leaves.items() if isinstance(x, Tensor) and x.is_floating_point()}

    two, one = trees.leaves(pair), trees.leaves(single)
    drawn = {path: torch.rand_like(x) for path, x in floating(two).items()}
    if not drawn:
        return None
    first = {path: drawn[path][: len(x)] if x.dim() else drawn[path] for path, x in floating(one).items()}
    return trees.with_leaves(pair, drawn), trees.with_leaves(single, first)


class Enough(BaseException):
    """Ends a forward of which enough was seen; no `Exception`, which a model might handle."""


def run(model: nn.Module, inputs: Inputs) -> None:
    """A forward without gradients, to its end or until a hook raises `Enough`."""
    args, kwargs = fresh(inputs)
    with suppress(Enough), torch.no_grad():
        model(*args, **kwargs)


def initialise(model: nn.Module, inputs: Inputs) -> None:
    """Let lazy modules that are not initialised yet see their inputs, in a forward as torch asks for before training.

    What parameters begin with is drawn from the global generators, as in a plain run; running statistics stay.
    """
    if not any(map(torch.nn.parameter.is_lazy, (*model.parameters(), *model.buffers()))):
        return
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase) and m.training]
    try:
        for norm in norms:
            norm.training = False
        with calling():
            run(model, inputs)
    finally:
        for norm in norms:
            norm.training = True


def observe(model: nn.Module, inputs: Inputs, modules: Collection[str]) -> dict[str, list[Tensor]]:
    """The output tensors of the named modules in one forward without gradients."""
    seen: dict[str, list[Tensor]] = {}
    may_stop = only_device(model) is not None  # asked before there are hooks

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            # A copy, since the block may add to the output in place.
            seen[name] = [t.detach().clone() for t in trees.tensors(output)]
            if may_stop and len(seen) == len(modules):
                raise Enough

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(keep(name)) for name in modules]
    try:
        with same_followers(model, may_stop):
            run(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return seen
