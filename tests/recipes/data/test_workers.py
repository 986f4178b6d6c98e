"""Worker processes of the folder loader: they outlive signals to the group, and nothing else."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import closing
from pathlib import Path

import pytest
import torch
from data import DataError
from data.folder_loader import lost_worker
from data.loader import make_loader

pytestmark = pytest.mark.timeout(120)
RECIPES = Path(__file__).parents[3] / "recipes"


def open_loader(photographs, workers=2):
    return make_loader(
        "imagenet",
        "train",
        train=True,
        data_dir=photographs,
        loader="torch",
        batch_size=2,
        device="cpu",
        resolution=16,
        workers=workers,
    )


def processes(loader):
    return loader._loader._iterator._workers


def alive(pid):
    """Whether a process runs; one that has ended and waits for its parent to ask does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_closing_ends_them_in_the_middle_of_an_epoch_while_something_still_holds_the_iterator(photographs):
    loader = open_loader(photographs)
    batches = loader.epoch(0)
    next(batches)
    workers = processes(loader)
    started = time.monotonic()
    loader.close()
    assert time.monotonic() - started < 5
    assert not any(worker.is_alive() for worker in workers)
    with pytest.raises(RuntimeError, match="closed"):
        next(loader.epoch(1))


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


@pytest.mark.parametrize("late", [0.0, 0.5])
def test_signals_to_the_process_group_do_not_end_them(late, photographs):
    """Not even those that come before a worker ignores them, however late it does."""
    with closing(open_loader(photographs)) as loader:
        begin = loader._loader.worker_init_fn
        loader._loader.worker_init_fn = lambda worker: (time.sleep(late * worker), begin(worker))
        batches = loader.epoch(0)
        next(batches)  # of the first worker; the second may not have begun
        for worker in processes(loader):
            for number in SIGNALS:
                os.kill(worker.pid, number)
        assert len(list(batches)) == len(loader) - 1
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []).isdisjoint(SIGNALS)


def kill_workers_in_mid_epoch(loader):
    for _ in loader.epoch(0):
        for worker in processes(loader):
            worker.kill()
            worker.join()


def test_one_that_is_killed_is_named(photographs):
    with closing(open_loader(photographs)) as loader:
        with pytest.raises(RuntimeError, match="DataLoader worker") as raised:
            kill_workers_in_mid_epoch(loader)
        assert "give fewer --workers, then go on with --resume" in str(lost_worker(raised.value))
    assert lost_worker(RuntimeError("something else")) is None
    assert isinstance(lost_worker(raised.value), DataError)


# An uncaught exception whose traceback holds the iterator; and a parent that is killed.
PROGRAM = """
    import multiprocessing, os, sys
    sys.path.insert(0, {recipes!r})
    from data.loader import make_loader
    loader = make_loader("imagenet", "train", train=True, data_dir={folder!r}, loader="torch", batch_size=2,
                         device="cpu", resolution=16, workers=2)
    multiprocessing.set_start_method({method!r}, force=True)
    batches = loader.epoch(0)
    next(batches)
    print(*[worker.pid for worker in loader._loader._iterator._workers], flush=True)
    {end}
"""


@pytest.mark.parametrize(
    ("end", "status", "method"),
    [
        ("raise KeyError(1)", 1, "fork"),
        ("os.kill(os.getpid(), 9)", -9, "forkserver"),
        pytest.param("os.kill(os.getpid(), 9)", -9, "fork", marks=pytest.mark.slow),
        pytest.param("sys.exit(3)", 3, "fork", marks=pytest.mark.slow),
    ],
)
def test_they_end_with_their_parent_however_it_ends(end, status, method, photographs):
    program = textwrap.dedent(PROGRAM).format(recipes=str(RECIPES), folder=str(photographs), end=end, method=method)
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as run:
        try:
            workers = [int(pid) for pid in run.stdout.readline().split()]
            assert len(workers) == 2
            assert run.wait(20) == status
        finally:
            run.kill()
    until = time.monotonic() + 10
    while any(map(alive, workers)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(alive, workers))


@pytest.mark.parametrize("workers", [0, 2])
def test_torchs_own_generator_is_left_alone(workers, photographs):
    with closing(open_loader(photographs, workers)) as loader:
        before = torch.get_rng_state()
        for epoch in range(2):
            list(loader.epoch(epoch))
        assert torch.equal(torch.get_rng_state(), before)


def test_the_listing_tells_data_apart_and_not_where_it_lies(photographs, tmp_path):
    (tmp_path / "moved").symlink_to(photographs)
    with closing(open_loader(photographs, 0)) as one, closing(open_loader(tmp_path / "moved", 0)) as other:
        assert one.listing == other.listing
        with closing(
            make_loader("imagenet", "test", train=False, data_dir=photographs, batch_size=2, device="cpu")
        ) as test:
            assert test.listing != one.listing
