"""`rdp.setup` by itself: what it refuses and warns of, word by word, and what it makes of the branches found."""

from __future__ import annotations

import linecache
import warnings
from typing import Any

import pytest
import timm.layers
import torch
from torch import nn

import rdp
from rdp import setup
from rdp.branches import Branch, GatePoint, Refusal
from rdp.discovery.find import Discovery
from rdp.options import Options

DEFAULTS: dict[str, Any] = {
    "rate": 0.4,
    "mode": "row",
    "decay": "linear",
    "sampling": "bernoulli",
    "freeze": "output",
    "scale_by_keep": False,
    "phases": (rdp.Phase.DROP, rdp.Phase.FREEZE),
    "branches": None,
    "native": "error",
    "compute": "auto",
    "seed": 0,
}


def options(**changes: Any) -> Options:
    return Options(**DEFAULTS | changes)


def message(error: type[Exception], function: Any, *args: Any) -> str:
    with pytest.raises(error) as caught:
        function(*args)
    return str(caught.value)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 4), nn.Linear(4, 4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])


# -- the model --------------------------------------------------------------------------------------------------------


def test_what_is_no_module():
    text = message(rdp.ArgumentError, setup.check_model, torch.relu, options())
    assert text == "model must be a torch.nn.Module; got builtin_function_or_method"


def test_data_parallel():
    assert message(rdp.AttachError, setup.check_model, nn.DataParallel(Net()), options()) == (
        "torch.nn.DataParallel copies the model into threads, where masks cannot follow. Use DistributedDataParallel, "
        "or attach to model.module and train that"
    )


def test_a_scripted_model():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Linear(2, 2))
    assert message(rdp.AttachError, setup.check_model, scripted, options()) == (
        "a scripted model runs no Python hooks. Attach to the model before torch.jit.script"
    )


@pytest.mark.parametrize(
    ("paths", "listed"),
    [
        (2, "0.drop_prob = 0.5, 1.drop_prob = 0.5"),
        (8, ", ".join(f"{i}.drop_prob = 0.5" for i in range(8))),
        (9, ", ".join(f"{i}.drop_prob = 0.5" for i in range(8)) + " and 1 more"),
    ],
)
def test_a_model_that_drops_paths_by_itself(paths, listed):
    model = nn.Sequential(*(timm.layers.DropPath(0.5) for _ in range(paths)))
    assert message(rdp.NativeDropPathError, setup.check_model, model, options()) == (
        f"Sequential drops paths by itself, and both together would drop more than either: {listed}. Build it with a "
        "drop path rate of 0, or pass native='off' to silence these until handle.remove()"
    )
    setup.check_model(model, options(native="off"))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("blocks.0.fc3", "; did you mean 'blocks.0.fc2' or 'blocks.0.fc1' or 'blocks.1.fc2'?"),
        ("nothing like it", ""),
    ],
)
def test_a_name_of_no_module(name, hint):
    text = message(rdp.BranchError, setup.check_model, Net(), options(branches=["blocks.1", name]))
    assert text == f"branches names {name!r}, which is no module of Net{hint}"


@pytest.mark.parametrize(("part", "where"), [("", "it"), ("blocks.1", "its module `blocks.1`")])
def test_a_model_with_the_hooks_of_another_handle(part, where):
    model = Net()
    handle = rdp.attach(model.get_submodule(part))
    expected = f"this Net is attached already ({where} has another handle's hooks); call remove() on that handle first"
    assert message(rdp.AttachError, setup.check_model, model, options()) == expected
    for kind in ("_forward_hooks", "_forward_pre_hooks"):  # in either of them
        hooks = getattr(model.get_submodule(part), kind)
        kept = dict(hooks)
        hooks.clear()
        assert message(rdp.AttachError, setup.check_unattached, model) == expected
        hooks.update(kept)
    setup.check_unattached(model, besides=handle._run)
    handle.remove()
    setup.check_unattached(model)


# -- its inputs -------------------------------------------------------------------------------------------------------


def test_inputs_have_rows():
    assert setup.check_inputs((torch.zeros(3, 2),), {}) == 3
    assert setup.check_inputs((), {"x": torch.zeros(1, 2)}) == 1
    assert message(rdp.ForwardError, setup.check_inputs, ("text", torch.tensor(1.0)), {}) == (
        "the model was called without any tensor that has a batch axis, so there are no rows to mask"
    )
    assert message(rdp.ForwardError, setup.check_inputs, (), {"x": torch.zeros(0, 2)}) == (
        "the batch is empty (0 rows); skip it, or train it under handle.paused()"
    )


