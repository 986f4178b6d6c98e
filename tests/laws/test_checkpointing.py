"""Activation checkpointing: a recomputed forward has the masks of the forward it recomputes."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import rdp
from laws.architectures import BlockMLP, Transformer
from laws.strategies import Case
from laws.training import identical, loss


class CheckpointedMLP(BlockMLP):
    """Every block is checkpointed."""

    def __init__(self, kinds: tuple[str, ...], reentrant: bool) -> None:
        super().__init__(kinds)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.body:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


class CheckpointedBranches(BlockMLP):
    """Only the branches are checkpointed, inside of the adding block."""

    def __init__(self, kinds: tuple[str, ...], reentrant: bool) -> None:
        super().__init__(kinds)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.body:
            x = x + checkpoint(block.branch, x, use_reentrant=self.reentrant)
        return self.head(x)


def save_matrix_products(context: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    products = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if op in products else CheckpointPolicy.PREFER_RECOMPUTE


class SelectivelyCheckpointedMLP(BlockMLP):
    """Matrix products are kept, and the rest of every block is computed again."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        contexts = functools.partial(create_selective_checkpoint_contexts, save_matrix_products)
        for block in self.body:
            x = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
        return self.head(x)


class NestedCheckpoints(BlockMLP):
    """A checkpoint around pairs of blocks, each of which is checkpointed too."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for first in range(0, len(self.body), 2):
            x = checkpoint(self.pair, x, first, use_reentrant=False)
        return self.head(x)

    def pair(self, x: Tensor, first: int) -> Tensor:
        for block in self.body[first : first + 2]:
            x = checkpoint(block, x, use_reentrant=False)
        return x


class CheckpointedTransformer(Transformer):
    """Two branches in one checkpointed block, each with a gate of its own."""

    def __init__(self, kind: str, depth: int, reentrant: bool) -> None:
        super().__init__(kind, depth)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.position
        for block in self.body:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x.mean(1))


MODELS = st.one_of(
    st.tuples(
        st.sampled_from([CheckpointedMLP, CheckpointedBranches]),
        st.tuples(
            st.lists(st.sampled_from(["plain", "norm", "in_place", "dropout"]), min_size=2, max_size=4).map(tuple),
            st.booleans(),
        ),
    ),
    st.tuples(
        st.sampled_from([SelectivelyCheckpointedMLP, NestedCheckpoints]),
        st.tuples(st.lists(st.sampled_from(["plain", "norm", "dropout"]), min_size=2, max_size=4).map(tuple)),
    ),
    st.tuples(
        st.just(CheckpointedTransformer),
        st.tuples(st.sampled_from(["pre_norm", "post_norm", "parallel"]), st.integers(1, 2), st.booleans()),
    ),
)


@given(
    MODELS,
    st.sampled_from(["row", "batch"]),
    st.sampled_from(["auto", "dense"]),
    st.lists(st.integers(1, 5), min_size=1, max_size=3),
    st.booleans(),
    st.integers(0, 2**16),
)
def test_gradients_equal_the_oracles_without_checkpointing(model, mode, compute, sizes, pending, seed):
    """`pending`: every micro-batch of a step runs forward before the first backward."""
    case = Case(*model, mode=mode, compute=compute, decay="constant", seed=seed)
    net = case.model()
    reference = copy.deepcopy(net)
    handle = case.attach(net)
    for step in range(4):
        outputs, expected = [], []
        for k, size in enumerate(sizes):
            # reentrant checkpointing wants an input that requires grad
            x = net.rows(size, 10 * step + k).requires_grad_()
            torch.manual_seed(k)
            outputs.append(net(x))
            torch.manual_seed(k)
            expected.append(case.oracle(reference, x, handle.masks, handle.phase))
            torch.testing.assert_close(outputs[-1], expected[-1])
            if not pending:
                loss(outputs[-1]).backward()
        if pending:
            sum(map(loss, outputs)).backward()
        sum(map(loss, expected)).backward()
        for (name, p), (_, q) in zip(net.named_parameters(), reference.named_parameters(), strict=True):
            a, b = (torch.zeros_like(p) if t.grad is None else t.grad for t in (p, q))
            torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")
        net.zero_grad()
        reference.zero_grad()
        handle.advance()


def test_a_reentrant_checkpoint_around_the_whole_model_is_refused():
    """Its first forward runs without gradients, like any evaluation in training mode, so no masks belong to it."""
    case = Case(CheckpointedMLP, (("plain", "norm", "plain"), False), decay="constant")
    net, twin, plain = case.model(), case.model(), case.model()
    handle, twin_handle = case.attach(net, example_inputs=net.rows(2, 0)), case.attach(twin)
    net(net.rows(4, 0))
    twin(twin.rows(4, 0))
    output = checkpoint(net, net.rows(4, 1).requires_grad_(), use_reentrant=True)
    with pytest.raises(rdp.ForwardError, match="use_reentrant=False"):
        loss(output).backward()
    # It counts for nothing, and nothing after it is taken for a part of it.
    x = torch.randn(4, net.stem.out_features, dtype=case.dtype)
    with pytest.warns(rdp.RdpWarning, match="ran outside of a forward"):
        assert torch.equal(net.body(x), plain.body(x))
    assert handle.step_count == 0
    assert torch.equal(handle.masks, twin_handle.masks)
    net.zero_grad()
    for model in (net, twin):
        loss(model(model.rows(4, 2))).backward()
    assert torch.equal(handle.masks, twin_handle.masks)
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert identical(p.grad, q.grad)


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_checkpointing_the_whole_model_from_outside(mode):
    """The recomputation runs the root's forward again: it is no further micro-batch."""
    case = Case(BlockMLP, (("plain", "norm", "plain"),), mode=mode, decay="constant", seed=3)
    net, twin = case.model(), case.model()
    handle, twin_handle = case.attach(net), case.attach(twin)
    for step in range(6):
        losses = []
        for k in range(2):
            x = net.rows(4, 10 * step + k).requires_grad_()
            losses.append(loss(checkpoint(net, x, use_reentrant=False)))
            loss(twin(x.detach().clone())).backward()
            assert torch.equal(handle.masks, twin_handle.masks)
        sum(losses).backward()
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            a, b = (torch.zeros_like(p) if t.grad is None else t.grad for t in (p, q))
            torch.testing.assert_close(a, b)
        net.zero_grad()
        twin.zero_grad()
        handle.advance()
        twin_handle.advance()
