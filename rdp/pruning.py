"""`prune`: a plain model without some of the branches, from an attached one.

A forward of two rows is traced. Where the removed branches ended there are zeros, and every module whose values the
output is made of no more is replaced by one that computes nothing (`removed.py`). That is all: the code of the model
stays as it is, and the result is compared with the attached model `without` these branches.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rdp import trees
from rdp.branches import Branch
from rdp.calls import Inputs
from rdp.copies import inert
from rdp.discovery import forwards
from rdp.discovery.graph import Graph
from rdp.discovery.records import Call
from rdp.discovery.trace import Trace
from rdp.discovery.unused import Unused
from rdp.errors import ArgumentError, BranchError, listed
from rdp.handle import ResidualDropPath
from rdp.inputs import fresh
from rdp.removed import Form, NoForm, Removed, Same, form_of, source_of
from rdp.training.lesions import Which, chosen


class Ordered(Protocol):
    """What `rdp.analysis.lesions` returns."""

    @property
    def order(self) -> tuple[str, ...]: ...  # noqa: D102


def prune(handle: ResidualDropPath, keep: Which | float, *, order: Ordered | Sequence[str] | None = None) -> nn.Module:
    """A shallower network: a plain copy of an attached model without some of its branches.

    The modules of these branches are not called and hold no parameters any more, unless they serve something else too.
    The copy has no hooks, and is trained, saved, compiled and exported as any model; it computes what the attached
    model computes within `handle.without(...)`. Model and handle are as before.

    Args:
        handle: What `rdp.attach` returned, with known branches.
        keep: The branches that stay: names, or a function of (name, module); or the fraction of them that stays.
        order: For a fraction: the table of `rdp.analysis.lesions`, of which the branches stay that are worth most; or
            the names of all branches, the most important first.

    Returns:
        The copy.

    Raises:
        ArgumentError: If `keep` is a fraction without `order`, or one of them cannot be understood.
        AttachError: If the handle was removed.
        BranchError: If a name is that of no branch, or a branch cannot be taken out.
    """
    with handle.without(()):  # which checks the handle, and follows what was replaced in the model
        pass
    kept = {branch.name for branch in _kept(handle, keep, order)}
    gone = [branch for branch in handle.branches if branch.name not in kept]
    device = next((p.device for p in handle.model.parameters()), None)
    inputs: Inputs = trees.map_leaves(lambda x: x.to(device) if isinstance(x, Tensor) else x, handle._found_with)
    try:
        return _pruned(handle, gone, inputs)
    except _Unfit as why:
        if len(gone) == 1:
            raise BranchError(_refusal([gone[0].name], str(why))) from why.__cause__
        reasons: dict[str, str] = {}
        for branch in gone:
            try:
                _pruned(handle, [branch], inputs)
            except _Unfit as one:
                reasons[branch.name] = str(one)
        named = [*reasons] or [branch.name for branch in gone]
        raise BranchError(_refusal(named, next(iter(reasons.values()), str(why)))) from why.__cause__


class _Unfit(Exception):
    """Why branches cannot be taken out."""


def _refusal(names: Sequence[str], why: str) -> str:
    return f"{listed([f'`{name}`' for name in names])} cannot be taken out of the model: {why}. Keep it with keep="


def _kept(handle: ResidualDropPath, keep: Which | float, order: Ordered | Sequence[str] | None) -> Sequence[Branch]:
    if isinstance(keep, bool) or not isinstance(keep, (int, float)):
        if order is not None:
            raise ArgumentError("order belongs to a fraction, such as keep=0.75; here keep says itself what stays")
        return chosen(handle._run, keep)
    if not 0 <= keep <= 1:
        raise ArgumentError(f"keep must be names, or a fraction of the branches in [0, 1]; got {keep}")
    if order is None:
        raise ArgumentError(
            f"keep={keep} says how many branches stay, but not which: give order=rdp.analysis.lesions(handle, "
            "evaluate), or the names of those that stay"
        )
    names = list(order if isinstance(order, Sequence) else order.order)
    known = {branch.name for branch in handle.branches}
    if len(names) != len(known) or {*names} != known:
        odd = sorted(map(str, {*names} ^ known)) or ["names that are there twice"]
        raise ArgumentError(
            f"order must hold each branch of this model once, as rdp.analysis.lesions(handle, ...) does; it differs in "
            f"{listed(odd)}"
        )
    return chosen(handle._run, names[: round(keep * len(names))])


def _pruned(handle: ResidualDropPath, gone: Sequence[Branch], inputs: Inputs) -> nn.Module:
    model = copy.deepcopy(handle.model)
    _forget_hooks(model)
    if gone:
        with forwards.undisturbed(model):
            replaced, still = _plan(model, gone, inputs)
        _replace(model, replaced, still)
        rows = handle._run.rows
        for given in (inputs, *([rows.take(inputs, 1)] if rows is not None else [])):
            _compare(handle, model, gone, given)
    return model


def _forget_hooks(model: nn.Module) -> None:
    """Take out what has become of the handle's hooks in a copy."""
    for module in model.modules():
        for table, options in (
            (module._forward_pre_hooks, (module._forward_pre_hooks_with_kwargs,)),
            (module._forward_hooks, (module._forward_hooks_with_kwargs, module._forward_hooks_always_called)),
        ):
            for key in [key for key, hook in table.items() if hook is inert]:
                for each in (table, *options):
                    each.pop(key, None)


