"""Which branches can be run on some of their rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from rdp.branches import Branch
from rdp.discovery.candidates import Candidate
from rdp.discovery.find import Discovery
from rdp.discovery.forwards import Inputs
from rdp.discovery.graph import Graph
from rdp.rows.cost import fewest_rows
from rdp.rows.operations import NotIndependent
from rdp.rows.program import Program, draws_random_numbers
from rdp.rows.twins import Twins
from rdp.rows.verify import verify_programs
from rdp.rows.writer import branch_programs


@dataclass(frozen=True)
class Plan:
    """What is known of the rows of a model's branches.

    Attributes:
        programs: By name, the branches that can be run on some of the rows.
        dense: By name, why others cannot.
        wrong: Has a branch turned out to be otherwise than its program?
    """

    programs: dict[str, Program]
    dense: dict[str, str]
    wrong: bool

    def without(self, dense: Mapping[str, str]) -> Plan:
        """The plan in which these, each with the reason, run all rows, if they do not already."""
        reasons = {name: why for name, why in dense.items() if name in self.programs}
        programs = {name: program for name, program in self.programs.items() if name not in dense}
        return replace(self, programs=programs, dense=self.dense | reasons)

    def noted(self, branch: Branch) -> Branch:
        """The branch, with what is known of its rows."""
        program, why = self.programs.get(branch.name), ""
        if program is not None and program.why_not_before:
            why = f"rows from `{program.entry}` on: {program.why_not_before}"
        elif branch.name in self.dense:
            why = f"dense: {self.dense[branch.name]}"
        note = ", ".join(filter(None, (branch.note, why)))
        if program is None:
            return replace(branch, note=note)
        return replace(branch, note=note, compute="rows", fewest=program.fewest)


def plan_rows(
    found: Discovery, single: Graph, model: nn.Module, pair: Inputs, allow_random: bool, allow_batch_norm: bool
) -> Plan:
    """Find out which branches can be run on some of the rows, from a forward of `pair` and the same of one row."""
    twins = Twins(found.graph, single)
    programs: dict[str, Program] = {}
    dense: dict[str, str] = {}
    shorter: dict[str, Iterator[Program]] = {}
    for candidate in found.accepted:
        shorter[candidate.name] = _programs(found.graph, twins, model, candidate, allow_batch_norm)
        try:
            programs[candidate.name] = next(shorter[candidate.name])
        except NotIndependent as reason:
            dense[candidate.name] = str(reason)
    failed = wrong = verify_programs(model, pair, programs)
    while failed:  # what follows the part that cannot run on some of the rows may be able to
        for name, why in failed.items():
            dense.setdefault(name, why)
        ways = {name: program for name in failed if (program := next(shorter[name], None)) is not None}
        programs = {name: program for name, program in programs.items() if name not in failed}
        failed = verify_programs(model, pair, ways)
        for name in ways.keys() - failed.keys():
            programs[name] = replace(ways[name], why_not_before=dense.pop(name))
    if not allow_random:
        random = [name for name, program in programs.items() if draws_random_numbers(model, program)]
        dense |= dict.fromkeys(random, "it has dropout inside; compute='rows' would run it on rows")
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        programs = {
            name: replace(program, fewest=fewest_rows(program.work, device))
            for name, program in programs.items()
            if name not in random
        }
    return Plan(programs, dense, bool(wrong))


def _programs(
    pair: Graph, twins: Twins, model: nn.Module, candidate: Candidate, allow_batch_norm: bool
) -> Iterator[Program]:
    if len(candidate.residuals) != 1 or len(candidate.seams) != 1 or candidate.seams[0].of_block:
        raise NotIndependent("it does not end in one module")
    yield from branch_programs(pair, twins, model, candidate.residuals[0], candidate.seams[0], allow_batch_norm)
