"""The table of docs/models.md for code bases that are not timm, torchvision or transformers.

    pip install diffusers open_clip_torch monai x-transformers vit-pytorch segmentation-models-pytorch ultralytics \\
        torch_geometric rtdl_revisiting_models peft hyper-connections denoising-diffusion-pytorch conformer \\
        openai-whisper
    python tools/elsewhere.py                               # a few minutes; what is not installed is named
    python tools/elsewhere.py --only monai diffusers
    python tools/elsewhere.py --write docs/models.md

elsewhere_models.py holds the models, with the number of branches that each has by reading its code.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Annotated, Any

import project_paths  # noqa: F401
import tyro
from engine import explained, interruptible
from engine.command import later


def main(
    only: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PACKAGE")] = (),
    write: Path | None = None,
) -> None:
    """Attach to small models of other code bases, and make the table.

    Args:
        only: Packages or models to which to confine the run.
        write: Replace the table in this document; by default it is printed.
    """
    known = {name for model in models() for name in (model.package, model.title)}
    if unknown := set(only) - known:
        sys.exit(f"nothing is known as {min(unknown)}: choose among {', '.join(sorted(known))}")
    text = write.read_text() if write is not None else f"{BEGIN}{END}"
    if BEGIN not in text or END not in text:
        sys.exit(f"{write} has no place for the table: it needs the lines {BEGIN!r} and {END!r}")
    if write is not None and only:
        sys.exit(f"--only is a part of the table, and --write would put it in place of the whole in {write}")
    chosen = [model for model in models() if not only or {model.package, model.title} & set(only)]
    missing = sorted({model.package for model in chosen if not _installed(model.package)})
    chosen = [model for model in chosen if model.package not in missing]
    if missing and (write is not None or not chosen):
        sys.exit(f"not all of it is installed; pip install {' '.join(missing)}")
    torch.set_num_threads(1)
    made = "\n".join(table(chosen, missing))
    if write is None:
        print(made)
    else:
        write.write_text(f"{text.partition(BEGIN)[0]}{BEGIN}\n{made}\n{END}{text.partition(END)[2]}")


if __name__ == "__main__":
    with interruptible():  # and before the imports below, which take seconds
        run = tyro.cli(later(main), description=__doc__)

with interruptible():
    import torch
    from elsewhere_models import Inputs, Model, models
    from engine.progress import tqdm
    from torch import Tensor, nn
    from torch.utils import _pytree

    import rdp

BEGIN, END = "<!-- elsewhere: begin -->", "<!-- elsewhere: end -->"
STEPS = 4


@dataclass
class Result:
    """What is found in a model, and whether it trains as promised."""

    found: int = 0
    reasons: tuple[str, ...] = ()
    """Of what is refused."""
    rows: int = 0
    """Branches that can run on rows, with `compute="rows"`."""
    default: int = 0
    """Those that do with "auto", where a batch has enough rows."""
    small: int = 0
    """Of these, too small to gain anything with the rows that there are here."""
    trains: str = ""


def examine(model: Model) -> Result:
    """Attach as a user would, look, and train a few steps."""
    torch.manual_seed(0)
    inputs, result = model.inputs(), Result()
    arguments: dict[str, Any] = {"rate": 0.3, "decay": "constant", "mode": "row" if model.rows else "batch"}
    for compute in ("rows", "auto"):
        torch.manual_seed(0)
        with quiet():
            network = model.build().train()
            named = inspect.signature(network.forward).bind(*inputs[0], **inputs[1]).arguments
            named |= named.pop("kwargs", {})
            example = inputs[0] if "args" in named else named
            try:
                handle = rdp.attach(network, compute=compute, example_inputs=example, **arguments)
            except rdp.BranchError as error:
                return Result(reasons=(str(error).splitlines()[0],), trains="nothing gated, and said so")
            result.found = len(handle.branches)
            result.reasons = tuple(dict.fromkeys(_anonymous(refusal.reason) for refusal in handle.refused))
            if compute == "rows":
                result.rows = sum(branch.compute == "rows" for branch in handle.branches)
            else:
                small = sum("too small" in branch.note for branch in handle.branches)
                result.default = sum(branch.compute == "rows" for branch in handle.branches) + small
                result.small = small
            trained = train(network, handle, inputs)
            result.trains = trained if result.trains in ("", "sound") else result.trains
    return result


def train(network: nn.Module, handle: rdp.ResidualDropPath, inputs: Inputs) -> str:
    """A few steps: what is frozen stays bit-identical, and `check()` has nothing to say."""
    optimizer = handle.wrap(torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.1))
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss(network(*inputs[0], **inputs[1])).backward()
        parameters = dict(network.named_parameters())
        before = {name: parameters[name].detach().clone() for name in handle.frozen}
        optimizer.step()
        if moved := [name for name in before if not torch.equal(parameters[name], before[name])]:
            return f"`{moved[0]}` moved though frozen"
    verdict = str(handle.check()).splitlines()
    return "sound" if verdict[0].startswith("sound") else next(line for line in verdict if line.startswith("PROBLEM"))


def loss(output: Any) -> Tensor:
    """A scalar of all tensors of an output that have a gradient."""
    if hasattr(output, "__dict__") and not isinstance(output, Tensor):
        output = dict(output) if isinstance(output, dict) else vars(output)
    return sum(
        (
            leaf.square().mean()
            for leaf in _pytree.tree_leaves(output)
            if isinstance(leaf, Tensor) and leaf.requires_grad
        ),
        torch.zeros(()),
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Other libraries' warnings and prints are no part of the table."""
    with warnings.catch_warnings(), redirect_stdout(StringIO()):
        warnings.simplefilter("ignore")
        yield


def _anonymous(reason: str) -> str:
    return re.sub(r"`[^`]*`|\['.*?'\]", "...", reason)


def line(model: Model, result: Result) -> str:
    """Of the table."""
    rows = f"{result.rows} ({result.default})" if model.rows else "batch mode"
    return (
        f"| {model.package} | {model.title} | {model.reading} | {model.expected} | {result.found} | {rows} "
        f"| {result.small if model.rows else ''} | {result.trains} | {'; '.join(result.reasons)} |"
    )


def table(chosen: list[Model], missing: list[str]) -> list[str]:
    """All lines, with the packages of which there are none."""
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in dict.fromkeys(m.package for m in chosen)
    )
    head = ["package", "model", "by reading", "expected", "found", "on rows (by default)", "too small here", "trains"]
    lines = [f"| {' | '.join([*head, 'refused'])} |", "|---|---|---|---:|---:|---:|---:|---|---|"]
    found = expected = rows = default = small = 0
    for model in (bar := tqdm(chosen)):
        bar.set_description(model.title)
        try:
            result = examine(model)
        except Exception as error:
            result = Result(trains=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        lines.append(line(model, result))
        found, expected, small = found + result.found, expected + model.expected, small + result.small
        rows, default = rows + result.rows, default + result.default
    in_rows = f"{rows} can run on rows, {default} do by default ({small} of them are too small to gain at these sizes)"
    lines += ["", f"{found} branches are gated, {expected} were expected; {in_rows}.", "", f"{versions}."]
    if missing:
        lines += ["", f"Not installed, and left out: {', '.join(missing)}."]
    return lines


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    with explained():
        run()
