"""The context in which a model is traced on `meta`."""

from __future__ import annotations

import pytest
import torch
from models.test_weightless import WIDTH, Caching
from torch import Tensor, nn
from torch.nn import functional

from rdp.discovery.weightless import weightless

IMAGES, TOKENS = torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.zeros(2, 5, 4)
WHOLE = torch.zeros(2, 5, 4, dtype=torch.int64)
CALLS = {
    "batch_norm": (functional.batch_norm, IMAGES, torch.zeros(3), torch.ones(3)),
    "gelu": (functional.gelu, IMAGES),
    "layer_norm": (functional.layer_norm, TOKENS, (4,)),
    "linear": (functional.linear, TOKENS, torch.zeros(6, 4), torch.zeros(6)),
    "relu": (functional.relu, IMAGES),
    "relu in place": (functional.relu, IMAGES, True),
    "silu in place": (functional.silu, TOKENS, True),
    "silu": (functional.silu, TOKENS.mT),
    "tanh": (torch.tanh, TOKENS),
    "tanh of integers": (torch.tanh, WHOLE),
    "sum": (torch.add, IMAGES, IMAGES),
    "sum of a broadcast": (torch.add, TOKENS, torch.zeros(5, 1)),
    "sum of another type": (torch.add, TOKENS, TOKENS.double()),
    "sum of integers": (torch.add, WHOLE, WHOLE),
    "sum with a number": (torch.add, TOKENS, 1),
    "sum in place": (Tensor.add_, TOKENS, TOKENS),
    "ratio": (torch.div, TOKENS, TOKENS),
    "ratio of integers": (torch.div, WHOLE, WHOLE),
    "difference": (Tensor.sub, TOKENS, TOKENS),
    "product": (Tensor.mul, IMAGES, IMAGES),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_functions_return_without_numbers_is_of_the_form_that_torch_gives_it(name: str) -> None:
    function, *given = CALLS[name]
    given = [x.clone() if isinstance(x, Tensor) else x for x in given]
    expected = function(*given)
    with weightless(nn.Identity()):
        moved = [x.clone().to("meta") if isinstance(x, Tensor) else x for x in CALLS[name][1:]]
        found = function(*moved)
    for attribute in ("shape", "dtype", "_version"):
        assert getattr(found, attribute) == getattr(expected, attribute), attribute
    assert found.stride() == expected.stride()
    assert (found is moved[0]) == (expected is given[0]) == ("in place" in name)


@pytest.mark.parametrize("error", [None, KeyError, KeyboardInterrupt])
def test_whatever_a_forward_without_numbers_leaves_is_taken_back(error: type[BaseException] | None) -> None:
    model = Caching()
    parameters, containers = dict(model.named_parameters()), (model.by_size, model.seen, model._parameters)
    attributes = set(vars(model))
    try:
        with weightless(model):
            assert all(p.is_meta for p in model.parameters())
            assert model.tied.weight is model.f.weight
            model(torch.ones(2, WIDTH, device="meta"))
            assert model.table.is_meta
            if error is not None:
                raise error
    except (KeyError, KeyboardInterrupt):
        pass
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    assert model.tied.weight is model.f.weight
    assert (model.table, model.scale, model.by_size, model.seen) == (None, None, {}, [])
    assert all(a is b for a, b in zip(containers, (model.by_size, model.seen, model._parameters), strict=True))
    assert set(vars(model)) == attributes
