"""What branches and models return around their tensors: any container is kept, and its tensor gated or linked."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import pytest
import torch
from laws.training import loss
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

import rdp


@dataclass
class Scored:
    output: Tensor
    score: float = field(default=0.5, init=False)


class Named(list):
    def __init__(self, *, name: str) -> None:
        super().__init__()
        self.name = name


def named(x: Tensor) -> Named:
    made = Named(name="mine")
    made.append(x)
    return made


CONTAINERS = {
    "defaultdict": (lambda x: defaultdict(list, output=x), lambda out: out["output"]),
    "list subclass": (named, lambda out: out[0] if out.name == "mine" else None),
    "dataclass": (Scored, lambda out: out.output if out.score == 0.5 else None),
    "model output": (lambda x: BaseModelOutput(last_hidden_state=x), lambda out: out.last_hidden_state),
    "named tuple": (lambda x: torch.return_types.max((x, x.argmax(1))), lambda out: out.values),
    "set before it": (lambda x: ({torch.zeros(2)}, x), lambda out: out[1]),
}


@pytest.mark.parametrize("kind", CONTAINERS)
@pytest.mark.parametrize("where", ["branch", "model"])
def test_outputs_may_be_of_any_container(kind, where):
    """A branch that returns it is gated in it, and a model that returns it is linked to its branches (batch mode)."""
    make, take = CONTAINERS[kind]

    class Wrapped(nn.Linear):
        def forward(self, x: Tensor) -> object:
            return make(super().forward(x))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = Wrapped(4, 4) if where == "branch" else nn.Linear(4, 4)

        def forward(self, x: Tensor) -> object:
            return x + take(self.f(x)) if where == "branch" else make(x + self.f(x))

    model = Net()
    handle = rdp.attach(model, 0.9, mode="row" if where == "branch" else "batch", branches=["f"], seed=1)
    x = torch.randn(6, 4)
    output = model(x)
    output = output if where == "branch" else take(output)
    dropped = ~handle.masks[0]
    assert dropped.any()
    assert torch.equal(output[dropped], x[dropped])
    assert output.requires_grad
    loss(output).backward()
