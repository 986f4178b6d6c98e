"""The real FFCV gives what the other loaders give, and does none of what it does when left to itself."""

import os
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from data import DataError, beton
from data.beton_writer import ArraySource, FolderSource, write_beton
from data.datasets import DATASETS, Arrays, read_arrays
from data.ffcv_loader import FFCVLoader
from data.folder import read_folder
from data.folder_loader import FolderLoader
from data.loader import make_loader
from data.memory_loader import MemoryLoader
from data.sampling import Sampler, subset
from data.transforms import Crop, Pixels

pytestmark = [pytest.mark.ffcv, pytest.mark.timeout(300)]

CPU = torch.device("cpu")


def assert_equal(got, expected):
    assert len(got) == len(expected)
    for batch, other in zip(got, expected, strict=True):
        assert all(torch.equal(tensor, same) for tensor, same in zip(batch, other, strict=True))


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    for split in ("train", "test"):
        write_beton(folder / f"mnist10k-{split}.beton", ArraySource(read_arrays("mnist10k", split)))
    return folder


@pytest.fixture(scope="module")
def betons(tmp_path_factory, photographs):
    """The photographs as .beton, half of them JPEG."""
    folder = tmp_path_factory.mktemp("betons")
    for split in ("train", "test"):
        source = FolderSource(read_folder(photographs, split), jpeg_share=0.5)
        write_beton(folder / f"imagenet-{split}.beton", source)
    return folder


def photograph_options(**options):
    return {"dataset": "imagenet", "batch_size": 4, "device": "cpu", "resolution": 32, "workers": 2} | options


@pytest.fixture(scope="module")
def shared(betons):
    """One loader of photographs for the tests that need no other: compiling takes seconds."""
    with closing(make_loader(**photograph_options(data_dir=betons), split="train", train=True)) as loader:
        yield loader


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(("split", "train"), [("train", True), ("test", False)])
def test_digits_are_the_torch_loaders(digits, split, train, world_size):
    labels = 0
    for rank in range(world_size):
        options = {"split": split, "train": train, "batch_size": 128, "device": "cpu", "data_dir": digits}
        options |= {"rank": rank, "world_size": world_size}
        with (
            closing(make_loader("mnist10k", **options, loader="ffcv")) as ffcv,
            closing(make_loader("mnist10k", **options, loader="torch")) as memory,
        ):
            assert (ffcv.kind, memory.kind) == ("ffcv", "memory")
            assert (ffcv.samples, ffcv.classes, ffcv.channels) == (memory.samples, 10, 1)
            got = list(ffcv.epoch(1))
            assert_equal(got, list(memory.epoch(1)))
            labels += sum(len(batch) for _, batch in got)
    assert labels == ffcv.samples


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("augmented", [False, True])
def test_small_color_images_are_the_memory_loaders(tmp_path, world_size, augmented):
    rng = np.random.default_rng(0)
    arrays = Arrays(rng.integers(0, 256, (203, 3, 32, 32), dtype=np.uint8), np.arange(203) % 10)
    file = write_beton(tmp_path / "small.beton", ArraySource(arrays))
    pixels = Pixels(*(DATASETS["cifar10"].mean, DATASETS["cifar10"].std), CPU, crop=augmented, flip=augmented)
    seen = []
    for rank in range(world_size):
        sampler = Sampler(subset(203, None), 16, train=True, rank=rank, world_size=world_size)
        with closing(FFCVLoader(file, sampler, pixels, Crop(random=False), lambda _: 32, 10, 1)) as ffcv:
            for epoch in range(2):
                assert_equal(list(ffcv.epoch(epoch)), list(MemoryLoader(arrays, sampler, pixels, 10).epoch(epoch)))
        seen += [index for batch in sampler.batches(0) for index in batch]
    assert len(set(seen)) == len(seen) == 203 // world_size * world_size


