"""What each branch is worth: the metric without it, and without more and more of them.

Veit et al. (2016) took single blocks out of trained residual networks: where accuracy hardly falls, the network does
not depend on that block. So this is a measure of feature reuse too, and one that works where shapes differ and features
cannot be compared. What branches are worth does not add up, which is why there is the curve.

Source: Veit et al. (2016), https://arxiv.org/abs/1605.06431
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rdp.analysis.features import check_handle
from rdp.copies import Hook
from rdp.discovery.forwards import own_random_numbers
from rdp.errors import ArgumentError, shortened
from rdp.handle import ResidualDropPath


@dataclass(frozen=True)
class Lesion:
    """One branch.

    Attributes:
        name: Of the branch.
        metric: That of the network without it.
        worth: How much worse that is than the metric of the whole network; below 0 where it is better.
    """

    name: str
    metric: float
    worth: float


@dataclass(frozen=True)
class Lesions:
    """A network without some of its branches. Printing it shows the table and the curve.

    Attributes:
        whole: The metric of the network with all branches.
        higher_is_better: Is it one like accuracy, or one like loss?
        table: The branches in forward order.
        least: The metric, by the number of branches that were removed, those that are worth least first.
        random: The same for branches removed at random, with a metric for each draw.
    """

    whole: float
    higher_is_better: bool
    table: tuple[Lesion, ...]
    least: dict[int, float]
    random: dict[int, tuple[float, ...]]

    @property
    def order(self) -> tuple[str, ...]:
        """The names of the branches, those that are worth most first; of equal ones, the earlier first."""
        # What is no number any more is lost altogether.
        worth = {lesion.name: math.inf if math.isnan(lesion.worth) else lesion.worth for lesion in self.table}
        return tuple(sorted(worth, key=lambda name: -worth[name]))

    def __str__(self) -> str:
        width = max(len(name) for name in ("(nothing)", *self.order))
        lines = [f"{'without':{width}}  {'metric':>9}  {'worth':>9}", f"{'(nothing)':{width}}  {self.whole:>9.4g}"]
        lines += [f"{each.name:{width}}  {each.metric:>9.4g}  {each.worth:>9.4g}" for each in self.table]
        lines.append(f"{'removed':{width}}  {'least':>9}  {'random':>9}")
        for number, metric in self.least.items():
            drawn = self.random.get(number, ())
            mean = f"  {sum(drawn) / len(drawn):>9.4g}" if drawn else ""
            lines.append(f"{number:<{width}}  {metric:>9.4g}{mean}")
        return "\n".join(lines)


def lesions(
    handle: ResidualDropPath,
    evaluate: Callable[..., Any],
    *,
    higher_is_better: bool = True,
    points: int | None = 10,
    random: int = 2,
    seed: int = 0,
    progress: bool = True,
) -> Lesions:
    """Measure what each branch is worth, with the function that you evaluate the model with.

    It is called once with the whole network, once without each of the N branches, and `1 + random` times for each
    point of the curve, always in eval mode and from the same state of the global random number generators. Parameters,
    buffers, modes, masks, phase and these generators are afterwards as before.

    Args:
        handle: What `rdp.attach` returned, with known branches.
        evaluate: Returns a number. It calls the attached model, or one that wraps it, and gets the model if it takes an
            argument: `lambda: accuracy(model, loader)` or `lambda model: accuracy(model, loader)`. With several
            processes it must return the same number in all of them.
        higher_is_better: False for a loss.
        points: At most so many points of the curve, evenly spaced between none and all branches removed; None: all N.
        random: How many times branches are removed at random, besides those that are worth least.
        seed: Of these draws.
        progress: Show a progress bar, if tqdm is installed.

    Returns:
        The table and the curve.

    Raises:
        ArgumentError: If `handle` is not a live handle or knows no branches; or if `evaluate` returns no number, or
            does not call the attached model.
    """
    check_handle(handle)
    if (points is not None and points < 1) or random < 0:
        raise ArgumentError(f"points must be at least 1 and random at least 0; got {points} and {random}")
    names = [branch.name for branch in handle.branches]
    count = len(names)
    numbers = torch.linspace(0, count, min(points or count, count) + 1).round().int().tolist()[1:]
    inner = [number for number in numbers if number < count]
    between = [number for number in inner if number > 1]  # of one branch, the table has it
    total = 1 + count + len({*between, count} - {1}) + random * len(between)
    with _measuring(handle, evaluate) as measured, _bar(total, progress) as step:

        def without(removed: Sequence[str]) -> float:
            metric = measured(removed)
            step()
            return metric

        whole = without(())
        if not math.isfinite(whole):
            raise ArgumentError(f"evaluate returned {whole} for the network with all of its branches")
        sign = 1 if higher_is_better else -1
        alone = {name: without([name]) for name in names}
        table = tuple(Lesion(name, metric, sign * (whole - metric)) for name, metric in alone.items())
        result = Lesions(whole, higher_is_better, table, {}, {})

        def removed(order: Sequence[str], number: int) -> float:
            return alone[order[0]] if number == 1 else without(order[:number])

        least = {0: whole} | {number: removed(result.order[::-1], number) for number in numbers}
        generator = torch.Generator().manual_seed(seed)
        draws = [torch.randperm(count, generator=generator).tolist() for _ in range(random)]
        orders = [[names[i] for i in draw] for draw in draws]
        at_random = {number: tuple(removed(order, number) for order in orders) for number in inner if orders}
    ends = {0: (whole,), count: (least[count],)} if orders else {}
    return Lesions(whole, higher_is_better, table, least, dict(sorted((at_random | ends).items())))


@contextmanager
def _measuring(handle: ResidualDropPath, evaluate: Callable[..., Any]) -> Iterator[Callable[[Sequence[str]], float]]:
    """Calls `evaluate` without some branches; what it leaves of the modes is put back."""
    model = handle.model
    modes = [(module, module.training) for module in model.modules()]
    given = () if _takes_nothing(evaluate) else (model,)

    def measured(removed: Sequence[str]) -> float:
        model.eval()
        with own_random_numbers(model), handle.without(removed), _seen(handle) as seen:
            value = evaluate(*given)
        if not seen.called:
            raise ArgumentError(
                f"evaluate did not come to any branch of the attached {type(model).__name__}: it called another model "
                "perhaps, such as a copy or an average of its weights; attach to that one"
            )
        try:
            return float(value.detach() if isinstance(value, Tensor) else value)
        except (TypeError, ValueError, RuntimeError):
            raise ArgumentError(
                f"evaluate must return a number; got {shortened(value)}. Choose one of several with a function around "
                "it, such as lambda: evaluate(model)['accuracy']"
            ) from None

    try:
        yield measured
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _seen(handle: ResidualDropPath) -> Iterator[_Seen]:
    seen = _Seen(handle)
    names = {gate.module for branch in handle.branches for gate in branch.gates}
    hooks = [handle.model.get_submodule(name).register_forward_hook(seen) for name in names]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


class _Seen(Hook):
    """Remembers whether the end of a branch was called."""

    called = False

    def __call__(self, *_: Any) -> None:
        self.called = True


def _takes_nothing(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind()
    except TypeError:
        return False
    except ValueError:  # of some functions that are not written in Python it is not known
        return True
    return True


@contextmanager
def _bar(total: int, wanted: bool) -> Iterator[Callable[[], object]]:
    try:
        from tqdm import tqdm
    except ImportError:
        wanted = False
    if not wanted:
        yield bool
        return
    with tqdm(total=total, desc="lesions", unit="evaluation") as bar:
        yield bar.update
