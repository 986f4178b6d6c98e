"""The state beside what is saved: what ranks must have in common, and what a refused one leaves."""

from __future__ import annotations

import pytest
import torch
from laws.architectures import BlockMLP
from laws.strategies import Case
from laws.training import loss

import rdp
from rdp import Phase

CASE = Case(BlockMLP, (("plain", "norm", "plain"),), rate=0.6, decay="constant", seed=2)


def test_what_ranks_must_have_in_common():
    model = CASE.model()
    handle = CASE.attach(model, seed=5, phases=(Phase.DROP, Phase.FREEZE, Phase.PLAIN), example_inputs=model.rows(2, 0))
    handle.advance()
    assert handle._run.facts() == {
        "the step": 1,
        "the branches": ["body.0.fc2", "body.1.fc2", "body.2.fc2"],
        "the rates": [0.6] * 3,
        "the seed": 5,
        "the phases, mode or sampling": ((Phase.DROP, Phase.FREEZE, Phase.PLAIN), "row", "bernoulli"),
    }
    assert handle._run.agreement._facts() == handle._run.facts()


def test_a_refused_state_leaves_the_very_step_and_its_graphs():
    model = CASE.model()
    handle = CASE.attach(model, example_inputs=model.rows(2, 0))
    output, step = model(model.rows(2, 0)), handle._run.step
    with pytest.raises(rdp.StateError):
        handle.load_state_dict(handle.state_dict() | {"replayed": [[0]], "seed": 9, "step_count": 3})
    assert handle._run.step is step
    assert handle._run.seed == CASE.seed
    loss(output).backward()
    assert handle.state_dict()["forwards"] == [[0, 2]]


def test_counters_are_on_the_cpu_whatever_the_default_device():
    model = CASE.model()
    handle = CASE.attach(model, example_inputs=model.rows(2, 0))
    saved = handle.state_dict() | {"forwards": [[0, 2]]}
    with torch.device("meta"):
        handle.load_state_dict(saved)
        assert handle.masks.device.type == "cpu"
        assert handle._run.live().device.type == "cpu"
