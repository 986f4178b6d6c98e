"""A device of its own, made of CPU tensors: shows on any machine what else only an accelerator would show.

It is a backend of torch written in Python (`PrivateUse1`). Each of its tensors wraps one on the CPU, where everything
is computed, so results are the CPU's. Two things are as on a GPU: tensors of two devices do not mix, and what is
launched, copied and waited for is recorded. A host waits when it reads a number or a shape that depends on numbers, and
when it copies otherwise than from pinned memory without blocking.

There is no `torch.tensor([1, 2], device=...)`, which would wait: it raises. `install` is for the
whole process, which has an accelerator from then on: do so in a process of its own.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import rdp

NAME = "simulated"
_RDP = str(Path(rdp.__file__).parent)
_aten = torch.ops.aten
_READS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim"}
"""Operators that return a number, or a shape that depends on numbers."""
_INDEXES = {"index", "index_put", "index_put_", "_index_put_impl_"}
_LAUNCHES_NOTHING = {"_unsafe_view", "detach", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


@dataclass
class Record:
    """What a device was asked to do."""

    launches: Counter[str] = field(default_factory=Counter)
    """Kernels by operator. Views and memory without numbers in it are none."""
    copies: list[str] = field(default_factory=list)
    """From another device or to it, each as how and from where it was done."""
    waits: list[str] = field(default_factory=list)
    """What the host has waited for, each with the lines of rdp that it came from, if it came from any."""


_record = Record()
_libraries: list[torch.library.Library] = []


@contextlib.contextmanager
def recording() -> Iterator[Record]:
    """Record what happens meanwhile, in all threads: a backward runs in a thread of the device."""
    global _record
    before, _record = _record, Record()
    try:
        yield _record
    finally:
        _record = before


def is_supported() -> bool:
    """Can torch have a backend that is written in Python?"""
    return hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend")


def install() -> torch.device:
    """Let this process have the device."""
    if not _libraries:
        torch.utils.backend_registration._setup_privateuseone_for_python_backend(NAME)
        everything, cpu = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
        everything.fallback(lambda func, *args, **kwargs: _call(func, args, kwargs), "PrivateUse1")
        # Torch would make an empty one and resize it, which a wrapper cannot follow.
        for overload in ("default", "start", "start_step"):
            func = getattr(_aten.arange, overload)
            name = "arange" + ("" if overload == "default" else f".{overload}")
            cpu.impl(name, lambda *args, func=func, **kwargs: _call(func, args, kwargs), "PrivateUse1")
        cpu.impl("is_pinned", _is_pinned, "CPU")
        cpu.impl("_pin_memory", _pinned, "CPU")
        _libraries.extend((everything, cpu))
    return torch.device(NAME, 0)


class SimulatedTensor(Tensor):
    """A tensor of the device; `raw` is the one on the CPU."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor, requires_grad: bool = False) -> SimulatedTensor:
        wrapper: SimulatedTensor = Tensor._make_wrapper_subclass(
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=torch.device(NAME, 0),
            requires_grad=requires_grad,
        )
        wrapper.raw = raw
        return wrapper

    def __init__(self, raw: Tensor, requires_grad: bool = False) -> None:
        super().__init__()

    def __repr__(self) -> str:
        return f"SimulatedTensor({self.raw!r})"

    def tolist(self) -> Any:
        """As numbers; torch's own refuses classes that are derived."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


def _call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Do what an operator does, and record it."""
    name = func._schema.name.removeprefix("aten::")
    if name == "_to_copy":
        return _to_copy(func, *args, **kwargs)
    if name == "copy_":
        return _copy(*args, **kwargs)
    tensors = [x for x in _flat((*args, *kwargs.values())) if isinstance(x, Tensor)]
    ours = [x for x in tensors if isinstance(x, SimulatedTensor)]
    strangers = [x for x in tensors if x.dim() and not isinstance(x, SimulatedTensor)]
    if ours and strangers and name not in _INDEXES:
        raise RuntimeError(f"{func}: tensors on {NAME} and on {strangers[0].device}, of shape {[*strangers[0].shape]}")
    if ours and (why := _waits(name, args, kwargs, strangers)):
        _wait(why)
    raw_args = [_each(_raw, x) for x in args]
    raw_kwargs = {key: _each(_raw, x) for key, x in kwargs.items()}
    if raw_kwargs.get("device") is not None:
        raw_kwargs["device"] = torch.device("cpu")
    raw_kwargs.pop("pin_memory", None)
    result = func(*raw_args, **raw_kwargs)
    if not ours and torch.device(kwargs.get("device") or "cpu").type != NAME:
        return result
    if name not in _LAUNCHES_NOTHING and not _is_view(func):
        _record.launches[name] += 1
    for x in ours:
        assert x.shape == x.raw.shape, f"{func} resizes a tensor, which the simulated device cannot"
    written = _written(func, args, kwargs)

    def wrapped(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return written[id(x)] if id(x) in written else SimulatedTensor(x)

    return _each(wrapped, result)


def _to_copy(func: Any, source: Tensor, *, device: Any = None, non_blocking: bool = False, **kwargs: Any) -> Tensor:
    target = source.device if device is None else torch.device(device)
    kwargs.pop("pin_memory", None)
    raw: Tensor = func(_raw(source), **kwargs)
    _record_copy(source, target, non_blocking)
    return SimulatedTensor(raw) if target.type == NAME else raw


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    _raw(target).copy_(_raw(source))
    _record_copy(source, target.device, non_blocking)
    return target


def _record_copy(source: Tensor, target: torch.device, non_blocking: bool) -> None:
    _record.launches["copy_"] += 1
    if source.device.type == target.type:
        return
    if target.type == NAME:
        pinned = _is_pinned(source)
        how = f"to {NAME}, {'' if pinned else 'not '}pinned, {'non-' if non_blocking else ''}blocking"
        waits = not (pinned and non_blocking)
    else:
        how, waits = f"from {NAME}", True  # whoever asks for it reads it
    _record.copies.append(how + _origin())
    if waits:
        _wait(f"a copy of {[*source.shape]} {how}")


def _waits(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], strangers: list[Tensor]) -> str:
    """Why the host waits for an operator, or the empty string."""
    if name in _READS or (name == "repeat_interleave" and kwargs.get("output_size") is None and _has_counts(args)):
        return name
    if name in _INDEXES:
        if strangers:
            return f"{name} with an index on the CPU"
        if any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
            return f"{name} with a mask"
    return ""


