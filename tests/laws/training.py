"""What the laws share about training: a loss, what an optimizer saw, and bitwise comparison."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def loss(output: Tensor) -> Tensor:
    """A sum with fixed weights, different for every row and entry, so that no two gradients cancel."""
    generator = torch.Generator().manual_seed(output.numel())
    weights = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
    return (output * weights).sum()


def seed(number: int) -> None:
    """As `torch.manual_seed`, but of the CPU's generator alone: that also writes down who called it, three times."""
    torch.default_generator.manual_seed(number)


class Spy:
    """The gradients an optimizer sees when its step begins, by parameter name; a hidden gradient is `None`."""

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        self.gradients: dict[str, Tensor | None] = {}
        self.model = model
        optimizer.register_step_pre_hook(self.record)

    def record(self, *_: Any) -> None:
        named = self.model.named_parameters()
        self.gradients = {name: None if p.grad is None else p.grad.clone() for name, p in named}


def after_forward(module: nn.Module, look: Callable[..., object]) -> Callable[[], object]:
    """Call `look(args, output)` after every forward of a module; not by a hook, for which a branch would run dense.

    Returns:
        How to stop it.
    """
    forward = module.forward

    def looked(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        look(args, output)
        return output

    module.forward = looked
    return lambda: vars(module).pop("forward")


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A copy of every parameter and of its optimizer state, by parameter name."""
    return {name: copied((p, optimizer.state.get(p, {}))) for name, p in model.named_parameters()}


def copied(value: Any) -> Any:
    """What `copy.deepcopy` makes of it, but for graphs, in a fraction of the time."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: copied(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)([copied(item) for item in value])
    return copy.deepcopy(value)


def identical(a: Any, b: Any) -> bool:
    """Bitwise equality of nested containers of tensors and numbers; nan equals itself."""
    if isinstance(a, Tensor):
        same_kind = isinstance(b, Tensor) and (a.dtype, a.shape) == (b.dtype, b.shape)
        return same_kind and torch.equal(_bits(a), _bits(b))
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and list(a) == list(b) and all(identical(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(identical, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8)


HOOKS = [
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
    "_non_persistent_buffers_set",
    "_parameters",
    "_buffers",
    "_modules",
]


def anatomy(model: nn.Module) -> dict[str, Any]:
    """Everything `attach` could leave behind: types, attributes, hooks, flags, the very tensors, and global hooks."""
    globals_ = torch.nn.modules.module
    return {
        "global hooks": [
            len(getattr(globals_, n)) for n in sorted(vars(globals_)) if n.startswith("_global_") and "hooks" in n
        ],
        "state_dict": [(key, id(value.untyped_storage())) for key, value in model.state_dict(keep_vars=True).items()],
        "tensor hooks": [
            (name, p._backward_hooks, p._post_accumulate_grad_hooks) for name, p in model.named_parameters()
        ],
        "requires_grad": [(name, p.requires_grad) for name, p in model.named_parameters()],
    } | {
        name: (
            type(module),
            getattr(module.forward, "__func__", module.forward),
            module.training,
            {key: id(value) for key, value in vars(module).items()},
            {
                hooks: dict(getattr(module, hooks))
                if isinstance(getattr(module, hooks), dict)
                else set(getattr(module, hooks))
                for hooks in HOOKS
            },
        )
        for name, module in model.named_modules()
    }
