"""One step: the rows of a forward, and which forwards count, against what is done to the gradients of one parameter."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from rdp import Phase
from rdp.training.step import Draw, Forward, Step, copies_from_pinned, sent

CPU, META = torch.device("cpu"), torch.device("meta")


# -- the masks of a forward -------------------------------------------------------------------------------------------


def masked(masks: Tensor) -> Forward:
    return Forward(Phase.FREEZE, 2, Draw(0, 1), masks, masks.any(1))


MASKS = st.integers(1, 6).flatmap(
    lambda rows: st.lists(st.lists(st.booleans(), min_size=rows, max_size=rows), min_size=1, max_size=4)
)


@given(MASKS)
def test_rows_are_kept_and_split_as_the_masks_say(table):
    forward = masked(torch.tensor(table))
    assert (forward.phase, forward.position, forward.rows) == (Phase.FREEZE, 2, len(table[0]))
    assert forward.kept == [sum(keep) for keep in table]
    for branch, keep in enumerate(table):
        assert forward.keep(branch, CPU).tolist() == keep
        split = forward.split(branch, CPU)
        assert split.kept.tolist() == [row for row, kept in enumerate(keep) if kept]
        assert split.dropped.tolist() == [row for row, kept in enumerate(keep) if not kept]


def test_rows_keep_their_order_also_where_a_sort_is_not_stable_by_itself():
    masks = torch.rand(2, 1000, generator=torch.Generator().manual_seed(0)) < 0.5
    split = masked(masks).split(1, CPU)
    assert torch.equal(split.kept, masks[1].nonzero().flatten())
    assert torch.equal(split.dropped, (~masks[1]).nonzero().flatten())


def test_all_masks_are_sent_to_a_device_at_once_and_only_once(monkeypatch):
    copies: list[tuple[torch.Size, torch.device]] = []

    def send(tensor: Tensor, device: torch.device) -> Tensor:
        copies.append((tensor.shape, device))
        return sent(tensor, device)

    monkeypatch.setattr("rdp.training.step.sent", send)
    forward = masked(torch.ones(4, 3, dtype=torch.bool))
    for branch in (2, 0, 2):
        assert forward.keep(branch, META).device == META
        assert forward.split(branch, META).kept.device == META
    assert copies == [((4, 3), META)] * 2, "the masks, and the order of the rows"
    assert forward.keep(1, CPU).device == CPU


class Recorder:
    """Stands for a tensor and writes down what is asked of it."""

    def __init__(self) -> None:
        self.asked: list[tuple] = []

    def pin_memory(self) -> Recorder:
        self.asked.append(("pin_memory",))
        return self

    def to(self, *args: object, **kwargs: object) -> Recorder:
        self.asked.append(("to", args, kwargs))
        return self


@pytest.mark.parametrize("device", [torch.device("cuda", 1), torch.device("xpu", 0)], ids=str)
def test_a_copy_to_an_accelerator_is_pinned_so_that_the_host_does_not_wait_for_it(device, monkeypatch):
    """No device is needed to see what is asked for."""
    monkeypatch.setattr("rdp.training.step.copies_from_pinned", lambda kind: kind == device.type)
    recorder = Recorder()
    assert sent(recorder, device) is recorder
    assert recorder.asked == [("pin_memory",), ("to", (device,), {"non_blocking": True})]


def test_a_copy_to_what_cannot_pin_is_plain():
    recorder = Recorder()
    assert sent(recorder, META) is recorder
    assert recorder.asked == [("to", (META,), {})]


def test_whether_memory_can_be_pinned_for_a_device_is_tried(monkeypatch):
    def refuse(self):
        raise NotImplementedError("this backend has no pinned memory")

    tried = copies_from_pinned.__wrapped__  # without what it remembers
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)
    assert [tried(kind) for kind in ("xpu", "cuda", "meta", "cpu")] == [True, False, False, False]
    monkeypatch.setattr(Tensor, "pin_memory", refuse)
    assert not tried("xpu")
    for there_is_none in (lambda: None, lambda: torch.empty(()).view(2)):  # torch 2.6 raises a RuntimeError
        monkeypatch.setattr(torch.accelerator, "current_accelerator", there_is_none)
        assert not tried("xpu")


# -- which forwards count ---------------------------------------------------------------------------------------------


class Model:
    """A parameter, and a step that probes it and another one, which no forward reaches."""

    def __init__(self, phase: Phase = Phase.DROP, replay: tuple[Draw, ...] = ()) -> None:
        self.parameters = [nn.Parameter(torch.ones(())) for _ in range(2)]
        self.step = Step(0, phase, 0, self, {draw.number: draw for draw in replay})

    def gradients(self) -> Sequence[tuple[int, int] | None]:
        return [None if p.grad is None else (id(p.grad), p.grad._version) for p in self.parameters]

    def expect_nothing(self, live: Tensor) -> bool:
        return False

    def forward(self, rows: int = 1) -> tuple[Forward, Tensor]:
        """A forward, with the loss that it ends in."""
        position, masks = self.step.place(), torch.ones(1, rows, dtype=torch.bool)
        forward = Forward(self.step.phase, position, Draw(position, rows), masks, masks[:, 0])
        self.step.forwards.append(forward)
        output = self.parameters[0] * 2
        self.step.mark(forward, output)
        return forward, output

    def learn(self) -> Forward:
        forward, value = self.forward()
        value.backward()
        return forward

    def clear(self, to_none: bool) -> None:
        for p in self.parameters:
            if to_none:
                p.grad = None
            elif p.grad is not None:
                p.grad.zero_()


def test_a_forward_counts_from_its_backward_on():
    model = Model()
    forward, value = model.forward()
    assert model.step.counted() == []
    value.backward()
    assert model.step.counted() == [forward]


def test_a_graph_that_is_gone_gives_its_position_back():
    model = Model()
    first, value = model.forward()
    second, other = model.forward()
    assert (first.position, second.position) == (0, 1)
    del value
    assert (first.may_learn, second.may_learn) == (False, True)
    assert [model.forward()[0].position for _ in range(2)] == [0, 0], "each of these graphs is gone at once"
    other.backward()
    assert model.step.counted() == [second]


def test_a_graph_is_alive_while_one_of_its_outputs_is():
    model = Model()
    forward, value = model.forward()
    branch = model.parameters[0] * 3
    model.step.mark(forward, branch)
    del value
    assert forward.may_learn
    branch.backward()
    assert model.step.counted() == [forward]
    del branch
    assert not forward.may_learn


def test_a_forward_that_runs_holds_its_position_before_it_has_a_graph():
    model = Model()
    forward, value = model.forward()
    forward.running = True
    del value
    assert model.forward()[0].position == 1


def test_an_output_without_a_graph_is_no_graph():
    model = Model()
    forward, value = model.forward()
    del value
    model.step.mark(forward, torch.ones(()))
    assert not forward.may_learn


@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_that_are_thrown_away_take_their_forwards_along_once_another_backward_came(to_none):
    model = Model()
    thrown = [model.learn(), model.learn()]
    assert [forward.position for forward in thrown] == [0, 1]
    assert model.step.counted() == thrown
    model.clear(to_none)
    assert model.step.counted() == ([] if to_none else thrown), "who edits gradients to zero may have meant it"
    again = model.learn()
    assert again.position == 0
    assert model.step.counted() == [again]


def test_a_gradient_that_stays_as_it_was_shows_that_none_was_thrown_away():
    """One of the probes may be clipped, or frozen by the user, between two backwards."""
    model = Model()
    (model.parameters[1] * 2).backward()
    first = model.learn()
    model.parameters[0].grad = None
    second = model.learn()
    assert (first.position, second.position) == (0, 1)
    assert model.step.counted() == [first, second]


def test_gradients_on_which_an_optimizer_has_stepped_count_although_they_are_gone():
    model = Model()
    used = model.learn()
    used.used = True
    model.clear(to_none=True)
    assert model.step.counted() == [used]
    other = model.learn()
    assert other.position == 1
    assert model.step.counted() == [used, other]


@pytest.mark.parametrize("before", [False, True])
def test_gradients_that_are_put_in_place_by_hand_count_for_their_forward_where_nothing_else_has_learnt(before):
    """`before`: there are others from an earlier backward."""
    model = Model()
    earlier = [model.learn()] if before else []
    forward, value = model.forward()
    (gradient,) = torch.autograd.grad(value, model.parameters[0])
    assert model.step.counted() == earlier
    model.parameters[0].grad = gradient
    assert model.step.counted() == (earlier or [forward])


def test_gradients_that_are_edited_bring_in_no_forward_that_made_none():
    """As an attack does, whose gradient is that of its input, before the batch that is learnt from is clipped."""
    model = Model()
    _, attack = model.forward()
    torch.autograd.grad(attack, model.parameters[0])
    learnt = model.learn()
    model.parameters[0].grad.mul_(0.5)
    assert model.step.counted() == [learnt]


def test_a_second_backward_brings_a_forward_back_whose_gradients_were_thrown_away():
    """One backward for each of several losses, and gradients that are made of theirs."""
    model = Model()
    forward, value = model.forward()
    for _ in range(2):
        model.clear(to_none=True)
        value.backward(retain_graph=True)
        assert model.step.counted() == [forward]


# -- what is replayed -------------------------------------------------------------------------------------------------


def test_what_is_replayed_are_the_draws_of_the_forwards_that_were_used_by_position():
    model = Model()
    for position, used in ((2, True), (0, True), (1, False)):
        ones = torch.ones(1, 1, dtype=torch.bool)
        forward = Forward(Phase.DROP, position, Draw(position, 10 + position), ones, ones[0])
        forward.used = used
        model.step.forwards.append(forward)
    assert model.step.draws() == {0: Draw(0, 10), 2: Draw(2, 12)}


@pytest.mark.parametrize("phase", [Phase.FREEZE, Phase.PLAIN])
def test_a_step_that_draws_nothing_hands_on_what_it_was_given(phase):
    model = Model(phase, replay=(Draw(3, 4),))
    model.learn().used = True
    assert model.step.draws() == {3: Draw(3, 4)}
