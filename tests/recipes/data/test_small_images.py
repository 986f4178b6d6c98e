"""CIFAR-10 as class folders of images, and the text of the character GPT."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from data import DataError
from data.beton import open_beton
from data.beton_writer import ArraySource, write_beton
from data.datasets import read_arrays
from data.loader import make_loader
from data.text import TextLoader, read_python
from PIL import Image

NAMES = [f"class{index}" for index in range(10)]


def write_folders(root: Path, per_class: int = 2, size: int = 32, names: list[str] = NAMES, test: str = "test") -> Path:
    rng = np.random.default_rng(0)
    for split in ("train", test):
        for name in names:
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(per_class):
                pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


@pytest.mark.parametrize("test", ["test", "val"])
def test_class_folders_are_read_as_torchvisions_files_are(test: str, tmp_path: Path) -> None:
    write_folders(tmp_path, test=test)
    for split, folder in (("train", "train"), ("test", test)):
        arrays = read_arrays("cifar10", split, tmp_path)  # type: ignore[arg-type]
        assert arrays.images.shape == (20, 3, 32, 32)
        assert arrays.labels.tolist() == [label for label in range(10) for _ in range(2)]
        stored = np.asarray(Image.open(tmp_path / folder / "class3" / "1.png"))
        assert np.array_equal(arrays.images[7], stored.transpose(2, 0, 1))


def test_gray_images_become_coloured(tmp_path: Path) -> None:
    write_folders(tmp_path)
    Image.fromarray(np.full((32, 32), 7, np.uint8)).save(tmp_path / "train" / "class0" / "0.png")
    assert (read_arrays("cifar10", "train", tmp_path).images[0] == 7).all()


@pytest.mark.parametrize(
    ("size", "names", "said"),
    [
        (40, NAMES, r"class0/0\.png has 40 x 40 pixels and cifar10 32 x 32: .*recipes/imagenet_ffcv\.py --resolution"),
        (
            32,
            NAMES[:4],
            r"has 4 class folders and cifar10 10: folders of other images are for recipes/imagenet_ffcv\.py",
        ),
    ],
)
def test_other_images_are_refused_with_the_recipe_that_takes_them(
    size: int, names: list[str], said: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=said):
        read_arrays("cifar10", "train", write_folders(tmp_path, size=size, names=names))


def test_nothing_is_refused_with_both_ways_and_the_recipe_of_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cifar-10-batches-py there, or class folders .* recipes/imagenet_ffcv\.py"):
        read_arrays("cifar10", "train", tmp_path)


def test_a_beton_of_them_holds_the_same(tmp_path: Path) -> None:
    arrays = read_arrays("cifar10", "train", write_folders(tmp_path))
    write_beton(tmp_path / "cifar10-train.beton", ArraySource(arrays), workers=1)
    beton = open_beton(tmp_path / "cifar10-train.beton")
    assert beton.shape == (3, 32, 32)
    assert beton.labels.tolist() == arrays.labels.tolist()


def test_a_limit_of_the_test_is_called_by_its_name(tmp_path: Path) -> None:
    options = {"train": False, "batch_size": 4, "device": "cpu", "data_dir": write_folders(tmp_path)}
    assert make_loader("cifar10", "test", limit=6, **options).samples == 6  # type: ignore[arg-type]
    with pytest.raises(DataError, match="--limit-test must be from 1 to the 20"):
        make_loader("cifar10", "test", limit=21, **options)  # type: ignore[arg-type]


def test_the_text_is_whole_files_of_which_every_tenth_is_for_testing(tmp_path: Path) -> None:
    for index in range(20):
        (tmp_path / f"m{index:02}.py").write_bytes(f"m{index}\té\r\n".encode())
    text, test, vocabulary = read_python(tmp_path)
    assert "".join(vocabulary[i] for i in test) == "m9\nm19\n"
    assert "".join(vocabulary[i] for i in text).startswith("m0\nm1\nm2\n")
    (tmp_path / "few").mkdir()
    with pytest.raises(DataError, match="holds 0 Python files"):
        read_python(tmp_path / "few")


def test_windows_are_a_pure_function_of_seed_and_epoch_and_followed_by_the_next_character() -> None:
    def batches(epoch: int, start: int = 0, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
        numbers = np.arange(1000)
        loader = TextLoader(numbers, classes=1000, context=5, windows=11, batch_size=4, train=True, seed=seed)
        assert len(loader) == 2
        return list(loader.epoch(epoch, start))

    for characters, following in batches(0):
        assert characters.shape == (4, 5)
        assert torch.equal(characters + 1, following)
    assert torch.equal(batches(3)[1][0], batches(3, start=1)[0][0])
    assert not torch.equal(batches(0)[0][0], batches(1)[0][0])
    assert not torch.equal(batches(0)[0][0], batches(0, seed=1)[0][0])


def test_the_test_has_every_window_once_spread_over_the_text() -> None:
    loader = TextLoader(np.arange(1005), classes=1005, context=5, windows=10, batch_size=4, train=False)
    firsts = torch.cat([characters[:, 0] for characters, _ in loader.epoch(0)])
    assert firsts.tolist() == list(range(0, 1000, 100))
    assert len(loader) == 3
    with pytest.raises(DataError, match="has no window"):
        TextLoader(np.arange(5), classes=5, context=5, windows=1, batch_size=1, train=False)
