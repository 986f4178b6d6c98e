"""How long `attach` takes on large models, beside a forward of one row.

    OMP_NUM_THREADS=1 python tools/benchmark_attach.py
    python tools/benchmark_attach.py --models vit_giant_patch14_224 convnext_xxlarge

Needs the memory for the parameters (4 bytes each), and little more: *extra* is by how much the peak of the process grew
while `attach(verify=False)` ran, an image more or less. *Proved* is the time with the proof, where `attach` makes one.
"""

from __future__ import annotations

import resource
import sys
import time
import warnings
from dataclasses import dataclass

import project_paths  # noqa: F401
import tyro
from engine import explained, interruptible


@dataclass
class Args:
    """Options."""

    models: tuple[str, ...] = (
        "vit_base_patch16_224",
        "vit_huge_patch14_224",
        "vit_gigantic_patch14_clip_224",
        "convnext_base",
        "convnext_xxlarge",
        "convnextv2_huge",
    )
    """timm models."""
    batch_size: int = 64
    """Of the example inputs, of which `attach` uses two rows."""


if __name__ == "__main__":
    with interruptible():  # and before the imports below, which take seconds
        args = tyro.cli(Args, description=__doc__)


with interruptible():
    import timm
    import torch
    from engine.progress import tqdm
    from torch import Tensor, nn

    import rdp


def build(name: str) -> nn.Module:
    """The model with some numbers in it; timm's own initialisation takes minutes for the largest."""
    with torch.device("meta"):
        model = timm.create_model(name)
    model = model.to_empty(device="cpu").train()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    for buffer in model.buffers():
        buffer.fill_(1)
    return model


def peak_megabytes() -> float:
    """The most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def forward_seconds(model: nn.Module, row: Tensor) -> float:
    """Of a plain forward in eval mode."""
    model.eval()
    with torch.no_grad():
        begin = time.perf_counter()
        model(row)
        seconds = time.perf_counter() - begin
    model.train()
    return seconds


def row(name: str, args: Args) -> str:
    """One line of the table."""
    model = build(name)
    images = torch.randn(args.batch_size, *model.default_cfg["input_size"])
    before, begin = peak_megabytes(), time.perf_counter()
    handle = rdp.attach(model, 0.1, decay="constant", example_inputs=images, native="off", verify=False)
    seconds, extra = time.perf_counter() - begin, peak_megabytes() - before
    on_rows = [branch.compute for branch in handle.branches].count("rows")
    handle.remove()
    begin = time.perf_counter()
    with rdp.attach(model, 0.1, decay="constant", example_inputs=images, native="off") as handle:
        proved = "no: too large" if "not proved" in str(handle) else f"{time.perf_counter() - begin:.1f}"
    plain = forward_seconds(model, images[:1])
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    return (
        f"| {name} | {millions:,.0f} | {on_rows}/{len(handle.branches)} | {seconds:.1f} | {seconds / plain:.1f} "
        f"| {proved} | {extra:.0f} |"
    )


def main(args: Args) -> None:
    """Measure and print."""
    unknown = [name for name in args.models if not timm.is_model(name)]
    if unknown:
        sys.exit(f"timm {timm.__version__} has no model {', '.join(map(repr, unknown))}; see timm.list_models()")
    if args.batch_size < 1:
        sys.exit(f"--batch-size must be at least 1; got {args.batch_size}")
    warnings.simplefilter("ignore", rdp.RdpWarning)
    print(f"torch {torch.__version__}, timm {timm.__version__}, {torch.get_num_threads()} threads\n")
    print("| model | parameters, millions | branches on rows | seconds | forwards of a row | proved | extra MB |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name in tqdm(args.models):
        tqdm.write(row(name, args))


if __name__ == "__main__":
    with explained(less="choose fewer or smaller --models, or a smaller --batch-size"):
        main(args)
