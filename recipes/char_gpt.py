"""A GPT that predicts the next character of Python's own standard library: no download, no BatchNorm.

    python recipes/char_gpt.py                                       # RDP, five seeds
    python recipes/char_gpt.py --algorithm standard --depth 12
    python recipes/char_gpt.py --help

The text is that of the Python that runs it (`data/text.py`): every tenth module is for testing. Results go to
results/DATASET/MODEL/ALGORITHM/seed-N; "top1" is the share of characters that were predicted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from engine import Config, Range, RunError, command_line, interruptible, parse

OF_IMAGES: tuple[str, ...] = ("small_stem", "stem_stride", "model_kwargs", "download", "loader", "augment", "limit")
OF_IMAGES += ("workers", "test_flip", "channels_last")


@dataclass(frozen=True)
class CharGptConfig(Config):
    """Train a character GPT. Adapted from nanoGPT's settings for characters (Karpathy), without dropout."""

    dataset: Literal["python"] = "python"
    """The only one here: the standard library of the Python that runs."""
    model: Literal["gpt"] = "gpt"
    """The only one here."""
    depth: Annotated[int, Range(1)] = 8
    """Blocks, of two branches each."""
    width: Annotated[int, Range(1)] = 192
    """Numbers of a character within the network."""
    heads: Annotated[int, Range(1)] = 6
    """Heads of attention; they share the width."""
    context: Annotated[int, Range(1)] = 64
    """Characters in a window."""
    windows: Annotated[int, Range(1)] = 640
    """Windows in an epoch."""
    epochs: Annotated[int, Range(1)] = 20
    """How often `windows` windows are trained on, always new ones."""
    batch_size: Annotated[int, Range(1)] = 16
    """Windows in an optimizer step."""
    optimizer: str = "adamw"
    """Any optimizer of timm."""
    lr: Annotated[float | None, Range(0)] = 1e-3
    """Peak learning rate."""
    weight_decay: Annotated[float, Range(0)] = 0.1
    """Weight decay, of matrices only."""
    warmup_epochs: Annotated[float, Range(0)] = 2.0
    """Epochs in which the learning rate grows linearly from 1e-5."""
    label_smoothing: Annotated[float, Range(0, below=1)] = 0.0
    """Label smoothing of the training loss."""
    limit_test: Annotated[int | None, Range(1)] = 512
    """Windows that are tested on, spread evenly over the test text."""

    def __post_init__(self) -> None:
        """Refuse what cannot be trained, and what only images have.

        Raises:
            RunError: one of the settings, named.
        """
        super().__post_init__()
        if changed := [name for name in OF_IMAGES if getattr(self, name) != getattr(Config, name)]:
            raise RunError(f"--{changed[0].replace('_', '-')} is for images, and this recipe reads text: leave it out")
        if self.width % self.heads:
            raise RunError(f"--width {self.width} is no multiple of --heads {self.heads}")


def configure(args: list[str]) -> CharGptConfig:
    """Read the command line."""
    return parse(CharGptConfig, args)


if __name__ == "__main__":
    config = command_line(configure)  # before the imports below, which take seconds

with interruptible():
    import torch
    from data.text import TextLoader, read_python
    from engine.launch import World
    from engine.main import main
    from engine.train import train
    from torch import Tensor, nn
    from torch.nn import functional


class Attention(nn.Module):
    """Causal attention with several heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Attend from each character to those up to it, `Tensor[N, T, width]`."""
        n, t, width = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind()
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(attended.transpose(1, 2).reshape(n, t, width))


class Block(nn.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(width), Attention(width, heads))
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """`Tensor[N, T, width]` to the same."""
        x = x + self.attention(x)
        return x + self.mlp(x)


class CharGpt(nn.Module):
    """A decoder of pre-norm blocks.

    Source: Radford et al. 2019 (GPT-2); weights from N(0, 0.02), those that end branches smaller by sqrt(2 * depth).
    """

    def __init__(self, characters: int, depth: int, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, width)
        self.position = nn.Parameter(torch.zeros(context, width))
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, characters, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                ends_branch = name.endswith(("out.weight", "mlp.3.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * depth) ** 0.5 if ends_branch else 0.02)

    def forward(self, characters: Tensor) -> Tensor:
        """Scores of the next characters, `Tensor[N, characters, T]`, of `Tensor[N, T]`."""
        x = self.embedding(characters) + self.position[: characters.shape[1]]
        return self.head(self.norm(self.blocks(x))).transpose(1, 2)


def run(config: CharGptConfig, seed: int, world: World) -> None:
    """Train one seed."""
    if world.size > 1:
        raise RunError("char_gpt.py trains on one device: leave --devices out")
    text, test_text, vocabulary = read_python()
    common: dict[str, Any] = {"classes": len(vocabulary), "context": config.context, "device": str(world.device)}
    batch = config.micro_batch(world.size)
    train_data = TextLoader(text, windows=config.windows, batch_size=batch, train=True, seed=seed, **common)
    test_data = TextLoader(test_text, windows=config.limit_test or 512, batch_size=64, train=False, **common)
    model = CharGpt(len(vocabulary), config.depth, config.width, config.heads, config.context)
    train(model, train_data, test_data, config=config, seed=seed, world=world, vocabulary=vocabulary)


if __name__ == "__main__":
    main(config, run)
