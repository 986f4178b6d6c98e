"""The handle that `rdp.attach` returns: sequences of phases, timm's DropPath as one of them, pausing and removing."""

from __future__ import annotations

import warnings

import pytest
import timm.layers
import torch
from laws.architectures import BlockMLP, ParallelBlock
from laws.strategies import Case
from laws.training import anatomy, identical, loss
from torch import Tensor, nn

import rdp
from rdp import Phase

CASE = Case(BlockMLP, (("plain", "norm", "plain"),), rate=0.6, decay="constant", seed=2)


def attached(**changes: object) -> tuple[nn.Module, rdp.ResidualDropPath]:
    model = CASE.model()
    return model, CASE.attach(model, **changes)


@pytest.mark.parametrize(
    "phases",
    [
        (Phase.DROP,),
        (Phase.PLAIN,),
        (Phase.PLAIN, Phase.DROP, Phase.FREEZE),
        (Phase.DROP, Phase.FREEZE, Phase.FREEZE),
        (Phase.DROP, Phase.DROP, Phase.FREEZE),
        (Phase.DROP, Phase.PLAIN, Phase.FREEZE),
    ],
)
def test_phases_repeat_and_freeze_replays_the_latest_drop(phases):
    model, handle = attached(phases=phases)
    dropped, seen = None, set()
    for step in range(3 * len(phases)):
        assert (handle.phase, handle.step_count) == (phases[step % len(phases)], step)
        x = model.rows(5, step)
        output = model(x)
        loss(output).backward()
        if handle.phase is Phase.DROP:
            dropped = handle.masks
            seen.add(tuple(dropped.flatten().tolist()))
        elif handle.phase is Phase.FREEZE:
            assert torch.equal(handle.masks, dropped)
        torch.testing.assert_close(output, CASE.oracle(CASE.model(), x, handle.masks, handle.phase))
        handle.advance()
    assert len(seen) == 3 * phases.count(Phase.DROP), "every DROP draws anew"


def test_drop_alone_is_timms_drop_path_given_the_same_mask():
    """timm's `drop_path`, with its one random draw replaced by our mask."""

    class TimmBlock(nn.Module):
        def __init__(self, block: nn.Module, rate: float) -> None:
            super().__init__()
            self.block, self.drop_path = block, timm.layers.DropPath(rate)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.drop_path(self.block.branch(x))

    model, handle = attached(phases=(Phase.DROP,), scale_by_keep=True)
    twin = CASE.model()
    twin.body = nn.Sequential(*(TimmBlock(block, CASE.rate) for block in twin.body))
    for step in range(3):
        x = model.rows(6, step)
        output = model(x)
        masks = iter(handle.masks)

        def bernoulli_(self: Tensor, _: float, masks=masks) -> Tensor:
            return self.copy_(next(masks).reshape(self.shape))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Tensor, "bernoulli_", bernoulli_)
            expected = twin(x)
        torch.testing.assert_close(output, expected)
        handle.advance()


def test_parallel_branches_drop_independently():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), ParallelBlock()).double()
    handle = rdp.attach(model, rate=0.5)
    model(torch.randn(64, 3, 3, dtype=torch.float64))
    assert {tuple(pair) for pair in handle.masks.T.tolist()} == {(a, b) for a in (True, False) for b in (True, False)}


def test_masks_are_a_copy():
    model, handle = attached()
    model(model.rows(4, 0))
    before = handle.masks
    handle.masks.logical_not_()
    assert torch.equal(handle.masks, before)


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_what_was_paused_goes_on_after_an_error(error):
    model, handle = attached()
    x = model.rows(5, 0)
    dropped, masks = model(x).detach(), handle.masks
    hook = model.body[1].register_forward_pre_hook(lambda *_: raises(error))

    def raises(error: type[BaseException]) -> None:
        raise error

    with pytest.raises(error), handle.paused():
        model(x)
    hook.remove()
    assert torch.equal(model(x), dropped)
    assert torch.equal(handle.masks, masks)


def test_a_context_manager_removes_itself_also_after_an_error():
    model = CASE.model()
    before = anatomy(model)
    handle = CASE.attach(model)

    def interrupted() -> None:
        with handle as entered:
            assert entered is handle
            model(model.rows(2, 0))
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert not handle.attached
    assert anatomy(model) == before


def test_a_model_can_be_attached_again_after_remove():
    model, handle = attached()
    model(model.rows(2, 0))
    handle.remove()
    again = CASE.attach(model)
    twin, twin_handle = attached()
    x = model.rows(5, 1)
    assert identical(model(x), twin(x))
    assert torch.equal(again.masks, twin_handle.masks)


def test_a_loop_that_advances_by_itself_is_not_warned():
    model, handle = attached()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(4):
            for k in range(2):
                loss(model(model.rows(2, 2 * step + k))).backward()
            optimizer.step()
            optimizer.zero_grad()
            handle.advance()
    assert handle.step_count == 4
