"""Masks for compiled models: opaque operators that run in every call of the compiled graph.

A compiler sees masks come out of an operator and a phase that is a constant, so it makes one graph a phase. The masks
are made on the CPU, and CUDA graphs, which would replay those of their recording for ever, leave these operators out.

That a backward has come to a compiled forward is seen by another operator, in the graph of the backward. The *ticket*
that it is given is kept for it by autograd, and so lives as long as the graph of the forward.

Where a branch runs on rows and their number is fixed, the graph does so as well: a constant number is undropped, and
the order of the rows comes out of the operator. Otherwise all rows run, and a mask is applied.

Which branches a graph gates is noted as it is traced, and a graph serves those modules alone that have its hooks.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from rdp import trees
from rdp.errors import BranchError
from rdp.masks import fixed_drops
from rdp.refusals import count_rows
from rdp.rows.branch import Split
from rdp.rows.program import Program
from rdp.training.step import copies_from_pinned, order

if TYPE_CHECKING:
    from rdp.training.run import Run

F = TypeVar("F", bound=Callable[..., Any])


class Given(NamedTuple):
    """What compiled code is given of a forward, where the model is.

    Attributes:
        masks: Bool `Tensor[branches, N]`.
        order: int64 `Tensor[branches, N]`: the undropped rows of each branch, and then the others; None if their
            numbers differ from one forward to the next.
        keep_probs: With `scale_by_keep`, what undropped rows are divided by, `Tensor[branches]`: were it numbers, a
            graph would be made for each rate.
        ticket: For `reached`; None where Python sees the backward.
    """

    masks: Tensor
    order: Tensor | None = None
    keep_probs: Tensor | None = None
    ticket: Tensor | None = None


_runs: weakref.WeakValueDictionary[int, Run] = weakref.WeakValueDictionary()
_constants: list[Callable[..., Any]] = []
_guarding: dict[int, bool] = {}
"""The attached runs, by id, and whether torch was to skip guards on hooks when each was attached."""


_TAGS: dict[str, Any] = {}
"""CUDA graphs would replay the masks of their recording for ever: torch cuts them here, if it knows how."""
if hasattr(torch.Tag, "cudagraph_unsafe") and "tags" in inspect.signature(torch.library.custom_op).parameters:
    _TAGS["tags"] = (torch.Tag.cudagraph_unsafe,)


@torch.library.custom_op("rdp::begin_forward", mutates_args=(), **_TAGS)
def begin_forward(
    x: Tensor, rows: int, run: int, branches: int, ordered: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Begin a forward of N rows: what `Given` has, on the CPU; the ticket is an int64 `Tensor[2]`.

    `x` tells where: it is any tensor that the model computes with. The order is of no rows where it is not asked for.
    """
    this = _runs[run]
    forward = this.begin_forward(rows)
    ticket = torch.tensor([run, id(forward)], device="cpu")
    forward.graph = weakref.ref(ticket)
    masks, rows_in_order = forward.masks.clone(), order(forward.masks) if ordered else _no_order(branches)
    if copies_from_pinned(x.device.type):
        masks, rows_in_order = masks.pin_memory(), rows_in_order.pin_memory()
    return masks, rows_in_order, keep_probs_of(this), ticket


