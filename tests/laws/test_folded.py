"""Views, frames and windows folded into the batch are masked by sample, in whatever order a sample's entries stand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import rdp
from laws.training import loss

WIDTH, FRAMES = 4, 3


class Folding(nn.Module):
    """Three residual branches on entries that are folded into the batch; `sample` tells whose an entry is."""

    row_shape: tuple[int, ...] = (FRAMES, WIDTH)
    masks: Tensor | None = None
    phase = "PLAIN"

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)
        self.fs = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(3))

    def fold(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def sample(self, rows: int) -> Tensor:
        return self.fold(torch.arange(rows).view(-1, 1, 1).expand(rows, *self.row_shape).double())[:, 0].long()

    def forward(self, x: Tensor) -> Tensor:
        rows, h = x.shape[0], self.stem(self.fold(x))
        for number, f in enumerate(self.fs):
            if self.masks is None:
                h = h + f(h)
                continue
            m, branch = self.masks[number][self.sample(rows)].to(h.dtype)[:, None], f(h)
            h = h + m * branch if self.phase == "DROP" else h + m * branch.detach() + (1 - m) * branch
        return self.head(h)


class Views(Folding):
    """SimSiam: two views of each sample, one after the other."""

    def fold(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, 0], x[:, 1]])


class FramesInside(Folding):
    """Video, `b t -> (b t)`."""

    def fold(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1)


class FramesOutside(Folding):
    """Video, `b t -> (t b)`."""

    def fold(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1).flatten(0, 1)


class ViewsOfFrames(Folding):
    """Two views, each of frames that stand side by side: `(view sample frame)`."""

    def fold(self, x: Tensor) -> Tensor:
        return torch.cat([x.flatten(0, 1), x.flip(1).flatten(0, 1)])


FOLDINGS = [Views, FramesInside, FramesOutside, ViewsOfFrames]


def test_the_orders_are_what_they_are_called() -> None:
    assert Views().sample(3).tolist() == [0, 1, 2] * 2
    assert FramesInside().sample(2).tolist() == [0, 0, 0, 1, 1, 1]
    assert FramesOutside().sample(2).tolist() == [0, 1] * 3
    assert ViewsOfFrames().sample(2).tolist() == [0, 0, 0, 1, 1, 1] * 2


@pytest.mark.parametrize("example", [torch.zeros, torch.randn], ids=["zeros", "randn"])
@pytest.mark.parametrize("compute", ["auto", "dense"])
@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("folding", FOLDINGS, ids=lambda folding: folding.__name__)
def test_masks_are_by_sample(folding: type[Folding], mode: str, compute: str, example) -> None:
    torch.manual_seed(0)
    model = folding().double()
    settings = {"mode": mode, "compute": compute, "decay": "constant", "seed": 2}
    inputs = example(3, FRAMES, WIDTH, dtype=torch.float64)
    with rdp.attach(model, 0.5, example_inputs=inputs, **settings) as handle:
        assert len(handle.branches) == 3
        for step in range(8):
            x = torch.randn(5 - step % 2, FRAMES, WIDTH, dtype=torch.float64)
            oracle = copy.deepcopy(model)
            model.zero_grad()
            oracle.zero_grad()
            output = model(x)
            loss(output).backward()
            oracle.masks, oracle.phase = handle.masks, handle.phase.name
            expected = oracle(x)
            loss(expected).backward()
            torch.testing.assert_close(output, expected)
            for (name, p), q in zip(model.named_parameters(), oracle.parameters(), strict=True):
                for gradient, wanted in [(p.grad, q.grad)]:
                    ours = torch.zeros_like(p) if gradient is None else gradient
                    by_hand = torch.zeros_like(q) if wanted is None else wanted
                    torch.testing.assert_close(ours, by_hand, msg=lambda m, n=name: f"{n}: {m}")
            handle.advance()


def test_another_number_of_frames_is_followed_where_that_is_clear() -> None:
    torch.manual_seed(0)
    for folding in (FramesInside, FramesOutside):
        model = folding().double()
        with rdp.attach(model, 0.5, decay="constant", example_inputs=torch.randn(3, FRAMES, WIDTH).double()) as handle:
            model.row_shape = (5, WIDTH)
            x = torch.randn(4, 5, WIDTH, dtype=torch.float64)
            oracle, output = copy.deepcopy(model), model(x)
            oracle.masks, oracle.phase = handle.masks, "DROP"
            torch.testing.assert_close(output, oracle(x))
    model = ViewsOfFrames().double()
    rdp.attach(model, 0.5, decay="constant", example_inputs=torch.randn(3, FRAMES, WIDTH).double())
    with pytest.raises(rdp.ForwardError, match="axis 0 should hold the 4 rows"):
        model(torch.randn(4, 5, WIDTH, dtype=torch.float64))


def test_an_order_that_is_not_known_is_refused_by_row() -> None:
    class Shuffled(Folding):
        def fold(self, x: Tensor) -> Tensor:
            flat = x.flatten(0, 1)
            return flat.roll(1, 0)

    model, x = Shuffled().double(), torch.randn(3, FRAMES, WIDTH, dtype=torch.float64)
    with pytest.raises(rdp.BranchError, match="several entries for each row, in an order that is not known"):
        rdp.attach(model, 0.5, example_inputs=x)
    assert len(rdp.attach(model, 0.5, mode="batch", example_inputs=x).branches) == 3


def test_branches_whose_samples_stand_apart_run_dense_and_say_so() -> None:
    x = torch.randn(3, FRAMES, WIDTH)
    by_folding = {f: rdp.attach(f(), 0.5, decay="constant", example_inputs=x).branches for f in FOLDINGS}
    apart = "dense: the entries of a row do not stand side by side"
    assert {f: {(b.compute, b.note) for b in branches} for f, branches in by_folding.items()} == {
        Views: {("dense", apart)},
        FramesInside: {("rows", "")},
        FramesOutside: {("dense", apart)},
        ViewsOfFrames: {("dense", apart)},
    }
