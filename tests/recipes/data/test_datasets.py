"""Readers of small data sets: what they return, and what they say of files that are not right."""

import gzip
import pickle
import re
import struct
import tracemalloc

import numpy as np
import pytest
from data import DataError
from data.datasets import DATASETS, MNIST10K, find_dataset, read_arrays, read_idx
from hypothesis import given
from hypothesis import strategies as st


def write_idx(path, array):
    header = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    data = header + array.astype(np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def write_digits(folder, images, labels, stem="train", suffix=""):
    write_idx(folder / f"{stem}-images-idx3-ubyte{suffix}", images)
    write_idx(folder / f"{stem}-labels-idx1-ubyte{suffix}", labels)


@pytest.fixture
def digits():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (20, 28, 28), dtype=np.uint8), np.arange(20, dtype=np.uint8) % 10


def test_mnist10k_splits_share_nothing_and_leave_nothing_out():
    file = np.load(MNIST10K)
    train, test = read_arrays("mnist10k", "train"), read_arrays("mnist10k", "test")
    assert (len(train), len(test)) == (8500, 1500)
    assert np.array_equal(np.concatenate([train.images, test.images])[:, 0], file["images"])
    assert np.array_equal(np.concatenate([train.labels, test.labels]), file["labels"])
    assert min(np.bincount(test.labels, minlength=10)) > 100


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    ("name", "place"), [("mnist", "MNIST/raw"), ("fashion-mnist", "FashionMNIST/raw"), ("mnist", "")]
)
def test_idx_files_are_found_and_read(tmp_path, digits, name, place, suffix):
    images, labels = digits
    write_digits(tmp_path / place, images, labels, suffix=suffix)
    write_digits(tmp_path / place, images[:5], labels[:5], stem="t10k", suffix=suffix)
    train, test = read_arrays(name, "train", tmp_path), read_arrays(name, "test", tmp_path)
    assert np.array_equal(train.images, images[:, None])
    assert train.labels.tolist() == labels.tolist()
    assert test.labels.tolist() == labels[:5].tolist()


def test_cifar10_is_read_from_torchvisions_files(tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5: path.startswith(str(tmp_path)))
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (6, 3 * 32 * 32), dtype=np.uint8)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": [0, 1, 2, 3, 4, 9]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(i) for i in range(10)]}))
    train, test = read_arrays("cifar10", "train", tmp_path), read_arrays("cifar10", "test", tmp_path)
    assert (len(train), len(test)) == (30, 6)
    assert np.array_equal(test.images, pixels.reshape(6, 3, 32, 32))
    assert test.labels.tolist() == [0, 1, 2, 3, 4, 9]


def test_unknown_data_set_is_answered_with_those_there_are():
    with pytest.raises(ValueError, match=r"no data set is called 'mnits'; there are mnist10k, mnist, "):
        find_dataset("mnits")


@pytest.mark.parametrize("name", [name for name in DATASETS if name not in ("mnist10k", "imagenet")])
def test_missing_files_are_named(tmp_path, name):
    with pytest.raises(DataError, match=f"{tmp_path}.*--download"):
        read_arrays(name, "train", tmp_path)
    with pytest.raises(DataError, match="--data-dir"):
        read_arrays(name, "train")


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_cut_short(tmp_path, digits, suffix):
    path = tmp_path / f"images{suffix}"
    write_idx(path, digits[0])
    whole = path.read_bytes()
    for length in (0, 3, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=rf"{path} .*; fetch it again"):
            read_idx(path)


def test_idx_damaged(tmp_path, digits):
    path = tmp_path / "images.gz"
    write_idx(path, digits[0])
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF
    path.write_bytes(bytes(damaged))
    with pytest.raises(DataError, match=r"cannot be read .*; fetch it again"):
        read_idx(path)
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(DataError, match="cannot be read"):
        read_idx(path)
    plain = path.with_suffix("")
    plain.write_bytes(b"<html>not found</html>")
    with pytest.raises(DataError, match="is not an IDX file"):
        read_idx(plain)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    "shape",
    [(2**16, 2**16, 2**31), (2**32 - 1,), (2**31, 2**31, 4), (2**22, 2**21, 2**21), (0, 28, 28)],
)
def test_idx_dimensions_that_overflow_or_lie_allocate_nothing(tmp_path, shape, suffix):
    path = tmp_path / f"images{suffix}"
    data = b"\0\0\x08" + bytes([len(shape)]) + b"".join(side.to_bytes(4) for side in shape) + bytes(99)
    path.write_bytes(gzip.compress(data) if suffix else data)
    tracemalloc.start()
    try:
        with pytest.raises(
            DataError, match=rf"^{path} has a header of .* values, which it cannot hold; fetch it again$"
        ):
            read_idx(path)
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()


def test_a_gzip_bomb_is_read_no_further_than_its_header_promises(tmp_path):
    path = tmp_path / "images.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b"\0\0\x08\1" + (1000).to_bytes(4))
        for _ in range(100):
            file.write(bytes(1 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=rf"^{path} holds more than 1000 values where its header says 1000; fetch"):
            read_idx(path)
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("suffix", ["", ".gz"])
@given(
    changes=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 255)), max_size=4), cut=st.none() | st.integers(0, 40)
)
def test_any_damaged_idx_file_is_read_or_named(tmp_path_factory, suffix, changes, cut):
    values = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    path = tmp_path_factory.getbasetemp() / f"damaged{suffix}"
    write_idx(path, values)
    data = bytearray(path.read_bytes())
    for place, value in changes:
        data[place % len(data)] = value
    path.write_bytes(data[:cut])
    result = read_or_error(path)
    if isinstance(result, DataError):
        assert re.fullmatch(rf"{path} .*; fetch it again", str(result))
    else:
        assert result.size == values.size
        assert suffix == "" or np.array_equal(result, values)  # gzip has a checksum


def read_or_error(path):
    try:
        return read_idx(path)
    except DataError as error:
        return error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda images, labels: (images, labels[:-1]), r"20 x 28 x 28 .* 19; expected as many labels"),
        (lambda images, labels: (images[:, :27], labels), r"27 x 28 pixels; mnist has 28 x 28"),
        (lambda images, labels: (images, labels + 1), r"10.*; mnist has 0 to 9"),
        (lambda images, labels: (images, labels * 0), r"labels \[0\]; mnist has 0 to 9"),
    ],
)
def test_digits_that_do_not_fit(tmp_path, digits, change, message):
    write_digits(tmp_path, *change(*digits))
    with pytest.raises(DataError, match=message):
        read_arrays("mnist", "train", tmp_path)
