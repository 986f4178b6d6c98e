"""`attach`, the function that everything begins with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from rdp.choose import check_model
from rdp.distributed.ranks import Ranks
from rdp.handle import ResidualDropPath
from rdp.masks import Decay, Mode, Sampling
from rdp.options import Compute, Freeze, Native, Options, Select
from rdp.phases import Phase, PhaseName, Schedule
from rdp.rate_schedules import RateSchedule
from rdp.rates import as_rate

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def attach(
    model: nn.Module,
    rate: float = 0.1,
    *,
    rate_schedule: RateSchedule | None = None,
    mode: Mode = "row",
    decay: Decay = "linear",
    sampling: Sampling = "bernoulli",
    freeze: Freeze = "output",
    scale_by_keep: bool = False,
    phases: Sequence[Phase | PhaseName] = (Phase.DROP, Phase.FREEZE),
    branches: Select = None,
    example_inputs: Tensor | tuple[Any, ...] | Mapping[str, Any] | None = None,
    rows: str | None = None,
    native: Native = "error",
    compute: Compute = "auto",
    seed: int = 0,
    verify: bool = True,
    process_group: ProcessGroup | None = None,
) -> ResidualDropPath:
    """Train `model` with Residual DropPath: find its residual branches and gate them by forward hooks.

    Every residual sum computes `y = shortcut(x) + F(x)`. In a DROP step dropped branches contribute nothing; in the
    FREEZE step after it the same branches, and only they, learn. Code, parameters, buffers and `state_dict` of the
    model stay as they are, and in eval mode it is the plain network.

    Example::

        handle = rdp.attach(model, rate=0.1)
        optimizer = handle.wrap(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))

    Args:
        model: Any module that you call in training as `model(...)`.
        rate: Drop probability of the deepest branch, in [0, 1). The default is the paper's. `handle.rate` changes it.
        rate_schedule: A function of the optimizer step, counted from 0, that returns a factor in [0, 1] on the rate of
            every branch, such as `rdp.rate_schedules.warmup(1000)`. FREEZE has the factor of the DROP that it replays;
            where it is 0 both are plain training.
        mode: "row" draws a mask for every sample, "batch" one for all samples; as in
            `torchvision.ops.StochasticDepth`.
        decay: "linear" lets the rate grow from 0 at the first block to `rate` at the last, as timm does; "constant"
            gives all blocks `rate`. A branch of rate 0 is not gated at all.
        sampling: "bernoulli" drops every row with the branch's rate, whatever becomes of the others. "fixed" (row mode)
            drops exactly `round(rate * N)` of the N rows, chosen at random, so that shapes do not change from step to
            step; a branch for which that is 0 is never dropped.
        freeze: What FREEZE stops: "output" the gradient at the branch output (Algorithm 1), so that none passes
            upstream either; "params" only the parameters (Figure 5 read literally; batch mode only).
        scale_by_keep: Divide undropped rows by their keep probability in DROP. False, as in the paper's section 4.1;
            True together with `phases=(Phase.DROP,)` is timm's DropPath.
        phases: The sequence of phases that repeats, one phase an optimizer step; `"drop"` is `rdp.Phase.DROP`.
        branches: None takes all that are found. A list of names takes these, and gates modules that were not found,
            or refused, on your word. A function of (name, module) chooses among those found.
        example_inputs: What the model is called with: a tensor, a tuple of positional or a dict of keyword
            arguments; anything else is its one argument. Branches are then found at once; by default they are found in
            the first training forward.
        rows: Name of the argument of `model.forward` that holds the rows, a tensor with a row an entry of its first
            axis, a list with a row an item, or a container of such tensors. None finds out. Batch mode needs no rows,
            and traces the model as it is called, whatever its inputs are.
        native: What to do with DropPath that is active in the model: "error", or "off" to silence it until `remove`.
        compute: "auto" runs only the rows that a step needs, in branches where that is exact. "rows" does so also in
            branches with dropout, where it keeps the distribution, but draws fewer numbers from the global RNG than a
            plain forward. "ghost" does so also through batch normalisation, which changes the mathematics: statistics
            are those of the rows that run together (undropped or dropped), as in ghost batch normalisation, and
            running statistics those of undropped rows; a branch that is dropped for all rows is skipped. "dense"
            always runs all rows.
        seed: Of the masks, which are independent of the global RNG.
        verify: When the branches are found, prove on two rows of the input that the gates do what they should: the
            output of FREEZE is the plain one, what is frozen gets no gradient, and rows do not influence each other. A
            branch for which that does not hold runs dense or is left ungated, by name. Where two rows take more than
            1e11 floating point operations it is left to `handle.check(inputs)`.
        process_group: The processes whose gradients are averaged, each with rows of its own: the data parallel group.
            None takes all processes of `torch.distributed`, or this one alone where that is not used.

    Returns:
        The handle: wrap the optimizer with it, save its `state_dict` beside the optimizer's.

    Raises:
        ArgumentError: If an argument has a value that cannot be used.
        AttachError: If the model is attached already, scripted, or wrapped in DataParallel.
        NativeDropPathError: If the model drops paths by itself and `native="error"`.
        BranchError: If no branch is found (in the first training forward, without `example_inputs`).
        ForwardError: In the first training forward, if in row mode it is not clear where the rows of its inputs are, or
            the model cannot be called with some of them.

    Source: Park (2024), Algorithm 1, https://arxiv.org/abs/2411.09475
    """
    options = Options(
        rate=as_rate(rate),
        mode=mode,
        decay=decay,
        sampling=sampling,
        freeze=freeze,
        scale_by_keep=scale_by_keep,
        phases=Schedule(phases).phases,
        branches=branches,
        native=native,
        compute=compute,
        seed=seed,
        verify=verify,
        rate_schedule=rate_schedule,
        rows=rows,
    )
    check_model(model, options)
    handle = ResidualDropPath(model, options, Ranks(process_group))
    if example_inputs is not None:
        try:
            handle.discover(example_inputs)
        except BaseException:
            handle.remove()
            raise
    return handle