def test_inputs_under_vmap():
    text = message(rdp.ForwardError, torch.vmap(lambda x: setup.check_inputs((x,), {})), torch.zeros(3, 2))
    assert text == "the model was called under torch.func (vmap, grad, jvp), where rows cannot be told apart"


# -- the branches -----------------------------------------------------------------------------------------------------


def branch(name: str, depth: int = 0, zero_only: bool = False) -> Branch:
    return Branch(name, "", "identity", (), depth=depth, gates=(GatePoint(name, 0, None, zero_only=zero_only),))


FOUND = (branch("blocks.0.fc1"), branch("blocks.0.fc2"), branch("blocks.1.fc1", 1), branch("blocks.1.fc2", 2))
REFUSED = Refusal("blocks.1", "", "used twice")


@pytest.fixture
def choose(monkeypatch):
    """`choose_branches` of a model in which just these things are found; also what `find_branches` was asked for."""

    def choose(*branches, refused=(), coupled=None, programs=None, rejected={}, **changes):  # noqa: B006
        asked = {}

        def find_branches(model, args, kwargs, named, **wanted):
            asked.update(model=model, args=args, kwargs=kwargs, named=named, **wanted)
            return Discovery(branches, refused, 7, coupled, programs or {}, rejected)

        monkeypatch.setattr(setup, "find_branches", find_branches)
        chosen = setup.choose_branches(Net(), options(**changes), ("x",), {"y": 1})
        return chosen, asked

    return choose


@pytest.mark.filterwarnings("error")
def test_what_is_found_gets_its_rates(choose):
    (branches, refused, programs), asked = choose(*FOUND, programs={"blocks.0.fc2": "a program"})
    assert [b.name for b in branches] == [b.name for b in FOUND]
    assert [round(b.rate, 9) for b in branches] == [0, 0, 0.2, 0.4]
    assert [b.compute for b in branches] == ["dense", "rows", "dense", "dense"]
    assert refused == ()
    assert programs == {"blocks.0.fc2": "a program"}
    assert (asked["args"], asked["kwargs"], asked["named"]) == (("x",), {"y": 1}, ())
    assert isinstance(asked["model"], Net)
    (branches, _, _), _ = choose(*FOUND, decay="constant", rate=0.3)
    assert [b.rate for b in branches] == [0.3] * 4


@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize(
    ("compute", "programs", "random", "batch_norm"),
    [
        ("dense", False, False, False),
        ("auto", True, False, False),
        ("rows", True, True, False),
        ("ghost", True, True, True),
    ],
)
def test_what_is_looked_for(mode, compute, programs, random, batch_norm, choose):
    _, asked = choose(*FOUND, mode=mode, compute=compute)
    assert asked["need_rows"] == (mode == "row")
    assert asked["want_programs"] == programs
    assert asked["allow_random"] == random
    assert asked["allow_batch_norm"] == batch_norm


def test_what_is_refused_is_told(choose):
    with pytest.warns(rdp.RdpWarning) as caught:
        (_, refused, _), _ = choose(*FOUND, refused=(REFUSED,))
    assert refused == (REFUSED,)
    assert [str(warning.message) for warning in caught] == [
        "1 residual sums are left ungated and train plainly: `blocks.1`: used twice. Name the modules to gate in "
        "branches= if you know better"
    ]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("chosen", [["blocks.0.fc1"], lambda name, module: True])
def test_who_chooses_is_told_nothing(chosen, choose):
    (_, refused, _), _ = choose(*FOUND, refused=(REFUSED,), branches=chosen)
    assert refused == ()