@begin_forward.register_fake
def _(x: Tensor, rows: int, run: int, branches: int, ordered: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    masks = torch.empty((branches, rows), dtype=torch.bool, device="cpu")
    rows_in_order = torch.empty_like(masks, dtype=torch.int64) if ordered else _no_order(branches)
    keep_probs = torch.empty(branches, dtype=torch.float64, device="cpu")
    return masks, rows_in_order, keep_probs, torch.empty(2, dtype=torch.int64, device="cpu")


@torch.library.custom_op("rdp::reached", mutates_args=(), **_TAGS)
def reached(gradient: Tensor, ticket: Tensor) -> Tensor:
    """A backward has come to the forward of `ticket`; returns a one, since what returns nothing is left out."""
    run, key = ticket.tolist()
    if run in _runs:
        step = _runs[run].step
        for forward in [forward for forward in step.forwards if id(forward) == key]:
            step.reached(forward)
    return gradient.new_ones(())


@reached.register_fake
def _(gradient: Tensor, ticket: Tensor) -> Tensor:
    return gradient.new_empty(())


class _Mark(torch.autograd.Function):
    """The identity; its backward tells that it ran."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ticket: Tensor) -> Tensor:
        ctx.save_for_backward(ticket)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0] * reached(gradients[0], *ctx.saved_tensors), None


def begin(run: Run, module: nn.Module, args: Any, kwargs: Any) -> None:
    """Begin a forward as torch.compile sees it.

    Raises:
        BranchError: If the branches are not known yet.
    """
    run.compiled = None
    if run.pauses or not run.model.training or not torch.is_grad_enabled():
        return
    if not run.branches:
        raise BranchError(
            "the model is compiled before its branches are known; pass example_inputs to rdp.attach, or call "
            "handle.discover(inputs), so that they are found beforehand"
        )
    given = [tensor for tensor in trees.tensors((args, kwargs)) if tensor.dim()]
    x, rows = given[0] if given else next(module.parameters()), count_rows(run.rows, (args, kwargs), run.options.mode)
    ordered, device = in_order(run), x.device
    masks, rows_in_order, keep_probs, ticket = begin_forward(x.detach(), rows, id(run), len(run.branches), ordered)
    run.compiled = Given(
        in_graph(masks, device),
        in_graph(rows_in_order, device) if ordered else None,
        in_graph(keep_probs, device) if run.options.scale_by_keep else None,
        ticket,
    )


def in_order(run: Run) -> bool:
    """Are undropped rows and others told apart by their order, since there is a constant number of each?"""
    return run.options.sampling == "fixed" and run.options.mode == "row"


def _no_order(branches: int) -> Tensor:
    return torch.empty((branches, 0), dtype=torch.int64, device="cpu")


def keep_probs_of(run: Run) -> Tensor:
    """What `scale_by_keep` divides by, `Tensor[branches]`."""
    return 1 - torch.tensor(run.step.rates, dtype=torch.float64, device="cpu")


def in_graph(tensor: Tensor, device: torch.device) -> Tensor:
    """What `sent` does, for a compiler, which cannot pin."""
    return tensor.to(device, non_blocking=True)


def split(run: Run, branch: int, program: Program) -> Split | None:
    """The rows of a branch, whose numbers are constants of the graph; None if it has to run dense."""
    given, step = run.compiled, run.step
    if given is None or given.order is None or program.batch_norm:
        return None
    rows = given.order.shape[1]
    # Of other rows than DROP had, any number may be undropped.
    if rows < program.fewest or (step.replayed_rows is not None and step.replayed_rows != rows):
        return None
    kept = rows - fixed_drops(step.rates[branch], rows)
    return Split(given.order[branch][:kept], given.order[branch][kept:]) if 0 < kept < rows else None


def marked(run: Run, branch: int, x: Tensor) -> Tensor:
    """The output `x` of a branch; if that is the first or last, its backward tells that it has reached the forward."""
    return mark(run, x) if branch in run.ends else x


def mark(run: Run, x: Tensor) -> Tensor:
    """A tensor whose backward tells that it has reached the compiled forward."""
    ticket = run.compiled.ticket if run.compiled is not None else None
    return _Mark.apply(x, ticket) if ticket is not None and x.requires_grad else x


def constant(function: F) -> F:
    """Let a function be called while a graph is traced, and not by the graph, for which what it returns is a constant.

    Its arguments must be constants, too, and nothing that it changes may have been looked at by then. It is torch's
    decorator that does so, but that would import dynamo together with this module.
    """
    _constants.append(function)
    return function


def run_of(run: int) -> Run:
    """A run by its id: where a graph is traced, runs are no constants."""
    return _runs[run]


@constant
def traced(run: int, key: str) -> str:
    """Note that a graph gates a branch; its number, as text, since torch makes symbols of numbers that differ."""
    this, branch = _runs[run], int(key)
    this.watch.traced.add(branch)
    this.watch.reached.add(branch)
    this.watch.whole |= this.options.mode == "batch" and not this.calls.running
    if this.options.mode == "row" and this.branches[branch].compute == "rows" and not in_order(this):
        this.watch.dense_in_graph = True
    return key


def end(run: Run, *_: Any) -> None:
    """End a forward as torch.compile sees it."""
    run.compiled = None


def attached(run: Run) -> None:
    """Make a run known to the operators, and have compiled code look at hooks for as long as it is attached.

    Unless told otherwise, torch takes it for granted that modules of one class have the same hooks: a graph of a module
    without any (a branch of rate 0, a plain twin of the model) would serve for gated ones, which would train plainly.
    """
    import torch._dynamo  # the first optimizer of a process does so too: the 3 seconds come earlier, not on top

    _runs[id(run)] = run
    for function in _constants:
        torch._dynamo.assume_constant_result(function)  # type: ignore[no-untyped-call]
    config = torch._dynamo.config
    _guarding.setdefault(id(run), config.skip_nnmodule_hook_guards)
    config.skip_nnmodule_hook_guards = False
    weakref.finalize(run, _unguard, id(run)).atexit = False


def detached(run: Run) -> None:
    """The hooks of a run are not in the model any more."""
    _unguard(id(run))
    forget_compiled()


def forget_compiled() -> None:
    """Drop compiled code: it was made without the hooks that have just been added, or with those just removed."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def _unguard(run: int) -> None:
    """Give torch its setting back when the last run has gone, whichever that is."""
    skipped = _guarding.pop(run, False)
    if _guarding:
        first = next(iter(_guarding))
        _guarding[first] |= skipped  # what the first one found is the user's; the others found ours
    elif skipped:
        torch._dynamo.config.skip_nnmodule_hook_guards = True
