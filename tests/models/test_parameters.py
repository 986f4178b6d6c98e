"""`Branch.parameters` against autograd: what loses its gradient when this branch, and no other, is dropped."""

from __future__ import annotations

import warnings
from collections import Counter

import pytest
import torch

import rdp
from models.semantics import ALWAYS, NEVER, tensors, wake
from models.zoo import zoo
from models.zoo_entry import Entry

NAMES = [
    "test_vit", "test_resnet", "test_convnext", "test_byobnet", "test_mambaout", "BertModel", "BartModel", "T5Model",
    "GPT2Model", "GPTNeoXModel", "SwinModel", "AlbertModel", "FunnelModel", "SegformerModel", "MixtralModel",
]  # fmt: skip


def with_gradient(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> set[str]:
    """Names of the parameters that get a gradient other than zero from a random functional of the outputs."""
    model.zero_grad()
    torch.manual_seed(1)
    outputs = [t for t in tensors(model(**{k: v.clone() for k, v in inputs.items()})) if t.requires_grad]
    sum((t * torch.randn_like(t)).sum() for t in outputs).backward()
    return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.count_nonzero()}


@pytest.mark.parametrize("entry", [e for e in zoo() if e.name in NAMES], ids=lambda entry: entry.key)
def test_dropping_one_branch_silences_its_parameters_and_no_others(entry: Entry) -> None:
    torch.manual_seed(0)
    model, inputs = entry.build_quick()
    wake(model)
    model.eval()
    warnings.simplefilter("ignore", rdp.RdpWarning)  # XLNet's and Funnel's refusals are tested elsewhere
    settings = {"decay": "constant", "compute": "dense", "verify": False, "example_inputs": inputs}
    with rdp.attach(model, NEVER, **settings) as handle:
        for name in {"", *(branch.block for branch in handle.branches)}:
            model.get_submodule(name).training = True  # the gates work; dropout would only blur the comparison
    with rdp.attach(model, NEVER, **settings) as handle:
        learning = with_gradient(model, inputs)
    owners = Counter(name for branch in handle.branches for name in branch.parameters)
    assert owners, "no parameters to look at"
    for index, branch in enumerate(handle.branches):
        with rdp.attach(model, ALWAYS, branches=lambda name, module, only=branch.name: name == only, **settings):
            silenced = learning - with_gradient(model, inputs)
        inner = [b for b in handle.branches if index in b.inside]
        alone = {name for name in branch.parameters if owners[name] == 1} | {p for b in inner for p in b.parameters}
        assert silenced == alone & learning, branch.name