@pytest.mark.parametrize(("split", "train"), [("train", True), ("test", False)])
def test_photographs_are_the_folder_loaders(betons, photographs, split, train):
    options = photograph_options(split=split, train=train)
    with (
        closing(make_loader(**options, data_dir=betons)) as ffcv,
        closing(make_loader(**(options | {"workers": 0}), data_dir=photographs)) as folder,
    ):
        assert (ffcv.kind, folder.kind, ffcv.classes) == ("ffcv", "folder", 3)
        for (images, labels), (others, other_labels) in zip(ffcv.epoch(1), folder.epoch(1), strict=True):
            assert labels.tolist() == other_labels.tolist()
            # OpenCV and torchvision resize a little differently, and half went through JPEG again. FFCV's centre is
            # that of whole pixels.
            difference = (images - others).abs().mean((1, 2, 3)) * 0.225 * 255
            assert difference.max() < (4 if train else 8)


@pytest.mark.parametrize("jpeg_share", [0.0, 1.0])
def test_a_box_of_the_output_size_is_cut_out_exactly(tmp_path, photographs, jpeg_share):
    listed = read_folder(photographs, "train")
    file = write_beton(tmp_path / "x.beton", FolderSource(listed, jpeg_share=jpeg_share))
    pixels = Pixels((0.0,) * 3, (1 / 255,) * 3, CPU)

    class Window(Crop):
        def boxes(self, epoch, indices, heights, widths, resolution):
            return np.array([[index % 8, index % 5, 24, 24] for index in indices])

    sampler = Sampler(subset(len(file), None), 5, train=False)
    with closing(FFCVLoader(file, sampler, pixels, Window(random=True), lambda _: 24, 3, 2)) as ffcv:
        got = torch.cat([images for images, _ in ffcv.epoch(0)])
    folder = FolderLoader(listed, sampler, pixels, Window(random=True), lambda _: 24, 0)
    expected = torch.cat([images for images, _ in folder.epoch(0)])
    difference = (got - expected).abs()
    if jpeg_share == 0:
        assert difference.max() == 0
    else:  # FFCV decodes JPEG with libjpeg's fast integer transform: the same but for rounding
        assert difference.mean() < 3
        assert difference.max() < 20


def test_crops_are_seeded_for_any_number_of_threads(betons):
    epochs = []
    for workers in (1, 2, 2):
        options = photograph_options(data_dir=betons, workers=workers)
        with closing(make_loader(**options, split="train", train=True)) as loader:
            epochs.append(list(loader.epoch(3)))
    assert_equal(epochs[0], epochs[1])
    assert_equal(epochs[1], epochs[2])


def test_epochs_differ_and_repeat(shared):
    first, second = list(shared.epoch(0)), list(shared.epoch(1))
    assert_equal(list(shared.epoch(0)), first)
    assert not torch.equal(first[0][0], second[0][0])


def test_a_resumed_epoch_goes_on_as_it_would_have(shared):
    whole = list(shared.epoch(2))
    for start in range(len(whole) + 1):
        assert_equal(list(shared.epoch(2, start)), whole[start:])


def test_batches_are_the_consumers_own(shared):
    held = list(shared.epoch(0))  # more batches than FFCV has buffers
    copies = [(images.clone(), labels.clone()) for images, labels in held]
    for images, _ in shared.epoch(1):
        images.zero_()
    assert len(held) > 5
    assert_equal(held, copies)
    assert_equal(list(shared.epoch(0)), held)


def test_leaving_an_epoch_leaks_neither_threads_nor_memory(shared):
    def leave():
        for _batch in shared.epoch(1):
            break

    leave()
    psutil = pytest.importorskip("psutil")  # FFCV requires it
    threads, memory = threading.active_count(), psutil.Process().memory_info().rss
    for _ in range(30):
        leave()
    assert threading.active_count() == threads
    assert psutil.Process().memory_info().rss - memory < 30e6
    assert len(list(shared.epoch(1))) == len(shared)


def test_close_ends_the_thread(digits):
    before = set(threading.enumerate())
    loader = make_loader("mnist10k", "test", train=False, batch_size=64, device="cpu", data_dir=digits, loader="ffcv")
    batches = loader.epoch(0)
    next(batches)
    loader.close()
    loader.close()
    assert set(threading.enumerate()) == before
    with pytest.raises(RuntimeError):
        next(loader.epoch(0))


