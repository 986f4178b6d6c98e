"""Every optimizer under RDP is the plain optimizer on the live parameters alone.

The oracle is the plain optimizer on a twin model, whose frozen parameters get `None` for a gradient. What is frozen
follows from the masks by the definition of DROP and FREEZE.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import timm.optim
import torch
from laws.architectures import BlockMLP
from laws.strategies import Case
from laws.training import identical, loss, snapshot
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

import rdp

CASE = Case(BlockMLP, (("plain", "norm", "plain"),), mode="batch", decay="constant", seed=3)
STEPS = 8

Make = Callable[[Iterable[nn.Parameter]], Optimizer]


def is_matrix(name: str, p: nn.Parameter) -> bool:
    """Does an optimizer for matrices only take this parameter?"""
    return p.dim() == 2


def objective(output: Tensor) -> Tensor:
    """Not linear, so that it has second derivatives."""
    return loss(output.square())


@dataclass
class Twins:
    """An attached model and a plain one with the same parameters, each with its optimizer.

    Args:
        make: Makes an optimizer of parameters.
        case: The model.
        takes: Chooses the parameters of the optimizer; None is all.
        make_plain: Makes the plain one, if it is to be another.
        exact: Must they agree bit by bit, or up to rounding?
        set_to_none: How the attached model's gradients are cleared. By default they become zeros, which move a
            parameter by momentum and decay unless they are hidden.
    """

    make: Make
    case: Case = CASE
    takes: Callable[[str, nn.Parameter], bool] | None = None
    make_plain: Make | None = None
    exact: bool = True
    set_to_none: bool = False

    def __post_init__(self) -> None:
        self.model, self.plain_model = self.case.model(), self.case.model()
        self.handle = self.case.attach(self.model)
        with torch.random.fork_rng():
            self.inner = self.make(self._chosen(self.model))
            self.optimizer = self.handle.wrap(self.inner)
        with torch.random.fork_rng():
            self.plain = (self.make_plain or self.make)(self._chosen(self.plain_model))
        self.frozen_ever = 0

    def _chosen(self, model: nn.Module) -> list[nn.Parameter]:
        return [p for name, p in model.named_parameters() if self.takes is None or self.takes(name, p)]

    def step(self, number: int, create_graph: bool = False, **arguments: Any) -> None:
        """One step of both, and what must be true of it."""
        self.optimizer.zero_grad(self.set_to_none)
        objective(self.model(self.model.rows(4, number))).backward(create_graph=create_graph)
        live = self.case.live(self.handle.masks, self.handle.phase)
        self._share_gradients(live, create_graph, number)
        before = snapshot(self.model, self.inner)
        self._both_step(**arguments)
        after = snapshot(self.model, self.inner)
        for name in before.keys() - live:
            assert identical(before[name], after[name]), f"{name} is frozen and moved"
            self.frozen_ever += 1
        self.check_equal()

    def _share_gradients(self, live: set[str], create_graph: bool, number: int) -> None:
        if create_graph:  # a gradient with a graph cannot be copied to another model: its twin computes its own
            out = self.case.oracle(
                self.plain_model, self.plain_model.rows(4, number), self.handle.masks, self.handle.phase
            )
            self.plain_model.zero_grad()
            objective(out).backward(create_graph=True)
        for (name, p), twin in zip(self.model.named_parameters(), self.plain_model.parameters(), strict=True):
            if name not in live:
                twin.grad = None
            elif not create_graph:
                twin.grad = None if p.grad is None else p.grad.clone()

    def _both_step(self, **arguments: Any) -> None:
        with torch.random.fork_rng():  # some optimizers draw numbers
            self.plain.step(**arguments)
        self.optimizer.step(**arguments)

    def check_equal(self) -> None:
        """The two models and optimizers are the same."""
        ours, theirs = snapshot(self.model, self.inner), snapshot(self.plain_model, self.plain)
        for name in ours:
            if self.exact:
                assert identical(ours[name], theirs[name]), f"{name} is not what the plain optimizer makes of it"
            else:
                torch.testing.assert_close(ours[name], theirs[name])

    def run(self, steps: int = STEPS, **arguments: Any) -> None:
        """Several steps, in which something was frozen."""
        for number in range(steps):
            self.step(number, **arguments)
        assert self.handle.step_count == steps
        self.check_shown()

    def check_shown(self) -> None:
        """Something was frozen, and the handle finds nothing wrong with this loop."""
        assert self.frozen_ever > 0, "nothing was ever frozen, so this shows nothing"
        inside = {name for branch in self.handle.branches for name in branch.parameters}
        if self.takes is None or all(self.takes(name, self.model.get_parameter(name)) for name in inside):
            checkup = self.handle.check()
            assert checkup.ok, str(checkup)


# -- torch.optim -----------------------------------------------------------------------------------------------------

CLASSES = sorted(
    (
        cls
        for _, cls in inspect.getmembers(torch.optim, inspect.isclass)
        if issubclass(cls, Optimizer) and cls is not Optimizer
    ),
    key=lambda cls: cls.__name__,
)
BY_CLOSURE = {torch.optim.LBFGS}
SPARSE_ONLY = {torch.optim.SparseAdam}
MATRICES_ONLY = {getattr(torch.optim, "Muon", None)}
SWITCHES = ("foreach", "fused", "maximize", "amsgrad", "nesterov", "centered", "decoupled_weight_decay")
"""Not `capturable`, which needs an accelerator, nor `differentiable`, which refuses parameters of a module (leaves)."""


def options(cls: type[Optimizer]) -> list[dict[str, Any]]:
    """The variants of a class that run on a CPU: its defaults with momentum and decay, and each of its switches."""
    accepted = inspect.signature(cls).parameters
    base = {
        name: value for name, value in {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1}.items() if name in accepted
    }
    switches = [name for name in SWITCHES if name in accepted]
    return [base, *(base | {name: True} for name in switches)]


VARIANTS = [
    pytest.param(cls, chosen, id="-".join([cls.__name__, *(name for name, on in chosen.items() if on is True)]))
    for cls in CLASSES
    if cls not in BY_CLOSURE | SPARSE_ONLY
    for chosen in options(cls)
]


@pytest.mark.parametrize(("cls", "chosen"), VARIANTS)
def test_every_class_of_torch(cls: type[Optimizer], chosen: dict[str, Any]) -> None:
    fused_sgd = cls is torch.optim.SGD and chosen.get("fused", False)
    # The plain fused SGD fails on parameters that get their first gradient late; its twin is not fused, so rounds
    # otherwise.
    plainly = chosen | {"fused": False} if fused_sgd else chosen
    twins = Twins(
        make=lambda ps: cls(ps, **chosen),
        make_plain=lambda ps: cls(ps, **plainly),
        takes=is_matrix if cls in MATRICES_ONLY else None,
        exact=not fused_sgd,
    )
    twins.run()


def test_the_classes_are_those_of_torch() -> None:
    """The sets of special cases name real classes, and the rest is enumerated."""
    assert len(CLASSES) >= 13
    assert set(CLASSES) >= BY_CLOSURE | SPARSE_ONLY | {torch.optim.Adafactor, torch.optim.AdamW, torch.optim.SGD}


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_lbfgs(line_search: str | None) -> None:
    """It keeps one state for all parameters and moves them along one direction: the frozen ones are put back."""
    twins = Twins(lambda ps: torch.optim.LBFGS(ps, lr=0.1, max_iter=4, line_search_fn=line_search))
    model, plain = twins.model, twins.plain_model
    frozen_ever = 0
    for number in range(STEPS):
        x, phase = model.rows(4, number), twins.handle.phase
        seen: list[Tensor] = []

        def closure(x=x, seen=seen) -> Tensor:
            twins.optimizer.zero_grad()
            value = model(x).square().sum()
            value.backward()
            seen.append(twins.handle.masks)
            return value

        before = copy.deepcopy(dict(model.named_parameters()))
        twins.optimizer.step(closure)
        assert len(seen) > 1
        assert all(identical(masks, seen[0]) for masks in seen), "every call of the closure replays the same masks"
        frozen = before.keys() - CASE.live(seen[0], phase)
        assert all(identical(before[name], p) for name, p in model.named_parameters() if name in frozen)
        assert any(not identical(before[name], p) for name, p in model.named_parameters() if name not in frozen)
        frozen_ever += len(frozen)

        def plain_closure(x=x, masks=seen[0], phase=phase, frozen=frozen, before=before) -> Tensor:
            twins.plain.zero_grad()
            with torch.no_grad():
                for name in frozen:
                    plain.get_parameter(name).copy_(before[name])
            value = CASE.oracle(plain, x, masks, phase).square().sum()
            value.backward()
            for name in frozen:
                plain.get_parameter(name).grad = None
            return value

        twins.plain.step(plain_closure)
        with torch.no_grad():
            for name in frozen:
                plain.get_parameter(name).copy_(before[name])
        torch.testing.assert_close(list(model.parameters()), list(plain.parameters()))
    assert frozen_ever > 0
    assert twins.handle.step_count == STEPS


class Lookup(nn.Module):
    """Residual branches that look their output up in a table, whose gradient is sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 5)
        self.tables = nn.ModuleList(nn.Embedding(5, 5, sparse=True) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for table in self.tables:
            x = x + table(x.argmax(1))
        return x


def test_sparse_adam() -> None:
    """It takes sparse gradients only, so it trains the tables and another optimizer the rest."""
    torch.manual_seed(0)
    model = Lookup()
    handle = rdp.attach(model, rate=0.5, mode="batch", decay="constant", seed=1)
    tables = torch.optim.SparseAdam(model.tables.parameters(), lr=0.1)
    optimizers = [handle.wrap(tables), handle.wrap(torch.optim.SGD(model.stem.parameters(), lr=0.1))]
    words: dict[str, Tensor] = {}
    for name, table in model.tables.named_children():
        table.register_forward_pre_hook(lambda _, args, name=name: words.update({name: args[0]}))
    frozen_ever = moved_ever = 0
    for number in range(STEPS):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss(model(torch.randn(3, 3))).backward()
        learning = (handle.masks if handle.phase is rdp.Phase.DROP else ~handle.masks).any(1)
        before = snapshot(model, tables)
        for optimizer in optimizers:
            optimizer.step()
        after = snapshot(model, tables)
        assert handle.step_count == number + 1
        for branch, learns in zip(handle.branches, learning.tolist(), strict=True):
            (name,) = branch.parameters
            if not learns:
                assert identical(before[name], after[name])
                frozen_ever += 1
                continue
            moved = (before[name][0] != after[name][0]).any(1).nonzero().flatten()
            assert identical(moved, words[name.split(".")[1]].unique()), "it moves where words were looked up"
            moved_ever += 1
    assert len(handle.branches) == 4
    assert min(frozen_ever, moved_ever) > 0


# -- timm's factory --------------------------------------------------------------------------------------------------

CUDA_ONLY = ("bnb", "fused")
"""Prefixes of the names of those that need bitsandbytes or Apex, and a GPU."""
TIMM = [name for name in timm.optim.list_optimizers() if not name.startswith(CUDA_ONLY)]


@pytest.fixture
def eager():
    """Some of timm's optimizers compile themselves, which takes a minute."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.mark.parametrize("name", [*TIMM, "lookahead_adamw"])
@pytest.mark.filterwarnings("ignore:It is highly recommended to have 'opt_einsum'")
@pytest.mark.usefixtures("eager")
def test_every_optimizer_of_timm(name: str) -> None:
    second_order = name == "adahessian"
    twins = Twins(lambda ps: timm.optim.create_optimizer_v2(list(ps), name, lr=0.01, weight_decay=0.1))
    twins.exact = not second_order
    twins.run(create_graph=second_order)


def test_the_optimizers_of_timm_are_many() -> None:
    assert len(TIMM) > 60


# -- schedule-free ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "SGDScheduleFree", "RAdamScheduleFree"])
def test_schedule_free(name: str) -> None:
    """Between steps it goes to the average and back, which moves frozen parameters too, and equally in both twins."""
    schedulefree = pytest.importorskip("schedulefree")
    twins = Twins(lambda ps: getattr(schedulefree, name)(ps, lr=0.01, weight_decay=0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("error", rdp.RdpWarning)  # going to the average is no unannounced step
        for number in range(STEPS):
            twins.optimizer.train()
            twins.plain.train()
            twins.step(number)
            twins.optimizer.eval()
            twins.plain.eval()
            twins.check_equal()
            before = twins.handle.state_dict()
            with torch.no_grad():
                twins.model.eval()(twins.model.rows(4, 99))
            twins.model.train()
            assert identical(twins.handle.state_dict(), before)
    twins.check_shown()


def test_the_wrapper_of_schedule_free_is_refused() -> None:
    """It is no `torch.optim.Optimizer`, and moves parameters around the step of the one that it holds."""
    schedulefree = pytest.importorskip("schedulefree")
    model = CASE.model()
    handle = CASE.attach(model)
    optimizer = schedulefree.ScheduleFreeWrapper(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(rdp.ArgumentError, match=r"wrap needs a torch.optim.Optimizer; got ScheduleFreeWrapper"):
        handle.wrap(optimizer)


# -- SAM -------------------------------------------------------------------------------------------------------------


class SAM(Optimizer):
    """Sharpness-aware minimization: climb to a worse point nearby, and descend with the gradient found there.

    Source: Foret et al. (2021), and the interface of github.com/davda54/sam.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], base: type[Optimizer], rho: float, **options: Any) -> None:
        super().__init__(parameters, {"rho": rho} | options)
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        trained = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in trained]).norm()
        for p in trained:
            self.state[p]["old"] = p.detach().clone()
            p.add_(p.grad, alpha=self.defaults["rho"] / (norm.item() + 1e-12))
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.copy_(self.state[p].pop("old"))
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        """As davda54's: the first gradient is there already, or the closure is called for it."""
        if all(p.grad is None for group in self.param_groups for p in group["params"]):
            with torch.enable_grad():
                closure()
        self.first_step(zero_grad=True)
        with torch.enable_grad():
            value = closure()
        self.second_step()
        return value


