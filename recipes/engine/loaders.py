"""The training and the test split of a run, opened together and closed together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

from data.folder_loader import lost_worker
from data.loader import Loader, make_loader

from engine.config import Config
from engine.launch import World

TEST_BATCH = 256  # in one forward of one process; results do not depend on it


@contextmanager
def open_loaders(
    config: Config,
    seed: int,
    world: World,
    *,
    resolution: int | Callable[[int], int] | None = None,
    test_resolution: int | None = None,
) -> Iterator[tuple[Loader, Loader]]:
    """Open the two splits of the configuration's data set.

    Args:
        config: what to read and how.
        seed: of order and augmentation.
        world: shares every batch.
        resolution: of training images, or a function from the epoch to it (`imagenet` only).
        test_resolution: of test images (`imagenet` only).

    Yields:
        The loaders of training and test images; they are closed when the context ends.

    Raises:
        DataError: the data is missing, corrupt, or has too few classes, or a process that reads it was killed.
    """
    train_data = make_loader(
        config.dataset,
        "train",
        train=True,
        batch_size=config.micro_batch(world.size),
        device=str(world.device),
        data_dir=config.data_dir,
        download=config.download,
        loader=config.loader,
        augment=config.augment,
        resolution=resolution,
        limit=config.limit,
        drop_last=True,  # as timm: a step always has a whole batch
        rank=world.rank,
        world_size=world.size,
        seed=seed,
        workers=config.workers,
    )
    with closing(train_data):
        test_data = make_loader(
            config.dataset,
            "test",
            train=False,
            batch_size=TEST_BATCH,
            device=str(world.device),
            data_dir=config.data_dir,
            download=config.download,
            loader=config.loader,
            resolution=test_resolution,
            limit=config.limit_test,
            rank=world.rank,
            world_size=world.size,
            workers=config.workers,
        )
        with closing(test_data):
            try:
                yield train_data, test_data
            except RuntimeError as error:
                if lost := lost_worker(error):
                    raise lost from error
                raise
