"""DropPath alone (`phases=(Phase.DROP,)`) beside blocks that leave dropped rows out by hand, as DINOv2's do.

    OMP_NUM_THREADS=1 python tools/benchmark_drop_path.py      # some minutes on one core

Plain training, the rival and we take turns, step by step, on the same ViT with the same number of dropped rows. What is
counted is the CPU time of the process, of which another that runs beside it takes none; a low quantile of it, since
caches are shared.
"""

from __future__ import annotations

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
    from timm.models.vision_transformer import Block, VisionTransformer
    from torch import Tensor, nn

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


def build(args: Args, block: type[nn.Module] = Block) -> nn.Module:
    """Of 65 tokens."""
    torch.manual_seed(0)
    heads = args.width // 64
    return VisionTransformer(64, 8, embed_dim=args.width, depth=args.depth, num_heads=heads, block_fn=block).train()


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
    print(
        "| rate | index_add | row | row, scale_by_keep | fixed | fixed, scale_by_keep |\n|---|---:|---:|---:|---:|---:|"
    )
    for rate in args.rates:
        models = [build(args), build(args, IndexAddBlock)]
        IndexAddBlock.rate = rate
        optimizers = [torch.optim.SGD(model.parameters(), 1e-4) for model in models]
        for sampling in ("bernoulli", "fixed"):
            for scale in (False, True):
                models.append(build(args))
                handle = rdp.attach(
                    models[-1], rate, phases=(rdp.Phase.DROP,), decay="constant", sampling=sampling,
                    scale_by_keep=scale, example_inputs=x[:2],
                )  # fmt: skip
                optimizers.append(handle.wrap(torch.optim.SGD(models[-1].parameters(), 1e-4)))
        rounds = [[step(*pair, x) for pair in zip(models, optimizers, strict=True)] for _ in range(args.rounds + 2)]
        plain, *others = (sorted(times)[args.rounds // 4] for times in zip(*rounds[2:], strict=True))
        print(f"| {rate} | " + " | ".join(f"{other / plain:.2f}" for other in others) + " |", flush=True)


if __name__ == "__main__":
    with explained(less="choose a smaller --batch-size"):
        main(args)
