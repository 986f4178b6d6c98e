"""What a training step with Residual DropPath costs, as ratios to a plain step of the same model in the same run.

    python tools/benchmark.py                                  # on two CPU cores, about half an hour
    python tools/benchmark.py --models resnet50 vit_small_patch16_224 --batch-size 128 --device cuda --dtype bfloat16

Every round times one plain step and one step of each contender, so that a machine whose speed drifts is fair to all;
FLOPs are counted by torch.utils.flop_counter, and activation memory is the peak of what autograd saves for
the backward.
"""

from __future__ import annotations

import json
import statistics
import time
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Literal, TypeVar

import project_paths  # noqa: F401
import tyro
from benchmark_options import Args
from engine import explained, interruptible

if __name__ == "__main__":
    with interruptible():  # and before the imports below, which take seconds
        args = tyro.cli(Args, description=__doc__)


with interruptible():
    import timm
    import torch
    from engine.progress import tqdm
    from torch import Tensor, nn
    from torch.utils.flop_counter import FlopCounterMode
    from torchvision.ops import stochastic_depth

    import rdp


Options = TypeVar("Options", bound=Args)


@dataclass
class Row:
    """One line of the table; all figures are ratios to the plain step."""

    model: str
    contender: str
    phase: str
    time: float
    spread: float
    flops: float
    memory: float


@dataclass
class Contender:
    """A model in training, and the phases that its steps go through."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    phases: tuple[str, ...]


class ResidualMLP(nn.Module):
    """`x + f(x)`, 32 times, each with a LayerNorm."""

    def __init__(self, width: int = 512, depth: int = 32) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Tensor[N, width] -> Tensor[N, width]."""
        for block in self.blocks:
            x = x + block(x)
        return x


def build(name: str, args: Args, drop_path_rate: float = 0.0) -> nn.Module:
    """The model in training mode."""
    torch.manual_seed(0)
    if name == "mlp":
        model: nn.Module = ResidualMLP()
    else:
        model = timm.create_model(name, num_classes=100, drop_path_rate=drop_path_rate)
    model = model.to(args.device).train()
    return model.to(memory_format=torch.channels_last) if args.channels_last else model


def inputs_of(name: str, args: Args) -> Tensor:
    """A batch of noise."""
    if name == "mlp":
        return torch.randn(args.batch_size * 32, 512, device=args.device)
    x = torch.randn(args.batch_size, 3, args.resolution, args.resolution, device=args.device)
    return x.to(memory_format=torch.channels_last) if args.channels_last else x


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """The same optimizer for all."""
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)


def with_rdp(name: str, args: Args, x: Tensor, mode: str, compute: str) -> Contender:
    """A model that trains with Residual DropPath."""
    model = build(name, args)
    handle = rdp.attach(model, args.rate, mode=mode, decay=args.decay, compute=compute, example_inputs=x, seed=1)
    on_rows = sum(branch.compute == "rows" for branch in handle.branches)
    label = f"rdp {mode}" + ("" if mode == "batch" else f", {on_rows}/{len(handle.branches)} branches on rows")
    return Contender(label, model, handle.wrap(sgd(model)), ("DROP", "FREEZE"))


def rivals(name: str, args: Args, x: Tensor) -> list[Contender]:
    """Other ways to drop paths, on the same branches."""
    found = []
    if name != "mlp":
        model = build(name, args, drop_path_rate=args.rate)
        found.append(Contender("timm DropPath (linear)", model, sgd(model), ("train",)))
    for label, gate in (
        ("StochasticDepth", lambda z: stochastic_depth(z, args.rate, "row")),
        ("multiply by a mask", lambda z: z * _mask(z, args.rate)),
    ):
        model = build(name, args)
        with rdp.attach(model, args.rate, decay="constant", example_inputs=x) as handle:
            ends = [branch.name for branch in handle.branches]
        for end in ends:
            model.get_submodule(end).register_forward_hook(lambda module, inputs, output, gate=gate: gate(output))
        found.append(Contender(label, model, sgd(model), ("train",)))
    return found


def _mask(z: Tensor, rate: float) -> Tensor:
    return (torch.rand([len(z)] + [1] * (z.dim() - 1), device=z.device) >= rate).to(z.dtype)


def step(contender: Contender, x: Tensor, args: Args) -> None:
    """One optimizer step."""
    dtype = getattr(torch, args.dtype)
    with torch.autocast(args.device, dtype=dtype, enabled=dtype is not torch.float32):
        loss = contender.model(x).float().square().mean()
    contender.optimizer.zero_grad()
    loss.backward()
    contender.optimizer.step()


def seconds(run: Callable[[], None], device: str) -> float:
    """Wall-clock time of `run`, with the work on the device finished."""
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