def _has_counts(args: tuple[Any, ...]) -> bool:
    return isinstance(args[min(1, len(args) - 1)], Tensor)


def _wait(why: str) -> None:
    _record.waits.append(why + _origin())


def _origin() -> str:
    """The lines of rdp that are running, innermost first."""
    lines, frame = [], sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(_RDP):
            lines.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
        frame = frame.f_back  # type: ignore[assignment]
    return f", from rdp: {' < '.join(lines[:3])}" if lines else ""


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    """What an operator takes or returns: values, and lists of them."""
    for x in values:
        if isinstance(x, (list, tuple)):
            yield from x
        else:
            yield x


def _each(change: Callable[[Any], Any], x: Any) -> Any:
    """The same, changed."""
    if isinstance(x, (list, tuple)):
        changed = [change(item) for item in x]
        return changed if isinstance(x, list) else tuple(changed)
    return change(x)


def _raw(x: Any) -> Any:
    return x.raw if isinstance(x, SimulatedTensor) else x


@functools.cache
def _is_view(func: Any) -> bool:
    returned = [value.alias_info for value in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in returned)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[int, SimulatedTensor]:
    """By id of what they wrap, the tensors that an operator writes to: it returns these, not new ones."""
    places = _places_written(func)
    given = [args[place] if place < len(args) else kwargs.get(name) for place, name in places]
    return {id(x.raw): x for x in _flat(given) if isinstance(x, SimulatedTensor)} if places else {}


@functools.cache
def _places_written(func: Any) -> list[tuple[int, str]]:
    arguments = enumerate(func._schema.arguments)
    return [(i, x.name) for i, x in arguments if x.alias_info is not None and x.alias_info.is_write]


def _is_pinned(x: Tensor, device: Any = None) -> bool:
    return getattr(x.untyped_storage(), "pinned_by_simulation", False)


def _pinned(x: Tensor, device: Any = None) -> Tensor:
    copy = x.clone()
    copy.untyped_storage().pinned_by_simulation = True  # type: ignore[attr-defined]
    return copy
