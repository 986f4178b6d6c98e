"""What compiled training with Residual DropPath costs, as ratios to plain compiled training of the same model.

    python tools/benchmark_compiled.py                        # FLOPs of the graphs alone
    python tools/benchmark_compiled.py --rounds 4             # and the time of the default backend: minutes to compile
    python tools/benchmark_compiled.py --rounds 20 --device cuda --mode reduce-overhead

The model is compiled as a whole, or each of its blocks by itself; each way is compared with plain training that is
compiled in that way. FLOPs are counted while graphs run that are parted into forward and backward as the default
backend does; steps are timed in turns.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import project_paths  # noqa: F401
import tyro
from benchmark_options import Args as Options
from engine import explained, interruptible


@dataclass
class Args(Options):
    """Options of the benchmark; those of `benchmark.py` that it does not name here mean the same."""

    models: tuple[str, ...] = ("vit_small_patch16_224", "convnext_tiny", "swin_tiny_patch4_window7_224")
    batch_size: int = 40
    rounds: int = 0
    """Timed rounds of every contender; 0 counts FLOPs alone."""
    mode: Literal["default", "reduce-overhead", "max-autotune"] = "default"
    """Of `torch.compile`, where steps are timed."""


if __name__ == "__main__":
    with interruptible():  # and before the imports below, which take seconds
        args = tyro.cli(Args, description=__doc__)


with interruptible():
    import torch
    from benchmark import Contender, build, checked, inputs_of, seconds, sgd, step
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch import Tensor
    from torch._dynamo.backends.common import aot_autograd
    from torch._dynamo.utils import counters
    from torch.utils.flop_counter import FlopCounterMode

    import rdp


class Counting:
    """A backend that counts the FLOPs of the graphs that it runs."""

    def __init__(self) -> None:
        self.flops = 0
        ways = {"fw_compiler": self._compile, "bw_compiler": self._compile}
        self.backend = aot_autograd(**ways, partition_fn=min_cut_rematerialization_partition)

    def _compile(self, graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Callable[..., object]:
        def run(*arguments: Tensor) -> object:
            with FlopCounterMode(display=False) as counter:
                output = graph(*arguments)
            self.flops += counter.get_total_flops()
            return output

        return make_boxed_func(run)


def contenders(name: str, args: Args, x: Tensor, by_block: bool, **how: object) -> list[Contender]:
    """A plain one, and the way of training that saves work if it is compiled so; `how` is for `compile`."""
    options = {"mode": "batch"} if by_block else {"sampling": "fixed"}
    found = []
    for plain in (True, False):
        model = build(name, args)
        optimizer, phases = sgd(model), ("train",)
        handle = rdp.attach(model, args.rate, decay=args.decay, example_inputs=x, seed=1, **options)
        parts = dict.fromkeys(model.get_submodule(branch.block) for branch in handle.branches) if by_block else [model]
        if plain:
            handle.remove()
        else:
            optimizer, phases = handle.wrap(optimizer), ("DROP", "FREEZE")
        for part in parts:
            part.compile(**how)
        label = "batch, by block" if by_block else "row fixed, whole"
        found.append(Contender("plain" if plain else f"rdp {label}", model, optimizer, phases))
    return found


def flops(name: str, args: Args, x: Tensor, by_block: bool) -> tuple[list[float], int]:
    """In each phase, the mean FLOPs of a step over those of a plain one; and how many graphs were made for it."""
    counting = Counting()
    torch._dynamo.reset()
    counters.clear()
    plain, ours = contenders(name, args, x, by_block, backend=counting.backend)
    step(plain, x, args)
    base, graphs, counting.flops = counting.flops, counters["stats"]["unique_graphs"], 0
    done: dict[str, list[float]] = {phase: [] for phase in ours.phases}
    for number in range(2 * args.cycles):
        step(ours, x, args)
        done[ours.phases[number % 2]].append(counting.flops / base)
        counting.flops = 0
    return [statistics.mean(ratios) for ratios in done.values()], counters["stats"]["unique_graphs"] - graphs


def times(name: str, args: Args, x: Tensor, by_block: bool) -> list[float]:
    """In each phase, the median time of a step over that of the plain ones around it."""
    torch._dynamo.reset()
    plain, ours = contenders(name, args, x, by_block, mode=args.mode)
    taken: dict[str, list[float]] = {phase: [] for phase in ours.phases}
    for number in range(2 * (args.rounds + args.cycles)):
        before, now, after = (seconds(lambda c=c: step(c, x, args), args.device) for c in (plain, ours, plain))  # type: ignore[misc]
        if number >= 2 * args.cycles:  # by then graphs have been made for all that happens
            taken[ours.phases[number % 2]].append(2 * now / (before + after))
    return [statistics.median(ratios) for ratios in taken.values()]


def main(args: Args) -> None:
    """Count, time, and print."""
    args = checked(args)
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {where}, batch {args.batch_size}, {args.dtype}, rate {args.rate} {args.decay}\n")
    print("| model | compiled | graphs | FLOPs DROP / FREEZE | **mean** | time DROP / FREEZE | **mean** |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for name in args.models:
        x = inputs_of(name, args)
        for by_block in (False, True):
            (drop, freeze), graphs = flops(name, args, x, by_block)
            cells = [f"{drop:.2f} / {freeze:.2f}", f"**{(drop + freeze) / 2:.2f}**"]
            if args.rounds:
                drop, freeze = times(name, args, x, by_block)
                cells += [f"{drop:.2f} / {freeze:.2f}", f"**{(drop + freeze) / 2:.2f}**"]
            else:
                cells += ["", ""]
            way = "batch, by block" if by_block else "row fixed, whole"
            print(f"| {name} | {way} | {graphs} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    with explained():
        main(args)