def sam_oracle(model: nn.Module, sam: SAM, x: Tensor, masks: Tensor, phase: rdp.Phase, live: set[str]) -> None:
    """SAM of the objective that the masks define, on the live parameters."""

    def gradients() -> None:
        model.zero_grad()
        loss(CASE.oracle(model, x, masks, phase)).backward()
        for name, p in model.named_parameters():
            if name not in live:
                p.grad = None

    gradients()
    sam.first_step()
    gradients()
    sam.second_step()


def make_sam(model: nn.Module) -> SAM:
    return SAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.05, momentum=0.9, weight_decay=0.1)


@pytest.mark.parametrize("usage", ["closure alone", "backward, then closure", "two steps"])
def test_sam(usage: str) -> None:
    """Both forwards of a step have the same masks, so both gradients are of the same objective."""
    model, plain_model = CASE.model(), CASE.model()
    handle = CASE.attach(model)
    sam, plain = make_sam(model), make_sam(plain_model)
    if usage == "two steps":
        optimizer = sam.base_optimizer = handle.wrap(sam.base_optimizer)
    else:
        optimizer = handle.wrap(sam)
    frozen_ever = 0
    for number in range(STEPS):
        x, phase, seen = model.rows(4, number), handle.phase, []

        def closure(x=x, seen=seen) -> Tensor:
            value = loss(model(x))
            value.backward()
            seen.append(handle.masks)
            return value

        before = snapshot(model, sam.base_optimizer)
        with warnings.catch_warnings():
            warnings.simplefilter("error", rdp.RdpWarning)
            if usage == "two steps":
                optimizer.zero_grad()
                closure()
                sam.first_step()
                optimizer.zero_grad()  # the wrapped optimizer's, so that the handle knows: the same step once more
                closure()
                sam.second_step()
            else:
                optimizer.zero_grad()
                if usage == "backward, then closure":
                    closure()
                optimizer.step(closure)
        assert len(seen) == 2
        assert identical(seen[0], seen[1])
        assert handle.step_count == number + 1
        live = CASE.live(seen[0], phase)
        after = snapshot(model, sam.base_optimizer)
        assert all(identical(before[name], after[name]) for name in before.keys() - live)
        frozen_ever += len(before.keys() - live)
        sam_oracle(plain_model, plain, x, seen[0], phase, live)
        torch.testing.assert_close(list(model.parameters()), list(plain_model.parameters()))
    assert frozen_ever > 0
    assert handle.check().ok, str(handle.check())