def test_rows_that_influence_each_other_are_told(choose):
    with pytest.warns(rdp.RdpWarning) as caught:
        choose(*FOUND, coupled="blocks.0.fc1")
    assert [str(warning.message) for warning in caught] == [
        "the rows of a batch influence each other even in eval mode, first in `blocks.0.fc1`: is the first axis of the "
        "input the batch? If not, use mode='batch'"
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choose(*FOUND, coupled="blocks.0.fc1", mode="batch")


@pytest.mark.parametrize("found", [{"refused": (REFUSED,)}, {"coupled": "blocks.0.fc1"}])
def test_warnings_show_the_line_that_called(found, choose):
    with pytest.warns(rdp.RdpWarning) as caught:
        choose(*FOUND, **found)
    assert "setup.choose_branches(" in linecache.getline(caught[0].filename, caught[0].lineno)


@pytest.mark.filterwarnings("error")
def test_branches_that_cannot_be_rescaled(choose):
    nonlinear = branch("blocks.1.fc1", 1, zero_only=True), branch("blocks.1.fc2", 1, zero_only=True)
    with pytest.raises(rdp.BranchError) as error:
        choose(FOUND[0], *nonlinear, scale_by_keep=True)
    assert str(error.value) == (
        "scale_by_keep=True needs branches whose ends commute with rescaling; a nonlinear function follows "
        "blocks.1.fc1, blocks.1.fc2. Use scale_by_keep=False, or leave these out with branches="
    )
    choose(FOUND[0], *nonlinear)
    choose(*FOUND, scale_by_keep=True)
    choose(branch("blocks.0.fc1", 0, zero_only=True), branch("blocks.1.fc1", 1), scale_by_keep=True)  # of rate 0


def test_branches_by_name_and_by_function(choose):
    (branches, _, _), asked = choose(*FOUND, branches=["blocks.1.fc1", "blocks.0.fc2"])
    assert asked["named"] == ("blocks.1.fc1", "blocks.0.fc2")
    assert [b.name for b in branches] == ["blocks.0.fc2", "blocks.1.fc1"]
    seen = {}

    def chosen(name, module):
        seen[name] = module
        return name.endswith("1")

    (branches, _, _), asked = choose(*FOUND, branches=chosen)
    assert asked["named"] == ()
    assert [b.name for b in branches] == ["blocks.0.fc1", "blocks.1.fc1"]
    assert set(seen) == {b.name for b in FOUND}
    assert all(isinstance(module, nn.Linear) for module in seen.values())


@pytest.mark.parametrize(
    ("refused", "why"),
    [((), ""), ((REFUSED, Refusal("blocks.0", "", "another")), " (`blocks.1`: used twice)")],
)
def test_a_named_module_that_returned_nothing(refused, why, choose):
    with pytest.raises(rdp.BranchError) as error:
        choose(*FOUND, refused=refused, branches=["blocks.1", "blocks.0.fc1"])
    assert str(error.value) == (
        f"branches names 'blocks.1', which returned no tensor in a forward of Net and cannot be gated{why}"
    )


@pytest.mark.parametrize(
    ("branches", "refused", "chosen", "middle"),
    [
        ((), (), None, ""),
        ((), (REFUSED, REFUSED), None, "; refused: `blocks.1`: used twice, `blocks.1`: used twice"),
        ((), (REFUSED,), lambda name, module: False, "; refused: `blocks.1`: used twice"),
        (FOUND[:2], (), lambda name, module: False, None),
    ],
)
def test_nothing_to_gate(branches, refused, chosen, middle, choose):
    with pytest.raises(rdp.BranchError) as error:
        choose(*branches, refused=refused, branches=chosen)
    text = "no residual branch to gate in Net: 7 additions were looked at"
    if middle is None:
        assert str(error.value) == f"{text}, and branches= chose none of blocks.0.fc1, blocks.0.fc2"
    else:
        end = ". If the model has residual branches, name the modules that end them in branches="
        assert str(error.value) == text + middle + end


def test_what_was_looked_at_is_listed_by_reason(choose):
    with pytest.raises(rdp.BranchError, match=r"7 additions were looked at \(2x adds a constant, 1x has none\)\. If"):
        choose(rejected={"adds a constant": 2, "has none": 1})


# -- words ------------------------------------------------------------------------------------------------------------


def test_values_are_shown_short():
    assert setup.shortened(torch.zeros(3, 0)) == "a tensor of shape (3, 0)"
    assert setup.shortened("a") == "'a'"
    assert setup.shortened("a" * 118) == f"'{'a' * 118}'"
    assert setup.shortened("a" * 119) == f"'{'a' * 119}..."
    assert setup.shortened([1, 2, 3], limit=3) == "[1,..."
