"""What recipes/study.py compares: settings (data, network, length) and arms (plain controls and ways of dropping).

Every run is one command: a recipe, the options of the setting, those of the arm, and a seed. docs/evidence.md says why
these, and what counts as better.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Setting:
    """Data, network and length of training, which all arms share."""

    name: str
    title: str
    recipe: str
    """File in recipes/."""
    options: tuple[str, ...]
    epochs: int
    lr: float
    metric: Literal["top1", "test_loss"]
    """What is compared: of the last epoch."""
    cheap: Literal["row", "batch"]
    """The mode that saves work in this network: row mode needs branches without BatchNorm."""
    seconds: float
    """Of a standard run on one core of a Xeon of 2023, for the estimate before the first run is done."""
    batchnorm: bool = False
    only: tuple[str, ...] = ()
    """The arms, if not all."""
    gpu: bool = False
    """Whether it is refused where there is no GPU."""


@dataclass(frozen=True)
class Arm:
    """One way of training."""

    name: str
    title: str
    options: tuple[str, ...]
    cost: float
    """About, of a standard run: for the estimate."""
    seeds: int
    plain: bool = False
    """Whether it is a control, of which the frontier is made."""
    tunes: bool = False
    """Whether it shows if the learning rate of `standard` is near its best; it is not compared."""


_SMALL = ("--limit", "5000", "--augment", "none", "--label-smoothing", "0", "--batch-size", "64", "--test-every", "10")
_VIT = ("img_size=32", "patch_size=8", "embed_dim=96", "depth=8", "num_heads=3")
_PAPER = ("--amp", "bf16", "--channels-last", "--test-every", "10")
_COMPUTE = ("--compute", "rows")
"""Not "auto", which decides by the machine: what an arm costs is to be the same on all."""
_TABLE_1 = ("standard", "standard-0.7", "droppath", "rdp-row", "rdp-batch")

SETTINGS = {
    setting.name: setting
    for setting in (
        Setting(
            name="resnet",
            title="ResNet of 8 blocks (16 to 128 channels), 5,000 CIFAR-10 images, not augmented, 14 epochs",
            recipe="cifar10.py",
            options=(
                *("--model", "resnet18", "--small-stem", "--stem-stride", "2", "--warmup-epochs", "1"),
                *("--model-kwargs", "channels=(16,32,64,128)", "--weight-decay", "5e-4", *_SMALL),
            ),
            epochs=14,
            lr=0.2,
            metric="top1",
            cheap="batch",
            seconds=110,
            batchnorm=True,
        ),
        Setting(
            name="vit",
            title="ViT of 8 blocks (width 96, patches of 8), 5,000 CIFAR-10 images, not augmented, 40 epochs",
            recipe="cifar10.py",
            options=(
                *("--model", "vit_tiny_patch16_224", "--model-kwargs", *_VIT, "--optimizer", "adamw"),
                *("--weight-decay", "0.05", "--warmup-epochs", "4", *_SMALL),
            ),
            epochs=40,
            lr=2e-3,
            metric="top1",
            cheap="row",
            seconds=340,
        ),
        Setting(
            name="gpt",
            title="GPT of 8 blocks (width 192), characters of Python's library, 600 steps of 16 x 64",
            recipe="char_gpt.py",
            options=("--windows", "480", "--test-every", "5"),
            epochs=20,
            lr=1e-3,
            metric="test_loss",
            cheap="row",
            seconds=156,
        ),
        *(
            Setting(
                name=model,
                title=f"{model} as in the paper's Table 1, all of CIFAR-10, timm's settings, 300 epochs",
                recipe="cifar10.py",
                options=("--model", model, *_PAPER),
                epochs=300,
                lr=0.05,
                metric="top1",
                cheap="batch",
                seconds=3600,
                batchnorm=True,
                only=_TABLE_1,
                gpu=True,
            )
            for model in ("resnet50", "resnet50d")
        ),
        Setting(
            name="trial",
            title="a GPT of a few seconds, to try the command",
            recipe="char_gpt.py",
            options=(
                *("--depth", "3", "--width", "16", "--heads", "2", "--context", "16", "--windows", "48"),
                *("--batch-size", "8", "--limit-test", "16", "--warmup-epochs", "1", "--checkpoint-minutes", "1e-9"),
            ),
            epochs=4,
            lr=1e-3,
            metric="test_loss",
            cheap="row",
            seconds=15,
            only=("standard", "standard-0.5", "squeezed-0.85", "rdp-row", "rdp-late-0.5"),
        ),
    )
}

MATTER, REST = 5, 3
"""Seeds of the arms that matter, and of the others."""
LESIONS = ("standard", "droppath", "rdp-row", "rdp-batch")
"""Arms of whose first seed it is measured what each branch is worth."""


def arms(setting: Setting) -> list[Arm]:
    """The arms of a setting, those that matter first."""

    def rdp(*options: str, mode: str = setting.cheap, rate: str = "0.1") -> tuple[str, ...]:
        steps = "256" if mode == "batch" else "64"  # masks that FLOPs are averaged over; batch mode has few of them
        return ("--algorithm", "rdp", "--mode", mode, "--rate", rate, "--count-steps", steps, *_COMPUTE, *options)

    def standard(share: float = 1.0, *options: str, lr: float = 1.0) -> tuple[str, ...]:
        epochs = str(round(setting.epochs * share))
        return ("--algorithm", "standard", "--epochs", epochs, "--lr", f"{setting.lr * lr:g}", *options)

    row = 1.0 if setting.batchnorm else 0.7
    found = [
        Arm("standard", "standard", standard(), 1.0, MATTER, plain=True),
        *(
            Arm(f"standard-{share:g}", f"standard, {share:g} of the steps", standard(share), share, MATTER, plain=True)
            for share in (0.85, 0.7, 0.5)
        ),
        *(
            Arm(
                f"squeezed-{length:g}",
                f"standard, the last {1 - start:.0%} squeezed to {to:.0%} of their steps",
                standard(1.0, "--squeeze-from", f"{start:g}", "--squeeze-to", f"{to:g}"),
                length,
                MATTER,
                plain=True,
            )
            for length, start, to in ((0.95, 0.8, 0.75), (0.85, 0.5, 0.7))
        ),
        Arm(
            "droppath", "DropPath row 0.1, scaled", ("--algorithm", "droppath", "--mode", "row", *_COMPUTE), 1.0, MATTER
        ),
        Arm("rdp-row", "RDP row 0.1", rdp(mode="row"), row, MATTER),
        Arm("rdp-batch", "RDP batch 0.1", rdp(mode="batch"), 0.72, MATTER),
        *(
            Arm(
                f"rdp-late-{part:g}",
                f"RDP {setting.cheap} 0.1, last {part:.0%} of the steps",
                rdp("--start", f"{1 - part:g}"),
                1 - 0.3 * part,
                MATTER,
            )
            for part in (0.2, 0.5)
        ),
        Arm("drop", "DROP alone, row 0.1, not scaled", rdp("--phases", "drop", mode="row"), 1.0, REST),
        Arm("rdp-row-0.3", "RDP row 0.3", rdp(mode="row", rate="0.3"), row, REST),
        Arm("rdp-batch-0.3", "RDP batch 0.3", rdp(mode="batch", rate="0.3"), 0.7, REST),
        Arm("ghost", "RDP row 0.1, compute='ghost'", rdp("--compute", "ghost", mode="row"), 0.8, REST),
        Arm("constant", f"RDP {setting.cheap} 0.1, constant decay", rdp("--decay", "constant"), 0.7, REST),
        Arm("params", "RDP batch 0.1, freeze='params'", rdp("--freeze", "params", mode="batch"), 0.85, REST),
        *(
            Arm(name, f"RDP {setting.cheap} 0.1, DROP to FREEZE {ratio}", rdp("--phases", *phases), cost, REST)
            for name, ratio, phases, cost in (
                ("drop-drop-freeze", "2:1", ("drop", "drop", "freeze"), 0.8),
                ("drop-freeze-freeze", "1:2", ("drop", "freeze", "freeze"), 0.6),
            )
        ),
        *(
            Arm(
                f"outside-{factor:g}",
                f"RDP {setting.cheap} 0.1, what is in no branch at {factor:g} of its rate in FREEZE",
                rdp("--freeze-outside", f"{factor:g}"),
                0.7,
                REST,
            )
            for factor in (0.5, 0)
        ),
        *(
            Arm(f"lr-x{factor:g}", f"standard, learning rate x {factor:g}", standard(lr=factor), 1.0, REST, tunes=True)
            for factor in (0.5, 2)
        ),
    ]
    chosen = setting.only or [arm.name for arm in found if setting.batchnorm or arm.name != "ghost"]
    return [arm for arm in found if arm.name in chosen]


def options(setting: Setting, arm: Arm) -> list[str]:
    """What a recipe is told for a run, but for its seed and where it runs."""
    own = list(arm.options)
    for name, value in (("--epochs", f"{setting.epochs}"), ("--lr", f"{setting.lr:g}")):
        if name not in own:
            own += [name, value]
    return [*setting.options, "--examine", *own]