def _plan(model: nn.Module, gone: Sequence[Branch], inputs: Inputs) -> tuple[dict[str, Form], set[str]]:
    """What serves these branches alone: modules, with what will stand for each, and parameters of other modules."""
    graph = Graph(Trace(model).run(*fresh(inputs)))  # a copy, which the model may write to
    zeros: set[int] = set()
    blocks: dict[int, int] = {}
    gates = [gate for branch in gone for gate in branch.gates]
    for gate in gates:
        calls = [call for call in graph.trace.calls if call.name == gate.module]
        if not calls:
            raise _Unfit(f"`{gate.module}` is not called in eval mode")
        if gate.of_block:
            blocks |= {call.outputs[gate.leaf]: call.inputs[0] for call in calls}
        else:
            zeros |= {call.outputs[gate.leaf] for call in calls}
    whole = {gate.module for gate in gates if gate.of_block}
    unused = Unused(graph, zeros, blocks)
    replaced: dict[str, Form] = {}
    for name, form in _forms(model, fresh(inputs), unused, whole).items():  # what is around others comes first
        if not _inside(name, replaced) and not any(_inside(block, [name]) for block in whole - {name}):
            replaced[name] = form
    for value in [*zeros, *blocks]:
        makers = [call.name for call in graph.values[value].returned_by]
        if not any(_inside(name, replaced) for name in makers):
            raise _Unfit(f"what `{makers[0]}` does serves something else too, or cannot be replaced")
    held = {name for name in unused.parameters() if not _inside(name, replaced)}
    if (layer := unused.layer(held)) is not None:
        raise _Unfit(f"`{layer[0]}` is used by the function `{layer[1]}` outside of any module that could be replaced")
    return replaced, held


def _inside(name: str, others: Iterable[str]) -> bool:
    return any(f"{name}.".startswith(f"{other}.") for other in others)


def _forms(model: nn.Module, inputs: Inputs, unused: Unused, whole: Collection[str]) -> dict[str, Form]:
    """The modules that can be replaced, in the order of their calls, and what by.

    Args:
        model: The model.
        inputs: Of the forward that was traced.
        unused: What it needs no more.
        whole: Blocks that return what they are given.
    """
    calls = unused.modules()
    forms: dict[str, list[Form | None]] = {name: [] for name in calls}

    def look(name: str) -> Callable[..., None]:
        ordinals = iter(calls[name])

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
            forms[name].append(_form(next(ordinals), args, kwargs, output, unused, name in whole))

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(look(name), with_kwargs=True) for name in calls]
    try:
        with torch.no_grad():
            model(*inputs[0], **inputs[1])
    finally:
        for hook in hooks:
            hook.remove()
    alike = {name: each[0] for name, each in forms.items() if each and all(form == each[0] for form in each)}
    return {name: form for name, form in alike.items() if form is not None}


def _form(
    call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any, unused: Unused, whole: bool
) -> Form | None:
    try:
        key, x = source_of(args, kwargs)
        if whole:
            return Form(key, Same(copied=True))
        number = next(i for i, tensor in enumerate(trees.tensors((args, kwargs))) if tensor is x)
        spent = not unused.is_looked_at(call.inputs[number])
        return Form(key, form_of(x, output, lambda leaf: not spent or call.outputs[leaf] in unused.zeros))
    except NoForm:
        return None


def _replace(model: nn.Module, modules: Mapping[str, Form], parameters: Collection[str]) -> None:
    """Put others in the places of modules; parameters that other modules hold become buffers that no state has."""
    removed = {id(old := model.get_submodule(name)): Removed(old, form) for name, form in modules.items()}
    named = dict(model.named_parameters(remove_duplicate=False))
    still = {id(named[name]) for name in parameters}
    for module in [*model.modules()]:
        for key, child in module._modules.items():
            module._modules[key] = removed.get(id(child), child)
        for key, parameter in [*module._parameters.items()]:
            if parameter is not None and id(parameter) in still:
                del module._parameters[key]
                module.register_buffer(key, parameter.detach(), persistent=False)
        if isinstance(module, nn.TransformerEncoderLayer) and any(isinstance(m, Removed) for m in module.children()):
            module.activation_relu_or_gelu = 0  # torch's way to choose no fused kernel, which takes weights by name


def _compare(handle: ResidualDropPath, model: nn.Module, gone: Sequence[Branch], inputs: Inputs) -> None:
    """See whether the model computes what the attached one does without these branches."""
    names = [branch.name for branch in gone]
    args, kwargs = fresh(inputs)
    with forwards.undisturbed(handle.model), handle.without(names), torch.no_grad():
        expected = [*trees.tensors(handle.model(*args, **kwargs))]
    fused = torch.backends.mha.get_fastpath_enabled()
    args, kwargs = fresh(inputs)
    try:
        with forwards.undisturbed(model), torch.no_grad():
            torch.backends.mha.set_fastpath_enabled(fused)
            outputs = [*trees.tensors(model(*args, **kwargs))]
    except Exception as error:
        raise _Unfit(f"the model does not run without what serves it alone ({error})") from error
    if len(outputs) != len(expected) or not all(map(_close, outputs, expected)):
        raise _Unfit("the model computes something else then")


def _close(x: Tensor, y: Tensor) -> bool:
    """Are they equal but for rounding?"""
    if x.shape != y.shape or x.dtype != y.dtype or x.is_meta or not x.is_floating_point():
        return x.shape == y.shape and x.dtype == y.dtype and (x.is_meta or torch.equal(x, y))
    size = float(y.nan_to_num(0, 0, 0).abs().max()) if y.numel() else 0.0
    return torch.allclose(x, y, rtol=0, atol=torch.finfo(x.dtype).eps ** 0.75 * size, equal_nan=True)
