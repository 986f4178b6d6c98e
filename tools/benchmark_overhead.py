"""What the hooks themselves cost, in microseconds for each branch and step, where there is no work to save.

    python tools/benchmark_overhead.py                       # a few seconds, and a ResNet-50 step at batch 32

A model of many tiny branches makes the hooks visible. It takes turns with the plain model, step by step: first with a
rate so low that no row is ever dropped, where a DROP step runs every hook and changes nothing, and then as usual.
Figures are medians of paired differences, divided by the number of branches.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Literal

import project_paths  # noqa: F401
import tyro
from engine import explained, interruptible


@dataclass
class Args:
    """Options of the benchmark."""

    branches: int = 32
    width: int = 8
    """Numbers in a row of the tiny model."""
    batch_size: int = 32
    steps: int = 200
    """Of each measurement, DROP and FREEZE in turn."""
    model: str = "resnet50"
    """A timm model whose plain step the overhead is compared with; "" for none."""
    resolution: int = 224


if __name__ == "__main__":
    with interruptible():  # and before the imports below, which take seconds
        args = tyro.cli(Args, description=__doc__)


with interruptible():
    import timm
    import torch
    from engine.progress import tqdm
    from torch import Tensor, nn

    import rdp


class Tiny(nn.Module):
    """`x + f(x)`, with as little in f as there can be."""

    def __init__(self, branches: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(branches))

    def forward(self, x: Tensor) -> Tensor:
        """Tensor[N, width] -> Tensor[N, width]."""
        for layer in self.layers:
            x = x + layer(x)
        return x


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> float:
    """Seconds of one training step."""
    begin = time.perf_counter()
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()
    return time.perf_counter() - begin


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """The same optimizer for all."""
    return torch.optim.SGD(model.parameters(), lr=1e-6)


def microseconds(args: Args, rate: float, phase: rdp.Phase, mode: Literal["row", "batch"]) -> float:
    """Median difference to a plain step, for each branch."""
    torch.manual_seed(0)
    x = torch.randn(args.batch_size, args.width)
    plain, attached = Tiny(args.branches, args.width), Tiny(args.branches, args.width)
    handle = rdp.attach(attached, rate, mode=mode, decay="constant", compute="dense", example_inputs=x)
    contenders = (plain, sgd(plain)), (attached, handle.wrap(sgd(attached)))
    differences = []
    for _ in range(args.steps):
        here = handle.phase
        base, ours = (step(*contender, x) for contender in contenders)
        if here is phase:
            differences.append(ours - base)
    return 1e6 * statistics.median(differences) / args.branches


def main(args: Args) -> None:
    """Measure and print."""
    if min(args.branches, args.width, args.batch_size, args.resolution) < 1 or args.steps < 2:
        raise SystemExit("all numbers must be at least 1, and --steps 2: a DROP and a FREEZE step")
    if args.model and not timm.is_model(args.model):
        raise SystemExit(f'timm has no model {args.model!r}; --model "" leaves the comparison out')
    print(f"torch {torch.__version__}, CPU, {torch.get_num_threads()} threads, {args.branches} branches\n")
    print("| what | mode | phase | us a branch and step |")
    print("|---|---|---|---:|")
    worst = 0.0
    for mode in ("row", "batch"):
        for what, rate, phase in (
            ("hooks alone: nothing is dropped", 1e-12, rdp.Phase.DROP),
            ("rate 0.1, with the masking itself", 0.1, rdp.Phase.DROP),
            ("rate 0.1, with the masking itself", 0.1, rdp.Phase.FREEZE),
        ):
            cost = microseconds(args, rate, phase, mode)
            worst = max(worst, cost)
            print(f"| {what} | {mode} | {phase.name} | {cost:.1f} |")
    if args.model:
        torch.manual_seed(0)
        model = timm.create_model(args.model).train()
        x = torch.randn(args.batch_size, 3, args.resolution, args.resolution)
        with rdp.attach(model, example_inputs=x) as handle:
            branches = len(handle.branches)
        optimizer = sgd(model)
        seconds = statistics.median([step(model, optimizer, x) for _ in tqdm(range(4), desc=args.model)][1:])
        share = worst * branches / 1e6 / seconds
        print(
            f"\n{branches} branches of {args.model} at the worst of these: {share:.3%} of its step of {seconds:.2f} s"
        )


if __name__ == "__main__":
    with explained(less="choose a smaller --model or --batch-size"):
        main(args)
