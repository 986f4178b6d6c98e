"""Python's own standard library as text: real, large enough, and on every machine that runs these recipes."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.errors import DataError

HELD_OUT = 10  # every tenth file is for testing


def read_python(root: Path | None = None) -> tuple[NDArray[np.int64], NDArray[np.int64], str]:
    """The modules of the standard library, one after the other, as numbers of characters.

    Args:
        root: a folder of `*.py`; default: the standard library of the Python that runs, without its packages.

    Returns:
        Training text and test text (every tenth file by name), `int64[characters]`, and the characters by number.
        What is not ASCII is left out, and tabs and carriage returns.

    Raises:
        DataError: there are fewer than ten files.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    paths = sorted(root.glob("*.py"))
    if len(paths) < HELD_OUT:
        raise DataError(f"{root} holds {len(paths)} Python files, too few for text to train and test on")
    vocabulary = "\n" + "".join(map(chr, range(32, 127)))
    number = np.full(256, -1, np.int64)
    number[[ord(character) for character in vocabulary]] = np.arange(len(vocabulary))
    texts: tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]] = ([], [])
    for index, path in enumerate(paths):
        numbers = number[np.frombuffer(path.read_bytes(), np.uint8)]
        texts[index % HELD_OUT == HELD_OUT - 1].append(numbers[numbers >= 0])
    return np.concatenate(texts[0]), np.concatenate(texts[1]), vocabulary


class TextLoader:
    """Windows of a text and the same windows one character later; see `data.Loader`.

    Args:
        text: `int64[characters]`.
        classes: how many characters there are.
        context: characters in a window.
        windows: in an epoch.
        batch_size: windows in a batch.
        train: each epoch has new places in the text, which the seed decides; otherwise they are spread evenly.
        seed: of the places.
        device: where batches are put.
    """

    kind = "text"
    channels = 1

    def __init__(
        self,
        text: NDArray[np.int64],
        *,
        classes: int,
        context: int,
        windows: int,
        batch_size: int,
        train: bool,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        if len(text) <= context:
            raise DataError(f"a text of {len(text)} characters has no window of {context} and the one after it")
        self._text, self._context, self._batch_size = torch.from_numpy(text), context, batch_size
        self._train, self._seed, self._device = train, seed, torch.device(device)
        self.samples, self.classes = windows, classes
        self.listing = hashlib.blake2b(text.tobytes(), digest_size=16).hexdigest()

    def __len__(self) -> int:
        return self.samples // self._batch_size if self._train else -(-self.samples // self._batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """See `data.Loader.epoch`: characters and their successors, int64 `Tensor[N, context]` each."""
        places = len(self._text) - self._context
        if self._train:
            chosen = np.random.default_rng([self._seed, epoch]).integers(places, size=self.samples)
        else:
            chosen = np.arange(self.samples) * places // self.samples
        window = torch.arange(self._context + 1)
        for batch in range(start, len(self)):
            rows = torch.from_numpy(chosen[batch * self._batch_size : (batch + 1) * self._batch_size])
            characters = self._text[rows[:, None] + window].to(self._device)
            yield characters[:, :-1], characters[:, 1:]

    def close(self) -> None:
        """Nothing to end."""
