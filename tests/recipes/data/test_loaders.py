"""The loaders that need no FFCV keep the interface."""

import sys
import threading
from contextlib import closing

import numpy as np
import pytest
import torch
from data import DataError
from data.beton_writer import ArraySource, write_beton
from data.datasets import MNIST10K, read_arrays
from data.loader import make_loader
from PIL import Image

MEMORY = {"dataset": "mnist10k", "limit": 200, "batch_size": 48, "device": "cpu"}


def folder_options(photographs, **options):
    return {
        "dataset": "imagenet",
        "data_dir": photographs,
        "loader": "torch",
        "batch_size": 6,
        "device": "cpu",
        "resolution": 32,
        "workers": 0,
    } | options


@pytest.fixture(params=["memory", "folder"])
def options(request, photographs):
    return MEMORY if request.param == "memory" else folder_options(photographs)


def epoch(options, epoch=0, start=0, split="train", train=True, **more):
    with closing(make_loader(**(options | {"split": split, "train": train} | more))) as loader:
        return list(loader.epoch(epoch, start))


def assert_equal(got, expected):
    assert len(got) == len(expected)
    for batch, other in zip(got, expected, strict=True):
        assert all(torch.equal(tensor, same) for tensor, same in zip(batch, other, strict=True))


def rows(batches):
    """Images with their labels, in an order of their own: what was seen, however it was cut into batches."""
    return sorted(
        (label.item(), image.numpy().tobytes())
        for images, labels in batches
        for image, label in zip(images, labels, strict=True)
    )


def test_tensors_are_as_documented(options):
    for images, labels in epoch(options):
        assert images.dtype == torch.float32
        assert images.is_contiguous()
        assert labels.dtype == torch.int64
        assert images.shape[0] == labels.shape[0]
    with closing(make_loader(**options, split="train", train=True)) as loader:
        assert len(loader) == len(epoch(options))
        assert loader.samples == sum(len(labels) for _, labels in epoch(options))
        assert images.shape[1] == loader.channels


def test_mnist10k_is_the_file_normalized():
    batches = epoch({"dataset": "mnist10k", "batch_size": 100, "device": "cpu"}, split="test", train=False)
    with np.load(MNIST10K) as file:
        pixels, labels = file["images"][8500:], file["labels"][8500:]
    expected = (torch.from_numpy(pixels)[:, None] / 255 - 0.1307) / 0.3081
    torch.testing.assert_close(torch.cat([images for images, _ in batches]), expected, atol=1e-5, rtol=0)
    assert torch.cat([labels for _, labels in batches]).tolist() == labels.tolist()


def test_an_epoch_is_the_same_again_and_differs_from_others(options):
    assert_equal(epoch(options, 3), epoch(options, 3))
    assert not torch.equal(epoch(options, 3)[0][0], epoch(options, 4)[0][0])
    assert not torch.equal(epoch(options, 3)[0][0], epoch(options, 3, seed=1)[0][0])


def test_a_resumed_epoch_goes_on_as_it_would_have(options):
    augment = {"augment": "crop-flip"} if options["dataset"] == "mnist10k" else {}
    whole = epoch(options, 2, **augment)
    for start in range(len(whole) + 1):
        assert_equal(epoch(options, 2, start, **augment), whole[start:])


def test_augmentation_depends_on_the_sample_not_on_its_batch(options):
    augment = {"augment": "crop-flip"} if options["dataset"] == "mnist10k" else {}
    assert rows(epoch(options, **augment)) == rows(epoch(options, batch_size=5, **augment))
    assert rows(epoch(options, **augment)) != rows(epoch(options, augment="none"))


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_see_together_what_one_sees(options, train, world_size):
    split = "train" if train else "test"
    one = rows(epoch(options, split=split, train=train))
    many = rows(
        batch
        for rank in range(world_size)
        for batch in epoch(options, split=split, train=train, rank=rank, world_size=world_size)
    )
    if train:
        assert len(many) == len(one) - len(one) % world_size
        assert set(many) <= set(one)
    else:
        assert many == one


def test_a_loader_can_be_left_and_used_again(options):
    with closing(make_loader(**options, split="train", train=True)) as loader:
        whole = list(loader.epoch(0))
        for _ in range(3):
            for _batch in loader.epoch(1):
                break
        assert_equal(list(loader.epoch(0)), whole)


@pytest.mark.timeout(120)
def test_worker_processes_change_no_image_and_end(photographs):
    options = folder_options(photographs)
    expected = [epoch(options, number) for number in range(2)]
    with closing(make_loader(**(options | {"workers": 2}), split="train", train=True)) as loader:
        assert_equal(list(loader.epoch(0)), expected[0])
        for _batch in loader.epoch(0):
            break
        assert_equal(list(loader.epoch(1)), expected[1])
    with pytest.raises(RuntimeError, match="closed"):
        next(loader.epoch(0))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ffcv")]


