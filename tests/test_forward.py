"""`rdp.forward`: the masks of one forward on a device, and the forward that a recomputation belongs to."""

from __future__ import annotations

import copy
import threading
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws.architectures import BlockMLP
from laws.strategies import Case
from laws.test_checkpointing import CheckpointedMLP
from laws.training import loss
from test_rows import WIDTH, MaskedBlock, Stack, row_masks
from torch import Tensor

import rdp
from rdp.forward import Forward, Forwards, _sent, in_backward, in_reentrant_checkpoint

CPU = torch.device("cpu")
MASKS = st.integers(1, 6).flatmap(
    lambda rows: st.lists(st.lists(st.booleans(), min_size=rows, max_size=rows), min_size=1, max_size=4)
)


def forward(rows: int = 3) -> Forward:
    return Forward(rdp.Phase.DROP, torch.ones(1, rows, dtype=torch.bool))


@given(MASKS)
def test_rows_are_kept_and_split_as_the_masks_say(table):
    masks = torch.tensor(table)
    one = Forward(rdp.Phase.FREEZE, masks)
    assert (one.phase, one.rows) == (rdp.Phase.FREEZE, len(table[0]))
    for branch, keep in enumerate(table):
        assert one.keep(branch, CPU).tolist() == keep
        assert one.kept(branch) == sum(keep)
        assert one.keeps_all(branch) == (None if len(set(keep)) == 2 else keep[0])
        split = one.split(branch, CPU)
        assert split.kept.tolist() == [row for row, kept in enumerate(keep) if kept]
        assert split.dropped.tolist() == [row for row, kept in enumerate(keep) if not kept]


def test_rows_keep_their_order_also_where_a_sort_is_not_stable_by_itself():
    masks = torch.rand(2, 1000, generator=torch.Generator().manual_seed(0)) < 0.5
    split = Forward(rdp.Phase.DROP, masks).split(1, CPU)
    assert torch.equal(split.kept, masks[1].nonzero().flatten())
    assert torch.equal(split.dropped, (~masks[1]).nonzero().flatten())


def test_all_masks_are_sent_to_a_device_at_once_and_only_once(monkeypatch):
    sent = []
    monkeypatch.setattr("rdp.forward._sent", lambda tensor, device: sent.append((tensor.shape, device)) or tensor)
    one = Forward(rdp.Phase.DROP, torch.ones(4, 3, dtype=torch.bool))
    for branch in (2, 0, 2):
        one.keep(branch, CPU)
        one.split(branch, CPU)
    assert sent == [((4, 3), CPU)] * 2, "the masks, and the order of the rows"
    one.keep(1, torch.device("meta"))
    assert sent[2:] == [((4, 3), torch.device("meta"))]


def test_a_copy_is_on_the_device_that_was_asked_for():
    one = forward()
    assert one.keep(0, torch.device("meta")).device.type == "meta"
    assert one.keep(0, CPU).device.type == "cpu"


class Asks(torch.autograd.Function):
    """The identity, whose backward asks which forward is running, as a gate in a recomputation does."""

    @staticmethod
    def forward(ctx, x: Tensor, ask) -> Tensor:
        ctx.ask = ask
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        ctx.ask()
        return gradient, None


def asking(forwards: Forwards, one: Forward | None, answers: list) -> Tensor:
    """The output of a forward of two nodes that ask in backward."""
    forwards.begin(one)
    x = torch.zeros((), requires_grad=True)
    for _ in range(2):
        x = Asks.apply(x, lambda: answers.append(forwards.current()))
    assert forwards.current() is one
    assert forwards.end() is one
    return x


@given(st.permutations(range(3)))
def test_a_backward_belongs_to_the_forward_that_made_its_graph(order):
    """However many forwards are pending, and in whatever order their backwards run."""
    forwards, made, answers = Forwards(), [forward(), forward(), forward()], []
    outputs = [asking(forwards, one, answers) for one in made]
    assert forwards.current() is None
    for number in order:
        answers.clear()
        outputs[number].backward()
        assert answers == [made[number]] * 2
    assert forwards.current() is None, "outside of a backward there is nothing to recompute"


