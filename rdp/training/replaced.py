"""Following what is replaced in an attached model: its modules and parameters, while it trains.

Others convert batch normalisation, prune, put adapters around layers, wrap blocks. So at the beginning of a training
forward the modules and the places of the branches' parameters are compared with those of before, and where they differ
it is looked again where gates and frozen parameters are. What cannot be followed is told at once, by name.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from rdp.branches import Branch, Point
from rdp.copies import Hook
from rdp.errors import listed
from rdp.refusals import check_training
from rdp.rows.program import Program
from rdp.training import compiled, hooks, user_hooks
from rdp.training.frozen import Slot, slots
from rdp.training.moved import Objects, follow_parameters

if TYPE_CHECKING:
    from rdp.training.run import Run


class Places:
    """The hooks of the branches, and where these and the branches' parameters are in the model.

    Args:
        run: That of the model.
        branches: In forward order.
        programs: By name, the branches that run on some of the rows.

    Raises:
        AttachError: If hooks of the user's cannot be served.
    """

    def __init__(self, run: Run, branches: Sequence[Branch], programs: Mapping[str, Program]) -> None:
        self._run = run
        self._programs = dict(programs)
        self._hooks: list[list[RemovableHandle]] = [[] for _ in branches]
        self._ends: list[list[nn.Module]] = [[] for _ in branches]
        """The modules at which it is gated or cut."""
        module = run.model.get_submodule
        user_hooks.check_ends({gate.module: module(gate.module) for b in branches if b.gated for gate in b.gates})
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
            AttachError: If the model has become one that cannot be trained so, see `refusals` and `user_hooks`.
        """
        children = [child for table in self._tables for child in table.values()]
        if (
            children != self._children
            or not all(map(operator.contains, *self._held))
            or [*itertools.chain(*self._hooked)] != self._hooks_there
        ):
            self._follow()

    def begin(self) -> None:
        """The run knows the branches: heed the hooks that the user has put into the model before."""
        if user_hooks.first_hooked(dict(self._run.model.named_modules())) is not None:
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
        held = [self._slots[name] for name in inside]
        self._held = [slot.holder for slot in held], [slot.key for slot in held]
        self._hooked = user_hooks.tables(self._modules)
        self._hooks_there = [*itertools.chain(*self._hooked)]

    def _follow(self) -> None:
        run = self._run
        check_training(run.model)
        modules = dict(run.model.named_modules(remove_duplicate=False))
        now = slots(run.model)
        moved = follow_parameters(self._slots, self._objects, now, run.branches)
        branches, lost = list(run.branches), []
        again: dict[int, str] = {}
        for index, branch in enumerate(run.branches):
            parameters = moved.of_branches[index]
            if not any(moved.names[name] for name in branch.parameters):
                parameters = tuple(name for name in branch.parameters if name not in now)
            branches[index] = branch = replace(branch, parameters=parameters)
            if not branch.gated:
                continue
            points = (*branch.gates, *branch.cuts)
            names = self._present(points, self._ends[index], modules)
            if names is None:
                lost.append(branch.name)
                continue
            gates = tuple(replace(gate, module=name) for gate, name in zip(branch.gates, names, strict=False))
            cuts = tuple(replace(cut, module=name) for cut, name in zip(branch.cuts, names[len(gates) :], strict=True))
            user_hooks.check_ends({gate.module: modules[gate.module] for gate in gates})
            branches[index] = branch = replace(branch, gates=gates, cuts=cuts)
            calls = [o.target for o in program.operations] if (program := self._programs.get(branch.name)) else []
            called = [target for target in calls if isinstance(target, str)]
            if [modules[name] for name in names] != self._ends[index] or not self._intact(called):
                again[index] = "its modules were replaced after attach"
            elif hooked := user_hooks.first_hooked(self._inside(called)):
                again[index] = f"a hook on `{hooked}` would see some of the rows"
        self._tell(lost, moved.unplaced)
        if again and run.watch.traced:
            run.watch.warn(
                "replaced in compiled",
                f"{_named([branches[index].name for index in again])}: {next(iter(again.values()))}, and after it was "
                "compiled, so these branches train plainly; remove the handle, attach again, and compile",
            )
        elif again:
            for index, why in again.items():
                branches[index] = self._hook_anew(index, branches[index], why)
            compiled.forget_compiled()
        run.in_graph = {
            index
            for index, branch in enumerate(branches)
            for name in branch.parameters
            if (holder := modules.get(name.rpartition(".")[0])) is not None and user_hooks.expects_backward(holder)
        }
        run.held = {new: p for old, p in run.held.items() if (new := moved.names.get(old)) is not None}
        self._remember(branches)
        run.followed(tuple(branches), self._slots)
        run.watch.known -= {*moved.unplaced}

    def _hook_anew(self, index: int, branch: Branch, why: str) -> Branch:
        """Hook a branch where it ends now, to run dense from now on."""
        for hook in self._hooks[index]:
            hook.remove()
        self._hooks[index] = []
        if self._programs.pop(branch.name, None) is not None:
            branch = replace(branch.sized(branch.fewest), fewest=0)
            branch = replace(branch, compute="dense", note=", ".join(filter(None, (branch.note, f"dense: {why}"))))
        self._install(index, branch)
        points = (*branch.gates, *branch.cuts)
        self._ends[index] = [self._run.model.get_submodule(point.module) for point in points]
        return branch

    def _present(
        self, points: Sequence[Point], ends: Sequence[nn.Module], modules: Mapping[str, nn.Module]
    ) -> list[str] | None:
        """The names of the modules that are hooked at these points now; None if one is not in the model."""
        names = {id(module): name for name, module in reversed([*modules.items()])}
        known = {id(module) for module in self._modules}
        present = []
        for point, old in zip(points, ends, strict=True):
            there, new = names.get(id(old)), modules.get(point.module)
            # A module around it that has parameters adds to its value, as adapters do; others pass it through.
            around = there is not None and new is not old and there.startswith(f"{point.module}.")
            if there is None and id(new) in known:
                return None  # what follows in a list has moved up; it has not taken its place
            if there is None or (around and self._adds(new)):
                there = point.module
            if there not in modules or _of_another(modules[there], self._run):
                return None
            present.append(there)
        return present

    def _intact(self, called: Sequence[str]) -> bool:
        """Does the model still call these modules of a program, and nothing besides that has parameters?"""
        for name in called:
            try:
                new = self._run.model.get_submodule(name)
            except AttributeError:
                return False
            there = {id(module) for module in new.modules()}
            if not all(id(old) in there for old in self._called[name]) or self._adds(new):
                return False
        return True

    def _inside(self, called: Sequence[str]) -> dict[str, nn.Module]:
        """These modules and all in them, by name."""
        return {
            inner: module
            for name in called
            for inner, module in self._run.model.get_submodule(name).named_modules(prefix=name)
        }

    def _adds(self, module: nn.Module | None) -> bool:
        """Are there, in new modules, new parameters, or buffers, which may be a state?"""
        known = {id(module) for module in self._modules}
        new = [m for m in module.modules() if id(m) not in known] if module is not None else []
        parameters = (p for m in new for p in m._parameters.values() if p is not None)
        return any(self._objects.name(p) is None for p in parameters) or any(m._buffers for m in new)

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


def _of_another(module: nn.Module, run: Run) -> bool:
    given: Iterable[Any] = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return any(isinstance(hook, Hook) and hook.owner is not run for hook in given)


def _named(names: Sequence[str]) -> str:
    return listed([f"`{name}`" for name in dict.fromkeys(names)])
