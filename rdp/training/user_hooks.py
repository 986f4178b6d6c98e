"""Hooks of the user's on modules of a branch: they must not see a part of the batch, nor miss a backward."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from rdp.errors import AttachError

_OWN = frozenset({"torch", "rdp"})
"""Packages whose hooks do not look at rows: they compute weights, gather shards, or are ours."""


def tables(modules: Iterable[nn.Module]) -> list[Mapping[int, Any]]:
    """Where hooks of the modules are."""
    return [table for module in modules for table in (*_forward(module), *_backward(module))]


def first_hooked(modules: Mapping[str, nn.Module]) -> str | None:
    """The first of some modules, by name, that has a hook of the user's."""
    return next((name for name, m in modules.items() if _of_user(*_forward(m), *_backward(m))), None)


def expects_backward(module: nn.Module) -> bool:
    """Has it hooks of the user's for both ways, which may keep account of forwards that no backward has come to?

    Opacus takes gradients by sample so.
    """
    return _of_user(*_forward(module)) and _of_user(*_backward(module))


def check_ends(ends: Mapping[str, nn.Module]) -> None:
    """Refuse modules that end a gated branch, whose gate their backward hooks do not see.

    Raises:
        AttachError: If one has hooks that expect a backward for each forward.
    """
    for name, module in ends.items():
        if expects_backward(module):
            # torch calls backward hooks with the gradient of what forward hooks have returned.
            raise AttachError(
                f"`{name}` ends a branch and has hooks that pair its forwards with backwards, as Opacus' for gradients "
                "by sample: they would take the gradients of dropped rows for its own. Let the branch end in a module "
                "without such hooks, an nn.Identity() behind it, or leave it out with branches="
            )


def _forward(module: nn.Module) -> tuple[Mapping[int, Any], ...]:
    return module._forward_pre_hooks, module._forward_hooks


def _backward(module: nn.Module) -> tuple[Mapping[int, Any], ...]:
    return module._backward_pre_hooks, module._backward_hooks


def _of_user(*some: Mapping[int, Any]) -> bool:
    return any(_package(hook) not in _OWN for table in some for hook in table.values())


def _package(hook: Any) -> str:
    hook = getattr(hook, "func", hook)  # of a functools.partial
    return str(getattr(hook, "__module__", None) or type(hook).__module__).partition(".")[0]
