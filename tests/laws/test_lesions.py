"""Law: without a branch a model is the sum without its term, in any mode; a pruned model is that, and no more."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rdp
from laws import architectures as arch
from laws.oracle import oracle_forward
from laws.strategies import Case, cases
from laws.training import identical, loss

CASES = cases(rates=st.sampled_from([0.0, 0.5]), freezes=("output",), scales=(False,))
SOME = st.integers(0, 2**6 - 1)
FEW = settings(max_examples=25)
KINDS = [
    (arch.BlockMLP, (("plain", "layer_scale"),)),
    (arch.SharedMLP, (2, 2)),
    *((arch.ConvNet, (kind, (1, 2))) for kind in arch.CONV_BLOCKS),
    *((arch.Transformer, (kind, 2)) for kind in arch.TRANSFORMER_BLOCKS),
    (arch.TorchTransformer, (2, True, True)),
    (arch.NestedMLP, ((True, False),)),
]


def attached(case: Case, some: int) -> tuple[arch.Architecture, rdp.ResidualDropPath, list[str], torch.Tensor]:
    """A model, its handle, the names of some branches, and what the oracle calls these: rows of zeros in the masks."""
    model = case.model()
    handle = case.attach(model, example_inputs=model.rows(2, 0), verify=False)
    gone = [branch.name for i, branch in enumerate(handle.branches) if some >> i & 1]
    kept = torch.tensor([branch.name not in gone for branch in handle.branches])
    return model, handle, gone, kept[:, None].expand(-1, 3)


@FEW
@given(case=CASES, some=SOME, train=st.booleans())
def test_a_lesion_is_the_sum_without_the_branch(case, some, train):
    model, handle, gone, masks = attached(case, some)
    model.train(train)
    written, x, before = copy.deepcopy(model), model.rows(3, 1), handle.state_dict()
    torch.manual_seed(0)
    with handle.without(gone):
        output = model(x)
    torch.manual_seed(0)
    expected = oracle_forward(written, x, masks, "DROP", [0.5] * len(masks))
    torch.testing.assert_close(output, expected)
    gradients = torch.autograd.grad(loss(output), [*model.parameters()], materialize_grads=True)
    wanted = torch.autograd.grad(loss(expected), [*written.parameters()], materialize_grads=True)
    torch.testing.assert_close(gradients, wanted)
    assert identical(handle.state_dict(), before)
    assert handle.masks.shape[1] == 0


@pytest.mark.parametrize(("architecture", "arguments"), KINDS)
@pytest.mark.parametrize("some", [0b0001, 0b0110])
def test_a_pruned_model_is_the_lesion_without_the_parameters(architecture, arguments, some):
    case = Case(architecture, arguments)
    model, handle, gone, _ = attached(case, some)
    twin = copy.deepcopy(model)
    pruned = rdp.prune(handle, keep=[b.name for b in handle.branches if b.name not in gone])
    x = model.rows(3, 1)
    with handle.without(gone):
        torch.testing.assert_close(pruned.eval()(x), model.eval()(x))
    numbers = {i for i, branch in enumerate(handle.branches) if branch.name in gone}
    left = {name for name, branches in case.used.items() if not branches or branches - numbers}
    assert {name for name, _ in pruned.named_parameters()} == left
    assert identical(model.state_dict(), twin.state_dict())
    assert handle.attached


@pytest.mark.parametrize("train", [True, False])
def test_lesions_nest_and_end_with_an_error(train):
    case = Case(arch.Transformer, ("pre_norm", 2), decay="constant")
    model, handle, _, _ = attached(case, 0)
    first, second = (branch.name for branch in handle.branches[:2])
    model.train(train)
    hooks = {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()}
    x = model.rows(3, 1)
    with handle.without([first, second]):
        both = model(x)
    with handle.without(first):
        one = model(x)
        with pytest.raises(ZeroDivisionError), handle.without(lambda name, module: name == second):
            _fail(model(x), both)
        torch.testing.assert_close(model(x), one)
    assert {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()} == hooks
    assert not torch.allclose(one, both)
    with handle.paused():
        plain = model(x)
    assert not torch.allclose(plain, one)


@pytest.mark.parametrize(
    ("compiled", "kind"), [("model", "pre_norm"), ("in place", "post_norm"), ("blocks", "parallel")]
)
def test_compiled_models_have_the_same_lesions(compiled, kind):
    torch._dynamo.reset()
    model, handle, _, _ = attached(Case(arch.Transformer, (kind, 2), decay="constant"), 0)
    name = handle.branches[1].name
    x, called = model.rows(3, 1), model
    with handle.without(name):
        expected = model.eval()(x)
    if compiled == "model":
        called = torch.compile(model, backend="eager")
    elif compiled == "in place":
        model.compile(backend="eager")
    else:
        for block in model.body:
            block.compile(backend="eager")
    plain = called(x)
    with handle.without(name):
        torch.testing.assert_close(called(x), expected)
    assert torch.equal(called(x), plain)
    assert not torch.allclose(plain, expected)


@pytest.mark.parametrize("kind", ["preact", "basic", "bottleneck"])
def test_training_goes_on_as_if_there_had_been_no_lesion(kind):
    case = Case(arch.ConvNet, (kind, (1, 2)), decay="constant")
    ends = []
    for lesioned in (False, True):
        model, handle, gone, _ = attached(case, 0b01)
        optimizer = handle.wrap(torch.optim.SGD(model.parameters(), lr=0.1))
        for step in range(4):
            loss(model(model.rows(4, step))).backward()
            if lesioned:
                model.eval()
                with handle.without(gone):
                    model(model.rows(3, 9))
                model.train()
            optimizer.step()
            optimizer.zero_grad()
        ends.append((model.state_dict(), handle.state_dict(), handle.masks))
    assert identical(*ends)


def _fail(output, expected):
    torch.testing.assert_close(output, expected)
    raise ZeroDivisionError


def test_what_is_no_branch_is_named_with_what_is():
    model, handle, _, _ = attached(Case(arch.LoopMLP, (3,)), 0)
    hint = r"'layers.0.0' is no branch .* did you mean 'layers.0'.*layers.2"
    with pytest.raises(rdp.BranchError, match=hint), handle.without(["layers.0.0"]):
        pass
    with pytest.raises(rdp.BranchError, match="chose none of the branches"), handle.without(lambda name, module: False):
        pass
    with pytest.raises(rdp.ArgumentError, match="by name, or by a function"), handle.without(2):
        pass
    with handle.without("layers.1"):
        model(model.rows(2, 0))
    handle.remove()
    with pytest.raises(rdp.AttachError, match="removed"), handle.without("layers.1"):
        pass
    with pytest.raises(rdp.ArgumentError, match="not known yet"), rdp.attach(model).without("layers.1"):
        pass


def test_a_branch_that_no_forward_comes_to_is_told():
    class Switched(arch.LoopMLP):
        depth = 2

        def forward(self, x):
            x = self.stem(x)
            for f in self.layers[: self.depth]:
                x = x + f(x)
            return self.head(x)

    model = Switched(2)
    handle = rdp.attach(model, example_inputs=torch.randn(2, 3))
    model.depth = 1
    with pytest.warns(rdp.RdpWarning, match="`layers.1`: nothing was taken away there"), handle.without("layers.1"):
        model(torch.zeros(3, 3))
