"""The report of a checkup where training cannot easily be brought to what it reports."""

from __future__ import annotations

import torch
from laws.architectures import LoopMLP

import rdp
from rdp.check import Checkup, check
from rdp.training import compiled


def run() -> rdp.training.run.Run:
    """Of a model with two branches."""
    model = LoopMLP(2)
    handle = rdp.attach(model, 0.5, decay="constant", example_inputs=model.rows(2, 0))
    handle.wrap(torch.optim.SGD(model.parameters(), lr=0.1))
    return handle._run


def test_a_checkup_is_printed_a_line_each():
    assert Checkup(("one", "two"), ()).ok
    assert str(Checkup(("one", "two"), ())) == "sound\none\ntwo"
    assert not Checkup(("one",), ("bad", "worse")).ok
    assert str(Checkup(("one",), ("bad", "worse"))) == "2 problems\none\nPROBLEM: bad\nPROBLEM: worse"


def test_what_a_graph_gates_has_been_reached():
    here = run()
    here.watch.forwards = 1
    assert len(check(here, ()).problems) == 1
    for branch in range(2):
        assert compiled.traced(id(here), branch) == branch
    assert check(here, ()).ok


def test_of_parameters_that_moved_the_first_step_is_told():
    here = run()
    here.watch.moved.update({"layers.0.0.weight": 7, "layers.1.0.weight": 4})
    (problem,) = check(here, ()).problems
    assert problem == (
        "`layers.0.0.weight`, `layers.1.0.weight` moved although frozen in that step (first seen in step 4): another "
        "optimizer, or code that writes to parameters"
    )
