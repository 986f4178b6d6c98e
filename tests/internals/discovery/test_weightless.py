"""The context in which a model is traced on `meta`."""

from __future__ import annotations

import pytest
import torch
from models.test_weightless import WIDTH, Caching

from rdp.discovery.weightless import weightless


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