def test_progressive_resizing(photographs):
    options = folder_options(photographs, resolution=lambda epoch: 24 + 8 * epoch)
    with closing(make_loader(**options, split="train", train=True)) as loader:
        sides = [{images.shape[-1] for images, _ in loader.epoch(number)} for number in range(3)]
    assert sides == [{24}, {32}, {40}]


def test_files_of_every_kind_are_decoded_to_rgb(tmp_path):
    color = Image.new("RGB", (40, 40), (200, 30, 60))
    for split in ("train", "val"):
        for index, (mode, file_format) in enumerate(
            [("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("RGBA", "PNG")]
        ):
            path = tmp_path / split / f"class{index}" / "image.JPEG"
            path.parent.mkdir(parents=True)
            color.convert(mode).save(path, file_format)  # a PNG called JPEG, as in ImageNet
    images, labels = epoch(folder_options(tmp_path), split="test", train=False)[0]
    assert labels.tolist() == [0, 1, 2, 3]
    pixels = images.mean((2, 3)) * torch.tensor([0.229, 0.224, 0.225]) + torch.tensor([0.485, 0.456, 0.406])
    expected = torch.tensor(color.getpixel((0, 0))) / 255
    gray = torch.full((3,), color.convert("L").getpixel((0, 0)) / 255)
    torch.testing.assert_close(pixels, torch.stack([expected, gray, expected, expected]), atol=0.03, rtol=0)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("keep", [0, 100, 0.5])
def test_a_broken_photograph_is_named(tmp_path, photographs, workers, keep):
    for source in photographs.rglob("*.jpg"):
        path = tmp_path / source.relative_to(photographs)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source.read_bytes())
    broken = tmp_path / "train" / "class1" / "4.jpg"
    whole = broken.read_bytes()
    broken.write_bytes(whole[: keep if isinstance(keep, int) else int(len(whole) * keep)])
    with pytest.raises(DataError, match=rf"^{broken} cannot be decoded \(.*\); replace or remove it$"):
        epoch(folder_options(tmp_path, workers=workers))


def test_folders_that_are_not_right(tmp_path):
    options = folder_options(tmp_path)
    with pytest.raises(DataError, match=rf"there is no folder {tmp_path}/train; --data-dir must hold train/ and val/"):
        epoch(options)
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match=r"train is not a folder of class folders"):
        epoch(options)
    (tmp_path / "train" / "cat").mkdir()
    with pytest.raises(DataError, match=r"train is not a folder of class folders of images .*cat"):
        epoch(options)
    Image.new("RGB", (40, 40)).save(tmp_path / "train" / "cat" / "0.jpg")
    with pytest.raises(DataError, match=r"train has 1 class \(cat\); a classifier needs at least two"):
        epoch(options)
    for name in ("ant", "bee"):
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(tmp_path / "val" / name / "0.jpg")
    with pytest.raises(DataError, match=r"different class folders \(ant, bee, cat\)"):
        epoch(options, split="test")
    with pytest.raises(DataError, match="--data-dir"):
        epoch(options | {"data_dir": None})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"augment": "resized-crop-flip"}, "mnist10k cannot be augmented with 'resized-crop-flip': use --augment auto"),
        ({"dataset": "imagenet", "augment": "crop-flip"}, "imagenet cannot be augmented with 'crop-flip'"),
        ({"limit": 8501}, "--limit must be from 1 to the 8500 samples that there are, not 8501"),
    ],
)
def test_options_that_do_not_go_together_with_the_data(arguments, message):
    with pytest.raises(DataError, match=message):
        make_loader(**(MEMORY | {"split": "train", "train": True} | arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"resolution": 32}, "mnist10k comes in 28 pixels; resolution is for imagenet only"),
        ({"split": "val"}, "split must be one of train, test, not 'val'"),
        ({"loader": "FFCV"}, "loader must be one of auto, ffcv, torch, not 'FFCV'"),
        ({"augment": "flip"}, "augment must be one of auto, none, crop-flip, resized-crop-flip, not 'flip'"),
        ({"dataset": "imagenet1k"}, "no data set is called 'imagenet1k'"),
    ],
)
def test_arguments_that_make_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_loader(**(MEMORY | {"split": "train", "train": True} | arguments))


def test_without_ffcv_auto_takes_torch_and_ffcv_says_how_to_install_it(monkeypatch, tmp_path):
    write_beton(tmp_path / "mnist10k-train.beton", ArraySource(read_arrays("mnist10k", "train")))
    for name in ["ffcv", *(name for name in sys.modules if name.startswith("ffcv."))]:
        monkeypatch.setitem(sys.modules, name, None)  # what an absent package looks like to import
    monkeypatch.delitem(sys.modules, "data.ffcv_pipeline", raising=False)
    monkeypatch.setattr("data.loader.ffcv_is_installed", lambda: False)
    options = MEMORY | {"split": "train", "train": True, "data_dir": tmp_path}
    with closing(make_loader(**options)) as loader:
        assert loader.kind == "memory"
    with pytest.raises(DataError, match=r"apt-get install .*libturbojpeg0-dev.*install_ffcv\.sh.*--loader torch"):
        make_loader(**options, loader="ffcv")
