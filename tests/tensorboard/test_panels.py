"""Panels in a training loop: what is written, for which models, and that training does not notice."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest
import timm
import torch
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

import rdp
from rdp.analysis import grid, lesions, spiral
from rdp.tensorboard import Panels
from rdp.tensorboard.probing import branch_weights
from rdp.tensorboard.scalars import parameter_counts


class MLP(nn.Module):
    def __init__(self, depth: int = 3, width: int = 4) -> None:
        super().__init__()
        self.width = width
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(depth))
        self.head = nn.Linear(width, 2)

    def forward(self, points: Tensor) -> Tensor:
        x = nn.functional.pad(points, (0, self.width - 2))
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def events(folder: Path) -> dict[str, list[tuple[int, object, str]]]:
    """(step, value, description) by tag, as TensorBoard reads them."""
    found = defaultdict(list)
    descriptions: dict[str, str] = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                # Only the first value of a tag carries its metadata.
                text = descriptions.setdefault(value.tag, value.metadata.summary_description)
                content = value.tensor.float_val or value.tensor.string_val
                found[value.tag].append((event.step, content[0] if len(content) == 1 else content, text))
    return dict(found)


def train(folder: Path | None, steps: int = 8, mode: str = "row") -> tuple[rdp.ResidualDropPath, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = MLP()
    points, labels = spiral(64)
    handle = rdp.attach(model, 0.5, example_inputs=points, mode=mode)
    optimizer = handle.wrap(torch.optim.SGD(model.parameters(), lr=0.1))
    panels = None
    if folder is not None:
        panels = Panels(
            handle, grid(10), folder, grid_size=10, points=points, labels=labels, scalars_every=2, images_every=4
        )
    for step in range(steps):
        loss = nn.functional.cross_entropy(model(points), labels)
        optimizer.zero_grad()
        loss.backward()
        if panels is not None:
            panels.log(step, loss=loss)
        optimizer.step()
    if panels is not None:
        panels.metrics(steps, accuracy=0.5)
        panels.draw(steps)
        panels.save(folder)
        panels.close()
    return handle, model.state_dict()


def test_everything_is_written_with_a_description(tmp_path: Path) -> None:
    train(tmp_path)
    written = events(tmp_path)
    by_phase = {f"{phase}/{name}" for phase in ("drop", "freeze") for name in BY_PHASE}
    assert set(written) - by_phase == {
        "model/text_summary", "custom_scalars__config__",
        "features/nodes", "features/similarity", "training/overview", "feature_reuse/reused",
        "feature_reuse/recreated", "train/loss", "train/gradient_norm", "test/accuracy", "rdp/rate",
        "rdp/learning_rows", "rdp/frozen_parameters",
    }  # fmt: skip
    assert by_phase <= set(written)
    for tag, points in written.items():
        assert points[0][2] or tag.endswith(("text_summary", "config__")), tag
    assert [step for step, _, _ in written["features/nodes"]] == [0, 4, 8]  # the slider
    # One point a cycle, of all phases at once.
    for tag in ("train/loss", "train/gradient_norm", "drop/loss", "freeze/gradient_norm", "rdp/rate"):
        assert [step for step, _, _ in written[tag]] == [1, 3, 5, 7], tag
    assert [value for _, value, _ in written["rdp/rate"]] == [0.5] * 4
    for name in ("features_nodes", "features_similarity", "training_overview"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_rate_is_a_curve(tmp_path: Path) -> None:
    model, points = MLP(), spiral(32)[0]
    handle = rdp.attach(model, 0.5, rate_schedule=rdp.rate_schedules.warmup(4), example_inputs=points)
    with Panels(handle, grid(8), tmp_path, grid_size=8, scalars_every=1) as panels:
        for step in range(6):
            model(points).square().sum().backward()
            panels.log(step)
            handle.advance()
    assert [(step, value) for step, value, _ in events(tmp_path)["rdp/rate"]] == [(1, 0.0), (3, 0.25), (5, 0.5)]


def test_lesions_are_written_with_a_description(tmp_path: Path) -> None:
    handle, _ = train(None)
    points, labels = spiral(64)
    found = lesions(handle, lambda model: float((model(points).argmax(1) == labels).float().mean()), progress=False)
    with Panels(handle, grid(10), tmp_path, grid_size=10) as panels:
        assert panels.lesions(8, found, "accuracy").shape == (720, 1400, 3)
        assert [path.name for path in panels.save(tmp_path)] == ["lesions.png"]
    ((step, _, description),) = events(tmp_path)["lesions"]
    assert step == 8
    assert "without each branch" in description


def test_reuse_is_the_true_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, points = MLP(), spiral(32)[0]
    handle = rdp.attach(model, 0.5, example_inputs=points)
    with Panels(handle, grid(8), tmp_path, grid_size=8) as panels:
        model(points).square().sum().backward()
        panels.log(0)
    features = list(rdp.analysis.extract_features(handle, grid(8)).values())
    reuse = rdp.analysis.feature_reuse(features)
    assert events(tmp_path)["feature_reuse/reused"][0][1] == pytest.approx(reuse.reused, rel=1e-5)


def test_training_does_not_notice(tmp_path: Path) -> None:
    with_panels, without = train(tmp_path)[1], train(None)[1]
    for name, value in without.items():
        assert torch.equal(with_panels[name], value), name


@pytest.mark.parametrize("phase", [rdp.Phase.DROP, rdp.Phase.FREEZE])
def test_frozen_parameters_are_those_that_the_optimizer_leaves_alone(phase: rdp.Phase) -> None:
    seen = set()
    for seed in range(8):
        torch.manual_seed(0)
        model, points = MLP(), spiral(32)[0]
        handle = rdp.attach(model, 0.5, mode="batch", seed=seed, example_inputs=points)
        optimizer = handle.wrap(torch.optim.AdamW(model.parameters(), lr=0.1))
        if phase is rdp.Phase.FREEZE:
            model(points).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert handle.phase is phase
        model(points).sum().backward()
        live, frozen = parameter_counts(handle)
        before = {name: p.clone() for name, p in model.named_parameters()}
        optimizer.step()
        moved = sum(p.numel() for name, p in model.named_parameters() if not torch.equal(p, before[name]))
        assert moved == live
        assert live + frozen == sum(p.numel() for p in model.parameters())
        seen.add(frozen)
    assert len(seen) > 1


def test_rows_that_branches_learn_from_are_those_of_the_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(
        "rdp.tensorboard.panels.training_panel", lambda learning, *a, **k: drawn.append(learning) or BLANK
    )
    torch.manual_seed(0)
    model, points = MLP(), spiral(64)[0]
    handle = rdp.attach(model, 0.5, example_inputs=points)
    masks = defaultdict(list)
    with Panels(handle, grid(8), tmp_path, grid_size=8, images_every=100) as panels:
        for step in range(9):
            model(points).sum().backward()
            panels.log(step)
            masks[handle.phase].append(handle.masks.clone())
            handle.advance()
        panels.draw(9)
    rates = torch.tensor([branch.rate for branch in handle.branches])
    assert rates[0] == 0
    # The first picture, at step 0, has the first step.
    dropped = (~torch.cat(masks[rdp.Phase.DROP][1:], dim=1)).float().mean(dim=1)
    redropped = (~torch.cat(masks[rdp.Phase.FREEZE], dim=1)).float().mean(dim=1)
    redropped[0] = 1  # what has rate 0 learns from all rows
    for phase, learnt, expected in (
        (rdp.Phase.DROP, 1 - dropped, 1 - rates),
        (rdp.Phase.FREEZE, redropped, torch.where(rates > 0, rates, 1)),
    ):
        torch.testing.assert_close(torch.tensor(drawn[-1][phase]), torch.stack((learnt, expected), dim=1))


def test_plain_training_drops_nothing_whatever_the_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr("rdp.tensorboard.panels.training_panel", lambda *a, **k: drawn.append(a) or BLANK)
    model, points = MLP(), spiral(32)[0]
    handle = rdp.attach(model, 0.5, phases=(rdp.Phase.PLAIN,), example_inputs=points)
    with Panels(handle, grid(8), tmp_path, grid_size=8) as panels:
        model(points).sum().backward()
        panels.log(0)
    learning, history = drawn[-1]
    assert learning == {rdp.Phase.PLAIN: [(1.0, 1.0)] * 3}
    assert history.points["rdp/rate"] == [(0, 0.0)]


def test_features_are_extracted_for_pictures_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extracted = []
    monkeypatch.setattr(
        "rdp.tensorboard.panels.extract_features", lambda *a: extracted.append(1) or rdp.analysis.extract_features(*a)
    )
    model, points = MLP(), spiral(32)[0]
    handle = rdp.attach(model, 0.5, example_inputs=points)
    with Panels(handle, grid(8), tmp_path, grid_size=8, scalars_every=2, images_every=10) as panels:
        for step in range(12):
            model(points).sum().backward()
            panels.log(step)
            handle.advance()
    assert len(extracted) == 2


BY_PHASE = ("loss", "gradient_norm", "learning_rows", "frozen_parameters")
BLANK = torch.zeros(8, 8, 3, dtype=torch.uint8).numpy()


@pytest.mark.parametrize("name", ["resnet50", "vit_tiny_patch16_224"])
def test_image_models_from_their_first_forward(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **({"img_size": 64} if "vit" in name else {}))
    images = torch.randn(4, 3, 64, 64)
    handle = rdp.attach(model, 0.1)
    optimizer = handle.wrap(torch.optim.SGD(model.parameters(), lr=0.01))
    with Panels(handle, images, tmp_path, images_every=2) as panels:
        for step in range(2):
            loss = model(images).square().mean()
            loss.backward()
            panels.log(step, loss=loss)
            optimizer.step()
    assert set(panels.images) == {"features/nodes", "features/similarity", "training/overview"}
    assert all(weight is None for weight in branch_weights(handle))
    assert {"features/nodes", "features/similarity", "feature_reuse/reused"} <= set(events(tmp_path))


class Conv(nn.Module):
    """Of any number of dimensions."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kind(3, 3, 1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.mark.parametrize(
    ("model", "inputs", "drawn"),
    [
        (MLP(), torch.randn(16, 2), True),  # a map has a pixel for each input
        (Conv(nn.Conv1d), torch.randn(4, 3, 17), True),  # and one for each place
        (Conv(nn.Conv2d), torch.randn(4, 3, 4, 6), True),
        (Conv(nn.Conv3d), torch.randn(4, 3, 4, 4, 4), False),  # of videos there is no picture
    ],
)
def test_pictures_of_any_network(model: nn.Module, inputs: Tensor, drawn: bool, tmp_path: Path) -> None:
    with Panels(rdp.attach(model, example_inputs=inputs), inputs, tmp_path) as panels:
        assert set(panels.draw(0)) - {"features/nodes"} == {"features/similarity", "training/overview"}
        assert ("features/nodes" in panels.images) == drawn


