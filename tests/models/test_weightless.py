"""Models are traced on `meta` first, which nobody notices: not the model, not its hooks, not what is found."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import rdp
from models.found import find
from models.test_branches import CASES, Case, inputs

WIDTH = 8


def block() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())


def on_rows(model: nn.Module, x: Tensor) -> list[str]:
    """The names of the branches that can run on some of the rows, as far as a search without a proof tells."""
    branches = find(model, x, compute="auto", verify=False).branches
    return [branch.name for branch in branches if branch.compute == "rows"]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_same_is_found_with_numbers_which_hooks_of_somebody_else_ask_for(case: Case) -> None:
    torch.manual_seed(0)
    model, batch = case.model(), inputs(case)
    expected = find(model, batch, compute="auto")
    model.register_forward_hook(lambda *_: None)
    assert find(model, batch, compute="auto") == expected


class Counter:
    """Counts calls; unlike a list in a module, it is not put back after a search."""

    def __init__(self, number: int) -> None:
        self.calls = [0] * number


class Deep(nn.Module):
    """Counts the calls of its blocks, the rows of which are numbers."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.counter = Counter(len(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for i, module in enumerate(self.blocks):
            self.counter.calls[i] += not x.is_meta
            x = x + module(x)
        return x


def test_a_deep_model_computes_its_first_block_only() -> None:
    model = Deep([block() for _ in range(20)])
    assert len(on_rows(model, torch.randn(4, WIDTH))) == 20
    assert model.counter.calls == [2] + 19 * [0]


def test_hooks_of_somebody_else_see_numbers_and_forwards_that_end() -> None:
    model = Deep([block() for _ in range(3)])
    on_meta, ends = [], []
    model.blocks[0].register_forward_hook(lambda module, args, output: on_meta.append(output.is_meta))
    model.register_forward_hook(lambda module, args, output: ends.append(1))
    assert on_rows(model, torch.randn(4, WIDTH)) == ["blocks.1", "blocks.2"]  # the hook is not to see some of the rows
    assert model.counter.calls == [5, 5, 5]
    assert len(ends) == 5  # the first looks for own dropping
    assert not any(on_meta)


class Sometimes(nn.Module):
    """Couples its rows or not: one class, but not one kind of branch."""

    def __init__(self, coupled: bool) -> None:
        super().__init__()
        self.linear, self.coupled = nn.Linear(WIDTH, WIDTH), coupled

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x - x.mean(0) if self.coupled else x)


@pytest.mark.filterwarnings("ignore:the rows of a batch influence")
def test_branches_of_one_class_that_compute_differently_are_verified_one_by_one() -> None:
    model = Deep([Sometimes(False), Sometimes(True), Sometimes(False)])
    assert on_rows(model, torch.randn(4, WIDTH)) == ["blocks.0", "blocks.2"]


class Caching(nn.Module):
    """Keeps tensors where no state_dict sees them, as position tables and attention biases are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.tied = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.tied.weight = self.f.weight
        self.register_buffer("table", None)
        self.scale: Tensor | None = None
        self.by_size: dict[int, Tensor] = {}
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.ones_like(self.f.bias)
        if self.scale is None:
            self.scale = self.f.bias.new_ones(())
        self.by_size.setdefault(x.shape[1], torch.ones_like(x[0]))
        self.seen.append(x)
        self.late = x
        return x + self.f(self.tied(x * self.table * self.scale * self.by_size[x.shape[1]]))


def test_a_model_that_keeps_tensors_trains_after_it_was_searched() -> None:
    model = Caching()
    assert find(model, torch.randn(4, WIDTH), compute="auto").branches
    model(torch.randn(4, WIDTH)).sum().backward()
    assert model.f.weight.grad is not None


class ByValue(nn.Module):
    """Asks for a number, which no tensor on `meta` has."""

    def __init__(self) -> None:
        super().__init__()
        self.f = block()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x) if x.isfinite().all() else x


def test_a_model_that_asks_for_numbers_is_traced_with_numbers() -> None:
    assert on_rows(ByValue(), torch.randn(4, WIDTH)) == ["f"]


class Attend(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return self.linear(x if bias is None else x + bias)


class OtherwiseOnMeta(nn.Module):
    """Leaves an argument out unless it sees that it does nothing, as models do with attention masks."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.bias = Attend(), nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x, self.bias if x.is_meta else None)


def test_a_model_that_does_something_else_on_meta_is_traced_with_numbers() -> None:
    model = OtherwiseOnMeta()
    (branch,) = find(model, torch.randn(4, WIDTH), compute="auto").branches
    assert (branch.name, branch.compute) == ("f", "rows")
    assert branch.parameters == ("f.linear.weight", "f.linear.bias")


class NothingOnMeta(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = block()

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x) if x.is_meta else x + self.f(x)


def test_a_model_without_branches_on_meta_is_traced_with_numbers() -> None:
    assert on_rows(NothingOnMeta(), torch.randn(4, WIDTH)) == ["f"]


class MakesATable(nn.Module):
    """The adding module makes a tensor on the device of its input, between two modules of the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return x + self.last(h + torch.arange(WIDTH, device=x.device, dtype=x.dtype))


def test_no_device_of_the_trace_is_left_in_what_runs_on_rows() -> None:
    torch.manual_seed(0)
    model, x = MakesATable(), torch.randn(4, WIDTH)
    handle = rdp.attach(model, 0.5, decay="constant", example_inputs=x, seed=4)
    assert [branch.compute for branch in handle.branches] == ["rows"]
    y = model(x)
    dropped = ~handle.masks[0]
    assert dropped.any()
    assert not dropped.all()
    torch.testing.assert_close(y[dropped], x[dropped])
    assert (y[~dropped] - x[~dropped]).abs().min() > 0


def test_autocast_is_searched_with_numbers_since_it_does_nothing_on_meta() -> None:
    model = Deep([block() for _ in range(3)])
    with torch.autocast("cpu", torch.bfloat16):
        assert len(on_rows(model, torch.randn(4, WIDTH))) == 3
    assert model.counter.calls[-1] == 2


class Stubborn(nn.Module):
    """Goes on whatever happens inside of its first block."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = block(), nn.Linear(WIDTH, WIDTH)
        self.went_on = False

    def forward(self, x: Tensor) -> Tensor:
        try:
            x = x + self.f(x)
        except Exception:
            self.went_on = True
        return self.g(x)


def test_the_early_end_of_a_forward_is_no_error_that_a_model_could_handle() -> None:
    model = Stubborn()
    assert on_rows(model, torch.randn(4, WIDTH)) == ["f"]
    assert not model.went_on


@pytest.mark.parametrize("compute", ["auto", "dense"])
def test_a_branch_without_any_numbers_is_found_too(compute: str) -> None:
    model = nn.Sequential(nn.Linear(WIDTH, 0), Deep([nn.Linear(0, 0)]), nn.Linear(0, WIDTH), Deep([block()]))
    with rdp.attach(model, 0.5, compute=compute, example_inputs=torch.randn(4, WIDTH)) as handle:
        assert [branch.name for branch in handle.branches] == ["1.blocks.0", "3.blocks.0"]
