"""What a training step with Residual DropPath costs, as ratios to a plain step of the same model in the same run.

    python tools/benchmark.py                                  # on a CPU core, about an hour
    python tools/benchmark.py --models resnet50 vit_small_patch16_224 --batch-size 128 --device cuda --dtype bfloat16
    python tools/benchmark.py --compiled whole --contenders row-fixed --models vit_tiny_patch16_224 --batch-size 20
    python tools/benchmark.py --compiled blocks --contenders batch row-fixed --models vit_tiny_patch16_224
    python tools/benchmark.py --rounds 0 --batch-size 40 --resolution 64       # FLOPs and memory alone, nothing timed

Each contender takes turns with a plain model that is compiled in the same way, if at all; so a machine whose speed
drifts is fair to all. FLOPs are counted by torch.utils.flop_counter, of compiled models in their graphs. A peak is the
most that autograd keeps for the backward, parameters aside: a batch fits if the largest one does.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

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
    from benchmark_contenders import Contender, applies, build, inputs_of, make
    from benchmark_counts import CountingBackend, count_flops, count_peak
    from engine.progress import tqdm
    from engine.start import lacks_memory
    from torch import Tensor
    from torch._dynamo.utils import counters


@dataclass
class Row:
    """One line of the table: by phase, ratios to a plain step."""

    model: str
    contender: str
    rate: float
    on_rows: str
    times: dict[str, list[float]] = field(default_factory=dict)
    flops: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, float] = field(default_factory=dict)
    graphs: int = 0

    @property
    def time(self) -> tuple[float, float]:
        """Mean over phases, and its standard error."""
        variances = [statistics.variance(ratios) / len(ratios) for ratios in self.times.values() if len(ratios) > 1]
        return (
            statistics.mean(statistics.mean(ratios) for ratios in self.times.values()),
            math.sqrt(sum(variances)) / len(self.times) if variances else math.nan,
        )


def compile_parts(contender: Contender, args: Args, **how: object) -> None:
    """Compile what the options ask for."""
    for part in {"no": [], "whole": [contender.model], "blocks": contender.blocks}[args.compiled]:
        part.compile(**how)


def step(contender: Contender, x: Tensor, args: Args) -> None:
    """One optimizer step."""
    dtype = getattr(torch, args.dtype)
    with torch.autocast(args.device, dtype=dtype, enabled=dtype is not torch.float32):
        loss = contender.model(x).float().square().mean()
    contender.optimizer.zero_grad()
    loss.backward()
    contender.optimizer.step()


def seconds(run: Callable[[], None], device: str) -> float:
    """How long `run` takes, with the work on the device finished.

    On one thread that is the CPU time of this process, of which others that run beside it take none.
    """
    alone = device == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    if device == "cuda":
        torch.cuda.synchronize()
    begin = clock()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - begin


def take_times(row: Row, plain: Contender, ours: Contender, x: Tensor, args: Args) -> None:
    """Time steps in turns, each over the mean of the plain ones before and after it."""
    for contender in (plain, ours):
        compile_parts(contender, args, mode=args.compile_mode)
    warm_up = 1 if args.compiled == "no" else args.cycles  # by then graphs have been made for all that happens
    before = seconds(lambda: step(plain, x, args), args.device)
    for number in tqdm(range(warm_up + args.rounds), desc=f"{row.model}, {row.contender}", leave=False):
        for phase in ours.phases:
            now, after = (seconds(lambda c=c: step(c, x, args), args.device) for c in (ours, plain))  # type: ignore[misc]
            if number >= warm_up:
                row.times.setdefault(phase, []).append(2 * now / (before + after))
            before = after


def count(row: Row, plain: Contender, ours: Contender, x: Tensor, args: Args) -> None:
    """FLOPs in the mean, and the largest peaks."""
    flops = count_flops(lambda: step(plain, x, args))
    peak = count_peak(plain.model, lambda: step(plain, x, args))
    for phase, counted in by_phase(ours, args, lambda: count_flops(lambda: step(ours, x, args))).items():
        row.flops[phase] = statistics.mean(counted) / flops
    for phase, counted in by_phase(ours, args, lambda: count_peak(ours.model, lambda: step(ours, x, args))).items():
        row.peaks[phase] = max(counted) / peak


def count_in_graphs(row: Row, plain: Contender, ours: Contender, x: Tensor, args: Args) -> None:
    """FLOPs in the mean, and how many graphs were made."""
    counting = CountingBackend()
    for contender in (plain, ours):
        compile_parts(contender, args, backend=counting)

    def flops(contender: Contender) -> int:
        counting.flops = 0
        step(contender, x, args)
        return counting.flops

    counters.clear()
    base, graphs = flops(plain), counters["stats"]["unique_graphs"]
    for phase, steps in by_phase(ours, args, lambda: flops(ours)).items():
        row.flops[phase] = statistics.mean(steps) / base
    row.graphs = counters["stats"]["unique_graphs"] - graphs


def by_phase(ours: Contender, args: Args, measured: Callable[[], int]) -> dict[str, list[int]]:
    """What some cycles of steps give."""
    found: dict[str, list[int]] = {phase: [] for phase in ours.phases}
    for phase in ours.phases * args.cycles:
        found[phase].append(measured())
    return found


def try_out(name: str, x: Tensor, args: Args) -> None:
    """See that the model takes images of this size."""
    try:
        with torch.no_grad():
            build(name, args)(x[:2])
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        if lacks_memory(error):
            raise
        cause = str(error).splitlines()[0]
        raise SystemExit(f"{name} cannot take images of {args.resolution} pixels: {cause}") from error


def measure(name: str, args: Args, left_out: list[str]) -> Iterator[Row]:
    """All contenders on one model, at all rates; those that there is nothing to measure of are named in `left_out`."""
    x, seen = inputs_of(name, args), set()
    try_out(name, x, args)
    for rate, way in itertools.product(args.rates, args.contenders):
        if not applies(name, way, args):
            left_out.append(f"{name}, {way}: it is for timm's VisionTransformer")
            continue
        ours = make(name, way, rate, args, x)
        if (rate, ours.does) in seen:
            left_out.append(f"{name}, {way}: it runs as one above does")
            continue
        seen.add((rate, ours.does))
        on_rows = f"{ours.computes.count('rows')}/{len(ours.computes)}" if ours.computes else ""
        row = Row(name, way, rate, on_rows)
        for take in (*([take_times] if args.rounds else []), count if args.compiled == "no" else count_in_graphs):
            torch._dynamo.reset()  # or graphs for one contender would count for the next
            take(row, make(name, "plain", rate, args, x), make(name, way, rate, args, x), x, args)
        yield row


def table(rows: list[Row], args: Args) -> str:
    """The rows as Markdown, without columns of what was not measured."""
    header = {"model": "---", "contender": "---", "rate": "---:", "on rows": "---:"}
    if args.rounds:
        header |= {"time": "---:", "**mean**": "---:", "±": "---:"}
    header |= {"FLOPs": "---:", "mean": "---:"}
    header |= {"peak": "---:"} if args.compiled == "no" else {"graphs": "---:"}
    lines = [f"| {' | '.join(header)} |", f"|{'|'.join(header.values())}|"]
    for row in rows:
        cells = [row.model, row.contender, str(row.rate), row.on_rows]
        if args.rounds:
            mean, error = row.time
            times = {phase: statistics.mean(ratios) for phase, ratios in row.times.items()}
            cells += [in_phases(times), f"**{mean:.2f}**", f"{error:.2f}"]
        cells += [in_phases(row.flops), f"{statistics.mean(row.flops.values()):.2f}"]
        cells += [in_phases(row.peaks)] if args.compiled == "no" else [str(row.graphs)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def in_phases(figures: dict[str, float]) -> str:
    """In DROP and in FREEZE, or in all steps."""
    return " / ".join(f"{figure:.2f}" for figure in figures.values())


def checked(args: Args) -> Args:
    """The options, with the device that "auto" takes.

    Raises:
        SystemExit: If one makes no sense; it is said before anything is measured.
    """
    if not (args.models and args.contenders and args.rates):
        raise SystemExit("--models, --contenders and --rates name at least one each")
    if unknown := [name for name in args.models if name != "mlp" and not timm.is_model(name)]:
        raise SystemExit(f"timm has no model {unknown[0]!r}; mlp is a residual MLP")
    if min(args.batch_size, args.resolution, args.cycles) < 1 or args.rounds < 0:
        raise SystemExit("sizes and --cycles are at least 1, --rounds at least 0")
    if not all(0 <= rate < 1 for rate in args.rates):
        raise SystemExit("--rates are in [0, 1)")
    found: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"
    return replace(args, device=found) if args.device == "auto" else args


def main(args: Args) -> None:
    """Measure, print, and write."""
    args = checked(args)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what runs dense, and why: the table says it
        rows: list[Row] = []
        left_out: list[str] = []
        for name in args.models:
            for row in measure(name, args, left_out):
                rows.append(row)
                if args.json_file is not None:
                    args.json_file.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    compiled = "" if args.compiled == "no" else f", compiled: {args.compiled}"
    print(f"torch {torch.__version__}, timm {timm.__version__}, {where}, batch {args.batch_size}, ", end="")
    print(f"{args.resolution} pixels, {args.dtype}, {args.decay} rate{compiled}\n")
    print(table(rows, args))
    if left_out:
        print("\nLeft out:", *dict.fromkeys(left_out), sep="\n- ")


if __name__ == "__main__":
    with explained(less="choose fewer or smaller --models, or a smaller --batch-size"):
        main(args)
