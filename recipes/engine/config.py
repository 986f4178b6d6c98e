"""The settings that all recipes share, typed; a recipe derives its own dataclass and changes the defaults.

    @dataclass(frozen=True)
    class MnistConfig(Config):
        epochs: int = 20

    config = parse(MnistConfig)      # from the command line; `--help` is made from the comments below

"paper" is Park 2024, section 4. What it leaves open has the default of timm's training script (timm 1.0, `train.py`),
marked "timm".
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import cleandoc
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

import tyro
from data import Augment, LoaderChoice

from engine.errors import RunError
from engine.naming import named
from engine.ranges import Range, check_ranges

Algorithm = Literal["standard", "droppath", "rdp"]
PhaseName = Literal["drop", "freeze", "plain"]

OF_DROPPING = ("decay", "sampling", "compute", "start", "stop", "rate_schedule")
OF_FREEZING = ("phases", "freeze", "freeze_outside")
NAMED_BY_THE_PATH = frozenset({"dataset", "model", "algorithm", "mode", "rate", "match"})
# What may differ between a run and its resumption: where and for how long it runs, never what it computes. Of loaders
# the one that reads counts, which checkpoints hold with the data, and not how it was asked for.
FREE_ON_RESUME = frozenset(
    {
        "resume",
        "seeds",
        "seed",
        "out",
        "data_dir",
        "download",
        "loader",
        "workers",
        "checkpoint_minutes",
        "progress",
        "lesions",
    }
)


@dataclass(frozen=True)
class Config:
    """Settings of a training run."""

    # Model and algorithm.
    model: str = "resnet50"
    """Any timm model, such as resnet50 or resnet50d (paper)."""
    small_stem: bool = False
    """Give a ResNet a 3x3 stem of stride 1 without pooling, the custom for 32x32 images; the paper does not name it."""
    stem_stride: Annotated[int, Range(1, most=2)] = 1
    """Stride of the small stem; 2 is four times cheaper."""
    model_kwargs: tuple[str, ...] = ()
    """Arguments of the timm model as NAME=VALUE, such as "layers=(1,1,1,1)" (timm's --model-kwargs)."""
    algorithm: Algorithm = "rdp"
    """standard: plain. droppath: drop and rescale, as timm's DropPath. rdp: drop and freeze in turn, no rescaling."""
    mode: Literal["row", "batch"] = "row"
    """row: a mask per sample (paper, timm). batch: one for the whole batch, which saves compute."""
    rate: Annotated[float, Range(0, below=1)] = 0.1
    """Drop rate of the deepest block (paper, timm)."""
    decay: Literal["linear", "constant"] = "linear"
    """linear: the rate grows from 0 at the first block (paper, timm). constant: all blocks have it."""
    sampling: Literal["bernoulli", "fixed"] = "bernoulli"
    """fixed: as many dropped rows in every step; see `rdp.attach`."""
    freeze: Literal["output", "params"] = "output"
    """What FREEZE stops: the gradient at the branch's output (paper, Algorithm 1), or that of its parameters alone."""
    compute: Literal["auto", "rows", "ghost", "dense"] = "auto"
    """Which rows run; ghost changes the mathematics of BatchNorm, see `rdp.attach`."""
    phases: tuple[PhaseName, ...] = ("drop", "freeze")
    """Phases of the steps, repeated (rdp only); `drop` alone is DropPath without rescaling."""
    start: Annotated[float, Range(0, below=1)] = 0.0
    """From this share of the training on the algorithm is on; before it, training is plain."""
    stop: Annotated[float, Range(above=0, most=1)] = 1.0
    """From this share of the training on it is off again."""
    rate_schedule: Literal["constant", "rising", "falling"] = "constant"
    """The rates from `start` to `stop`: constant, or linearly rising from 0 (and staying there), or falling to 0."""
    freeze_outside: Annotated[float, Range(0, most=1)] = 1.0
    """Factor of the learning rate in FREEZE steps for what lies in no branch: stem, head, shortcuts; 0 freezes it."""
    match: Literal["steps", "cost"] = "steps"
    """steps: every algorithm gets the same epochs. cost: the FLOPs of standard, so cheaper steps get more epochs."""

    # Data.
    dataset: str = "mnist10k"
    """Name of the data set."""
    data_dir: Path = Path("data")
    """Where the data set lies."""
    download: bool = False
    """Let torchvision download the data set into data_dir if it is not there."""
    loader: LoaderChoice = "auto"
    """ffcv reads a .beton file (tools/write_beton.py), torch the data set's own files; auto takes FFCV if it can."""
    augment: Augment = "auto"
    """Augmentation of the training images; auto is the data set's usual one."""
    limit: Annotated[int | None, Range(1)] = None
    """Train on a fixed random subset of this many images."""
    limit_test: Annotated[int | None, Range(1)] = None
    """Test on a fixed random subset of this many images."""
    workers: Annotated[int | None, Range(0, most=1024)] = None
    """Loader threads or processes; default: the CPUs there are."""

    # Optimization.
    epochs: Annotated[int, Range(1)] = 300
    """Passes over the training set (timm)."""
    batch_size: Annotated[int, Range(1)] = 128
    """Images in an optimizer step, over all devices and micro-batches."""
    accumulate: Annotated[int, Range(1)] = 1
    """Micro-batches in an optimizer step (gradient accumulation)."""
    optimizer: str = "sgd"
    """Any optimizer of timm; sgd has Nesterov momentum (timm)."""
    lr: Annotated[float | None, Range(0)] = None
    """Peak learning rate; default: 0.1 for every 256 images of the batch (timm), which is 0.05 at 128."""
    momentum: Annotated[float, Range(0, below=1)] = 0.9
    """Momentum of sgd (timm)."""
    weight_decay: Annotated[float, Range(0)] = 2e-5
    """Weight decay, of matrices and kernels only, not of biases and norms (timm)."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """How the learning rate falls to zero, step by step (timm: cosine)."""
    warmup_epochs: Annotated[float, Range(0)] = 5.0
    """Epochs in which the learning rate grows linearly from 1e-5 (timm)."""
    squeeze_from: Annotated[float, Range(0, most=1)] = 1.0
    """From this share of the epochs on the schedule passes faster, ..."""
    squeeze_to: Annotated[float, Range(above=0, most=1)] = 1.0
    """... so that only this share of the remaining epochs is trained."""
    label_smoothing: Annotated[float, Range(0, below=1)] = 0.1
    """Label smoothing of the training loss (timm)."""
    clip_grad: Annotated[float | None, Range(above=0)] = None
    """Clip the norm of the gradient to this; default: no clipping (timm)."""
    ema: Annotated[float | None, Range(above=0, below=1)] = None
    """Keep an exponential moving average of the weights with this decay, and test it too; timm's decay is 0.9998."""
    test_flip: bool = False
    """Test on the mean of the logits of an image and its mirror image."""

    test_every: Annotated[int, Range(1)] = 1
    """Test after every N epochs, and after the last."""
    examine: bool = False
    """At the end also test on training images, take BatchNorm's statistics anew and test again, and measure feature
    reuse."""
    count_steps: Annotated[int, Range(1)] = 32
    """Steps in which FLOPs are counted before the first start of a configuration."""

    # Machine.
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes a GPU if there is one."""
    devices: Annotated[int, Range(0)] = 1
    """How many devices, one process each; 0 takes every visible GPU. Under torchrun, torchrun decides."""
    amp: Literal["off", "bf16", "fp16"] = "off"
    """Mixed precision."""
    channels_last: bool = False
    """Store images and kernels with channels last, faster on GPUs with tensor cores."""
    compile: bool = False
    """Compile the model with torch.compile."""
    fsdp: bool = False
    """Shard parameters, gradients and optimizer state over the devices (FSDP2), for models that outgrow one."""

    # The run.
    seeds: Annotated[int, Range(1)] = 5
    """How many runs, with the seeds `seed`, `seed + 1`, ... (paper: 5)."""
    seed: Annotated[int, Range(0, below=2**32)] = 0
    """The first seed."""
    out: Path | None = None
    """Results folder; default: results/DATASET/MODEL/ALGORITHM, with every setting that is not the default."""
    resume: bool = False
    """Go on with the run in the results folder, from its last good checkpoint; finished seeds are left alone."""
    checkpoint_minutes: Annotated[float, Range(above=0)] = 10.0
    """Write a checkpoint this often, besides at the end of each epoch and on SIGTERM, SIGINT, SIGHUP and SIGUSR1."""
    panels: Annotated[int, Range(0)] = 0
    """Draw TensorBoard pictures of feature reuse and masks every N steps, about a second each; 0: none."""
    lesions: bool = False
    """At the end test the network without each branch, and without more and more of them; see docs/shallower.md."""
    progress: bool = True
    """Show a progress bar with throughput and time left."""

    @property
    def dropping(self) -> float:
        """The share of the training in which the algorithm is on."""
        ends = 1.0 if self.rate_schedule == "rising" else self.stop
        return ends - (0.0 if self.rate_schedule == "falling" else self.start)

    def __post_init__(self) -> None:
        """Refuse what cannot be trained.

        Raises:
            RunError: a setting is out of its range, named with its value.
        """
        check_ranges(self)
        if self.warmup_epochs >= self.epochs:
            raise RunError(
                f"--warmup-epochs {self.warmup_epochs:g} do not end within --epochs {self.epochs}, so the learning "
                "rate would never reach its peak: give fewer, such as --warmup-epochs 0"
            )
        if self.start >= self.stop:
            raise RunError(f"--start {self.start:g} is not before --stop {self.stop:g}, so nothing would be dropped")
        for names, needs in (OF_DROPPING, ("droppath", "rdp")), (OF_FREEZING, ("rdp",)):
            changed = [name for name in names if getattr(self, name) != getattr(Config, name)]
            if changed and self.algorithm not in needs:
                option = changed[0].replace("_", "-")
                raise RunError(f"--{option} does nothing with --algorithm {self.algorithm}: leave it out")
        if self.stem_stride != 1 and not self.small_stem:
            raise RunError("--stem-stride is the stride of --small-stem: give both or neither")
        if self.match == "cost" and self.length < 1:
            raise RunError("--squeeze-to decides how many epochs there are, and so does --match cost: give one of them")
        if self.fsdp and (self.ema is not None or self.compile or self.panels or self.lesions):
            raise RunError(
                "--fsdp does not go together with --ema, --compile, --panels or --lesions: leave one of them out"
            )

    @property
    def usual(self) -> Config:
        """What the settings are where the command line is silent; those that differ name the results folder."""
        return type(self)()

    @property
    def label(self) -> str:
        """The algorithm with all that distinguishes it, such as "rdp-row-0.1" or "standard,epochs=20"."""
        label = self.algorithm if self.algorithm == "standard" else f"{self.algorithm}-{self.mode}-{self.rate:g}"
        label += "-equal-cost" if self.match == "cost" else ""
        usual, own = self.usual.identity(), self.identity()
        return named(label, {n: own[n] for n in own if n not in NAMED_BY_THE_PATH and own[n] != usual[n]})

    @property
    def folder(self) -> Path:
        """Where the results go, one sub-folder a seed."""
        return self.out or Path("results", self.dataset, self.model, self.label)

    @property
    def length(self) -> float:
        """The share of the epochs that is left of a squeezed schedule; 1 of a whole one."""
        return self.squeeze_from + self.squeeze_to * (1 - self.squeeze_from)

    @property
    def peak_lr(self) -> float:
        """The highest learning rate of the schedule."""
        return 0.1 * self.batch_size / 256 if self.lr is None else self.lr

    def tested_epochs(self, epochs: int) -> frozenset[int]:
        """The epochs, from 0, after which the network is tested.

        Args:
            epochs: how many are trained.
        """
        return frozenset({*range(self.test_every - 1, epochs, self.test_every), epochs - 1})

    def micro_batch(self, world_size: int) -> int:
        """Images in one forward of one process.

        Raises:
            RunError: the batch cannot be shared equally.
        """
        shares = world_size * self.accumulate
        if self.batch_size % shares:
            raise RunError(
                f"a batch of {self.batch_size} cannot be shared equally by {world_size} processes x {self.accumulate} "
                f"micro-batches: choose a --batch-size that {shares} divides, or other --devices or --accumulate"
            )
        return self.batch_size // shares

    def to_json(self) -> dict[str, object]:
        """The settings as plain values."""
        return {name: _plain(value) for name, value in dataclasses.asdict(self).items()}

    def identity(self) -> dict[str, object]:
        """The settings that decide what is computed: what a checkpoint says of the run that it is of."""
        return {name: value for name, value in self.to_json().items() if name not in FREE_ON_RESUME}

    def describe(self) -> str:
        """The settings, one a line."""
        return "\n".join(f"  {name} = {value}" for name, value in self.to_json().items())

    def changes(self, saved: Mapping[str, object]) -> list[str]:
        """What a saved configuration computes differently, as "name: saved -> ours"; empty if a resume is exact."""
        ours = self.to_json()
        names = sorted((ours.keys() | saved.keys()) - FREE_ON_RESUME)
        return [f"{n}: {saved.get(n)} -> {ours.get(n)}" for n in names if saved.get(n) != ours.get(n)]

    def replace(self, **settings: object) -> Self:
        """A copy with some settings changed."""
        return dataclasses.replace(self, **settings)  # type: ignore[arg-type]


def _plain(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value  # as JSON will give it back


ConfigT = TypeVar("ConfigT", bound=Config)


def parse(kind: type[ConfigT], args: Sequence[str], default: ConfigT | None = None) -> ConfigT:
    """Read the command line; `--help` begins with what the recipe's file and its configuration say of themselves.

    Args:
        kind: the recipe's configuration.
        args: the command line without the program's name.
        default: what holds where the command line is silent; default `kind()`.
    """
    texts = sys.modules[kind.__module__].__doc__, kind.__doc__
    description = "\n\n".join(cleandoc(text) for text in texts if text)
    return tyro.cli(kind, args=list(args), default=default or kind(), description=description)
