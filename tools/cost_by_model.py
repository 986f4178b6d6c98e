"""Model by model, the FLOPs of training with Residual DropPath, as a ratio to plain training; nothing is timed.

    python tools/cost_by_model.py                    # the smallest timm model of each family, some minutes
    python tools/cost_by_model.py --only vit swin    # families whose name begins so

Row mode, constant rate 0.1, mean of DROP and FREEZE over some cycles, whole model. A model whose branches run on rows
and hold the share s of its FLOPs costs 1 - 0.35 s. What can run on rows does, however small it is. Models without a
branch that runs on rows are left out: they are dense, for the reason that `print(handle)` gives (BatchNorm, mostly).
"""

from __future__ import annotations

import re
import sys
import warnings
from collections import Counter
from dataclasses import dataclass

import project_paths  # noqa: F401
import tyro
from engine import explained, interruptible


@dataclass
class Args:
    """Options."""

    only: tuple[str, ...] = ()
    """Beginnings of the names of timm families; all, if there are none."""
    batch_size: int = 16
    """Even: two rows are repeated."""
    cycles: int = 8
    rate: float = 0.1


if __name__ == "__main__":
    with interruptible():  # and before the imports below, which take seconds
        args = tyro.cli(Args, description=__doc__)


with interruptible():
    import timm
    import torch
    from engine.progress import tqdm
    from models.semantics import tensors
    from models.zoo import timm_models
    from models.zoo_entry import Entry
    from torch import Tensor, nn
    from torch.utils.flop_counter import FlopCounterMode

    import rdp


def flops(model: nn.Module, inputs: dict[str, Tensor], backward: bool = True) -> int:
    """Of one forward and its backward."""
    with FlopCounterMode(display=False) as counter:
        output = next(t for t in tensors(model(**inputs)) if t.requires_grad)
        if backward:
            output.float().square().mean().backward()
    model.zero_grad()
    return counter.get_total_flops()


def share_on_rows(model: nn.Module, pair: dict[str, Tensor]) -> float:
    """The part of the FLOPs of a forward that branches which run on rows have: half of it goes with one of two rows."""
    options = {"decay": "constant", "sampling": "fixed", "native": "off", "compute": "rows"}
    with rdp.attach(model, 0.5, example_inputs=pair, **options) as handle:
        on_one_row = flops(model, pair, backward=False)
        with handle.paused():
            return 2 - 2 * on_one_row / flops(model, pair, backward=False)


def row(entry: Entry, args: Args) -> str | None:
    """One line of the table; None if no branch runs on rows."""
    torch.manual_seed(0)
    model, pair = entry.build_quick()
    inputs = {name: x.repeat_interleave(args.batch_size // 2, dim=0) for name, x in pair.items()}
    model.train()
    try:
        share = share_on_rows(model, pair)
        handle = rdp.attach(model, args.rate, decay="constant", compute="rows", example_inputs=pair, native="off")
    except rdp.BranchError:
        return None
    on_rows = [branch for branch in handle.branches if branch.compute == "rows"]
    if not on_rows:
        return None
    if entry.on_meta:  # the branches were verified with numbers; shapes are enough to count
        model.to("meta")
        inputs = {name: x.to("meta") for name, x in inputs.items()}
    with handle.paused():
        plain = flops(model, inputs)
    total = 0
    for _ in range(2 * args.cycles):
        total += flops(model, inputs)
        handle.advance()
    reasons = Counter(branch.note.rpartition("dense: ")[2] for branch in handle.branches if branch.compute == "dense")
    reasons.update(f"not gated: {refusal.reason.split(';')[0]}" for refusal in handle.refused)
    why = "; ".join(f"{number}x {re.sub('`[^`]*`', '...', reason)}" for reason, number in reasons.most_common(2))
    ratio, branches = total / (2 * args.cycles) / plain, f"{len(on_rows)}/{len(handle.branches)}"
    return f"| {entry.family} | {entry.name} | {branches} | {share:.2f} | {ratio:.2f} | {why} |"


def main(args: Args) -> None:
    """Measure and print."""
    warnings.simplefilter("ignore")
    if args.batch_size < 2 or args.batch_size % 2 or args.cycles < 1:
        sys.exit("--batch-size must be even and at least 2, --cycles at least 1")
    chosen = [e for e in timm_models() if e.check and (not args.only or e.family.startswith(args.only))]
    if not chosen:
        sys.exit(f"no family of timm begins with {', '.join(args.only)}; see tests/models/zoo.py")
    print(f"torch {torch.__version__}, timm {timm.__version__}, batch {args.batch_size}, rate {args.rate}\n")
    print("| family | model | branches on rows | share of a forward | FLOPs of training | what stays dense, and why |")
    print("|---|---|---:|---:|---:|---|")
    for entry in tqdm(chosen):
        if (line := row(entry, args)) is not None:
            tqdm.write(line)


if __name__ == "__main__":
    with explained(less="choose a smaller --batch-size"):
        main(args)
