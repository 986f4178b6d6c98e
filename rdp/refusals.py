"""Ways of training in which frozen parameters cannot be told from others: refused by name, with the way out."""

from __future__ import annotations

from torch import nn

from rdp.errors import AttachError


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
