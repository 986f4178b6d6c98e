"""The peak of what autograd keeps for the backward, by phase, as a ratio to plain training: nothing is timed.

    python tools/benchmark_memory.py                           # a minute on one core
    python tools/benchmark_memory.py --models vit_small_patch16_224 --batch-size 64 --resolution 224

A batch fits if the largest peak does, so that is what is shown for DROP and for FREEZE, not their mean. Parameters,
which are kept anyway, are not counted; what several operations keep is counted once.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import project_paths  # noqa: F401
import tyro
from engine import explained, interruptible
from engine.start import lacks_memory


@dataclass
class Args:
    """Options."""

    models: tuple[str, ...] = ("vit_tiny_patch16_224", "convnext_atto", "swin_tiny_patch4_window7_224", "resnet18")
    """Of timm."""
    batch_size: int = 40
    resolution: int = 64
    rate: float = 0.1
    """The same for all branches."""
    cycles: int = 3
    """Of DROP and FREEZE, each with other masks."""


if __name__ == "__main__":
    with interruptible():  # and before the imports below, which take seconds
        args = tyro.cli(Args, description=__doc__)


with interruptible():
    import timm
    import torch
    from benchmark import SavedBytes
    from torch import Tensor, nn

    import rdp

WAYS: dict[str, dict[str, Any]] = {
    "row": {},
    'row, sampling="fixed"': {"sampling": "fixed"},
    'row, compute="dense"': {"compute": "dense"},
    "batch": {"mode": "batch"},
}


def build(name: str, args: Args) -> nn.Module:
    """The model in training mode."""
    torch.manual_seed(0)
    sized = {"img_size": args.resolution} if name.startswith(("vit", "deit", "swin")) else {}
    return timm.create_model(name, num_classes=10, drop_path_rate=0.0, **sized).train()


def peak(model: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps at most, in a forward and its backward."""
    saved = SavedBytes(model)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda pair: pair[0]):
        model(x).square().mean().backward()
    model.zero_grad()
    return saved.peak


def main(args: Args) -> None:
    """Measure and print."""
    warnings.simplefilter("ignore")
    if min(args.batch_size, args.resolution, args.cycles) < 1:
        raise SystemExit("--batch-size, --resolution and --cycles must be at least 1")
    if not 0 <= args.rate < 1:
        raise SystemExit(f"--rate must be at least 0 and below 1, not {args.rate}")
    if unknown := [name for name in args.models if not timm.is_model(name)]:
        raise SystemExit(f"timm has no model {', '.join(unknown)}")
    print(
        f"torch {torch.__version__}, timm {timm.__version__}, batch {args.batch_size}, {args.resolution} pixels, ",
        end="",
    )
    print(f"rate {args.rate} constant; largest peak over that of plain training\n")
    print("| model | plain, MB | contender | branches on rows | DROP | FREEZE |")
    print("|---|---:|---|---:|---:|---:|")
    x = torch.randn(args.batch_size, 3, args.resolution, args.resolution)
    for name in args.models:
        try:
            plain = peak(build(name, args), x)
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            if lacks_memory(error):
                raise
            cause = str(error).splitlines()[0]
            raise SystemExit(f"{name} cannot take images of {args.resolution} pixels: {cause}") from error
        for way, options in WAYS.items():
            model = build(name, args)
            handle = rdp.attach(model, args.rate, decay="constant", seed=1, example_inputs=x[:2], **options)
            peaks: dict[str, float] = {}
            for _ in range(2 * args.cycles):
                phase = handle.phase.name
                peaks[phase] = max(peaks.get(phase, 0.0), peak(model, x) / plain)
                handle.advance()
            on_rows = sum(branch.compute == "rows" for branch in handle.branches)
            shown = f"{on_rows}/{len(handle.branches)} | {peaks['DROP']:.2f} | {peaks['FREEZE']:.2f}"
            print(f"| {name} | {plain / 1e6:.1f} | {way} | {shown} |", flush=True)


if __name__ == "__main__":
    with explained(less="choose fewer or smaller --models, or a smaller --batch-size"):
        main(args)
