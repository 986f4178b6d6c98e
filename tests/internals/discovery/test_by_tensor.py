"""The dictionary of a trace: it knows tensors by identity, for as long as they live."""

from __future__ import annotations

import torch

from rdp.discovery.by_tensor import ByTensor


def test_tensors_are_known_by_identity() -> None:
    x, y = torch.zeros(2), torch.zeros(2)
    known = ByTensor[str]()
    known[x] = "x"
    assert known.get(x) == "x"
    assert known.get(y) is None
    known[x] = "x again"
    assert known.get(x) == "x again"


def test_what_takes_the_place_of_one_that_is_gone_is_not_known() -> None:
    known = ByTensor[int]()
    old = [torch.zeros(2) for _ in range(100)]
    for i, x in enumerate(old):
        known[x] = i
    places = set(map(id, old))
    del old, x
    new = [torch.zeros(2) for _ in range(100)]
    assert places & set(map(id, new)), "no place was taken again: this test shows nothing"
    assert all(known.get(x) is None for x in new)


def test_one_that_python_has_let_go_and_gets_back_is_the_same() -> None:
    known = ByTensor[int]()
    x = torch.zeros(2, requires_grad=True)
    product = x * x  # torch holds x
    known[x] = 1
    place = id(x)
    del x
    again = product.grad_fn.next_functions[0][0].variable
    assert id(again) == place
    assert known.get(again) == 1
