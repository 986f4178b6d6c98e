"""Ways of training in which rows cannot be masked, or what is frozen not be told: refused, with the way out."""

from __future__ import annotations

import torch
from torch import nn

from rdp.calls import Inputs
from rdp.errors import AttachError, ForwardError
from rdp.inputs import Rows
from rdp.masks import Mode

CHECKPOINTED = (
    "the whole model is recomputed by a checkpoint with use_reentrant=True, whose first forward runs without gradients "
    "and was taken for a plain one. Pass use_reentrant=False, or checkpoint its blocks"
)

NO_ROWS = "the model was called without any tensor that has a batch axis, so there are no rows to mask"
EMPTY = "the batch is empty (0 rows); skip it, or train it under handle.paused()"


def check_training(model: nn.Module) -> None:
    """Refuse a model whose parameters are not those of its modules any more.

    Raises:
        AttachError: If FSDP has put them into flat ones.
    """
    for name, parameter in model.named_parameters():
        if getattr(parameter, "_is_flat_param", False):  # how torch itself tells a FlatParameter
            raise AttachError(
                f"FullyShardedDataParallel has put the parameters of several modules into one, `{name}`, which cannot "
                "be frozen in parts. Pass use_orig_params=True, or use fully_shard (FSDP2)"
            )


def check_attached_one(module: nn.Module, attached: nn.Module) -> None:
    """Refuse a forward of another module than the attached one, which has its hooks.

    Raises:
        ForwardError: If they are not the same.
    """
    if module is not attached:
        raise ForwardError(
            f"this {type(module).__name__} is a replica or a shallow copy of the attached model, as "
            "torch.nn.DataParallel makes them. Use DistributedDataParallel, or attach to the copy itself"
        )


def check_rows_apart() -> None:
    """Refuse a forward in which rows cannot be told apart.

    Raises:
        ForwardError: If it is one of `torch.func`.
    """
    if torch._C._functorch.maybe_current_level() is not None:
        raise ForwardError("the model was called under torch.func (vmap, grad, jvp), where rows cannot be told apart")


def count_rows(rows: Rows | None, inputs: Inputs, mode: Mode) -> int:
    """The number of rows of a training forward; in batch mode, which needs none, one where there are none.

    Raises:
        ForwardError: If it is zero, or there are none in row mode.
    """
    number = None if rows is None else rows.count(inputs)
    if number == 0:
        raise ForwardError(EMPTY)
    if number is None and mode == "row":
        raise ForwardError(NO_ROWS)
    return number or 1
