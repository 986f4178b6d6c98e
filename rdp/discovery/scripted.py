"""Calls of TorchScript (`torch.jit.script`) in a trace: torch shows them to no mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def scripted_calls(seen_by: Callable[..., Any]) -> Iterator[None]:
    """Within the context, calls of TorchScript go through a `__torch_function__`, as those of other functions do."""
    kinds = [torch.jit.ScriptFunction, torch._C.ScriptMethod]
    calls = [kind.__call__ for kind in kinds]

    def shown(call: Callable[..., Any]) -> Callable[..., Any]:
        def script(scripted: Any, *args: Any, **kwargs: Any) -> Any:
            def scripted_function(*args: Any, **kwargs: Any) -> Any:
                return call(scripted, *args, **kwargs)

            return seen_by(scripted_function, (), args, kwargs)

        return script

    try:
        for kind, call in zip(kinds, calls, strict=True):
            kind.__call__ = shown(call)  # type: ignore[method-assign]
        yield
    finally:
        for kind, call in zip(kinds, calls, strict=True):
            kind.__call__ = call  # type: ignore[method-assign]
