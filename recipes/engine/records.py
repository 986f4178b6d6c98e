"""What a run tells while it trains: a progress bar, one JSON line per epoch, and TensorBoard scalars and pictures.

All of it is a copy of what the checkpoints hold: it is told after it is saved, and not being able to ends no run.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import rdp
from engine.config import Config
from engine.files import write_atomically
from rdp.tensorboard import Panels


class Records:
    """The records of one seed, written by the first process only; the others' calls do nothing."""

    def __init__(
        self,
        folder: Path | None,
        config: Config,
        *,
        title: str,
        images: int,
        images_done: int = 0,
        step: int = 0,
        history: list[dict[str, Any]] | None = None,
    ) -> None:
        """Open the records, or go on with them.

        Args:
            folder: the results folder; None writes nothing.
            config: `progress` and `panels`.
            title: what the progress bar is called.
            images: training images of the whole run, all epochs together.
            images_done: those that a run before the resume has done.
            step: the optimizer step to go on from; what TensorBoard has from later steps is cut off.
            history: the epochs that are done; they replace what `metrics.jsonl` holds, which may be ahead of the
                checkpoint that is resumed.
        """
        self.history = list(history or [])
        self._folder = folder
        self._every = config.panels
        self._panels: Panels | None = None
        self._bar = tqdm(
            total=images,
            initial=images_done,
            desc=title,
            unit="img",
            unit_scale=True,
            smoothing=0.05,
            dynamic_ncols=True,
            disable=folder is None or not config.progress,
        )
        self.tensorboard: SummaryWriter | None = None
        if folder is not None:
            self.tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=step or None)
        self._write_history()

    def open_panels(self, handle: rdp.ResidualDropPath | None, images: Tensor) -> None:
        """Draw pictures of feature reuse and masks from now on, if `panels` of the configuration asks for them.

        Args:
            handle: attached to the model.
            images: on which features are compared, `Tensor[N, C, H, W]`.
        """
        if self.tensorboard is not None and self._every and handle is not None:
            self._panels = Panels(handle, images, self.tensorboard, images_every=self._every)

    def gradients(self, step: int, loss: Tensor) -> None:
        """Let the panels look at the gradients; call it between `backward` and the optimizer's step."""
        if self._panels is not None:
            self._panels.log(step, loss=loss)

    def step(self, images: int) -> None:
        """Move the progress bar by the images of an optimizer step."""
        self._bar.update(images)

    def add(self, epoch: int, step: int, numbers: dict[str, float]) -> None:
        """Take the numbers of an epoch into the history, which belongs into the checkpoint; nothing is told yet.

        Args:
            epoch: which one, from 0.
            step: optimizer steps done in the whole run.
            numbers: by name, such as "top1".
        """
        self.history.append({"epoch": epoch, "step": step, **numbers})

    def tell(self, epochs: int) -> None:
        """Write and print the newest epoch of the history, once it is saved.

        Args:
            epochs: how many there are.
        """
        if self._folder is None:
            return
        epoch, step, numbers = (newest := dict(self.history[-1])).pop("epoch"), newest.pop("step"), newest
        self._write_history()
        with self._spared():
            if self.tensorboard is not None:
                for name, value in numbers.items():
                    self.tensorboard.add_scalar(name, value, step)
                self.tensorboard.flush()
        tested = f"test {numbers['test_loss']:.4f}, top-1 {numbers['top1']:.2f} %, " if "top1" in numbers else ""
        trained = f"epoch {epoch + 1}/{epochs}: loss {numbers['train_loss']:.4f}, "
        self.say(f"{trained}{tested}{numbers['images_per_second']:.0f} images/s")

    def say(self, sentence: str) -> None:
        """Print a line above the progress bar."""
        if self._folder is not None:
            self._bar.write(sentence)

    def __enter__(self) -> Self:
        """Nothing to do: the records are open."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Close the bar and TensorBoard's file."""
        self._bar.close()
        with self._spared():
            if self.tensorboard is not None:
                self.tensorboard.close()

    def _write_history(self) -> None:
        if self._folder is None:
            return
        lines = "".join(json.dumps(line) + "\n" for line in self.history)
        with self._spared():
            write_atomically(self._folder / "metrics.jsonl", lines.encode())

    @contextlib.contextmanager
    def _spared(self) -> Iterator[None]:
        # The checkpoint has it all, and it is written anew with the next epoch.
        try:
            yield
        except OSError as error:
            self.say(f"cannot write the records of {self._folder}: {error.strerror}; the run goes on")
