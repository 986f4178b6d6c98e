"""Every refusal: the message names the thing, says what was found and what to do, and the model stays as it was."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import timm.layers
import torch
from laws.architectures import BlockMLP, ConvNet, LoopMLP, MLPBlock
from laws.strategies import Case
from laws.training import anatomy, identical
from torch import Tensor, nn

import rdp
from rdp import Phase

CASE = Case(BlockMLP, (("plain", "norm", "plain"),), rate=0.6, decay="constant", seed=2)


def refused(model: nn.Module, act: Callable[[], object], *words: str, error: type[Exception] = rdp.RdpError) -> str:
    """`act` raises an error that names all of `words`, and leaves the model as it was."""
    before, weights = anatomy(model), copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    with pytest.raises(error) as caught:
        act()
    text = str(caught.value)
    for word in words:
        assert word in text, f"{word!r} is not named in: {text}"
    assert anatomy(model) == before
    assert identical(dict(model.state_dict()), dict(weights))
    assert torch.equal(state, torch.get_rng_state())
    return text


# -- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rate": -0.1}, ("rate", "-0.1")),
        ({"rate": 1.5}, ("rate", "1.5")),
        ({"rate": float("nan")}, ("rate", "nan")),
        ({"rate": "a lot"}, ("rate", "a lot")),
        ({"mode": "rows"}, ("mode", "rows", "row", "batch")),
        ({"decay": "cosine"}, ("decay", "cosine", "linear", "constant")),
        ({"freeze": "outputs"}, ("freeze", "outputs", "output", "params")),
        ({"freeze": "params"}, ("freeze", "params", "mode", "row", "batch")),
        ({"freeze": "params", "mode": "row"}, ("freeze", "params", "mode", "row", "batch")),
        ({"native": "ignore"}, ("native", "ignore", "error", "off")),
        ({"compute": "sparse"}, ("compute", "sparse", "dense")),
        ({"phases": ()}, ("phases", "empty")),
        ({"phases": (Phase.FREEZE, Phase.DROP)}, ("phases", "FREEZE", "DROP")),
        ({"phases": (Phase.PLAIN, Phase.FREEZE)}, ("phases", "FREEZE", "DROP")),
        ({"phases": ("drop", "frozen")}, ("phases", "frozen", "'freeze'")),
        ({"phases": "drop"}, ("phases", "drop")),
        ({"rate": torch.tensor(1.5)}, ("rate", "1.5")),
        ({"rate": torch.tensor([0.1, 0.2])}, ("rate", "0.1")),
        ({"rate": torch.tensor(True)}, ("rate", "True")),
        ({"rate": nn.Parameter(torch.tensor(0.1))}, ("rate", "learn", ".item()")),
        ({"phases": Phase.DROP}, ("phases", "Phase.DROP")),
        ({"seed": -1}, ("seed", "-1")),
        ({"seed": 2**64}, ("seed", str(2**64))),
        ({"seed": 0.5}, ("seed", "0.5")),
    ],
    ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_a_bad_argument_is_named_with_its_value(arguments, words):
    model = CASE.model()
    refused(model, lambda: rdp.attach(model, **{"rate": 0.1} | arguments), *words)
    rdp.attach(model, rate=0.1).remove()  # the refusal left nothing behind that would refuse this


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_in_place_of_the_rate_is_answered_with_the_two_lines(make):
    model = CASE.model()
    optimizer = make(model.parameters(), lr=0.1)
    text = refused(model, lambda: rdp.attach(model, optimizer), make.__name__, "rdp.attach(model, rate=0.1)")
    assert text.endswith("optimizer = handle.wrap(optimizer)")
    assert "lr" not in text  # not the optimizer's own description
    handle = rdp.attach(model, 0.1)
    with pytest.raises(rdp.ArgumentError, match="handle"):
        handle.rate = optimizer


MODELS = [Case(BlockMLP, (("plain", "norm"),)), Case(ConvNet, ("basic", (1, 1, 1))), Case(LoopMLP, (3,))]


@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.architecture.__name__)
@pytest.mark.parametrize(
    "rate", [torch.tensor(0.5), torch.tensor(0.5, dtype=torch.float64), np.float32(0.5), np.array(0.5)]
)
def test_one_number_is_a_rate_whatever_holds_it(case, rate):
    handle = rdp.attach(case.model(), rate, decay="constant")
    assert type(handle.rate) is float
    assert handle.rate == 0.5
    handle.rate = rate / 2
    assert handle.state_dict() == rdp.attach(case.model(), 0.25, decay="constant").state_dict()


@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.architecture.__name__)
def test_phases_go_by_their_names_too(case):
    named = rdp.attach(case.model(), 0.5, phases=("plain", "drop", "FREEZE"))
    members = rdp.attach(case.model(), 0.5, phases=[Phase.PLAIN, Phase.DROP, Phase.FREEZE])
    assert named.options == members.options
    assert named.state_dict() == members.state_dict()


def test_bad_arguments_are_value_errors_too():
    model = CASE.model()
    refused(model, lambda: rdp.attach(model, rate=2.0), error=ValueError)


def test_what_is_attached_must_be_a_module():
    with pytest.raises((rdp.RdpError, TypeError), match=r"[Mm]odule"):
        rdp.attach(torch.relu, rate=0.1)


# -- branches --------------------------------------------------------------------------------------------------------


def test_naming_an_unknown_branch_names_it_and_what_there_is():
    model = CASE.model()
    act = lambda: CASE.attach(model, branches=["body.0.fc2", "body.7.fc2"], example_inputs=model.rows(2, 0))  # noqa: E731
    text = refused(model, act, "body.7.fc2")
    assert "body.0.fc2" not in text.split("body.7.fc2")[0]


def test_naming_an_unknown_branch_is_refused_at_attach_without_inputs():
    model = CASE.model()
    refused(model, lambda: CASE.attach(model, branches=["bodi.0.fc2"]), "bodi.0.fc2", "branches")


def test_a_predicate_that_chooses_nothing_is_refused():
    model = CASE.model()
    refused(
        model,
        lambda: CASE.attach(model, branches=lambda name, module: False, example_inputs=model.rows(2, 0)),
        "branches",
        "body.0.fc2",
    )


def test_a_bare_string_is_no_list_of_names():
    model = CASE.model()
    refused(model, lambda: CASE.attach(model, branches="body.0.fc2"), "branches", "body.0.fc2")


class Plain(nn.Module):
    """Adds a bias and a position embedding, and nothing residual."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(3, 4), nn.Linear(4, 2)
        self.position = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(x) + self.position))


