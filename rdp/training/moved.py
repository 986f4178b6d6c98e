"""Where the parameters of branches are after parts of a model were replaced."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from rdp.branches import Branch
from rdp.training.frozen import Slot


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