def test_a_graph_made_in_a_recomputation_belongs_to_the_forward_that_is_recomputed():
    """Nested checkpoints: the inner one's nodes are younger than every forward."""
    forwards, answers = Forwards(), []
    first, second = forward(), forward()

    def recompute() -> None:
        answers.append(forwards.current())
        with torch.enable_grad():
            x = Asks.apply(torch.zeros((), requires_grad=True), lambda: answers.append(forwards.current()))
        x.backward()

    forwards.begin(first)
    output = Asks.apply(torch.zeros((), requires_grad=True), recompute)
    forwards.end()
    asking(forwards, second, [])
    output.backward()
    assert answers == [first, first]


def test_after_a_step_nothing_is_recomputed():
    forwards, answers = Forwards(), []
    output = asking(forwards, forward(), answers)
    output.backward(retain_graph=True)
    forwards.forget()
    answers.clear()
    output.backward()
    assert answers == [None, None]


def test_before_the_first_forward_a_backward_belongs_to_none():
    answers = []
    x = Asks.apply(torch.zeros((), requires_grad=True), lambda: answers.append(Forwards().current()))
    x.backward()
    assert answers == [None]


def test_forwards_are_remembered_for_more_micro_batches_than_anyone_accumulates():
    forwards, answers = Forwards(), []
    made = [forward() for _ in range(257)]
    outputs = [asking(forwards, one, answers) for one in made]
    outputs[1].backward()
    outputs[256].backward()
    assert answers == [made[1]] * 2 + [made[256]] * 2
    answers.clear()
    outputs[0].backward()
    assert made[0] not in answers, "the oldest of 257 is forgotten"


def test_a_forward_that_is_not_gated_hides_the_one_around_it():
    forwards, outer = Forwards(), forward()
    forwards.begin(outer)
    forwards.begin(None)
    assert forwards.current() is None
    assert forwards.end() is None
    assert forwards.current() is outer
    assert forwards.end() is outer
    assert forwards.end() is None, "an end without a beginning, as after an interruption"


def test_a_recomputation_of_the_whole_model_runs_the_first_forward_again():
    forwards, one, seen = Forwards(), forward(), []

    def recompute() -> None:
        forwards.begin_recomputed()
        interval = (one.first_node, one.last_node)
        seen.append(forwards.current())
        seen.append(forwards.end())
        assert (one.first_node, one.last_node) == interval, "its nodes are those of the first run"

    forwards.begin(one)
    output = Asks.apply(torch.zeros((), requires_grad=True), recompute)
    forwards.end()
    output.backward()
    assert seen == [one, one]


def test_a_recomputation_that_no_forward_made_is_refused():
    forwards = Forwards()
    with pytest.raises(rdp.ForwardError) as refused:
        forwards.begin_recomputed()
    assert str(refused.value) == (
        "the whole model is recomputed by a checkpoint with use_reentrant=True, whose first forward runs without "
        "gradients and was taken for a plain one. Pass use_reentrant=False, or checkpoint its blocks"
    )
    assert forwards.running == [None], "the end of the call, which comes even so, has something to end"


def test_a_backward_and_a_reentrant_checkpoint_are_told_apart():
    answers = []

    def ask(*_: object) -> None:
        answers.append((in_backward(), in_reentrant_checkpoint()))

    def block(x: Tensor) -> Tensor:
        ask()
        return x.square()

    x = torch.ones((), requires_grad=True)
    for reentrant in (True, False):
        torch.utils.checkpoint.checkpoint(block, x, use_reentrant=reentrant).backward()
    ask()
    assert answers == [(False, False), (True, True), (False, False), (True, False), (False, False)]


KINDS = ("plain", "norm", "plain")