# -- several optimizers, groups added later, zero_grad ---------------------------------------------------------------


def test_the_step_ends_when_each_of_several_optimizers_has_stepped() -> None:
    """One for the branches and one for the rest, in either order, equal one for all."""
    twins = Twins(lambda ps: torch.optim.AdamW(ps, lr=0.01, weight_decay=0.1))
    other = CASE.model()
    handle = CASE.attach(other)
    body = handle.wrap(torch.optim.AdamW(other.body.parameters(), lr=0.01, weight_decay=0.1))
    rest = handle.wrap(
        torch.optim.AdamW([*other.stem.parameters(), *other.head.parameters()], lr=0.01, weight_decay=0.1)
    )
    for number in range(STEPS):
        twins.step(number)
        objective(other(other.rows(4, number))).backward()
        phase = handle.phase
        first, second = (body, rest) if number % 3 else (rest, body)
        first.step()
        assert (handle.phase, handle.step_count) == (phase, number), "the other optimizer has not stepped yet"
        second.step()
        assert handle.step_count == number + 1
        body.zero_grad()
        rest.zero_grad()
        assert identical(dict(other.state_dict()), dict(twins.model.state_dict()))
    twins.check_shown()


@pytest.mark.parametrize("later", ["head", "body.1"])
def test_a_group_added_later(later: str) -> None:
    """A head, or a whole residual block, that starts to train in the middle, as in gradual unfreezing."""
    twins = Twins(
        lambda ps: torch.optim.AdamW(ps, lr=0.01, weight_decay=0.1),
        takes=lambda name, _: not name.startswith(later),
    )
    before = copy.deepcopy(twins.model.get_submodule(later).state_dict())
    for number in range(3):
        twins.step(number)
    assert identical(dict(twins.model.get_submodule(later).state_dict()), dict(before))
    for model, optimizer in ((twins.model, twins.optimizer), (twins.plain_model, twins.plain)):
        optimizer.add_param_group({"params": list(model.get_submodule(later).parameters()), "lr": 0.1})
    for number in range(3, 3 + STEPS):
        twins.step(number)
    assert not identical(dict(twins.model.get_submodule(later).state_dict()), dict(before))
    twins.check_shown()


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
def test_gradients_set_to_zero_instead_of_none(cls: type[Optimizer]) -> None:
    """A gradient of zero is not frozen; ours is hidden, so the run is the same."""
    ends = []
    for set_to_none in (True, False):
        twins = Twins(lambda ps: cls(ps, lr=0.01, weight_decay=0.1), set_to_none=set_to_none)
        twins.run()
        ends.append(snapshot(twins.model, twins.inner))
    assert identical(*ends)


