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

import rdp
from engine.config import Config
from engine.files import write_atomically
from engine.messages import log
from engine.progress import tqdm
from rdp.tensorboard import Events, Panels

_GROUPS = {"train": "train", "test": "test", "ema": "test_ema"}
_WHOLE_NAMES = {"lr": "train/lr", "train_seconds": "time/epoch_seconds", "images_per_second": "time/images_per_second"}


def tag_of(name: str) -> str:
    """Where TensorBoard has a number of the history: "train_loss" is `train/loss`, "ema_top1" `test_ema/top1`."""
    if name in _WHOLE_NAMES:
        return _WHOLE_NAMES[name]
    first, _, rest = name.partition("_")
    if first not in _GROUPS:
        return f"test/{name}"
    return f"{_GROUPS[first]}/{rest.removeprefix('test_')}"


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
            unit="sample",
            unit_scale=True,
            smoothing=0.05,
            dynamic_ncols=True,
            **({"disable": True} if folder is None or not config.progress else {}),
        )
        self._writer: SummaryWriter | None = None
        if folder is not None:
            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step or None)
            self._events = Events(self._writer)
            with self._spared():
                self._events.layout()
                self._events.settings({"title": title, **config.to_json(), "lr": config.peak_lr})
        self._write_history()

    def open_panels(self, handle: rdp.ResidualDropPath | None, images: Tensor, vocabulary: str | None = None) -> None:
        """Draw pictures of feature reuse and masks from now on, if `panels` of the configuration asks for them.

        Args:
            handle: attached to the model.
            images: on which features are compared, `Tensor[N, C, H, W]`; or texts, `Tensor[N, T]` of numbers.
            vocabulary: of texts, the characters by number.
        """
        if self._writer is None or handle is None:
            return
        self._events.text("model", f"```\n{handle}\n```")
        if self._every:
            tokens = [vocabulary[number] for number in images[0].tolist()] if vocabulary is not None else None
            self._panels = Panels(handle, images, self._writer, images_every=self._every, tokens=tokens)

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
            tags = {tag_of(name): value for name, value in numbers.items()}
            if self._panels is not None:  # whose points are closer together
                del tags["train/loss"]
            self._events(step, tags, {})
            self._events.flush()
        tested = f"test {numbers['test_loss']:.4f}, top-1 {numbers['top1']:.2f} %, " if "top1" in numbers else ""
        trained = f"epoch {epoch + 1}/{epochs}: loss {numbers['train_loss']:.4f}, "
        self.say(f"{trained}{tested}{numbers['images_per_second']:.0f} samples/s")

    def say(self, sentence: str) -> None:
        """Print a line."""
        if self._folder is not None:
            log.info(sentence)

    def __enter__(self) -> Self:
        """Nothing to do: the records are open."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Close the bar and TensorBoard's file."""
        self._bar.close()
        with self._spared():
            if self._writer is not None:
                self._writer.close()

    def finish(self, result: dict[str, Any], step: int) -> None:
        """Tell TensorBoard the last numbers, by which its HParams tab sorts runs; after `__exit__`.

        Args:
            result: of the run; what in it is a number and no setting is told.
            step: optimizer steps done.
        """
        if self._folder is None:
            return
        with self._spared(), SummaryWriter(str(self._folder / "tensorboard")) as writer:
            tell_result(Events(writer), result, step)

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
            log.warning("cannot write the records of %s: %s; the run goes on", self._folder, error.strerror)


def tell_result(events: Events, result: dict[str, Any], step: int) -> None:
    """Write the numbers of a finished run that are no settings, and that it is finished."""
    numbers = {name: value for name, value in result.items() if isinstance(value, (int, float))}
    events(step, {f"final/{name}": value for name, value in numbers.items() if name not in ("rate", "seed")}, {})
    events.finished()