def test_a_model_without_branches_is_refused_at_attach():
    model, x = Plain(), torch.randn(2, 3)
    refused(model, lambda: rdp.attach(model, rate=0.1, example_inputs=x), "Plain", "branches=")


def test_a_model_without_branches_is_refused_at_the_first_forward_with_the_same_words():
    model = Plain()
    rdp.attach(model, rate=0.1)
    with pytest.raises(rdp.RdpError, match=r"Plain.*branches=|branches=.*Plain"):
        model(torch.randn(2, 3))


class CalledTwice(nn.Module):
    """One module is the end of two branches, or of one and of something else."""

    def __init__(self, both: bool) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(4, 4), nn.Linear(4, 4)
        self.both = both

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.f(x)
        x = x + self.g(x)
        return x + self.f(x) if self.both else self.f(x)


def test_a_module_that_ends_two_branches_is_one_branch_and_says_so():
    torch.manual_seed(0)
    handle = rdp.attach(CalledTwice(both=True), rate=0.5, decay="constant", example_inputs=torch.randn(2, 4))
    assert [(branch.name, branch.sums) for branch in handle.branches] == [("f", 2), ("g", 1)]
    assert "2 sums" in str(handle)


def test_a_branch_module_that_is_also_called_elsewhere_is_reported_by_name_and_not_gated():
    torch.manual_seed(0)
    model = CalledTwice(both=False)
    with pytest.warns(rdp.RdpWarning, match=r"`f` is called 2 times"):
        handle = rdp.attach(model, rate=0.5, decay="constant", example_inputs=torch.randn(2, 4))
    assert [branch.name for branch in handle.branches] == ["g"]
    assert [refusal.name for refusal in handle.refused] == ["f"]


