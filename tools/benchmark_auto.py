"""Is `compute="auto"` ever slower than `dense`? Time of a training step on the networks of the recipes.

    python tools/benchmark_auto.py                           # about five minutes

Contenders take turns, step by step, so that whatever else the machine does meets all of them; a figure is the median
over pairs of steps of its time over that of `dense`. The networks are small: the first is all overhead, and the others
are about where rows begin to pay.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

import project_paths  # noqa: F401
import tyro
from engine import explained, interruptible

Mode = Literal["row", "batch"]


@dataclass(frozen=True)
class Args:
    """Options of the benchmark."""

    steps: Annotated[int, tyro.conf.arg(help="Of each contender; networks that are tiny take more.")] = 40
    rate: float = 0.1
    mode: tuple[Mode, ...] = get_args(Mode)


if __name__ == "__main__":
    with interruptible():  # and before the imports below, which take seconds
        args = tyro.cli(Args, description=__doc__)


with interruptible():
    import char_gpt
    import spiral_mlp
    import timm
    import torch
    from engine.model import shrink_stem
    from engine.progress import tqdm
    from torch import Tensor, nn

    import rdp

COMPUTES = ("dense", "auto", "rows")


@dataclass(frozen=True)
class Network:
    """A network, a batch, and its usual optimizer."""

    title: str
    build: Callable[[], nn.Module]
    batch: Callable[[], Tensor]
    steps: int = 1
    """Times `Args.steps`: tiny networks need more of them."""


NETWORKS = (
    Network("spiral MLP 6 x 6", lambda: spiral_mlp.ResidualMLP(6, 6), lambda: torch.randn(200, 2), steps=6),
    Network("spiral MLP 32 x 32", lambda: spiral_mlp.ResidualMLP(32, 32), lambda: torch.randn(200, 2), steps=3),
    Network(
        "MNIST ResNet-18",
        lambda: shrink_stem(timm.create_model("resnet18", in_chans=1, num_classes=10), "resnet18"),
        lambda: torch.randn(32, 1, 28, 28),
    ),
    Network(
        "tiny GPT (4 blocks of 64)",
        lambda: char_gpt.CharGpt(64, depth=4, width=64, heads=2, context=32),
        lambda: torch.randint(64, (16, 32)),
        steps=3,
    ),
    Network(
        "GPT (8 blocks of 192)",
        lambda: char_gpt.CharGpt(64, depth=8, width=192, heads=6, context=64),
        lambda: torch.randint(64, (16, 64)),
    ),
)


class Contender:
    """A model that trains with one `compute`, or plainly."""

    def __init__(self, network: Network, x: Tensor, args: Args, mode: Mode, compute: Any) -> None:
        torch.manual_seed(0)
        self.model, self.x = network.build(), x
        optimizer: Any = torch.optim.SGD(self.model.parameters(), lr=1e-6, momentum=0.9)
        if compute is not None:
            handle = rdp.attach(self.model, args.rate, mode=mode, compute=compute, example_inputs=x)
            self.on_rows = sum("dense" not in branch.note for branch in handle.branches) / len(handle.branches)
            optimizer = handle.wrap(optimizer)
        self.optimizer = optimizer

    def step(self) -> float:
        """Seconds of one training step."""
        begin = time.perf_counter()
        self.optimizer.zero_grad()
        self.model(self.x).square().mean().backward()
        self.optimizer.step()
        return time.perf_counter() - begin


def measure(network: Network, args: Args, mode: Mode) -> dict[str, float]:
    """Median ratio of a step's time to that with `dense`."""
    x = network.batch()
    contenders = {name: Contender(network, x, args, mode, name) for name in COMPUTES}
    contenders["plain"] = Contender(network, x, args, mode, None)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in tqdm(range(args.steps * network.steps + 4), desc=f"{network.title}, {mode}", leave=False):
        for name, contender in contenders.items():
            spent = contender.step()
            if number >= 4:  # the first steps are slower
                seconds[name].append(spent)
    # A DROP and a FREEZE step together: they differ from each other, and branches on rows from step to step.
    pairs = {name: [sum(two) for two in zip(all_[::2], all_[1::2], strict=True)] for name, all_ in seconds.items()}
    ratios = {
        name: statistics.median(a / b for a, b in zip(pairs[name], pairs["dense"], strict=True)) for name in pairs
    }
    return ratios | {"on rows": contenders["auto"].on_rows}


def main(args: Args) -> None:
    """Measure and print."""
    if args.steps < 2 or args.steps % 2 or not 0 <= args.rate < 1:
        raise SystemExit("--steps is an even number, and --rate in [0, 1)")
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, CPU, 1 thread, rate {args.rate:g}: time of a step over that with dense\n")
    print("| network | mode | plain | auto | rows | branches on rows with auto |")
    print("|---|---|---:|---:|---:|---:|")
    for network in NETWORKS:
        for mode in args.mode:
            of = measure(network, args, mode)
            print(
                f"| {network.title} | {mode} | {of['plain']:.2f} | {of['auto']:.2f} | {of['rows']:.2f} "
                f"| {of['on rows']:.0%} |",
                flush=True,
            )


if __name__ == "__main__":
    with explained():
        main(args)