def test_torchs_threads_are_left_alone(digits):
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        options = {"train": False, "batch_size": 64, "device": "cpu", "data_dir": digits, "loader": "ffcv"}
        with closing(make_loader("mnist10k", "test", **options, workers=1)) as loader:
            list(loader.epoch(0))
            assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)


FORKED = """
import os, sys
from contextlib import closing
from data.loader import make_loader

options = {"train": False, "batch_size": 500, "device": "cpu", "data_dir": sys.argv[1], "loader": "ffcv"}
with closing(make_loader("mnist10k", "test", **options)) as loader:
    list(loader.epoch(0))
    if os.fork() == 0:
        os._exit(0)
    os.wait()
"""


def test_a_process_that_forked_ends(digits):
    recipes = str(Path(beton.__file__).parents[1])
    subprocess.run(
        [sys.executable, "-c", FORKED, digits], env=os.environ | {"PYTHONPATH": recipes}, check=True, timeout=300
    )


def test_numbas_types_are_left_alone(shared):
    import numba

    assert len(list(shared.epoch(0))) == len(shared)
    assert numba.uint8[::1].mutable


def test_more_workers_than_cpus(betons):
    options = photograph_options(data_dir=betons, workers=10_000)
    with closing(make_loader(**options, split="test", train=False)) as loader:
        assert sum(len(labels) for _, labels in loader.epoch(0)) == 10


def test_progressive_resizing(betons):
    options = photograph_options(data_dir=betons, resolution=lambda epoch: 24 + 8 * epoch)
    with closing(make_loader(**options, split="train", train=True)) as loader:
        sides = [{images.shape[-1] for images, _ in loader.epoch(epoch)} for epoch in range(3)]
    assert sides == [{24}, {32}, {40}]


def test_two_loaders_in_turns(shared, betons):
    with closing(make_loader(**photograph_options(data_dir=betons), split="test", train=False)) as other:
        train, test = list(shared.epoch(0)), list(other.epoch(0))
        in_turns = list(zip(shared.epoch(0), other.epoch(0), strict=False))
    assert_equal([batch for batch, _ in in_turns], train[: len(in_turns)])
    assert_equal([batch for _, batch in in_turns], test[: len(in_turns)])


