"""Following what is replaced in an attached model: its modules and parameters, while it trains.

Others convert batch normalisation, prune, put adapters around layers, wrap blocks. So at the beginning of a training
forward the modules and the places of the branches' parameters are compared with those of before, and where they differ
it is looked again where gates and frozen parameters are. What cannot be followed is told at once, by name.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from rdp.branches import Branch, Point
from rdp.copies import Hook
from rdp.errors import listed
from rdp.refusals import check_training
from rdp.rows.program import Program
from rdp.training import compiled, hooks
from rdp.training.frozen import Slot, slots

if TYPE_CHECKING:
    from rdp.training.run import Run


class Places:
    """The hooks of the branches, and where these and the branches' parameters are in the model.

    Args:
        run: That of the model.
        branches: In forward order.
        programs: By name, the branches that run on some of the rows.
    """

    def __init__(self, run: Run, branches: Sequence[Branch], programs: Mapping[str, Program]) -> None:
        self._run = run
        self._programs = dict(programs)
        self._hooks: list[list[RemovableHandle]] = [[] for _ in branches]
        self._ends: list[list[nn.Module]] = [[] for _ in branches]
        """The modules at which it is gated or cut."""
        module = run.model.get_submodule
        called = {o.target for p in programs.values() for o in p.operations if isinstance(o.target, str)}
        self._called = {name: [*module(name).modules()] for name in called}
        self._slots: dict[str, Slot] = {}
        try:
            for index, branch in enumerate(branches):
                self._ends[index] = [module(point.module) for point in (*branch.gates, *branch.cuts)]
                self._install(index, branch)
        except BaseException:  # all or nothing: with some of the hooks, the other branches would train plainly
            self.remove()
            raise
        self._remember(branches)

    def remove(self) -> None:
        """Take the hooks out of the model."""
        for hook in itertools.chain(*self._hooks):
            hook.remove()

    def look(self) -> None:
        """A training forward begins: see whether all is where it was, and follow what is not.

        Raises:
            AttachError: If the model has become one that cannot be trained so.
        """
        children = [child for table in self._tables for child in table.values()]
        if children != self._children or not all(key in holder for holder, key in self._held):
            self._follow()

    def _install(self, index: int, branch: Branch) -> None:
        for hook in hooks.install(self._run, index, branch, self._programs.get(branch.name)):
            self._hooks[index].append(hook)

    def _remember(self, branches: Sequence[Branch]) -> None:
        model = self._run.model
        self._modules = list(model.modules())
        self._tables = [module._modules for module in self._modules if module._modules]
        self._children = [child for table in self._tables for child in table.values()]
        inside = list(dict.fromkeys(name for branch in branches for name in branch.parameters))
        now = slots(model)
        # A branch that was taken out of the model keeps its parameters: it may be put in again.
        self._slots = {name: self._slots[name] for name in inside if name not in now} | now
        self._objects = Objects({name: slot.holder.get(slot.key) for name, slot in self._slots.items()})
        self._held = [(self._slots[name].holder, self._slots[name].key) for name in inside]

    def _follow(self) -> None:
        run = self._run
        check_training(run.model)
        modules = dict(run.model.named_modules(remove_duplicate=False))
        now = slots(run.model)
        moved = follow_parameters(self._slots, self._objects, now, run.branches)
        branches, lost, again = list(run.branches), [], []
        for index, branch in enumerate(run.branches):
            parameters = moved.of_branches[index]
            if not any(moved.names[name] for name in branch.parameters):
                parameters = tuple(name for name in branch.parameters if name not in now)
            branches[index] = branch = replace(branch, parameters=parameters)
            if branch.rate == 0:
                continue
            points = (*branch.gates, *branch.cuts)
            names = self._present(points, self._ends[index], modules)
            if names is None:
                lost.append(branch.name)
                continue
            gates = tuple(replace(gate, module=name) for gate, name in zip(branch.gates, names, strict=False))
            cuts = tuple(replace(cut, module=name) for cut, name in zip(branch.cuts, names[len(gates) :], strict=True))
            branches[index] = branch = replace(branch, gates=gates, cuts=cuts)
            program = self._programs.get(branch.name)
            if [modules[name] for name in names] != self._ends[index] or not self._intact(program):
                again.append(index)
        self._tell(lost, moved.unplaced)
        if again and run.watch.traced:
            run.watch.warn(
                "replaced in compiled",
                f"modules of {_named([branches[index].name for index in again])} were replaced after the model was "
                "compiled, so these branches train plainly; remove the handle, attach again, and compile",
            )
        elif again:
            for index in again:
                branches[index] = self._moved(index, branches[index])
            compiled.forget_compiled()
        run.held = {new: p for old, p in run.held.items() if (new := moved.names.get(old)) is not None}
        self._remember(branches)
        run.followed(tuple(branches), self._slots)
        run.watch.known -= {*moved.unplaced}

    def _moved(self, index: int, branch: Branch) -> Branch:
        """Hook a branch anew, at other modules; its program is of the former ones."""
        for hook in self._hooks[index]:
            hook.remove()
        self._hooks[index] = []
        if self._programs.pop(branch.name, None) is not None:
            note = "dense: its modules were replaced after attach"
            branch = replace(branch, compute="dense", note=", ".join(filter(None, (branch.note, note))))
        self._install(index, branch)
        points = (*branch.gates, *branch.cuts)
        self._ends[index] = [self._run.model.get_submodule(point.module) for point in points]
        return branch

    def _present(
        self, points: Sequence[Point], ends: Sequence[nn.Module], modules: Mapping[str, nn.Module]
    ) -> list[str] | None:
        """The names of the modules that are hooked at these points now; None if one is not in the model."""
        names = {id(module): name for name, module in reversed([*modules.items()])}
        present = []
        for point, old in zip(points, ends, strict=True):
            there, new = names.get(id(old)), modules.get(point.module)
            # A module around it that has parameters adds to its value, as adapters do; others pass it through.
            around = there is not None and new is not old and there.startswith(f"{point.module}.")
            if there is None or (around and self._adds(new)):
                there = point.module
            if there not in modules or _of_another(modules[there], self._run):
                return None
            present.append(there)
        return present

    def _intact(self, program: Program | None) -> bool:
        """Does the model still call the modules of a program, and nothing besides that has parameters?"""
        for operation in program.operations if program is not None else ():
            if isinstance(operation.target, str):
                try:
                    new = self._run.model.get_submodule(operation.target)
                except AttributeError:
                    return False
                there = {id(module) for module in new.modules()}
                if not all(id(old) in there for old in self._called[operation.target]) or self._adds(new):
                    return False
        return True

    def _adds(self, module: nn.Module | None) -> bool:
        """Are there, in new modules, new parameters?"""
        known = {id(module) for module in self._modules}
        new = [m for m in module.modules() if id(m) not in known] if module is not None else []
        return any(self._objects.name(p) is None for m in new for p in m._parameters.values() if p is not None)

    def _tell(self, lost: Sequence[str], unplaced: Sequence[str]) -> None:
        if lost:
            self._run.watch.warn(
                f"lost {lost}",
                f"{_named(lost)} ended a branch and is not in the model any more, or has the hooks of another handle: "
                "what has taken its place trains plainly; remove the handle and attach again when it is complete",
            )
        if unplaced:
            self._run.watch.warn(
                f"unplaced {unplaced}",
                f"{_named(unplaced)} was added after the branches were found, and it cannot be told to which of them "
                "it belongs, so it is not frozen; remove the handle and attach again, after the model is complete",
            )


class Objects:
    """Names of parameter objects, which are not kept alive; a copy is empty."""

    def __init__(self, parameters: Mapping[str, nn.Parameter | None]) -> None:
        self._references = {name: weakref.ref(p) for name, p in parameters.items() if p is not None}

    def __reduce__(self) -> tuple[type[Objects], tuple[dict[str, Any]]]:
        return Objects, ({},)

    def id(self, name: str) -> int:
        """Of the parameter that had this name, if it is still somewhere; else 0."""
        parameter = self._references[name]() if name in self._references else None
        return 0 if parameter is None else id(parameter)

    def name(self, parameter: object) -> str | None:
        """The name that a parameter had."""
        return next((name for name, reference in self._references.items() if reference() is parameter), None)


@dataclass(frozen=True)
class Moved:
    """What has become of the parameters of a model.

    Attributes:
        names: Where each is now, by the name that it had; None if it is not there any more.
        of_branches: The names of the parameters of each branch.
        unplaced: Names of new ones, of which it is unclear whether they belong to a branch.
    """

    names: Mapping[str, str | None]
    of_branches: Sequence[tuple[str, ...]]
    unplaced: tuple[str, ...]


def follow_parameters(
    before: Mapping[str, Slot], objects: Objects, now: Mapping[str, Slot], branches: Sequence[Branch]
) -> Moved:
    """Find the parameters of branches again.

    One is where it was in its module, or where the same object is, or under the same name. A new one belongs to the
    branches that all former parameters of the module around it belonged to.

    Args:
        before: Places, by name.
        objects: What was there.
        now: Places, by name.
        branches: With the names of before.
    """
    at = {(id(slot.holder), slot.key): name for name, slot in reversed([*now.items()])}
    of = {id(slot.holder.get(slot.key)): name for name, slot in reversed([*now.items()])}
    names = {old: at.get((id(slot.holder), slot.key), of.get(objects.id(old))) for old, slot in before.items()}
    taken = set(names.values())
    names |= {old: old for old, new in names.items() if new is None and old in now and old not in taken}
    owners = {name: frozenset(i for i, b in enumerate(branches) if name in b.parameters) for name in before}
    of_branches = [[new for old in b.parameters if (new := names[old]) is not None] for b in branches]
    unplaced = []
    known = {id(slot.holder.get(slot.key)) for name, slot in now.items() if name in set(names.values())}
    for name, slot in now.items():
        if id(slot.holder.get(slot.key)) in known:
            continue
        owning = _owners_around(name, names, owners)
        if len(owning) != 1:
            unplaced.append(name)
        for index in next(iter(owning)) if len(owning) == 1 else ():
            of_branches[index].append(name)
    return Moved(names, [tuple(dict.fromkeys(group)) for group in of_branches], tuple(unplaced))


def _owners_around(
    name: str, names: Mapping[str, str | None], owners: Mapping[str, frozenset[int]]
) -> set[frozenset[int]]:
    """The branches of the former parameters of the smallest module around a new one that had any."""
    around = name
    while around:
        around = around.rpartition(".")[0]
        prefix = f"{around}." if around else ""
        # One that is gone was in the module that had its name.
        found = {owners[old] for old, new in names.items() if (new or old).startswith(prefix)}
        if found:
            return found
    return set()


def _of_another(module: nn.Module, run: Run) -> bool:
    given: Iterable[Any] = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return any(isinstance(hook, Hook) and hook.owner is not run for hook in given)


def _named(names: Sequence[str]) -> str:
    return listed([f"`{name}`" for name in dict.fromkeys(names)])