class SavedBytes:
    """The peak of what autograd keeps for the backward, parameters aside; used as a pair of saved-tensor hooks."""

    def __init__(self, model: nn.Module) -> None:
        self.weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.holders: Counter[int] = Counter()
        self.now = self.peak = 0

    def pack(self, tensor: Tensor) -> tuple[Tensor, object]:
        """Count a tensor until autograd lets go of it."""
        storage, ticket = tensor.untyped_storage(), _Ticket()
        key, size = storage.data_ptr(), storage.nbytes()
        if key not in self.weights:
            self.now += size if not self.holders[key] else 0
            self.holders[key] += 1
            self.peak = max(self.peak, self.now)
            weakref.finalize(ticket, self._release, key, size)
        return tensor.detach(), ticket  # an output that is kept by its own node would keep that node alive

    def _release(self, key: int, size: int) -> None:
        self.holders[key] -= 1
        self.now -= size if not self.holders[key] else 0


class _Ticket:
    """Lives as long as a saved tensor."""


def flops_and_memory(contender: Contender, x: Tensor, args: Args, steps: int) -> list[tuple[float, float]]:
    """Per phase, the mean FLOPs of a step and the mean peak of the bytes that autograd saves for its backward."""
    sums = {phase: [0.0, 0.0] for phase in contender.phases}
    for i in range(steps):
        saved, counter = SavedBytes(contender.model), FlopCounterMode(display=False)
        with counter, torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda pair: pair[0]):
            step(contender, x, args)
        total = sums[contender.phases[i % len(contender.phases)]]
        total[0] += counter.get_total_flops()
        total[1] += saved.peak
    share = steps / len(contender.phases)
    return [(flops / share, memory / share) for flops, memory in sums.values()]


def measure(name: str, args: Args) -> list[Row]:
    """All contenders on one model."""
    x = inputs_of(name, args)
    plain_model = build(name, args)
    plain = Contender("plain", plain_model, sgd(plain_model), ("train",))
    contenders = [with_rdp(name, args, x, "row", "auto"), with_rdp(name, args, x, "batch", "auto")]
    # Where nothing runs on rows by default, because of BatchNorm, show what the option does; else what dense costs.
    other = "ghost" if " 0/" in contenders[0].name else "dense"
    for mode in ("row", "batch") if other == "ghost" else ("row",):
        contenders.append(with_rdp(name, args, x, mode, other))
        contenders[-1].name = f"rdp {mode}, compute='{other}'"
    contenders += rivals(name, args, x) if args.rivals else []
    ratios: dict[tuple[str, str], list[float]] = {}
    for round_number in tqdm(range(args.rounds + 1 if args.rounds else 0), desc=name, leave=False):
        base = seconds(lambda: step(plain, x, args), args.device)
        for contender in contenders:
            for phase in contender.phases:
                taken = seconds(lambda c=contender: step(c, x, args), args.device)  # type: ignore[misc]
                base_again = seconds(lambda: step(plain, x, args), args.device)
                if round_number:
                    ratios.setdefault((contender.name, phase), []).append(2 * taken / (base + base_again))
                base = base_again
    (base_flops, base_memory), *_ = flops_and_memory(plain, x, args, 1)
    rows = []
    for contender in contenders:
        steps = args.cycles * len(contender.phases) if len(contender.phases) > 1 else 1
        costs = flops_and_memory(contender, x, args, steps)
        own = []
        for phase, (flops, memory) in zip(contender.phases, costs, strict=True):
            times = ratios.get((contender.name, phase), [float("nan")])
            spread = (max(times) - min(times)) / 2
            median = statistics.median(times)
            own.append(Row(name, contender.name, phase, median, spread, flops / base_flops, memory / base_memory))
        if len(own) > 1:
            mean = [statistics.mean(getattr(r, key) for r in own) for key in ("time", "spread", "flops", "memory")]
            own.append(Row(name, contender.name, "mean", *mean))
        rows += own
    return rows


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    lines = [
        "| model | contender | phase | time | +- | FLOPs | saved activations |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for r in rows:
        figures = f"{r.time:.2f} | {r.spread:.2f} | {r.flops:.2f} | {r.memory:.2f}"
        lines.append(f"| {r.model} | {r.contender} | {r.phase} | {figures} |")
    return "\n".join(lines)


def checked(args: Options) -> Options:
    """The options, with the device that "auto" takes.

    Raises:
        SystemExit: If one makes no sense; it is said before anything is measured.
    """
    if unknown := [name for name in args.models if name != "mlp" and not timm.is_model(name)]:
        raise SystemExit(f"timm has no model {unknown[0]!r}; mlp is a residual MLP")
    if min(args.batch_size, args.resolution, args.cycles) < 1 or args.rounds < 0 or not 0 <= args.rate < 1:
        raise SystemExit("sizes and --cycles are at least 1, --rounds at least 0, and --rate in [0, 1)")
    found: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"
    return replace(args, device=found) if args.device == "auto" else args


def main(args: Args) -> None:
    """Measure, print, and write."""
    rows: list[Row] = []
    args = checked(args)
    for name in args.models:
        rows += measure(name, args)
        if args.json_file is not None:
            args.json_file.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {where}, batch {args.batch_size}, {args.dtype}, rate {args.rate} {args.decay}\n")
    print(table(rows))


if __name__ == "__main__":
    with explained(less="choose fewer or smaller --models, or a smaller --batch-size"):
        main(args)