def damage_jpeg(path: Path, index: int) -> int:
    """Overwrite the end of the first JPEG from `index` on; its number."""
    file, data = beton.open_beton(path), bytearray(path.read_bytes())
    for row in file.table[index:]:
        pointer, size = int(row["pointer"]), int(row["size"])
        if data[pointer : pointer + 2] == b"\xff\xd8":
            data[pointer + size // 2 : pointer + size] = bytes(size - size // 2)
            path.write_bytes(data)
            return int(row["sample"])
    raise AssertionError("no JPEG")


def test_a_damaged_jpeg_is_named_and_the_loader_lives_on(tmp_path, betons):
    path = tmp_path / "imagenet-train.beton"
    path.write_bytes((betons / path.name).read_bytes())
    broken = damage_jpeg(path, 10)
    options = photograph_options(data_dir=tmp_path)
    with closing(make_loader(**options, split="train", train=False)) as loader:
        for _ in range(2):
            start, got = time.monotonic(), []
            with pytest.raises(DataError, match=rf"image {broken} of {path} is not a whole JPEG; write the file again"):
                got.extend(images for images, _labels in loader.epoch(0))
            assert time.monotonic() - start < 60
            assert sum(len(images) for images in got) <= broken


def test_any_exception_of_the_thread_reaches_the_consumer(digits, monkeypatch):
    with closing(
        make_loader("mnist10k", "test", train=False, batch_size=64, device="cpu", data_dir=digits, loader="ffcv")
    ) as loader:
        whole = list(loader.epoch(0))
        original = loader._decode

        def fail(epoch, indices, buffers):
            if indices[0] >= 500:
                raise OSError("no more")
            return original(epoch, indices, buffers)

        monkeypatch.setattr(loader, "_decode", fail)
        got = []
        with pytest.raises(OSError, match="no more"):
            got.extend(loader.epoch(0))
        monkeypatch.undo()
        assert_equal(list(loader.epoch(0)), whole)


def test_auto_takes_ffcv_where_the_file_is(digits, tmp_path):
    options = {"train": False, "batch_size": 64, "device": "cpu"}
    with closing(make_loader("mnist10k", "test", **options, data_dir=digits)) as loader:
        assert loader.kind == "ffcv"
    with closing(make_loader("mnist10k", "test", **options, data_dir=tmp_path)) as loader:
        assert loader.kind == "memory"
    with pytest.raises(DataError, match=r"there is no file .*mnist10k-test\.beton; tools/write_beton\.py makes it"):
        make_loader("mnist10k", "test", **options, data_dir=tmp_path, loader="ffcv")


def test_files_of_another_data_set(digits, betons, tmp_path):
    options = {"train": False, "batch_size": 64, "device": "cpu", "data_dir": tmp_path, "loader": "ffcv"}
    (tmp_path / "cifar10-test.beton").symlink_to(digits / "mnist10k-test.beton")
    with pytest.raises(DataError, match=r"holds arrays of 1 x 28 x 28 where cifar10 has arrays of 3 x 32 x 32"):
        make_loader("cifar10", "test", **options)
    (tmp_path / "mnist-test.beton").symlink_to(betons / "imagenet-test.beton")
    with pytest.raises(DataError, match=r"holds photographs where mnist has arrays of 1 x 28 x 28"):
        make_loader("mnist", "test", **options)
    write_beton(
        tmp_path / "mnist-train.beton", ArraySource(Arrays(np.zeros((2, 1, 28, 28), np.uint8), np.array([1, 11])))
    )
    with pytest.raises(DataError, match="has label 11, and mnist has 10 classes"):
        make_loader("mnist", "train", **options)


def test_a_file_of_one_class(photographs, tmp_path):
    folder = read_folder(photographs, "train")
    source = FolderSource(type(folder)(folder.paths, folder.labels * 0, folder.classes))
    write_beton(tmp_path / "imagenet-train.beton", source)
    with pytest.raises(DataError, match="has a single class"):
        make_loader(**photograph_options(data_dir=tmp_path), split="train", train=True)


def test_files_that_ffcvs_own_writer_wrote(tmp_path, photographs):
    from ffcv.fields import IntField, NDArrayField, RGBImageField
    from ffcv.writer import DatasetWriter
    from PIL import Image

    folder = read_folder(photographs, "train")
    images = [np.asarray(Image.open(path).convert("RGB")) for path in folder.paths]
    pairs = list(zip(images, folder.labels.tolist(), strict=True))
    path = tmp_path / "rgb.beton"
    DatasetWriter(
        str(path), {"image": RGBImageField(write_mode="raw"), "label": IntField()}, num_workers=2
    ).from_indexed_dataset(pairs, chunksize=3)
    file = beton.open_beton(path)
    assert file.labels.tolist() == folder.labels.tolist()
    assert file.heights.tolist() == [image.shape[0] for image in images]

    arrays = read_arrays("mnist10k", "test")
    path = tmp_path / "mnist10k-test.beton"
    fields = {"image": NDArrayField(np.dtype("u1"), (1, 28, 28)), "label": IntField()}
    DatasetWriter(str(path), fields, num_workers=2).from_indexed_dataset(
        list(zip(arrays.images, arrays.labels, strict=True))
    )
    options = {"train": False, "batch_size": 100, "device": "cpu", "data_dir": tmp_path}
    with (
        closing(make_loader("mnist10k", "test", **options, loader="ffcv")) as ffcv,
        closing(make_loader("mnist10k", "test", **options, loader="torch")) as memory,
    ):
        assert_equal(list(ffcv.epoch(0)), list(memory.epoch(0)))


def test_ffcvs_own_reader_reads_our_files(digits, betons):
    from ffcv.reader import Reader

    for path in (digits / "mnist10k-test.beton", betons / "imagenet-train.beton"):
        reader, file = Reader(str(path)), beton.open_beton(path)
        assert reader.num_samples == len(file)
        assert reader.field_names == ["image", "label"]
        assert reader.metadata["f1"].tolist() == file.labels.tolist()
        assert sorted(reader.alloc_table.tolist()) == file.table.tolist()
