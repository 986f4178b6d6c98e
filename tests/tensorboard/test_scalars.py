"""The numbers of training steps: true, comparable between algorithms, and read only where a point is due."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import rdp
from rdp.tensorboard import Image, Panels
from rdp.tensorboard.tags import BY_PHASE, TAGS

Phase = rdp.Phase
PHASES = {"standard": (Phase.PLAIN,), "droppath": (Phase.DROP,), "rdp": (Phase.DROP, Phase.FREEZE)}
PHASES["long"] = (Phase.DROP, Phase.FREEZE, Phase.FREEZE, Phase.PLAIN)


class Residual(nn.Module):
    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        for branch in self.branches:
            x = x + branch(x)
        return x


MODELS = {
    "linear": (lambda: Residual(nn.Linear(4, 4), nn.Linear(4, 4)), (8, 4)),
    "conv": (lambda: Residual(*(nn.Conv2d(2, 2, 3, padding=1) for _ in range(3))), (6, 2, 5, 5)),
    "mlp": (lambda: Residual(*(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.GELU()) for _ in range(2))), (5, 4)),
}


class Kept:
    """A `Log` that keeps everything."""

    def __init__(self) -> None:
        self.numbers: dict[str, dict[int, float]] = defaultdict(dict)
        self.images: dict[str, list[int]] = defaultdict(list)

    def __call__(self, step: int, numbers: Mapping[str, float], images: Mapping[str, Image]) -> None:
        for tag, number in numbers.items():
            assert type(number) is float
            assert step not in self.numbers[tag]
            self.numbers[tag][step] = number
        for tag, image in images.items():
            assert image.dtype == "uint8"
            assert image.shape[2] == 3
            self.images[tag].append(step)


@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("algorithm", PHASES)
@pytest.mark.parametrize("name", MODELS)
def test_points_are_means_over_whole_cycles(
    name: str, algorithm: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(Panels, "draw", lambda self, step: {})  # which is what takes time
    make, shape = MODELS[name]
    model, kept = make(), Kept()
    handle = rdp.attach(model, 0.5, mode=mode, phases=PHASES[algorithm], example_inputs=torch.randn(shape))
    optimizer = handle.wrap(torch.optim.SGD(model.parameters(), lr=0.01))
    cycle, count = len(PHASES[algorithm]), sum(p.numel() for p in model.parameters())
    seen: list[tuple[Phase, float, float, float, float]] = []
    with Panels(handle, torch.randn(4, *shape[1:]), kept, scalars_every=cycle + 1, images_every=10_000) as panels:
        for step in range(5 * cycle):
            loss = model(torch.randn(shape)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
            panels.log(step, loss=loss, lr=0.01)
            before = [p.clone() for p in model.parameters()]
            phase, masks = handle.phase, handle.masks
            optimizer.step()
            moved = sum(p.numel() for p, old in zip(model.parameters(), before, strict=True) if not torch.equal(p, old))
            learns = {Phase.DROP: masks, Phase.FREEZE: ~masks, Phase.PLAIN: torch.ones_like(masks)}[phase].clone()
            learns[[branch.rate == 0 for branch in handle.branches]] = True
            rows, frozen = 100 * learns.float().mean().item(), 100 * (1 - moved / count)
            seen.append((phase, loss.item(), norm.item(), rows, frozen))
    ends = list(kept.numbers["train/loss"])
    assert ends == list(kept.numbers["rdp/rate"]) == [cycle - 1, 3 * cycle - 1, 5 * cycle - 1]
    for start, end in zip([0, *(end + 1 for end in ends)], ends, strict=False):
        for place, tag in enumerate(
            ("train/loss", "train/gradient_norm", "rdp/learning_rows", "rdp/frozen_parameters")
        ):
            # The loss is known in every step, what has to be looked up in those of the last cycle.
            span = seen[start if place == 0 else end - cycle + 1 : end + 1]
            assert kept.numbers[tag][end] == pytest.approx(sum(s[place + 1] for s in span) / len(span), rel=1e-4)
            for phase in Phase:
                values = [s[place + 1] for s in span if s[0] is phase]
                own = f"{phase.name.lower()}/{tag.split('/')[1]}"
                assert (own in kept.numbers) == (phase in PHASES[algorithm] and len(set(PHASES[algorithm])) > 1)
                if own in kept.numbers:
                    assert kept.numbers[own][end] == pytest.approx(sum(values) / len(values), rel=1e-4)
    assert "drop/lr" not in kept.numbers


def test_every_algorithm_has_the_same_tags_but_for_those_by_phase() -> None:
    tags = {}
    for algorithm, phases in PHASES.items():
        model, kept = MODELS["linear"][0](), Kept()
        handle = rdp.attach(model, 0.5, phases=phases, example_inputs=torch.randn(8, 4))
        with Panels(handle, torch.randn(8, 4), kept, scalars_every=1) as panels:
            for step in range(len(phases)):
                model(torch.randn(8, 4)).sum().backward()
                panels.log(step, loss=1.0)
                handle.advance()
            panels.metrics(step, top1=50.0, **{"val/top1": 40})
        tags[algorithm] = {tag for tag in kept.numbers if not tag.startswith(("drop/", "freeze/", "plain/"))}
        assert set(kept.images) == {"features/nodes", "features/similarity", "training/overview"}
    assert len({frozenset(each) for each in tags.values()}) == 1, tags
    assert {"train/loss", "train/gradient_norm", "test/top1", "val/top1"} <= tags["rdp"]


def test_nothing_is_read_or_drawn_between_points(monkeypatch: pytest.MonkeyPatch) -> None:
    model, kept, drawn = MODELS["mlp"][0](), Kept(), []
    monkeypatch.setattr(Panels, "draw", lambda self, step: drawn.append(step))
    handle = rdp.attach(model, 0.5, example_inputs=torch.randn(5, 4))
    unread = torch.zeros((), device="meta")  # of which nobody can read the value
    with Panels(handle, torch.randn(5, 4), kept, scalars_every=6, images_every=8) as panels:

        def step(loss: Tensor) -> None:
            model(torch.randn(5, 4)).sum().backward()
            panels.log(handle.step_count, loss=loss)
            handle.advance()

        for _ in range(2):
            step(torch.ones(()))
        before = dict(kept.numbers["train/loss"])
        assert before == {1: 1.0}
        reads = []
        monkeypatch.setattr(Tensor, "norm", lambda *_: reads.append(1) or torch.ones(()))
        for _ in range(4):
            step(unread)
        assert not reads  # no gradient is looked at either
        assert kept.numbers["train/loss"] == before
        step(unread)
        with pytest.raises((RuntimeError, NotImplementedError)):
            step(unread)  # a point is due
    assert drawn == [0]


def test_the_documents_list_every_tag() -> None:
    text = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
    assert [tag for tag in TAGS if f"`{tag}`" not in text] == []
    assert all(tag in TAGS for tag in BY_PHASE)