@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize(
    ("architecture", "arguments"),
    [(BlockMLP, (KINDS,)), (CheckpointedMLP, (KINDS, False))],
    ids=["plain", "checkpointed"],
)
def test_two_losses_of_one_forward_and_a_backward_that_is_run_twice_have_the_forwards_masks(
    mode, architecture, arguments
):
    """One after the other with `retain_graph=True`, the second after a further forward; one micro-batch each."""
    case = Case(architecture, arguments, mode=mode, decay="constant", seed=3)
    model = case.model()
    reference = copy.deepcopy(model)
    handle = case.attach(model)
    for step in range(6):
        x = model.rows(4, step).requires_grad_()
        output = model(x)
        expected = case.oracle(reference, x, handle.masks, handle.phase)
        loss(output).backward(retain_graph=True)
        output.square().sum().backward(retain_graph=True)
        other = model(x)
        loss(case.oracle(reference, x, handle.masks, handle.phase)).backward()
        output.square().sum().backward()
        loss(other).backward()
        (loss(expected) + 2 * expected.square().sum()).backward()
        assert handle._run.progress.forwards == 2
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            a, b = (torch.zeros_like(p) if t.grad is None else t.grad for t in (p, q))
            torch.testing.assert_close(a, b)
        model.zero_grad()
        reference.zero_grad()
        handle.advance()


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


def test_a_copy_to_cuda_is_pinned_so_that_the_host_does_not_wait_for_it():
    """No device is needed to see what is asked for."""
    for device, asked in {
        torch.device("cuda", 1): [("pin_memory",), ("to", (torch.device("cuda", 1),), {"non_blocking": True})],
        torch.device("meta"): [("to", (torch.device("meta"),), {})],
    }.items():
        recorder = Recorder()
        assert _sent(recorder, device) is recorder
        assert recorder.asked == asked