@pytest.mark.parametrize("number", [0, 3])
def test_a_batch_that_is_thrown_away_leaves_no_trace(number: int) -> None:
    """Its loss was nan, say; `zero_grad` after its backward, and the step begins anew with the same masks."""
    ends = []
    for thrown in (False, True):
        twins = Twins(lambda ps: torch.optim.AdamW(ps, lr=0.01, weight_decay=0.1))
        for step in range(STEPS):
            if thrown and step == number:
                twins.optimizer.zero_grad()
                (objective(twins.model(twins.model.rows(7, 77))) * float("nan")).backward()
            twins.step(step)
        twins.check_shown()
        ends.append((snapshot(twins.model, twins.inner), twins.handle.masks))
    assert identical(*ends)


# -- learning rate schedules -----------------------------------------------------------------------------------------

SCHEDULERS = {
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=STEPS + 1),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=STEPS),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.5),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.5)], milestones=[3]
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name: str) -> None:
    """A schedule counts optimizer steps; DROP and FREEZE are one each."""
    twins = Twins(lambda ps: torch.optim.SGD(ps, lr=0.01, momentum=0.9, weight_decay=0.1))
    rates = set()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "lr_scheduler.step() before optimizer.step()"
        warnings.filterwarnings("ignore", "The epoch parameter")  # by SequentialLR of old versions
        ours, theirs = SCHEDULERS[name](twins.optimizer), SCHEDULERS[name](twins.plain)
        for number in range(STEPS):
            twins.step(number)
            for schedule in (ours, theirs):
                schedule.step(1.0) if name == "ReduceLROnPlateau" else schedule.step()
            (group,), (expected,) = twins.inner.param_groups, twins.plain.param_groups
            assert (group["lr"], group["momentum"]) == (expected["lr"], expected["momentum"])
            rates.add(group["lr"])
    assert len(rates) > 3
    assert identical(ours.state_dict()["_last_lr"], theirs.state_dict()["_last_lr"])
    twins.check_shown()


