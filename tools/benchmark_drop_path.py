"""DropPath alone (`phases=(Phase.DROP,)`) beside other ways to drop paths, of a ViT of equal blocks.

    OMP_NUM_THREADS=1 python tools/benchmark_drop_path.py      # some minutes on one core

Rivals: blocks that leave dropped rows out by hand, as DINOv2's do (`index_add`); timm's DropPath and torchvision's
StochasticDepth, which multiply by masks; and blocks that are skipped as a whole for a batch, as Composer's stochastic
depth and torchtune's layer dropout do, another algorithm: the branches of a block share one fate, for all rows.

Plain training, the rivals and we take turns, step by step. What is counted is the CPU time of the process, of which
another that runs beside it takes none; a low quantile of it, since caches are shared, but for whole blocks, whose steps
differ: of these it is the mean.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import project_paths  # noqa: F401
import tyro
from engine import explained, interruptible


@dataclass
class Args:
    """Options."""

    rates: tuple[float, ...] = (0.1, 0.3, 0.4)
    batch_size: int = 40
    width: int = 192
    depth: int = 4
    rounds: int = 20
    """Steps of each contender; two more warm up."""


if __name__ == "__main__":
    with interruptible():  # and before the imports below, which take seconds
        args = tyro.cli(Args, description=__doc__)


with interruptible():
    import torch
    from timm.layers import DropPath
    from timm.models.vision_transformer import Block, VisionTransformer
    from torch import Tensor, nn
    from torchvision.ops import StochasticDepth

    import rdp


class IndexAddBlock(Block):
    """Both branches run on some of the rows, and are added to these, with the kept rows scaled up."""

    rate = 0.0

    def forward(self, x: Tensor, **_: object) -> Tensor:
        """Tensor[N, tokens, width] -> the same."""
        for norm, branch in ((self.norm1, self.attn), (self.norm2, self.mlp)):
            kept = len(x) - round(self.rate * len(x))
            rows = torch.randperm(len(x), device=x.device)[:kept]
            x = torch.index_add(x, 0, rows, branch(norm(x[rows])), alpha=len(x) / kept)
        return x


class SkippedBlock(Block):
    """The block runs for all rows, or for none."""

    rate = 0.0

    def forward(self, x: Tensor, **_: object) -> Tensor:
        """Tensor[N, tokens, width] -> the same."""
        output: Tensor = super().forward(x) if torch.rand(()) >= self.rate else x
        return output


def build(args: Args, block: type[nn.Module] = Block, drop: nn.Module | None = None) -> nn.Module:
    """Of 65 tokens; `drop` is what blocks call on the outputs of their branches."""
    torch.manual_seed(0)
    heads = args.width // 64
    model = VisionTransformer(64, 8, embed_dim=args.width, depth=args.depth, num_heads=heads, block_fn=block).train()
    for each in model.blocks if drop is not None else ():
        each.drop_path1 = each.drop_path2 = drop
    return model


def rivals(args: Args, rate: float) -> dict[str, nn.Module]:
    """By name, plain training first."""
    IndexAddBlock.rate = SkippedBlock.rate = rate
    return {
        "plain": build(args),
        "index_add": build(args, IndexAddBlock),
        "timm": build(args, drop=DropPath(rate)),
        "torchvision": build(args, drop=StochasticDepth(rate, "row")),
        "whole blocks": build(args, SkippedBlock),
    }


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> float:
    """Seconds of the CPU."""
    begin = time.process_time()
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()
    return time.process_time() - begin


def main(args: Args) -> None:
    """Measure and print."""
    if min(args.batch_size, args.depth, args.rounds) < 1 or args.width < 64 or args.width % 64:
        raise SystemExit("sizes and --rounds are at least 1, and --width a multiple of 64")
    if not all(0 <= rate < 1 for rate in args.rates):
        raise SystemExit("--rates are in [0, 1)")
    x = torch.randn(args.batch_size, 3, 64, 64)
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, CPU, {threads} threads, batch {x.shape[0]}, CPU time over plain\n")
    header: list[str] = []
    for rate in args.rates:
        models = rivals(args, rate)
        optimizers = {name: torch.optim.SGD(model.parameters(), 1e-4) for name, model in models.items()}
        for sampling in ("bernoulli", "fixed"):
            for scale in (False, True):
                name = ("row" if sampling == "bernoulli" else "fixed") + (", scale_by_keep" if scale else "")
                models[name] = build(args)
                handle = rdp.attach(
                    models[name], rate, phases=(rdp.Phase.DROP,), decay="constant", sampling=sampling,
                    scale_by_keep=scale, example_inputs=x[:2],
                )  # fmt: skip
                optimizers[name] = handle.wrap(torch.optim.SGD(models[name].parameters(), 1e-4))
        rounds = [[step(models[name], optimizers[name], x) for name in models] for _ in range(args.rounds + 2)]
        taken = dict(zip(models, zip(*rounds[2:], strict=True), strict=True))
        low = {name: sorted(times)[args.rounds // 4] for name, times in taken.items()}
        low["whole blocks"] = low["plain"] * statistics.fmean(taken["whole blocks"]) / statistics.fmean(taken["plain"])
        if not header:
            header = [name for name in models if name != "plain"]
            print(f"| rate | {' | '.join(header)} |\n|---|{'---:|' * len(header)}")
        print(f"| {rate} | " + " | ".join(f"{low[name] / low['plain']:.2f}" for name in header) + " |", flush=True)


if __name__ == "__main__":
    with explained(less="choose a smaller --batch-size"):
        main(args)
