"""Residual DropPath (RDP) for any PyTorch model.

Two lines in an existing training loop::

    handle = rdp.attach(model, rate=0.1)
    optimizer = handle.wrap(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))

Source: Park (2024), "Residual DropPath", https://arxiv.org/abs/2411.09475
"""

from rdp import rate_schedules
from rdp.attachment import attach
from rdp.branches import Branch, Refusal
from rdp.errors import (
    ArgumentError,
    AttachError,
    BranchError,
    ForwardError,
    NativeDropPathError,
    RankError,
    RdpError,
    RdpWarning,
    StateError,
    UnknownAttributeError,
)
from rdp.handle import ResidualDropPath
from rdp.phases import Phase
from rdp.pruning import prune
from rdp.training.optimizer import MaskedOptimizer

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "AttachError",
    "Branch",
    "BranchError",
    "ForwardError",
    "MaskedOptimizer",
    "NativeDropPathError",
    "Phase",
    "RankError",
    "RdpError",
    "RdpWarning",
    "Refusal",
    "ResidualDropPath",
    "StateError",
    "UnknownAttributeError",
    "attach",
    "prune",
    "rate_schedules",
]


def __dir__() -> list[str]:
    """The public names: the modules that they come from would only be in the way."""
    return [*__all__, "__version__"]
