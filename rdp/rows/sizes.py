"""Which of the lengths in a model's inputs is that of the batch: the one that the ends of branches follow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from torch import nn

from rdp import trees
from rdp.calls import CallError, Inputs, described
from rdp.discovery import forwards
from rdp.discovery.find import find_branches, traced
from rdp.errors import ForwardError, RdpError
from rdp.inputs import Rows, candidates
from rdp.options import Options
from rdp.refusals import EMPTY, NO_ROWS
from rdp.rows.places import locate

WAYS_OUT = "use mode='batch', which needs no rows, or attach to a part that is called with rows, as model.backbone"


def find_rows(model: nn.Module, inputs: Inputs, options: Options) -> Rows | None:
    """Where the rows of these inputs are; within `forwards.undisturbed`. None if batch mode finds none, nor needs any.

    Where one length alone could be theirs nothing is tried. Of several the model is called with some of each, and it is
    the one that most branches follow.

    Raises:
        ForwardError: If row mode finds none, or it is not clear where.
    """
    try:
        return _find_rows(model, inputs, options)
    except Exception:
        if options.mode == "row":
            raise
        return None


def _find_rows(model: nn.Module, inputs: Inputs, options: Options) -> Rows:
    try:
        found = candidates(model, inputs, options.rows)
    except ValueError as error:
        raise ForwardError(f"{error} (it was called with {described(model, inputs)})") from None
    if not found:
        raise ForwardError(f"{NO_ROWS} (it was called with {described(model, inputs)}); {_opened(inputs)}{WAYS_OUT}")
    if not any(found.values()):
        raise ForwardError(EMPTY)
    possible = [rows for rows, size in found.items() if size]
    if len(possible) == 1:
        return possible[0]
    followed = {rows: _followed(model, inputs, rows, options) for rows in possible}
    most = max(number for number, _ in followed.values())
    best = [rows for rows in possible if followed[rows][0] == most]
    if most < 0:
        return best[0]  # whoever calls the model next sees what it raises
    arguments = {rows.places[0][0] for rows in best}
    if len(arguments) == 1:
        # Both the items of a list and the entries of all items may do, as of sequences that are stacked: what lies
        # further out in the stack are the rows.
        best = [rows for rows in best if followed[rows][1] == min(followed[other][1] for other in best)]
    if most > 0 and len({found[rows] for rows in best}) > 1:
        names = " as ".join(f"{rows} ({found[rows]})" for rows in best)
        named = next((name for name in sorted(map(str, arguments))), "")
        how = f"Name the argument that holds them, as rows={named!r}, " if len(arguments) > 1 else ""
        ways_out = WAYS_OUT if how else WAYS_OUT.capitalize()
        raise ForwardError(
            f"it is not clear where the rows of the batch are: as many branches follow {names}. {how}{ways_out}"
        )
    return best[0]


def _opened(inputs: Inputs) -> str:
    """How an object can be looked into that holds tensors, if there is one."""
    for leaf in trees.leaves(inputs).values():
        if trees.is_opaque(leaf) and any(True for _ in trees.held(leaf)):
            kind = type(leaf).__name__
            return (
                f"tell torch what is in a {kind} (torch.utils._pytree.register_pytree_node), or make it a dataclass; "
            )
    return ""


def _followed(model: nn.Module, inputs: Inputs, rows: Rows, options: Options) -> tuple[int, int]:
    """How many branches follow these rows, and along which axis the first of them does; -1 if no forward ends."""
    number, axis = -1, 0
    with suppress(Exception):
        for pair, single in traced(model, rows.take(inputs, 2), rows.take(inputs, 1)):
            found = find_branches(pair, model, options.named)
            gates = [places.gates.values() for places in locate(found.accepted, pair, single).values()]
            axes = [at.axis for of_branch in gates for at in of_branch if at is not None]
            number, axis = max(number, sum(None not in of_branch for of_branch in gates)), min(axes, default=0)
            if number > 0:
                break
    return number, axis


@contextmanager
def telling(model: nn.Module, inputs: Inputs, options: Options) -> Iterator[None]:
    """Forwards of discovery within this context, and within `forwards.undisturbed`, raise nothing that is not told.

    Raises:
        ForwardError: If one cannot be made, though the model can be called with these inputs.
        CallError: If it cannot.
    """
    try:
        yield
    except RdpError:
        raise
    except Exception as error:
        if (own := _raised(model, inputs)) is not None:
            raise CallError(own) from own
        raise _cannot_be_cut(model, inputs, options, error) from error


def _raised(model: nn.Module, inputs: Inputs) -> Exception | None:
    """What a model raises when it is called with these inputs, in eval mode and as in training too."""
    try:
        forwards.run(model, inputs)
    except Exception:
        try:
            with forwards.as_in_training(model):
                forwards.run(model, inputs)
        except Exception as own:
            return own
    return None


def _cannot_be_cut(model: nn.Module, inputs: Inputs, options: Options, error: Exception) -> ForwardError:
    name, called = type(model).__name__, described(model, inputs)
    raised = f"it raised {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    if options.mode == "batch":
        return ForwardError(
            f"{name} cannot be looked at: called with {called} for no more than to see what it computes, {raised}. "
            "Attach to a part of it, as model.backbone"
        )
    named = _named(model, inputs)
    name_it = f"Name the argument that holds the rows, as rows={named!r}, " if named and not options.rows else ""
    ways_out = WAYS_OUT if name_it else WAYS_OUT.capitalize()
    return ForwardError(
        f"{name} cannot be called with some of its rows: given two, or one, of those in ({called}), {raised}. "
        f"{name_it}{ways_out}"
    )


def _named(model: nn.Module, inputs: Inputs) -> str | None:
    """An argument that could be named, if there are several that have a name."""
    names = list(dict.fromkeys(rows.places[0][0] for rows in candidates(model, inputs)))
    return next((name for name in names if isinstance(name, str)), None) if len(names) > 1 else None