def test_a_branch_that_is_called_without_its_model_warns_once_by_name_and_only_where_it_would_learn():
    model = BlockMLP(KINDS)
    x = model.rows(3, 0)
    handle = rdp.attach(model, 0.5, example_inputs=x)
    block, name = model.body[1], handle.branches[1].name
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(model(x)).backward()
        with torch.no_grad():
            block(model.stem(x))
        with handle.paused():
            block(model.stem(x))
        model.eval()
        block(model.stem(x))
        model.train()
    with pytest.warns(rdp.RdpWarning) as caught:
        block(model.stem(x))
    assert [str(warning.message) for warning in caught] == [
        f"branch `{name}` ran outside of a forward of the attached model, so it is trained plainly. Call the BlockMLP "
        "itself, not its parts, or attach to the part that is called"
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        block(model.stem(x))


# -- forwards that do not end ----------------------------------------------------------------------------------------


def interrupted(model, error: type[BaseException], name: str, rows: int = 4):
    """A forward that `error` ends when the module of this name has run."""

    def stop(*_: object) -> None:
        raise error

    hook = model.get_submodule(name).register_forward_hook(stop)
    with pytest.raises(error):
        model(model.rows(rows, 0))
    hook.remove()


ERRORS = pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
INSIDE = pytest.mark.parametrize("where", ["stem", "body.1.fc1", "body.1.fc2", "head"])


@ERRORS
@INSIDE
@pytest.mark.parametrize("mode", ["row", "batch"])
def test_a_forward_that_raised_does_not_count(error, where, mode):
    """Out of memory, say: the batch is tried again, and FREEZE replays what the forward that learned had dropped."""
    case = Case(BlockMLP, (KINDS,), mode=mode, rate=0.5, decay="constant", seed=3)
    model, twin = case.model(), case.model()
    handle, expected = (case.attach(m, example_inputs=m.rows(2, 0)) for m in (model, twin))
    for step in range(4):
        interrupted(model, error, where, rows=7)
        for k in range(2):
            x = model.rows(4, 2 * step + k)
            assert torch.equal(model(x), twin(x))
            assert torch.equal(handle.masks, expected.masks)
            if k == 0:
                interrupted(model, error, where)
        assert handle.frozen == expected.frozen
        handle.advance()
        expected.advance()


@ERRORS
def test_a_forward_that_raises_while_another_error_is_handled_does_not_count_and_one_that_does_not_counts(error):
    model = BlockMLP(KINDS)
    handle = rdp.attach(model, 0.5, example_inputs=model.rows(2, 0))
    try:
        raise MemoryError
    except MemoryError:
        interrupted(model, error, "head")
        model(model.rows(4, 0))
    assert handle._run.progress.forwards == 1


@ERRORS
@INSIDE
def test_after_a_forward_that_raised_parts_of_the_model_are_plain_in_eval_mode(error, where):
    model, plain = BlockMLP(KINDS).double(), BlockMLP(KINDS).double()
    plain.load_state_dict(model.state_dict())
    rdp.attach(model, 0.9, decay="constant", example_inputs=model.rows(2, 0))
    interrupted(model, error, where)
    model.eval()
    x = plain.stem(model.rows(4, 1))
    assert torch.equal(model.body(x), plain.body(x))
    assert torch.equal(model.body[1].fc2(x), plain.body[1].fc2(x))


@pytest.mark.parametrize(("error", "train"), [(RuntimeError, True), (RuntimeError, False), (KeyboardInterrupt, False)])
def test_after_a_forward_that_raised_a_module_in_the_middle_of_a_branch_gets_all_its_rows(error, train):
    model = Stack(MaskedBlock())
    x, mask = torch.randn(4, 5, WIDTH), row_masks(4, 5)
    handle = rdp.attach(model, 0.5, example_inputs=(x, mask), seed=2)
    assert handle.branches[0].compute == "rows"
    hook = model.blocks[0].norm.register_forward_hook(lambda *_: (_ for _ in ()).throw(error()))
    with pytest.raises(error):
        model(x, mask)
    hook.remove()
    assert 0 < handle.masks.sum() < 4
    model.train(train)
    attention = model.blocks[0].attn
    assert torch.equal(attention(x, mask=mask), attention.forward(x, mask=mask))


@pytest.mark.parametrize("reentrant", [False, True])
def test_after_an_interrupted_forward_checkpoints_recompute_the_masks_of_theirs(reentrant):
    case = Case(CheckpointedMLP, (KINDS, reentrant), mode="row", rate=0.5, decay="constant", seed=3)
    model, reference = case.model(), case.model()
    handle = case.attach(model, example_inputs=model.rows(2, 0))
    interrupted(model, KeyboardInterrupt, "head")
    for step in range(4):
        x = model.rows(4, step).requires_grad_()
        loss(model(x)).backward()
        loss(case.oracle(reference, x, handle.masks, handle.phase)).backward()
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(torch.zeros_like(p) if p.grad is None else p.grad, q.grad)
        model.zero_grad()
        reference.zero_grad()
        handle.advance()


def test_a_plain_forward_in_another_thread_disturbs_nothing():
    """Pictures or scores that a thread makes while the training forward is in the middle of the model."""
    case = Case(BlockMLP, (KINDS,), mode="row", rate=0.5, decay="constant", seed=3)
    model, twin = case.model(), case.model()
    handle = case.attach(model, compute="dense", example_inputs=model.rows(2, 0))
    case.attach(twin, compute="dense", example_inputs=model.rows(2, 0))
    inside, go_on, main = threading.Event(), threading.Event(), threading.current_thread()
    x, outputs = model.rows(4, 0), []

    @torch.no_grad()
    def look() -> None:
        outputs.append(model(x))

    def together(*_: object) -> None:
        if threading.current_thread() is main:
            thread.start()
            assert inside.wait(60)
        else:
            inside.set()
            assert go_on.wait(60)

    thread = threading.Thread(target=look)
    hook = model.body[0].register_forward_hook(together)
    trained = model(x)
    go_on.set()
    thread.join()
    hook.remove()
    assert torch.equal(trained, twin(x))
    assert torch.equal(outputs[0], case.model()(x))
    assert handle._run.progress.forwards == 1


def test_a_model_that_calls_itself_is_not_taken_for_an_interrupted_one():
    class Twice(BlockMLP):
        def forward(self, x: Tensor, again: bool = True) -> Tensor:
            if not again:
                return super().forward(x)
            with handle.paused():
                plain = self(x, again=False)
            return super().forward(x) + plain

    model = Twice(KINDS)
    handle = rdp.attach(model, 0.9, decay="constant", branches=["body.0.fc2"], compute="dense")
    handle.discover(model.rows(2, 0))
    x = model.rows(4, 0)
    with handle.paused():
        plain = BlockMLP.forward(model, x)
    assert not torch.allclose(model(x), 2 * plain), "the outer call is gated after the inner one has returned"
    assert handle._run.forwards.running == []
    assert handle._run.progress.forwards == 1
