"""Which branches can be run on some of their rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn

from rdp.branches import Branch
from rdp.discovery.candidates import Candidate
from rdp.discovery.find import Discovery
from rdp.discovery.forwards import Inputs
from rdp.discovery.graph import Graph
from rdp.rows.program import Program, draws_random_numbers
from rdp.rows.verify import verify_programs
from rdp.rows.writer import NotIndependent, branch_program


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
        if branch.name in self.programs:
            return replace(branch, compute="rows")
        why = [f"dense: {self.dense[branch.name]}"] if branch.name in self.dense else []
        return replace(branch, note=", ".join([branch.note] * bool(branch.note) + why))


def plan_rows(
    found: Discovery, single: Graph, model: nn.Module, pair: Inputs, allow_random: bool, allow_batch_norm: bool
) -> Plan:
    """Find out which branches can be run on some of the rows, from a forward of `pair` and the same of one row."""
    programs: dict[str, Program] = {}
    dense: dict[str, str] = {}
    for candidate in found.accepted:
        try:
            program = _program(found.graph, single, model, candidate, allow_batch_norm)
            if not allow_random and draws_random_numbers(model, program):
                raise NotIndependent("it has dropout inside, see compute='rows'")
            programs[candidate.name] = program
        except NotIndependent as why:
            dense[candidate.name] = str(why)
    wrong = verify_programs(model, pair, programs)
    programs = {name: program for name, program in programs.items() if name not in wrong}
    return Plan(programs, dense | wrong, bool(wrong))


def _program(pair: Graph, single: Graph, model: nn.Module, candidate: Candidate, allow_batch_norm: bool) -> Program:
    if len(candidate.residuals) != 1 or len(candidate.seams) != 1 or candidate.seams[0].of_block:
        raise NotIndependent("it does not end in one module")
    return branch_program(pair, single, model, candidate.residuals[0], candidate.seams[0], allow_batch_norm)