def test_weights_are_those_of_branches_with_one_matrix() -> None:
    model = MLP()
    weights = branch_weights(rdp.attach(model, example_inputs=torch.randn(2, 2)))
    assert [w is not None and torch.equal(w, layer[0].weight) for w, layer in zip(weights, model.layers, strict=True)]
    assert all(weight is not None for weight in weights)


def test_a_given_writer_is_shared_and_left_open(tmp_path: Path) -> None:
    handle = rdp.attach(MLP(), example_inputs=torch.randn(2, 2))
    with SummaryWriter(str(tmp_path)) as writer:
        with Panels(handle, grid(8), writer, grid_size=8) as panels:
            panels.draw(0)
        writer.add_scalar("mine", 1.0, 0)
    assert {"mine", "features/nodes"} <= set(events(tmp_path))


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    handle = rdp.attach(MLP(), example_inputs=torch.randn(2, 2))
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(rdp.ArgumentError, match=r"cannot write to '.*file/run': Not a directory; choose another"):
        Panels(handle, grid(8), file / "run")
    with pytest.raises(rdp.ArgumentError, match="cannot write to '/proc/run'"):
        Panels(handle, grid(8), "/proc/run")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"scalars_every": 0}, "must be at least 1; got 0 and 1000"), ({"images_every": -1}, "got 20 and -1")],
)
def test_wrong_intervals_are_refused(arguments: dict[str, int], message: str, tmp_path: Path) -> None:
    with pytest.raises(rdp.ArgumentError, match=message):
        Panels(rdp.attach(MLP(), example_inputs=torch.randn(2, 2)), grid(8), tmp_path, **arguments)


def test_wrong_models_and_features_are_named(tmp_path: Path) -> None:
    with pytest.raises(rdp.ArgumentError, match=r"got the model \(MLP\)"):
        Panels(MLP(), grid(8), tmp_path)
    handle = rdp.attach(MLP())
    panels = Panels(handle, grid(8), tmp_path, grid_size=8)
    with pytest.raises(rdp.ArgumentError, match="not known yet"):
        panels.log(0)
    handle.discover(grid(8))
    with pytest.raises(rdp.ArgumentError, match="cannot be drawn as maps"):
        Panels(handle, grid(8), tmp_path, grid_size=9).draw(0)
    with torch.no_grad():
        handle.model.layers[1][0].bias[0] = torch.nan
    with pytest.raises(rdp.ArgumentError, match=r"after 'layers.1' hold NaN.*diverged"):
        panels.draw(0)
