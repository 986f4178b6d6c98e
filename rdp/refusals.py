"""Ways of training in which rows cannot be masked, or what is frozen not be told: refused, with the way out."""

from __future__ import annotations

import torch
from torch import nn

from rdp import trees
from rdp.errors import AttachError, ForwardError

CHECKPOINTED = (
    "the whole model is recomputed by a checkpoint with use_reentrant=True, whose first forward runs without gradients "
    "and was taken for a plain one. Pass use_reentrant=False, or checkpoint its blocks"
)


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


def count_rows(inputs: object) -> int:
    """The number of rows of a training forward.

    Raises:
        ForwardError: If there are none, or they cannot be told apart.
    """
    rows = trees.batch_size(inputs)
    if rows is None:
        raise ForwardError(
            "the model was called without any tensor that has a batch axis, so there are no rows to mask"
        )
    if rows == 0:
        raise ForwardError("the batch is empty (0 rows); skip it, or train it under handle.paused()")
    if torch._C._functorch.maybe_current_level() is not None:
        raise ForwardError("the model was called under torch.func (vmap, grad, jvp), where rows cannot be told apart")
    return rows
