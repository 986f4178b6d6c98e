"""What forwards of a model show: its branches, where these have their rows, and which can run on some of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn

from rdp.calls import Inputs
from rdp.discovery.find import Discovery, find_branches, traced
from rdp.discovery.graph import Graph
from rdp.inputs import Rows
from rdp.known import Known
from rdp.options import Options
from rdp.phases import Phase
from rdp.rows.axes import Coupling
from rdp.rows.places import Places, locate, settle_by_row
from rdp.rows.plan import Plan, plan_rows
from rdp.rows.sizes import telling


@dataclass(frozen=True)
class Seen:
    """What forwards have shown.

    Attributes:
        found: The branches.
        plan: Those that can run on some of the rows.
        places: Of each accepted candidate, by `id`.
        odd: Where rows influence each other, or are no numbers.
        rows: Where the inputs have their rows; None where batch mode knows of none.
    """

    found: Discovery
    plan: Plan
    places: Mapping[int, Places]
    odd: Coupling
    rows: Rows | None


def look(
    model: nn.Module,
    options: Options,
    inputs: Inputs,
    rows: Rows | None,
    known: Known,
) -> Seen:
    """Look at forwards of a model, within `forwards.undisturbed`: of two rows and of one or, in batch mode, of all.

    Args:
        model: The model.
        options: What `attach` was asked for.
        inputs: Of a forward.
        rows: Where they have their rows.
        known: What an earlier look has brought up.

    Raises:
        ForwardError: If a forward of these cannot be made, though the model can be called with the inputs.
    """
    with telling(model, inputs, options):
        if options.mode == "batch":
            return _whole(model, options, inputs, rows, known)
        assert rows is not None
        pair, single = rows.take(inputs, 2), rows.take(inputs, 1)
        for graph, alone in traced(model, pair, single):
            found = discovered(model, options, graph, known)
            plan = _plan(model, options, found, alone, pair)
            if found.accepted and not plan.wrong:
                break
        plan = plan.without(known.dense)
        places = locate(found.accepted, found.graph, alone)
        sure = [name for name, program in plan.programs.items() if not program.why_not_before]
        odd = settle_by_row(found, places, model, pair, single, sure)
        return Seen(found, plan, places, odd, rows)


def _whole(
    model: nn.Module,
    options: Options,
    inputs: Inputs,
    rows: Rows | None,
    known: Known,
) -> Seen:
    """Batch mode asks nothing of the inputs. If they have rows, a dropped branch may run on one of them alone."""
    for (graph,) in traced(model, inputs):
        found = discovered(model, options, graph, known)
        if found.accepted:
            break
    names = {candidate.name for candidate in found.accepted}
    plan, why = Plan({}, {}, wrong=False), "no rows were found in the inputs"
    if rows is not None:
        try:
            pair, single = rows.take(inputs, 2), rows.take(inputs, 1)
            for two, one in traced(model, pair, single):
                few = discovered(model, options, two, known)
                few = replace(few, candidates=[c for c in few.accepted if c.name in names])
                plan = _plan(model, options, few, one, pair)
                if few.accepted and not plan.wrong:
                    break
        except Exception as error:  # they are no rows, or none that can be alone
            rows, why = None, f"the model cannot be called with some of the rows ({type(error).__name__})"
    if rows is None and options.compute != "dense":
        plan = Plan({}, dict.fromkeys(names, why), wrong=False)
    # Between a forward and itself no axis differs: none is that of rows.
    return Seen(found, plan.without(known.dense), locate(found.accepted, graph, graph), Coupling(), rows)


def discovered(model: nn.Module, options: Options, graph: Graph, known: Known) -> Discovery:
    """What a forward shows, for what `options` ask and by what is `known` besides."""
    stops = options.freeze == "output" and Phase.FREEZE in options.phases
    found = find_branches(graph, model, options.named, stops)
    for candidate in found.accepted:
        candidate.reason = None if candidate.name in options.named else known.unsound.get(candidate.name)
    return found


def _plan(model: nn.Module, options: Options, found: Discovery, alone: Graph, pair: Inputs) -> Plan:
    if options.compute == "dense":
        return Plan({}, {}, wrong=False)
    allow_random = options.compute in ("rows", "ghost")
    return plan_rows(found, alone, model, pair, allow_random, options.compute == "ghost")
