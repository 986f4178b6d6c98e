"""Which samples make up which batch: a pure function of (seed, epoch, rank), the same for every loader."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Sampler:
    """The batches of an epoch, as indices into a split.

    Args:
        indices: the samples to go through, `int64[samples]`.
        batch_size: samples in a batch on this rank.
        train: shuffle, and cut full batches; otherwise keep the order and cut batches of nearly equal size.
        drop_last: leave out the partial last batch of a training epoch.
        rank: this process among `world_size`.
        world_size: processes that share every epoch.
        seed: of the shuffle.
    """

    indices: Indices
    batch_size: int
    train: bool
    drop_last: bool = False
    rank: int = 0
    world_size: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {self.batch_size}")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank must be from 0 to world_size - 1 = {self.world_size - 1}, not {self.rank}")
        if not self.train and 1 == self.batch_size < self.world_size:
            raise ValueError("evaluation on several ranks needs a batch_size of at least 2, not 1")
        if len(self.indices) < self.world_size:
            raise DataError(f"{len(self.indices)} samples are too few for {self.world_size} processes")
        if len(self) == 0:
            raise DataError(
                f"{len(self.indices)} samples do not fill a batch of {self.batch_size} on each of {self.world_size} "
                "processes, and drop_last leaves out the rest: use a smaller batch"
            )

    def __len__(self) -> int:
        """Batches an epoch, the same number on every rank."""
        if not self.train:
            return self._ceil(len(self.indices), self.batch_size * self.world_size)
        per_rank = len(self.indices) // self.world_size
        return per_rank // self.batch_size if self.drop_last else self._ceil(per_rank, self.batch_size)

    def batches(self, epoch: int) -> list[Indices]:
        """The batches of an epoch on this rank, in order."""
        if not self.train:
            # Equal counts of nearly equal batches: no rank waits for another in a collective, none pads with copies.
            return np.array_split(self.indices, len(self) * self.world_size)[self.rank :: self.world_size]
        order = np.random.default_rng([self.seed, epoch]).permutation(self.indices)
        # Rank r gets the r-th slice of every batch of all ranks: 4 ranks of 256 learn from the batches of 1 of 1024.
        all_ranks = self.batch_size * self.world_size
        return [self._share(order[batch * all_ranks : (batch + 1) * all_ranks]) for batch in range(len(self))]

    def _share(self, batch: Indices) -> Indices:
        share = len(batch) // self.world_size
        return batch[self.rank * share : (self.rank + 1) * share]

    @staticmethod
    def _ceil(samples: int, size: int) -> int:
        return -(-samples // size)


def subset(samples: int, limit: int | None, option: str = "--limit") -> Indices:
    """Indices of a split: all of it, or a fixed random subset of `limit` samples, in the split's order."""
    if limit is None:
        return np.arange(samples)
    if not 1 <= limit <= samples:
        raise DataError(f"{option} must be from 1 to the {samples} samples that there are, not {limit}")
    return np.sort(np.random.default_rng(0).permutation(samples)[:limit])