class Leaky(nn.Module):
    """The branch output also goes somewhere else."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        f = self.f(x)
        x = x + f
        x = x + self.g(x)
        return x * f.sigmoid()


def test_a_branch_that_also_feeds_something_else_is_reported_and_not_gated():
    model = Leaky()
    with pytest.warns(rdp.RdpWarning, match=r"\bf\b"):
        handle = rdp.attach(model, rate=0.5, example_inputs=torch.randn(2, 4))
    assert [branch.name for branch in handle.branches] == ["g"]


def test_scaling_kept_rows_through_a_functional_activation_is_refused_by_name():
    """gelu(f(x) / keep) is not gelu(f(x)) / keep."""
    case = Case(BlockMLP, (("activated", "plain", "plain"),), decay="constant", scale_by_keep=True)
    model = case.model()
    x = model.rows(2, 0)
    text = refused(model, lambda: case.attach(model, example_inputs=x), "scale_by_keep", "body.0.fc2", "branches=")
    assert "body.1" not in text
    handle = case.attach(model, example_inputs=x, branches=["body.1.fc2", "body.2.fc2"])
    assert [branch.name for branch in handle.branches] == ["body.1.fc2", "body.2.fc2"]


def test_example_inputs_that_do_not_fit_are_told_with_what_the_model_raises_and_leave_it_as_it_was():
    model, x = CASE.model(), torch.randn(2, 5).double()
    words = (
        "example_inputs",
        "shapes",
        "x: a tensor of shape [2, 5]",
        "tuple is taken for positional",
        "a dict for keyword",
    )
    refused(model, lambda: CASE.attach(model, example_inputs=x), *words, error=rdp.ArgumentError)


def test_a_training_forward_raises_what_the_plain_model_raises():
    model, x = CASE.model(), torch.randn(2, 5).double()
    handle = CASE.attach(model)
    refused(model, lambda: model(x), "shapes", error=RuntimeError)
    assert identical(model(model.rows(3, 0)), CASE.model()(CASE.model().rows(3, 0))) or handle.branches


# -- models ----------------------------------------------------------------------------------------------------------


def test_attaching_twice_is_refused_and_the_first_handle_lives_on():
    model, twin = CASE.model(), CASE.model()
    CASE.attach(model)
    CASE.attach(twin)
    refused(model, lambda: CASE.attach(model), "attached", "remove")
    x = model.rows(5, 0)
    assert identical(model(x), twin(x))


@pytest.mark.parametrize("part", ["body", "body.1"])
@pytest.mark.parametrize("late", [False, True], ids=["found", "not_found_yet"])
def test_attaching_to_a_part_of_an_attached_model_is_refused(part, late):
    """At the latest when the outer model finds its branches."""
    model = CASE.model()
    x = model.rows(2, 0)
    CASE.attach(model, example_inputs=None if late else x)
    inner = model.get_submodule(part)

    def both() -> None:
        handle = rdp.attach(inner, rate=0.1)
        try:
            model(x)
        finally:
            handle.remove()

    refused(model, both, "attached", "remove")


def test_attaching_to_a_whole_with_an_attached_part_is_refused():
    model = CASE.model()
    CASE.attach(model)
    refused(model, lambda: rdp.attach(nn.Sequential(model), rate=0.1), "attached", "remove", "`0`")


class NativeBlock(MLPBlock):
    def __init__(self, rate: float, path: type[nn.Module] = timm.layers.DropPath, **options: str) -> None:
        super().__init__()
        self.drop_path = path(rate, **options)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.branch(x))


def native_model(path: type[nn.Module] = timm.layers.DropPath, **options: str) -> BlockMLP:
    torch.manual_seed(0)
    model = BlockMLP(("plain",))
    model.body = nn.Sequential(*(NativeBlock(rate, path, **options) for rate in (0.0, 0.3, 0.5)))
    return model.double()


def native_models():
    import torchvision.ops

    return [
        pytest.param(native_model, id="timm"),
        pytest.param(lambda: native_model(torchvision.ops.StochasticDepth, mode="row"), id="torchvision"),
    ]


@pytest.mark.parametrize("make", native_models())
def test_active_native_drop_paths_are_named_with_the_way_out(make):
    model = make()
    text = refused(model, lambda: rdp.attach(model, rate=0.1), "body.1.drop_path", "body.2.drop_path", "native='off'")
    assert "body.0.drop_path" not in text, "a rate of 0 is not active"
    with pytest.raises(rdp.NativeDropPathError):
        rdp.attach(model, rate=0.1, native="error")


@pytest.mark.parametrize("make", native_models())
def test_native_off_silences_them_and_remove_restores_them(make):
    model = make()
    before = anatomy(model)
    handle = rdp.attach(model, rate=1e-12, native="off")
    x = model.rows(4, 0)
    torch.manual_seed(0)
    outputs = [model(x) for _ in range(5)]
    assert all(torch.equal(outputs[0], output) for output in outputs)
    assert torch.equal(outputs[0], model.eval()(x))
    model.train()
    assert [branch.name for branch in handle.branches] == [f"body.{i}.drop_path" for i in range(3)]
    handle.remove()
    assert anatomy(model) == before
    assert any(not torch.equal(outputs[0], model(x)) for _ in range(20))


@pytest.mark.parametrize("make", native_models())
def test_native_off_is_undone_when_attach_then_fails(make):
    model = make()
    refused(model, lambda: rdp.attach(model, rate=0.1, native="off", branches=["nothing"]), "nothing")


def test_data_parallel_is_refused_by_name():
    model = nn.DataParallel(CASE.model())
    refused(model, lambda: rdp.attach(model, rate=0.1), "DataParallel", "DistributedDataParallel")


def test_a_scripted_model_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.jit.script(nn.Linear(3, 3))
    with pytest.raises(rdp.RdpError, match=r"[Ss]cript"):
        rdp.attach(model, rate=0.1)


def test_vmap_is_refused():
    model = CASE.model()
    CASE.attach(model, example_inputs=model.rows(2, 0))
    with pytest.raises(rdp.RdpError, match="vmap"):
        torch.func.vmap(model)(model.rows(6, 0).reshape(3, 2, 3))


def test_per_sample_gradients_by_vmap_are_refused():
    model = CASE.model()
    CASE.attach(model, example_inputs=model.rows(2, 0))
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x[None],)).sum()

    with pytest.raises(rdp.RdpError, match="vmap"):
        torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, model.rows(3, 0))


def test_an_empty_batch_is_refused():
    model = CASE.model()
    CASE.attach(model, example_inputs=model.rows(2, 0))
    with pytest.raises(rdp.RdpError, match=r"empty|0 rows|no rows"):
        model(model.rows(2, 0)[:0])


# -- optimizer and phases --------------------------------------------------------------------------------------------


def test_only_an_optimizer_can_be_wrapped():
    model = CASE.model()
    handle = CASE.attach(model)
    refused(model, lambda: handle.wrap(model.parameters()), "Optimizer", "generator")
    refused(model, lambda: handle.wrap(torch.optim.SGD), "Optimizer", "type")


def test_wrapping_twice_would_advance_twice_and_is_refused():
    model = CASE.model()
    handle = CASE.attach(model)
    optimizer = handle.wrap(torch.optim.SGD(model.parameters(), lr=0.1))
    refused(model, lambda: handle.wrap(optimizer), "wrap")


def test_an_optimizer_of_another_model_is_refused():
    model = CASE.model()
    handle = CASE.attach(model)
    refused(model, lambda: handle.wrap(torch.optim.SGD(CASE.model().parameters(), lr=0.1)), "model", "parameter")


def test_a_step_without_advance_warns_once_and_names_the_way_out():
    model = CASE.model()
    CASE.attach(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(4):
            model(model.rows(2, step)).sum().backward()
            optimizer.step()
    ours = [w for w in caught if issubclass(w.category, rdp.RdpWarning)]
    assert len(ours) == 1
    assert "wrap" in str(ours[0].message)
    assert "advance" in str(ours[0].message)


# -- state -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "word"),
    [
        (Case(BlockMLP, (("plain", "norm"),), rate=0.6, decay="constant", seed=2), "branches"),
        (Case(ConvNet, ("basic", (1, 1, 1)), rate=0.6, decay="constant", seed=2), "branches"),
        (Case(LoopMLP, (3,), rate=0.6, decay="constant", seed=2), "branches"),
        (Case(*[CASE.architecture, CASE.arguments], rate=0.5, decay="constant", seed=2), "rate"),
        (Case(*[CASE.architecture, CASE.arguments], rate=0.6, decay="linear", seed=2), "rate"),
        (Case(*[CASE.architecture, CASE.arguments], rate=0.6, mode="batch", decay="constant", seed=2), "mode"),
    ],
)
@pytest.mark.parametrize("late", [False, True], ids=["found", "not_found_yet"])
def test_a_state_of_another_model_rate_or_mode_is_refused_and_changes_nothing(other, word, late):
    source = other.model()
    handle = other.attach(source, example_inputs=source.rows(2, 0))
    source(source.rows(2, 0))
    handle.advance()
    state = handle.state_dict()

    model = CASE.model()
    x = model.rows(2, 0)
    handle = CASE.attach(model, example_inputs=None if late else x)
    before = copy.deepcopy(handle.state_dict())

    def load() -> None:
        handle.load_state_dict(state)
        model(x)  # with branches to be found, there may be nothing to compare with before

    refused(model, load, word, error=rdp.StateError)
    if late and word != "mode":
        refused(model, lambda: model(x), word, error=rdp.StateError)  # not just once, and then plain training
    else:
        assert identical(handle.state_dict(), before)


@pytest.mark.parametrize("state", [{}, {"step_count": 3}, {"something": "else"}])
def test_what_is_no_state_of_a_handle_is_refused_by_key(state):
    model = CASE.model()
    handle = CASE.attach(model)
    before = handle.state_dict()
    refused(model, lambda: handle.load_state_dict(state), error=rdp.StateError)
    assert identical(handle.state_dict(), before)


def test_warnings_show_the_line_of_the_user_that_led_to_them_through_torch():
    model = BlockMLP(("plain",)).train()
    handle = rdp.attach(model, 0.5, decay="constant", example_inputs=model.rows(2, 0))
    optimizer = handle.wrap(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.warns(rdp.RdpWarning, match="had no part in this step") as idle:
        optimizer.step()
    with pytest.warns(rdp.RdpWarning, match="ran outside of a forward") as stray:
        nn.Sequential(model.body)(torch.randn(2, model.stem.out_features))
    for _ in range(2):
        model(model.rows(2, 0)).sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    with pytest.warns(rdp.RdpWarning, match="no step was announced") as unannounced:
        model(model.rows(2, 0))
    assert [caught[0].filename for caught in (idle, unannounced)] == [__file__] * 2
    assert stray[0].filename.endswith("architectures.py")  # where the block calls the module
