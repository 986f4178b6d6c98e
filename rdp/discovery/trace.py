"""Recording one forward of a model as a graph of values: which function made what from what, inside which module.

The forward runs for real, on tensors of any kind (`meta` and fake ones too), with a `TorchFunctionMode` around it.
No tensor is kept: a value is known by (tensor identity, version), so that an in-place write makes a new value and a
module that passes its input through makes none.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rdp import frames, trees
from rdp.discovery import ops
from rdp.discovery.by_tensor import ByTensor
from rdp.discovery.records import Call, Recipe, Ref, Value
from rdp.discovery.scripted import scripted_calls


class Trace(TorchFunctionMode):
    """The graph of one forward.

    Attributes:
        values: Every `Value`, in order of creation.
        calls: Every module `Call`, in order of entry; the first is the model's own.
        count: Number of calls of each module name.
        dropouts: The values that dropout was applied to, which changes nothing in eval mode, and the callers.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.values: list[Value] = []
        self.calls: list[Call] = []
        self.count: Counter[str] = Counter()
        self.dropouts: list[tuple[int, Call]] = []
        self._stack: list[Call] = []
        self._gradients = [True]  # one for each of the model's own `no_grad` and `enable_grad` that are open
        self._known: ByTensor[tuple[int, int]] = ByTensor()  # version and value index
        self._written: ByTensor[int] = ByTensor()  # by the owner of the storage, the value of its last in-place write
        self._from_host = False
        """Is the model called without any tensor, so that those which it makes of numbers are its data?"""
        self._names: dict[int, str] = {}
        self._first_names: dict[str, str] = {}
        for named in (model.named_parameters, model.named_buffers):
            for name, tensor in named(remove_duplicate=False):
                self._names.setdefault(id(tensor), name)  # the first of several names, as `parameters()` has it
                self._first_names[name] = self._names[id(tensor)]

    @property
    def root(self) -> Call:
        """The model's own call."""
        return self.calls[0]

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Trace:
        """Trace `model(*args, **kwargs)` without gradients and return self."""
        with _unseen():
            given = [*trees.tensors((args, kwargs)), *_held((args, kwargs))]
            for tensor in given:
                self._bind(tensor, self._new("input", (), tensor, is_data=True))
        self._from_host = not given
        hooks = []
        for name, module in self.model.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):
                hooks.append(module.register_forward_pre_hook(self._enter(name), with_kwargs=True))
                hooks.append(module.register_forward_hook(self._leave))
        try:
            with torch.no_grad(), scripted_calls(self.__torch_function__), self:
                self.model(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
        return self

    def _enter(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            call = Call(name, self.count[name], self._stack[-1] if self._stack else None, begin=0)
            with _unseen():
                for own, parameter in module._parameters.items():
                    if parameter is not None:
                        full = f"{name}.{own}" if name else own
                        self._name(parameter, self._first_names.get(full, full))
                call.inputs = tuple(self._lookup(tensor) for tensor in trees.tensors((args, kwargs)))
                call.arguments = self._recorded(args), self._recorded(kwargs)
            call.begin = len(self.values)
            self.count[name] += 1
            self.calls.append(call)
            self._stack.append(call)

        return hook

    def _name(self, parameter: Tensor, name: str) -> None:
        """FSDP replaces the parameters of a module while it runs, and makes the replacements under the trace."""
        self._names[id(parameter)] = name
        known = self._known.get(parameter)
        if known is not None:
            self.values[known[1]].parameter = name

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        call = self._stack.pop()
        with _unseen():
            call.outputs = tuple(self._lookup(tensor) for tensor in trees.tensors(output))
        call.end = len(self.values)
        call.returns_tensor = isinstance(output, Tensor)
        for index in dict.fromkeys(call.outputs):
            self.values[index].returned_by.append(call)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if name == "_set_grad_enabled":
            self._switch_gradients()
        with _unseen():
            given = list(trees.tensors((args, kwargs)))
            inputs = [self._lookup(tensor) for tensor in given]
            if name in ops.ADD and len(inputs) == 1 and any(isinstance(a, (int, float)) and a == 0 for a in args):
                name = "alias"  # the first addition of Python's sum([...])
            arguments = self._recorded(tuple(args)), self._recorded(dict(kwargs))
        if name in ops.DROPOUT and self._stack and (args[1] if len(args) > 1 else kwargs.get("p", 0.5)):
            self.dropouts.append((inputs[0], self._stack[-1]))
        output = func(*args, **kwargs)
        learned_token = name in ops.BROADCAST and inputs and self._source(inputs[0]).parameter is not None
        becomes_data = learned_token or (self._from_host and name in ops.FROM_HOST)
        with _unseen():
            for leaf, tensor in enumerate([*trees.tensors(output), *given]):
                known = self._known.get(tensor)
                if known is not None and known[0] == _version(tensor):
                    continue  # passed through unwritten
                sources = () if name in ops.FRESH else tuple(inputs)
                index = self._bind(tensor, self._new(name, sources, tensor, is_data=True if becomes_data else None))
                self.values[index].recipe = Recipe(func, arguments, leaf)
                if known is not None:
                    self._written[self._storage_owner(tensor)] = index
        return output

    def _switch_gradients(self) -> None:
        """The model enters or leaves a context; which one tell the frames, since the trace runs without gradients."""
        callers = list(itertools.islice(frames.callers(), 1, 4))
        for frame, caller in itertools.pairwise(callers):
            context = frame.f_locals.get("self") if frame.f_code.co_name in ("__enter__", "__exit__") else None
            # Others, as `set_grad_enabled(self.training)`, may depend on flags, which now are those of eval mode.
            if isinstance(context, (torch.no_grad, torch.enable_grad)):
                if frame.f_code.co_name == "__exit__":
                    self._gradients = self._gradients[:-1] or [True]
                elif frames.is_autograd_function(caller):
                    self._gradients.append(self._gradients[-1])  # a checkpoint, which makes gradients later
                else:
                    self._gradients.append(isinstance(context, torch.enable_grad))
                return

    def _recorded(self, value: Any) -> Any:
        """`value` with a `Ref` in the place of every tensor; a container that does not take these is kept."""
        try:
            return trees.map_leaves(lambda leaf: Ref(self._lookup(leaf)) if isinstance(leaf, Tensor) else leaf, value)
        except Exception:
            return value

    def _new(
        self, op: str, inputs: tuple[int, ...], tensor: Tensor, is_data: bool | None = None, name: str | None = None
    ) -> int:
        if is_data is None:
            is_data = any(self.values[i].is_data for i in inputs)
        # Of a DTensor these are traced themselves.
        shape, is_float = _shape(tensor), tensor.is_floating_point() or tensor.is_complex()
        index = len(self.values)
        owner = self._stack[-1] if self._stack else None
        gradients = self._gradients[-1] and not torch.is_inference_mode_enabled()
        self.values.append(Value(index, op, inputs, shape, is_float, is_data, owner, gradients, name))
        for i in inputs:
            self.values[i].users.append(index)
        return index

    def _bind(self, tensor: Tensor, index: int) -> int:
        self._known[tensor] = (_version(tensor), index)
        if (local := _local(tensor)) is not None and self._known.get(local) is None:
            self._known[local] = _version(local), index
        return index

    def _lookup(self, tensor: Tensor) -> int:
        known = self._known.get(tensor)
        if known is None and (local := _local(tensor)) is not None and self._known.get(local) is not None:
            return self._bind(tensor, self._new("alias", (self._lookup(local),), tensor))
        if known is None:
            return self._bind(tensor, self._new("leaf", (), tensor, is_data=False, name=self._names.get(id(tensor))))
        version, index = known
        if version == _version(tensor):
            return index
        written = self._written.get(self._storage_owner(tensor))  # changed through an alias
        return self._bind(tensor, self._new("alias", (index,) if written is None else (index, written), tensor))

    @staticmethod
    def _storage_owner(tensor: Tensor) -> Tensor:
        return tensor if tensor._base is None else tensor._base

    def _source(self, index: int) -> Value:
        value = self.values[index]
        while value.op in ops.VIEW | ops.SLICE and value.inputs:
            value = self.values[value.inputs[0]]
        return value


def _unseen() -> AbstractContextManager[None]:
    """What is asked of tensors is not the model's doing: no mode and no subclass takes notice, or time."""
    disabled: AbstractContextManager[None] = torch._C.DisableTorchFunction()
    return disabled


def _held(inputs: Any) -> Iterator[Tensor]:
    """The tensors that objects of unknown kinds among the inputs hold."""
    for leaf in trees.leaves(inputs).values():
        if trees.is_opaque(leaf):
            yield from (held for held in trees.held(leaf) if isinstance(held, Tensor))


def _shape(tensor: Tensor) -> tuple[int, ...]:
    """Of a nested tensor, whose rows are of different lengths, that of all of them in one."""
    if tensor.is_nested and tensor.layout is torch.jagged:
        return tuple(tensor._values.shape)  # type: ignore[attr-defined]
    return tuple(tensor.shape)


def _local(tensor: Tensor) -> Tensor | None:
    """This rank's part of a `DTensor`. The conversions from and to it are autograd functions, which no trace sees."""
    return getattr(tensor, "_local_tensor", None)


def _version(tensor: Tensor) -> int:
    """How often it was written to; those made in inference mode do not count."""
    try:
        return tensor._version
    except RuntimeError:
        return -1
