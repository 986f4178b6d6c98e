"""Forwards in which nothing counts: training forwards with given masks, of which the run and the model keep nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from torch import Tensor, nn

from rdp.discovery import forwards
from rdp.discovery.forwards import Inputs
from rdp.discovery.weightless import ways_to_run
from rdp.phases import Phase
from rdp.training.first_cycle import FirstCycle
from rdp.training.run import Run
from rdp.training.step import Step
from rdp.training.watch import Watch


@contextmanager
def as_trained(model: nn.Module) -> Iterator[None]:
    """Modes as in training, but without what makes rows depend on each other or on chance; all is put back."""
    modes = [(module, module.training or not model.training) for module in model.modules()]
    with forwards.undisturbed(model):
        for module, training in modes:
            still = isinstance(module, (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd))
            module.training = training and not still
        dropping = [
            (module, name, value)
            for module in model.modules()
            for name, value in vars(module).items()
            if "drop" in name.lower() and isinstance(value, float)
        ]
        try:
            for module, name, _ in dropping:
                setattr(module, name, 0.0)  # which attention passes to a function
            yield
        finally:
            for module, name, value in dropping:
                setattr(module, name, value)


@contextmanager
def rehearsal(run: Run, phase: Phase | None, masks: Tensor | None) -> Iterator[None]:
    """Forwards in this context have these masks, or none, and the run does not know of them."""
    before = run.step, run.watch, run.first, run.look, run.masks, run.several, run.pauses
    run.watch, run.first, run.look, run.pauses = Watch(run.model), FirstCycle(), bool, int(phase is None)
    if phase is not None:
        step = run.step
        run.step = Step(step.number, phase, step.cycle, run.probes, {}, masks, step.rate, step.rates)
    try:
        yield
    finally:
        run.step, run.watch, run.first, run.look, run.masks, run.several, run.pauses = before


def grounds(run: Run, inputs: Inputs) -> Iterator[tuple[str, Inputs, Inputs | None]]:
    """What a proof can be made on, in words: two rows and the first of them alone, or all of the input in one."""
    if run.rows is not None:
        yield "two rows of the input", run.rows.take(inputs, 2), run.rows.take(inputs, 1)
    if run.options.mode == "batch":
        yield "the input as it is", inputs, None


def operations(run: Run, inputs: Inputs) -> float:
    """Floating point operations of a plain forward, counted without numbers if that can be."""
    from torch.utils.flop_counter import FlopCounterMode  # imports triton, which is not for everybody

    for place, given in ways_to_run(run.model, inputs, shortcuts=False):
        with suppress(Exception), place, forwards.own_random_numbers(run.model), rehearsal(run, None, None):
            with FlopCounterMode(display=False) as counter:
                forwards.run(run.model, given)
            return float(counter.get_total_flops())
    return 0.0  # as no forward comes to its end, the proof will not either