# -- gradient scaling ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clear", ["optimizer.zero_grad", "model.zero_grad", "set_to_none=False"])
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize(("cls", "chosen"), [(torch.optim.SGD, {}), (torch.optim.AdamW, {"fused": True})])
def test_a_skipped_step_waits_with_its_masks(
    cls: type[Optimizer], chosen: dict[str, Any], unscale: bool, clear: str
) -> None:
    """A step skipped for inf does not advance the phase; the next one has its masks, and equals a run without it."""
    ends = []
    for skips in (False, True):
        model = CASE.model()
        handle = CASE.attach(model)
        inner = cls(model.parameters(), lr=0.01, **chosen)
        optimizer = handle.wrap(inner)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, backoff_factor=1.0 - 2**-53, growth_interval=1000)
        masks = []
        for number in range(STEPS):
            for attempt in range(2 if skips and number in (0, 3, 4) else 1):
                bad = attempt == 0 and skips and number in (0, 3, 4)
                x = model.rows(5, 50 + number) if bad else model.rows(4, number)
                phase, count = handle.phase, handle.step_count
                scaler.scale(loss(model(x)) * (float("inf") if bad else 1.0)).backward()
                if bad:
                    skipped = handle.masks
                elif attempt:
                    assert identical(handle.masks[:, :1], skipped[:, :1])
                if unscale:
                    scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
                if clear == "model.zero_grad":
                    model.zero_grad()
                else:
                    optimizer.zero_grad(set_to_none=clear == "optimizer.zero_grad")
                assert handle.step_count == count + (not bad)
                assert (handle.phase is phase) == bad
            masks.append(handle.masks)
        assert handle.step_count == STEPS
        assert all(identical(drop, freeze) for drop, freeze in zip(masks[::2], masks[1::2], strict=True))
        ends.append((snapshot(model, inner), masks))
    assert identical(ends[0][1], ends[1][1])
    assert identical(ends[0][0], ends[1][0])
